"""Groups of layers, and what LoRAs change in blocks, against the weights themselves."""

from __future__ import annotations

import math

import pytest
import torch
from graft.ops import overview
from graft.ops.extract import Change
from graft.ops.kinds import LoKr, LoRA, Padded, Patch
from graft.ops.layers import Linear
from graft.ops.report import size_text
from graft.ops.strengths import Blocks, Curve, Strength

GROUPS = {
    "diffusion_model.double_blocks.3.img_attn.qkv": "double_blocks.img_attn",
    "diffusion_model.single_blocks.11.linear1": "single_blocks",
    "blocks.0.ffn.2": "blocks.ffn",
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q": "input_blocks.transformer_blocks.attn1",
    "diffusion_model.img_in": overview.OUTSIDE,
    "time_in.in_layer": overview.OUTSIDE,
}


def test_layers_that_do_the_same_are_a_group() -> None:
    assert {name: overview.group_of(name) for name in GROUPS} == GROUPS
    assert overview.block_of("diffusion_model.single_blocks.11.linear1") == ("single_blocks", 11)
    assert overview.block_of("diffusion_model.img_in") == (overview.OUTSIDE, None)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> dict[str, Linear]:
    """Two blocks and a layer outside of them, of fewer rows than stand for all of a weight."""
    found = {}
    for seed, name in enumerate(("blocks.0.a", "blocks.0.b", "blocks.1.a", "out")):
        layer = found[f"diffusion_model.{name}"] = Linear(24, 16)
        layer.load_weight(noise(16, 24, seed=seed).to(torch.bfloat16 if name == "out" else torch.float16))
    return found


def test_types_and_sizes_are_told_by_group(model) -> None:
    assert overview.told(overview.groups(model)) == ["blocks: F16 3 · 2.3 KB", "outside of the blocks: BF16 1 · 768 B"]


def test_effects_are_shares_of_the_weights_norms(model) -> None:
    style = LoRA(noise(16, 4, seed=8), noise(4, 24, seed=9), 2.0)
    other = LoKr(noise(4, 4, seed=10), noise(4, 6, seed=11))
    sometimes = Strength(Curve(((0.0, 0.5, "linear"), (1.0, 0.0, "hold"))), blocks=Blocks.parse("blocks 1 = 0.4"))
    patches = {
        "diffusion_model.blocks.0.a.weight": [Patch(0.5, style, source="a"), Patch(2.0, other, source="b")],
        "diffusion_model.blocks.1.a.weight": [Patch(-1.0, style, when=sometimes, source="a")],
        "diffusion_model.out.weight": [Patch(1.0, Padded(style, (16, 48)), source="c"), Patch(0.0, style, source="d")],
    }
    found = overview.effects(model, patches, lambda patch: patch.source)
    norms = {name: layer.dequantized().norm().item() for name, layer in model.items()}
    first = math.hypot(norms["diffusion_model.blocks.0.a"], norms["diffusion_model.blocks.0.b"])
    delta = (0.5 * style.up @ style.down).norm().item()  # alpha 2 of rank 4: half
    wanted = {
        "a": {("blocks", 0): 0.5 * delta / first, ("blocks", 1): 0.2 * delta / norms["diffusion_model.blocks.1.a"]},
        "b": {("blocks", 0): 2 * torch.kron(noise(4, 4, seed=10), noise(4, 6, seed=11)).norm().item() / first},
        "c": {}, "d": {},
    }  # fmt: skip
    assert found.keys() == wanted.keys()
    for what, shares in wanted.items():
        assert found[what] == pytest.approx(shares, rel=1e-4)
    line = overview.effect_line("a", {("blocks", 0): 0.012, ("blocks", 1): 0.5, (overview.OUTSIDE, None): 1.5})
    assert line == "a changes the weights by: blocks 35 % (most in 1: 50 %), outside of the blocks 150 %"
    assert overview.effect_line("c", {}) == "c changes the weights by: nothing"


def test_the_norm_of_factors_is_that_of_their_product() -> None:
    up, down = noise(16, 4, seed=1), noise(4, 24, seed=2)
    square = (up @ down).square().sum().item()
    assert overview.squared_norm(Change(torch.Size((16, 24)), up, down)) == pytest.approx(square, rel=1e-4)


def test_a_search_wants_all_words_in_any_case() -> None:
    names = ["double_blocks.1.img_attn.qkv", "double_blocks.11.txt_attn.qkv", "IMG_in"]
    assert overview.matching("img  QKV", names) == names[:1]
    assert overview.matching(".1 ", names) == names[:2] and overview.matching("img", names) == [names[0], names[2]]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (4_712_345, "4.71 MB"), (180e6, "180 MB"), (999.6e6, "1 GB"), (1.234e9, "1.23 GB"),
        (6.87e9, "6.87 GB"), (1.8e12, "1.8 TB"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text
