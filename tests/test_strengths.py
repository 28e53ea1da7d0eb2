"""Strengths that depend on the call: each row of an output is that of a layer with that row's own merged weight."""

from __future__ import annotations

import dataclasses
import re

import adapter_samples as samples
import pytest
import torch
from adapter_samples import Sampler, make_layer, patch_of
from graft.kernels import AdapterError, GraftError
from graft.ops.factors import FactorCache
from graft.ops.kinds import Diff, Patch, Region
from graft.ops.places import (
    ARCHITECTURES,
    Architecture,
    Picture,
    Place,
    architecture_of,
    on_tokens,
    over_rows,
    place_of,
)
from graft.ops.regions import regions
from graft.ops.residual import ResidualStack
from graft.ops.strengths import PRESETS, Blocks, Call, Curve, Strength

one_thread = pytest.fixture(autouse=True)(samples.one_thread)

SHAPE = (48, 32)
CONV = (32, 16, 3, 3)
PICTURE = Picture(1, 4, 6, (1, 2, 2))  # 2 by 3 tokens
CPU = torch.device("cpu")


def known(place: Place) -> Architecture:
    return Architecture("a model", (), ((re.compile("layer"), place),))


def call_of(place: Place = Place.PICTURE, picture: Picture = PICTURE, **fields) -> Call:
    return Call(picture=picture, architecture=known(place), **fields)


def run(layer, x: torch.Tensor, patches: list[Patch], call: Call | None, bias: list[Patch] = ()) -> torch.Tensor:  # type: ignore[assignment]
    stack = ResidualStack({"layer.weight": list(patches), "layer.bias": list(bias)})
    stack.build({"layer": layer}, FactorCache())
    assert not stack.planned({"layer": layer})["layer"].rejected
    with stack.active({"layer": layer}, CPU, call):
        return layer(x)


def varied(patch: Patch, when: Strength) -> Patch:
    return dataclasses.replace(patch, when=when)


def mask_of(*rows: list[float]) -> torch.Tensor:
    """A mask of a number for each token of `PICTURE`: each covers two by two cells."""
    return torch.tensor([rows]).repeat_interleave(2, 1).repeat_interleave(2, 2)


MASK = mask_of([0.0, 1.0, 0.25], [0.5, 1.0, 0.0])
LINEAR = sorted((samples.KINDS | samples.LINEAR_KINDS).keys() - {"boft", "boft rescaled", "set"})
CONVS = sorted((samples.KINDS | samples.CONV_KINDS).keys() - {"boft", "boft rescaled", "set"})


@pytest.mark.parametrize("kind", LINEAR)
def test_each_token_has_the_weight_of_its_own_strength(kind: str) -> None:
    r = Sampler(3)
    weight, x = r(*SHAPE, scale=1.0), r(4, 6, SHAPE[1], scale=1.0)
    value = (samples.KINDS | samples.LINEAR_KINDS)[kind](r, SHAPE)
    layer = make_layer(SHAPE, weight, r(SHAPE[0]))
    when = Strength(Curve(((0.0, 0.5, "hold"),)), MASK, applies_to="positive")
    got = run(layer, x, [varied(patch_of(value, SHAPE, 0.8), when)], call_of(conditionings=("negative", "positive")))
    for i in range(4):
        for token in range(6):
            s = 0.8 * 0.5 * float(MASK[0, ::2, ::2].flatten()[token]) * (i >= 2)
            wanted = x[i, token] @ samples.merged(weight, value, s).t() + layer.bias
            # one fp32 number for a mask's cell, all else in fp64
            assert (got[i, token] - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", CONVS)
def test_each_place_of_a_convolution_has_the_weight_of_its_own_strength(kind: str, stride: int) -> None:
    r = Sampler(4)
    weight, x = r(*CONV, scale=1.0), r(2, CONV[1], 6, 8, scale=1.0)
    value = (samples.KINDS | samples.CONV_KINDS)[kind](r, CONV)
    layer = make_layer(CONV, weight, r(CONV[0]), stride=stride, padding=1)
    space = (6 // stride, 8 // stride)
    cells = torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, space, generator=torch.Generator().manual_seed(1))]
    patch = varied(patch_of(value, CONV, 0.8), Strength(mask=cells[None]))
    stack = ResidualStack({"layer.weight": [patch]})
    rejected = stack.planned({"layer": layer})["layer"].rejected
    if not patch.adapter.from_output:
        assert rejected and "changes what goes in" in rejected[0]
        return
    got = run(layer, x, [patch], call_of(Place.LEVEL, Picture(1, 6, 8)))
    for s in (0.0, 0.5, 1.0):
        merged = make_layer(CONV, samples.merged(weight, value, 0.8 * s), layer.bias, stride=stride, padding=1)(x)
        here = cells == s
        assert (got[..., here] - merged[..., here]).norm() <= 1e-6 * merged[..., here].norm()


@pytest.mark.parametrize("seed", range(12))
def test_stacks_with_masks_schedules_and_blocks(seed: int) -> None:
    """Two to six adapters, some on a part of the layer, each with a strength of its own."""
    r = Sampler(seed)
    weight, x = r(*SHAPE, scale=1.0), r(2, 6, SHAPE[1], scale=1.0)
    # what reads the weight before it comes first: behind a strength that varies its norms are those without it
    kinds = [k for k in LINEAR if not k.startswith("dora")]
    count = 2 + seed % 5
    patches, values = [], []
    for i in range(count):
        kind = r.pick(LINEAR if i == 0 else kinds)
        region = Region(0, 16, 16) if kind == "lora" and i % 2 else None
        value = (samples.KINDS | samples.LINEAR_KINDS)[kind](r, SHAPE if region is None else (16, SHAPE[1]))
        mask = torch.rand(1, 2, 3, generator=r.generator).repeat_interleave(2, 1).repeat_interleave(2, 2)
        when = [
            None,
            Strength(Curve(((0.0, 0.0, "linear"), (1.0, 1.0, "hold")))),
            Strength(mask=mask),
            Strength(Curve(((0.0, 1.0, "hold"),)), mask, blocks=Blocks.parse("layer = 0.5")),
        ][int(torch.randint(4, (), generator=r.generator))]
        patches.append(dataclasses.replace(patch_of(value, SHAPE, 0.7, region), when=when))
        values.append((value, region, when))
    got = run(make_layer(SHAPE, weight), x, patches, call_of(share=0.25))
    for token in range(6):
        merged = weight.clone()
        for value, region, when in values:
            s = 0.7
            if when is not None:
                s *= 0.25 if when.curve is not None and when.mask is None else 1.0
                s *= 0.5 if when.blocks is not None else 1.0
                s *= float(when.mask[0, ::2, ::2].flatten()[token]) if when.mask is not None else 1.0
            if region is None:
                merged = samples.merged(merged, value, s)
            else:
                merged[16:32] = samples.merged(merged[16:32], value, s)
        wanted = x[:, token] @ merged.t()
        assert (got[:, token] - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_a_mask_of_ones_is_the_plain_lora_and_of_zeros_the_base_bit_for_bit(kind: str) -> None:
    r = Sampler(5, torch.float32)
    layer, x = make_layer(SHAPE, r(*SHAPE, scale=1.0), r(SHAPE[0])), r(2, 6, SHAPE[1], scale=1.0)
    patch = patch_of(samples.KINDS[kind](r, SHAPE), SHAPE, 0.7)
    plain = run(layer, x, [patch], None)
    assert not torch.equal(plain, layer(x))
    for value, wanted in ((1.0, plain), (0.0, layer(x))):
        masked = varied(patch, Strength(mask=torch.full((1, 5, 7), value)))
        assert torch.equal(run(layer, x, [masked], call_of()), wanted)


def test_a_schedule_is_the_constant_of_each_step_bit_for_bit() -> None:
    r = Sampler(6, torch.float32)
    layer, x = make_layer(SHAPE, r(*SHAPE, scale=1.0)), r(2, 6, SHAPE[1], scale=1.0)
    values = [samples.lora(r, SHAPE), samples.lokr(r, SHAPE), samples.oft(r, SHAPE)]
    curve = Curve(((0.0, 1.0, "linear"), (0.5, 0.2, "ease"), (1.0, 0.0, "hold")))
    stack = ResidualStack({"layer.weight": [varied(patch_of(v, SHAPE, 0.7), Strength(curve)) for v in values]})
    stack.build({"layer": layer}, FactorCache())
    for step in range(8):
        call = call_of(share=step / 8)
        with stack.active({"layer": layer}, CPU, call):
            got = layer(x)
        assert torch.equal(got, run(layer, x, [patch_of(v, SHAPE, 0.7 * curve(call)) for v in values], None))
    assert layer.residual is None


def test_a_difference_of_the_bias_goes_with_its_tokens() -> None:
    r = Sampler(7)
    layer, x = make_layer(SHAPE, r(*SHAPE, scale=1.0), r(SHAPE[0])), r(1, 6, SHAPE[1], scale=1.0)
    difference = r(SHAPE[0])
    patch = varied(patch_of(("diff", (difference,)), SHAPE[:1], 0.5), Strength(mask=MASK))
    got = run(layer, x, [], call_of(), bias=[patch])
    s = 0.5 * MASK[0, ::2, ::2].flatten().double()
    assert torch.allclose(got[0], layer(x)[0] + s[:, None] * difference, atol=1e-6)
    scheduled = dataclasses.replace(patch, when=Strength(Curve(((0.0, 0.5, "hold"),))))
    assert torch.allclose(run(layer, x, [], call_of(), bias=[scheduled]), layer(x) + 0.25 * difference, atol=1e-6)
    part = Patch(0.5, Diff(difference[:16]), region=Region(0, 8, 16), when=Strength(mask=MASK))
    got = run(layer, x, [], call_of(), bias=[part])
    wanted = torch.nn.functional.pad(difference[:16], (8, SHAPE[0] - 24))
    assert torch.allclose(got[0], layer(x)[0] + s[:, None] * wanted, atol=1e-6)


def test_dora_behind_a_strength_that_varies_takes_the_norms_without_it() -> None:
    r = Sampler(8)
    weight, x = r(*SHAPE, scale=1.0), r(1, 6, SHAPE[1], scale=1.0)
    first, second = samples.lora(r, SHAPE), samples.lora(r, SHAPE, dora=samples.magnitudes(r, SHAPE, 0))
    left = mask_of([1.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    patches = [varied(patch_of(v, SHAPE, 1.0), Strength(mask=m)) for v, m in ((first, left), (second, 1 - left))]
    got = run(make_layer(SHAPE, weight), x, patches, call_of())
    for token in range(6):
        wanted = x[:, token] @ samples.merged(weight, second if token % 3 else first, 1.0).t()
        assert (got[:, token] - wanted).norm() <= 1e-6 * wanted.norm()


def test_what_cannot_vary_says_so() -> None:
    r = Sampler(9)
    layer = make_layer(SHAPE, r(*SHAPE, scale=1.0))
    for kind, when, why in (
        ("boft", Strength(Curve(((0.0, 0.5, "hold"),))), "BOFT multiplies its stages anew"),
        ("set", Strength(mask=MASK), "replaces a weight at any strength"),
    ):
        patch = varied(patch_of(samples.KINDS[kind](r, SHAPE), SHAPE, 1.0), when)
        planned = ResidualStack({"layer.weight": [patch]}).planned({"layer": layer})["layer"]
        assert why in planned.rejected[0] and not planned.weight_patches
    patch = varied(patch_of(samples.lora(r, SHAPE), SHAPE, 1.0), Strength(mask=MASK))
    with pytest.raises(AdapterError, match="whose picture is not known"):
        run(layer, r(1, 6, SHAPE[1]), [patch], Call())
    with pytest.raises(GraftError, match=r"layer has 7 tokens where the picture has 6"):
        run(layer, r(1, 7, SHAPE[1]), [patch], call_of())
    with pytest.raises(AdapterError, match="choose another mask"):
        Strength(mask=torch.zeros(4, 4))


def test_curves() -> None:
    def at(curve: Curve, share: float) -> float:
        return curve(Call(share=share, step=share * 10, sigma=1 - share))

    steps = Curve(((0.25, 1.0, "hold"), (0.75, 0.5, "hold")))
    assert [at(steps, s) for s in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 1.0, 1.0, 0.5, 0.5]
    line = Curve(((0.0, 0.0, "linear"), (0.5, 1.0, "ease"), (1.0, 0.0, "hold")))
    assert [at(line, s) for s in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert at(line, 0.55) > 0.97 > at(line, 0.6)
    assert at(Curve(((3.0, 1.0, "hold"), (5.0, 0.0, "hold")), "step"), 0.4) == 1.0
    assert at(Curve(((3.0, 1.0, "hold"), (5.0, 0.0, "hold")), "step"), 0.5) == 0.0
    falling = Curve(((0.8, 1.0, "linear"), (0.4, 0.0, "hold")), "sigma")
    assert [round(at(falling, s), 6) for s in (0.0, 0.2, 0.4, 0.6, 0.9)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert Curve.between(0.0, 1.0) is None
    window = Curve.between(0.25, 0.5)
    # a quarter of 12 steps is three, whatever a division makes of it
    assert [at(window, step / 12) for step in range(12)] == [0.0] * 3 + [1.0] * 3 + [0.0] * 6
    assert at(window, 0.25 - 1e-9) == 1.0 and at(window, 0.5 - 1e-9) == 0.0
    assert [at(Curve.between(0.0, 0.5), s) for s in (0.0, 0.49, 0.5)] == [1.0, 1.0, 0.0]
    assert [at(Curve.between(0.5, 1.0), s) for s in (0.0, 0.5, 1.0)] == [0.0, 1.0, 1.0]
    with pytest.raises(AdapterError, match="keyframes"):
        Curve(())
    with pytest.raises(AdapterError, match="keyframes"):
        Curve(((0.0, 1.0, "jump"),))


def test_blocks() -> None:
    weights = Blocks.parse("double 0-9 = 0.5, single 3=0.25\nattn = 2; img_mlp.2 = -1, * = 0")
    for path, weight in {
        "diffusion_model.double_blocks.3.img_attn.qkv": 0.5,
        "double_blocks.9.img_mlp.0": 0.5,
        "double_blocks.10.img_attn.qkv": 2.0,
        "double_blocks.10.img_mlp.2": -1.0,
        "single_blocks.3.linear1": 0.25,
        "single_blocks.4.linear1": 0.0,
        "img_in": 0.0,
    }.items():
        assert weights(path) == weight, path
    assert Blocks.parse("blocks 0 = 0")("img_in") == 1.0
    assert Blocks.parse(" \n") is None
    for wrong in ("doubles", "double 0-9", "= 1", "double 0-9 = x"):
        with pytest.raises(AdapterError, match="cannot be read"):
            Blocks.parse(wrong)
    with pytest.raises(AdapterError, match="counts down"):
        Blocks.parse("double 9-0 = 0.5")


def test_rules_for_blocks_that_the_model_does_not_have() -> None:
    """One behind another is used, even where the first one counts; a misspelt one and a number too high are not."""
    text = "double 0-9 = 0.5, doubel = 1, double 19-30 = 0, double 3 = 1, img_attn = 2, single = 0, * = 1"
    weights = Blocks.parse(text)
    layers = [f"diffusion_model.double_blocks.{number}.img_attn.qkv" for number in range(19)]
    assert weights.unused(layers) == ["doubel", "double 19-30", "single"]


LAYERS = {
    "flux": ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1", "img_in"),
    "sdxl": (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q", "middle_block.1.transformer_blocks.0.ff.net.2",
        "output_blocks.0.1.transformer_blocks.0.attn2.to_k", "output_blocks.1.0.in_layers.2", "time_embed.0",
    ),
}  # fmt: skip


KEPT = [
    ("flux", "attention", "1010"), ("flux", "feed-forward", "0110"), ("flux", "double", "1100"),
    ("flux", "single", "0010"), ("sdxl", "attention", "10100"), ("sdxl", "feed-forward", "01000"),
    ("sdxl", "in", "10000"), ("sdxl", "middle", "01000"), ("sdxl", "out", "00110"), ("sdxl", "content", "00100"),
    ("sdxl", "style", "00010"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "preset", "kept"), KEPT)
def test_presets_of_blocks(model: str, preset: str, kept: str) -> None:
    weights = Blocks.parse(preset)
    assert [weights(path) for path in LAYERS[model]] == [float(digit) for digit in kept]
    assert weights.unused(LAYERS[model]) == []


def test_presets_beside_rules() -> None:
    """Those in front count first; one of another model is said by its name, once."""
    weights = Blocks.parse("middle_block = 0.5, Style")
    assert [weights(path) for path in LAYERS["sdxl"]] == [0, 0.5, 0, 1, 0]
    assert weights.unused(LAYERS["flux"]) == ["middle_block", "style"]
    assert Blocks.parse("feed-forward").unused(["input_blocks.0"]) == ["feed-forward"]
    assert {preset for _, preset, _ in KEPT} == set(PRESETS)


def test_rectangles_with_nothing_in_them() -> None:
    for box in ((0.5, 0, 0.5, 1), (0.8, 0, 0.2, 1), (0, 0.9, 1, 0.1)):
        with pytest.raises(AdapterError, match="nothing lies between left"):
            regions("rectangle", 0.1, box)
    assert len(regions("left | right", 0.0, (0.5, 0.5, 0.5, 0.5))) == 2  # which has no rectangle


# where tokens are


def test_words_references_and_padding_stand_around_the_picture() -> None:
    own = MASK[0, ::2, ::2].flatten().tolist()
    for place, picture, count, wanted in (
        (Place.PICTURE, PICTURE, 6, own),
        (Place.PICTURE, dataclasses.replace(PICTURE, before=2, behind=1), 9, [9, 9, *own, 9]),
        (Place.PICTURE, dataclasses.replace(PICTURE, multiple=8), 8, [*own, 9, 9]),
        (Place.PICTURE, dataclasses.replace(PICTURE, multiple=8), 6, own),
        (Place.WORDS_PICTURE, PICTURE, 9, [9, 9, 9, *own]),
        (Place.WORDS_PICTURE, dataclasses.replace(PICTURE, behind=2), 9, [9, *own, 9, 9]),
        (Place.PICTURE_WORDS, PICTURE, 9, [*own, 9, 9, 9]),
        (Place.PICTURE_WORDS, dataclasses.replace(PICTURE, before=1), 9, [9, *own, 9, 9]),
    ):
        assert over_rows(MASK, picture, place, count, 9.0, "layer").tolist() == wanted
    for place, count in ((Place.PICTURE, 5), (Place.PICTURE, 7), (Place.WORDS_PICTURE, 5)):
        with pytest.raises(GraftError, match=f"layer has {count} tokens where the picture has 6"):
            over_rows(MASK, PICTURE, place, count, 0.0, "layer")


def test_a_mask_of_any_size_is_spread_over_the_picture() -> None:
    half = torch.zeros(1, 512, 512)
    half[:, :, :256] = 1
    assert on_tokens(half, Picture(1, 32, 32, (1, 2, 2))).view(16, 16)[3].tolist() == [1.0] * 8 + [0.0] * 8
    # a latent that is no whole number of tokens: the last one is averaged over the edge's own cells
    odd = on_tokens(torch.ones(1, 10, 10), Picture(1, 5, 7, (1, 2, 2)))
    assert odd.shape == (3 * 4,) and torch.equal(odd, torch.ones(12))
    frames = torch.linspace(0, 1, 9).view(9, 1, 1).expand(9, 4, 4)
    over_time = on_tokens(frames, Picture(3, 4, 4, (1, 2, 2))).view(3, 4)
    assert torch.allclose(over_time, torch.tensor([[0.0], [0.5], [1.0]]).expand(3, 4))
    assert on_tokens(torch.ones(1, 4, 4), Picture(3, 4, 4, (1, 2, 2))).shape == (12,)


def test_levels_of_a_unet() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    for rows, columns in ((16, 24), (8, 12), (4, 6), (2, 3)):
        got = over_rows(mask, Picture(1, 16, 24), Place.LEVEL, rows * columns, 0.0, "layer").view(rows, columns)
        assert got[: rows // 2].min() == 1 and got[-(rows // 2) :].max() == 0
    assert over_rows(mask, Picture(1, 15, 23), Place.LEVEL, 8 * 12, 0.0, "layer").shape == (96,)
    with pytest.raises(GraftError, match="no level of a picture of 16 by 24"):
        over_rows(mask, Picture(1, 16, 24), Place.LEVEL, 100, 0.0, "layer")


def test_tokens_of_a_level_that_are_not_the_pictures() -> None:
    """A fourth of all tokens, or a tile of a fourth of the picture, is as long as the next level."""
    mask, plain = torch.ones(1, 8, 8), Picture(1, 16, 24, batch=2)
    merged = dataclasses.replace(plain, merges_tokens=True)
    for place in (Place.LEVEL, Place.SELF_ATTENTION):
        assert over_rows(mask, plain, place, 8 * 12, 0.0, "layer", 2).shape == (96,)
        with pytest.raises(GraftError, match=r"layer has other tokens than the picture.*HyperTile"):
            over_rows(mask, plain, place, 8 * 12, 0.0, "layer", 8)
    assert over_rows(mask, merged, Place.LEVEL, 8 * 12, 0.0, "layer", 2).shape == (96,)
    with pytest.raises(GraftError, match=r"another node or extension merges.*ToMe"):
        over_rows(mask, merged, Place.SELF_ATTENTION, 8 * 12, 0.0, "layer", 2)


def test_the_prompts_of_a_batch() -> None:
    """Of tokens each prompt has its own behind each other; times of references come behind those of all prompts."""
    strength = Strength(applies_to="positive")
    call = Call(conditionings=("positive", "negative"), picture=Picture(1, 4, 4, batch=4))

    def rows(*lead: int) -> list[float]:
        return strength.rows(call, "layer", torch.Size(lead), False, torch.device("cpu")).flatten().tolist()

    assert rows(4) == rows(4, 9) == [1, 1, 0, 0]
    assert rows(8) == [1, 1, 0, 0, 1, 1, 0, 0] and rows(8, 9) == [1, 1, 1, 1, 0, 0, 0, 0]
    assert rows(2) == [1, 0] and rows(3) == [1]


def test_references_that_attention_has_kept() -> None:
    """Layers that take them in see them, those behind these do not, and words stay in front."""
    mask = torch.zeros(1, 4, 4)
    mask[:, :, :2] = 1
    own, picture = mask.flatten(), Picture(1, 4, 4, behind=8, keeps_references=True)
    taken_in = over_rows(mask, picture, Place.PICTURE, 16 + 8, 0.5, "img_in")
    assert torch.equal(taken_in, torch.cat([own, torch.full((8,), 0.5)]))
    assert torch.equal(over_rows(mask, picture, Place.PICTURE, 16, 0.5, "img_attn"), own)
    words = over_rows(mask, picture, Place.WORDS_PICTURE, 10 + 16, 0.5, "single")
    assert torch.equal(words, torch.cat([torch.full((10,), 0.5), own]))


PLACES = {
    "Flux": {
        "double_blocks.0.img_attn.qkv": Place.PICTURE, "double_blocks.3.img_mlp.2": Place.PICTURE,
        "double_blocks.0.img_mod.lin": Place.NOWHERE, "double_blocks.0.txt_attn.proj": Place.WORDS,
        "single_blocks.0.linear1": Place.WORDS_PICTURE, "single_blocks.0.modulation.lin": Place.NOWHERE,
        "img_in": Place.PICTURE, "txt_in": Place.WORDS, "time_in.in_layer": Place.NOWHERE,
        "final_layer.linear": Place.PICTURE, "final_layer.adaLN_modulation.1": Place.NOWHERE,
    },
    "HunyuanVideo": {
        "single_blocks.0.linear1": Place.PICTURE_WORDS, "img_in.proj": Place.PICTURE,
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv": Place.WORDS,
        "double_blocks.0.img_attn.qkv": Place.PICTURE,
    },
    "Wan": {
        "blocks.0.self_attn.q": Place.PICTURE, "blocks.0.cross_attn.q": Place.PICTURE,
        "blocks.0.cross_attn.k": Place.WORDS, "blocks.0.cross_attn.k_img": Place.NOWHERE,
        "blocks.0.ffn.0": Place.PICTURE, "patch_embedding": Place.PICTURE, "head.head": Place.PICTURE,
        "time_projection.1": Place.NOWHERE, "text_embedding.0": Place.WORDS,
    },
    "Stable Diffusion": {
        "input_blocks.0.0": Place.LEVEL, "input_blocks.1.0.emb_layers.1": Place.NOWHERE,
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q": Place.SELF_ATTENTION,
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k": Place.WORDS,
        "middle_block.1.proj_in": Place.LEVEL, "out.2": Place.LEVEL, "time_embed.0": Place.NOWHERE,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_a_path_tells_where_its_rows_are(name: str) -> None:
    marks = [f"diffusion_model.{path}" for a in ARCHITECTURES if a.name == name for path in a.marks]
    found = architecture_of(marks, PictureFirst)
    assert found.name == name
    for path, place in PLACES[name].items():
        assert place_of(found, f"diffusion_model.{path}") is place, path


class PictureFirst:
    """As ComfyUI ran HunyuanVideo at first."""

    def forward(self, img: torch.Tensor, txt: torch.Tensor) -> torch.Tensor:
        return torch.cat((img, txt), 1)


class WordsFirst:
    def forward(self, img: torch.Tensor, txt: torch.Tensor) -> torch.Tensor:
        return torch.cat((txt, img), 1)


def test_hosts_of_different_ages_join_words_and_picture_in_another_order() -> None:
    """Which, the model's code says; where it says neither, a mask is refused."""
    marks = next(a.marks for a in ARCHITECTURES if a.name == "HunyuanVideo")
    for network, place in ((PictureFirst, Place.PICTURE_WORDS), (WordsFirst, Place.WORDS_PICTURE)):
        assert place_of(architecture_of(marks, network), "single_blocks.0.linear2") is place
    for network in (None, torch.nn.Linear, int):
        with pytest.raises(AdapterError, match="take the mask off"):
            architecture_of(marks, network)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"take the mask off: .* on HunyuanVideo, Flux, "):
        architecture_of(["layers.0.weight"])
