"""LoRAs by region, by step and by prompt in ComfyUI, in one pass: against full differences added token by token."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import comfy.hooks
import comfy.lora
import comfy.sd
import comfy.weight_adapter
import nodes
import pytest
import torch
from architectures import ARCHITECTURES, NARROW
from comfy_extras import nodes_custom_sampler
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from conftest import ROOT
from generation import both_models, dense_model, distance, forget, sample, sample_guided
from graft.demo import pictures
from loras import make_lora
from safetensors.torch import load_file, save_file
from sweep import known_classes, lora_for, output_of, sizes_of, write_tiny
from tiny_models import MODELS

SD15 = replace(ARCHITECTURES["sd15"], latent=(1, 4, 12, 10))
FLUX = replace(NARROW["flux"], latent=(1, 16, 15, 12))
CASES = {a.name: a for a in (FLUX, ARCHITECTURES["sd3"], replace(ARCHITECTURES["wan"], latent=(1, 16, 3, 8, 6)), SD15)}
WORDS_FIRST = {"flux": ("single_blocks",)}
WORDS = {
    "flux": (), "sd3": ("context_block", "context_embedder"), "wan": ("cross_attn.k", "cross_attn.v"),
    "sd15": ("attn2.to_k", "attn2.to_v"),
}  # fmt: skip
NOWHERE = ("modulation", "adaLN", "time_", "emb_layers", "_mod.", "vector_in", "guidance_in")


@pytest.fixture(scope="module", params=CASES)
def case(request, pack, folders):
    with both_models(pack, CASES[request.param], "Q8_0", folders / "unet_gguf") as (architecture, graft, dense):
        shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
        files = [
            make_lora(dense.model, shapes, "native", architecture.lora_layers, rank=rank, seed=seed, scale=0.5)
            for rank, seed in ((8, 1), (20, 2))
        ]
        # the reference adds to whole layers: a name for a part of one has no module of its own
        files = [{key: value for key, value in file.items() if "linear1_qkv" not in key} for file in files]
        yield architecture, graft, dense, files
    forget()


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    left = torch.zeros(1, 64, 64)
    left[:, :, :32] = 1
    return left, 1 - left


def patches_of(model, file: dict) -> dict:
    return comfy.lora.load_lora(dict(file), comfy.lora.model_lora_keys_unet(model.model, {}))


@contextmanager
def added_by_token(dense, architecture, files, masks, factor=lambda: 1.0):
    """Hooks on the host's own layers: the whole ΔW of each file, times its mask at each token."""
    handles, layers = [], dict(dense.model.named_modules())
    rows, columns = architecture.latent[-2:]
    for file, mask in zip(files, masks, strict=True):
        for name in {key.rpartition(".lora_")[0] for key in file}:
            down, up = (file[f"{name}.lora_{side}.weight"].float() for side in "AB")
            handles.append(
                layers[name].register_forward_hook(
                    hook(architecture.name, name, down, up, mask, (rows, columns), factor)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook(kind: str, name: str, down, up, mask, size, factor):
    def add(layer, inputs, output):
        (x,) = inputs
        if x.dim() > 3:
            change = torch.nn.functional.conv2d(x, down, None, layer.stride, layer.padding)
            change = torch.nn.functional.conv2d(change, up)
            at = torch.nn.functional.adaptive_avg_pool2d(mask, change.shape[-2:])[:, None]
            return output + factor() * at * change
        change = (x @ down.flatten(1).t()) @ up.flatten(1).t()
        return output + factor() * at_tokens(kind, name, x, mask, size) * change

    return add


def at_tokens(kind: str, name: str, x, mask, size) -> torch.Tensor:
    if x.dim() < 3 or any(part in name for part in (*WORDS[kind], *NOWHERE)):
        return torch.zeros(())
    count = x.shape[1]
    if kind == "sd15":
        rows, columns = size
        while rows * columns > count:
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return torch.nn.functional.adaptive_avg_pool2d(mask, (rows, columns)).view(1, -1, 1)
    cells = torch.nn.functional.adaptive_avg_pool2d(mask, size)[:, None]
    odd = [n % 2 for n in size]
    cells = torch.nn.functional.pad(cells, (0, odd[1], 0, odd[0]), mode="replicate")
    own = torch.nn.functional.avg_pool2d(cells, 2).flatten()
    own = own.repeat(3) if kind == "wan" else own
    words = count - own.numel()
    assert words == 0 or name.removeprefix("diffusion_model.").startswith(WORDS_FIRST.get(kind, ("none",)))
    return torch.nn.functional.pad(own, (words, 0)).view(1, -1, 1)


def test_two_regions_in_one_pass(pack, case):
    """As many passes of the model as without LoRAs, each token with its own sum of differences."""
    architecture, graft, dense, files = case
    strength = pack("ops.strengths").Strength
    branch, passes = graft.clone(), []
    for file, mask in zip(files, halves(), strict=True):
        assert branch.add_patches(patches_of(graft, file), 0.8, when=strength(mask=mask))
    inner = type(graft.model.diffusion_model).forward
    base = sample(graft, architecture, steps=2)

    def counted(self, *args, **kwargs):
        passes.append(1)
        return inner(self, *args, **kwargs)

    try:
        type(graft.model.diffusion_model).forward = counted
        got = sample(branch, architecture, steps=2)
    finally:
        type(graft.model.diffusion_model).forward = inner
    assert len(passes) == 2
    with added_by_token(dense, architecture, files, halves(), lambda: 0.8):
        want = sample(dense, architecture, steps=2)
    assert distance(got - base, want - sample(dense, architecture, steps=2)) < 1e-4
    assert torch.equal(sample(graft, architecture, steps=2), base)
    assert not any(layer.residual for layer in graft.graft.layers.values())


def test_a_schedule_is_sampling_with_a_constant_of_each_step(pack, case):
    architecture, graft, _, files = case
    module = pack("ops.strengths")
    curve = module.Curve(((0.0, 1.0, "hold"), (0.5, 0.25, "hold")))
    branch = graft.clone()
    branch.add_patches(patches_of(graft, files[0]), 0.8, when=module.Strength(curve))
    got = sample(branch, architecture, steps=4)
    latent = {"samples": torch.zeros(architecture.latent)}
    for start, value in ((0, 1.0), (2, 0.25)):
        constant = graft.clone()
        constant.add_patches(patches_of(graft, files[0]), 0.8 * value)
        (latent,) = nodes.common_ksampler(
            constant, 3, 4, 1.0, "euler", "simple", architecture.conditioning(1), architecture.conditioning(2), latent,
            disable_noise=bool(start), start_step=start, last_step=start + 2, force_full_denoise=bool(start),
        )  # fmt: skip
    base = sample(graft, architecture, steps=4)
    # between its two halves the host scales a latent out and in again
    assert distance(got - base, latent["samples"] - base) < 1e-4


def hooked(file: dict, strengths: Sequence[float]):
    """Create Hook LoRA with a keyframe for each step, as long as these follow each other at once."""
    group, keyframes = comfy.hooks.create_hook_lora(file, 0.8, 0.0), comfy.hooks.HookKeyframeGroup()
    for step, strength in enumerate(strengths):
        keyframes.add(comfy.hooks.HookKeyframe(strength, 1e-4 * step, guarantee_steps=1))
    group.set_keyframes_on_hooks(keyframes)
    return group


@contextmanager
def counting(model, monkeypatch):
    """Calls of the network, and merges of the host."""
    counts, network = Counter(), type(model.model.diffusion_model)
    with monkeypatch.context() as patch:
        for owner, name in ((network, "forward"), (comfy.lora, "calculate_weight")):
            patch.setattr(owner, name, counted(getattr(owner, name), counts, name))
        yield counts


def counted(function, counts: Counter, name: str):
    def call(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def test_the_same_schedule_as_the_hosts_keyframes(pack, case, monkeypatch):
    """A course of ours, the host's keyframes on our model, and these on its own: one picture, and no merge of ours."""
    architecture, graft, dense, files = case
    if architecture.name == "sd3":
        pytest.skip("the others are enough")
    module, strengths = pack("ops.strengths"), (1.0, 0.25)
    curve = module.Curve(tuple((step, s, "hold") for step, s in enumerate(strengths)), "step")
    branch = graft.clone()
    branch.add_patches(patches_of(graft, files[0]), 0.8, when=module.Strength(curve))

    def drawn(model, hooks=None):
        positive, latent = architecture.conditioning(1), {"samples": torch.zeros(architecture.latent)}
        if hooks is not None:
            positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
        return nodes.common_ksampler(
            model, 3, len(strengths), 1.0, "euler", "simple", positive, architecture.conditioning(2), latent
        )[0]["samples"]

    with counting(graft, monkeypatch) as counts:
        base, ours, theirs = drawn(graft), drawn(branch), drawn(graft, hooked(files[0], strengths))
    assert counts == {"forward": 3 * len(strengths)}
    assert torch.equal(ours, theirs), "a step of a schedule is that of a constant, bit for bit"
    with counting(dense, monkeypatch) as counts:
        own = drawn(dense, hooked(files[0], strengths)) - drawn(dense)
    assert counts["calculate_weight"] and counts["forward"] == 2 * len(strengths)
    # the bound of a LoRA's effect against a merge in fp32
    assert distance(ours - base, own) < 1e-4


def test_the_demos_schedule_as_the_hosts_keyframes(pack):
    """Two styles of the demo that follow one another, over the shares of all steps, as `demo/` draws its pictures.

    The host's hooks merge them into the dequantized model at each keyframe; ours run beside the packed one.
    """
    module, prompt = pack("ops.strengths"), pack("nodes.demo").GraftDemoPrompt()
    path, size = ROOT / "demo" / "graft-demo-Q8_0.gguf", {"samples": torch.zeros(1, 16, 1, 16, 16)}
    styles = [load_file(ROOT / "demo" / f"graft-demo-{name}.safetensors") for name in ("neon", "blueprint")]
    courses, steps = ((1.0, 0.5, 0.0, 0.0), (0.0, 0.0, 0.7, 1.0)), 8
    positive, negative = (prompt.encode(text)[0] for text in ("a red star and a blue ring on mint", ""))
    graft, dense = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32"), dense_model(pack, path)
    branch = graft.clone()
    for file, course in zip(styles, courses, strict=True):
        curve = module.Curve(tuple((step / 4, strength, "hold") for step, strength in enumerate(course)))
        assert branch.add_patches(patches_of(graft, file), 1.0, when=module.Strength(curve))

    def hooks() -> comfy.hooks.HookGroup:
        groups = []
        for file, course in zip(styles, courses, strict=True):
            groups.append(comfy.hooks.create_hook_lora(file, 1.0, 0.0))
            keyframes = comfy.hooks.HookKeyframeGroup()
            for step, strength in enumerate(course):
                keyframes.add(comfy.hooks.HookKeyframe(strength, step / 4, guarantee_steps=0))
            groups[-1].set_keyframes_on_hooks(keyframes)
        return comfy.hooks.HookGroup.combine_all_hooks(groups)

    def drawn(model, scheduled=None) -> torch.Tensor:
        (model,) = ModelSamplingSD3().patch(model, pictures.SHIFT)
        prompts = [positive, negative]
        if scheduled is not None:
            prompts = [comfy.hooks.set_hooks_for_conditioning(each, scheduled) for each in prompts]
        return nodes.common_ksampler(model, 1, steps, 3.0, "euler", "simple", *prompts, dict(size))[0]["samples"]

    base, ours, theirs, own = drawn(graft), drawn(branch), drawn(graft, hooks()), drawn(dense, hooks()) - drawn(dense)
    assert distance(ours, base) > 0.1, "the styles show"
    assert torch.equal(ours, theirs), "the host's keyframes take the same road"
    assert distance(ours - base, own) < 1e-4
    forget()


def test_the_positive_prompt_alone(pack, case):
    architecture, graft, _, files = case
    strength = pack("ops.strengths").Strength
    branch, whole = graft.clone(), graft.clone()
    branch.add_patches(patches_of(graft, files[0]), 0.8, when=strength(applies_to="positive"))
    whole.add_patches(patches_of(graft, files[0]), 0.8)
    # guidance g is g·positive + (1 − g)·negative: with the LoRA on both less what it does to the negative one
    assert torch.equal(sample(branch, architecture), sample(whole, architecture))
    both, positive = (sample(m, architecture, cfg=3.0) for m in (whole, branch))
    negative = graft.clone()
    negative.add_patches(patches_of(graft, files[0]), 0.8, when=strength(applies_to="negative"))
    base = sample(graft, architecture, cfg=3.0)
    assert distance((positive - base) + (sample(negative, architecture, cfg=3.0) - base), both - base) < 1e-4
    assert distance(positive, both) > 1e-3


def branch_with(pack, case, **when):
    """The first LoRA on the Graft model, where and when `Strength` is told."""
    _, graft, _, files = case
    branch = graft.clone()
    assert branch.add_patches(patches_of(graft, files[0]), 0.8, when=pack("ops.strengths").Strength(**when))
    return branch


def for_prompt(pack, case, prompt: str):
    return branch_with(pack, case, applies_to=prompt)


def test_a_guider_for_two_prompts(pack, case):
    """Dual CFG asks for the negative prompt first. Without guidance by the first prompt that one shows nowhere."""
    architecture, graft = case[:2]
    prompts = [architecture.conditioning(seed) for seed in (1, 2, 3)]

    def picture(model, first: float, second: float) -> torch.Tensor:
        guider = nodes_custom_sampler.Guider_DualCFG(model)
        guider.set_conds(*prompts)
        guider.set_cfg(first, second)
        return sample_guided(guider, architecture)

    positive, negative = (for_prompt(pack, case, prompt) for prompt in ("positive", "negative"))
    base = picture(graft, 0.0, 3.0)
    assert distance(picture(positive, 0.0, 3.0), base) < 1e-6
    assert distance(picture(negative, 0.0, 3.0), base) > 1e-3
    # the second prompt alone
    base = picture(graft, 0.0, 1.0)
    assert all(distance(picture(model, 0.0, 1.0), base) < 1e-6 for model in (positive, negative))
    assert distance(picture(positive, 2.0, 1.0), picture(graft, 2.0, 1.0)) > 1e-3


def behind(module: str, name: str, model, *arguments):
    """The model behind a node of the host's."""
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    change = getattr(node, "execute", None) or node().patch  # newer and older nodes
    return change(model, *arguments)[0]


def test_guidance_that_asks_for_the_negative_prompt_alone(pack, case):
    """Self-attention guidance adds what it finds there: a LoRA for the positive prompt changes none of it."""
    if case[0].name != "sd15":
        pytest.skip("a node for UNets")

    def added(model) -> torch.Tensor:
        with_guidance = behind("nodes_sag", "SelfAttentionGuidance", model, 1.0, 2.0)
        return sample(with_guidance, case[0], cfg=3.0) - sample(model, case[0], cfg=3.0)

    base = added(case[1])
    assert distance(added(for_prompt(pack, case, "positive")), base) < 1e-4
    assert distance(added(for_prompt(pack, case, "negative")), base) > 1e-2


def masked(pack, case, mask: torch.Tensor):
    return branch_with(pack, case, mask=mask)


def drawn(case, model, batch: int = 1, areas=((),)) -> torch.Tensor:
    """A step with as many prompts as there are areas, each ``(rows, columns, top, left)`` or of all of the picture."""
    architecture = case[0]
    prompt = [
        [text, more | ({"area": area} if area else {})] for area in areas for text, more in architecture.conditioning(1)
    ]
    latent = {"samples": torch.zeros(batch, *architecture.latent[1:])}
    return nodes.common_ksampler(model, 3, 1, 1.0, "euler", "simple", prompt, prompt, latent)[0]["samples"]


def test_references_that_are_kept_from_the_first_step(pack, folders):
    """FluxKVCache: from the second step on only the first layer sees them, and the mask stays on the picture."""
    cache = getattr(pytest.importorskip("comfy_extras.nodes_flux"), "FluxKVCache", None)
    if cache is None:
        pytest.skip("this ComfyUI does not have the node")
    tiny, path = MODELS["Flux2"], folders / "unet_gguf" / "kept.gguf"
    with sizes_of(tiny) as module:
        write_tiny(tiny, module, "weights", path)
        graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
        dense = dense_model(pack, path)
    g, layers, file = torch.Generator().manual_seed(5), dict(dense.model.named_modules()), {}
    for name in ("img_in", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"):
        rows, columns = layers[f"diffusion_model.{name}"].weight.shape
        file[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, columns, generator=g) / columns**0.5
        file[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=g) / 4
    references = [torch.randn(1, 128, 2, 4, generator=g)]
    prompt = [[torch.randn(1, *tiny.context, generator=g), {"reference_latents": references}]]
    left, seen = torch.tensor([1.0, 1, 0, 0]).repeat(4), []

    def drawn(model) -> torch.Tensor:
        model, latent = cache.execute(model)[0], {"samples": torch.zeros(tiny.latent)}
        return nodes.common_ksampler(model, 3, 3, 1.0, "euler", "simple", prompt, prompt, latent)[0]["samples"]

    def add(name, layer, inputs, output):
        down, up = (file[f"{name}.lora_{side}.weight"] for side in "AB")
        words = 512 if "single" in name else 0  # to which the host pads them
        seen.append(output.shape[1] - len(left) - words)
        at = torch.nn.functional.pad(left, (words, seen[-1])).view(1, -1, 1)
        return output + 0.8 * at * (inputs[0] @ down.t() @ up.t())

    branch, strength = graft.clone(), pack("ops.strengths").Strength(mask=halves()[0])
    assert branch.add_patches(patches_of(graft, file), 0.8, when=strength)
    got, base, plain = drawn(branch), drawn(graft), drawn(dense)
    names = {key.rpartition(".lora_")[0] for key in file}
    handles = [layers[name].register_forward_hook(partial(add, name)) for name in names]
    try:
        want = drawn(dense)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [8, 8, 8, 8, 0, 0, 8, 0, 0], "the references are there in the first step, then in the first layer"
    assert distance(got - base, want - plain) < 1e-4
    forget()


@pytest.mark.parametrize(
    "node",
    [("nodes_hypertile", "HyperTile", 64, 1, 0, False), ("nodes_tomesd", "TomePatchModel", 0.75)],
    ids=["HyperTile", "TomePatchModel"],
)
def test_tokens_of_tiles_and_merged_ones_are_refused(pack, case, node):
    """Both give self-attention as many tokens as the next level of the UNet has."""
    if case[0].name != "sd15":
        pytest.skip("nodes for UNets")
    architecture, graft, _, files = case
    module, name, *arguments = node

    def drawn(model) -> torch.Tensor:
        changed, prompt = behind(module, name, model, *arguments), architecture.conditioning(1)
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        return nodes.common_ksampler(changed, 3, 1, 1.0, "euler", "simple", prompt, prompt, latent)[0]["samples"]

    plain = graft.clone()
    plain.add_patches(patches_of(graft, files[0]), 0.8)
    assert distance(drawn(plain), drawn(graft)) > 1e-3
    with pytest.raises(Exception, match="merges or cuts into tiles"):
        drawn(masked(pack, case, halves()[0]))


def test_prompts_for_areas(pack, case):
    """The host cuts these out of the picture: a mask stays where it is in the whole."""
    (left, right), graft = halves(), case[1]
    rows, columns = case[0].latent[-2:]
    areas = [(rows, columns // 2, 0, 0), (rows, columns // 2, 0, columns // 2)]
    base = drawn(case, graft, areas=areas)
    everywhere = drawn(case, masked(pack, case, torch.ones(1, 8, 8)), areas=areas)
    assert distance(everywhere, base) > 1e-3
    for mask, there in ((left, slice(0, columns // 2)), (right, slice(columns // 2, columns))):
        # by parts, or both in one batch
        picture = drawn(case, masked(pack, case, mask), areas=areas)
        wanted = base.clone()
        wanted[..., there] = everywhere[..., there]
        assert distance(picture, wanted) < 1e-5


def test_a_mask_for_each_picture_of_a_batch(pack, case):
    masks, graft = torch.stack([torch.zeros(64, 64), torch.ones(64, 64)]), case[1]
    if len(case[0].latent) > 4:
        pytest.skip("of a video they are its frames")
    base = drawn(case, graft, batch=2)
    picture, everywhere = (drawn(case, masked(pack, case, mask), batch=2) for mask in (masks, masks[1:]))
    assert torch.equal(picture[0], base[0]) and distance(picture[1], everywhere[1]) < 1e-5
    assert distance(everywhere[1], base[1]) > 1e-3
    with pytest.raises(Exception, match="a LoRA's mask is a batch of 2, and 3 are drawn"):
        drawn(case, masked(pack, case, masks), batch=3)


@pytest.fixture
def in_windows(case):
    """Draws in parts along a dimension of the latent, as the host does it with what is too long for a model."""
    windows = pytest.importorskip("comfy.context_windows")

    def draw(model, size: tuple[int, ...], dim: int, length: int, fix: bool = False) -> torch.Tensor:
        handler = windows.IndexListContextHandler(
            windows.get_matching_context_schedule("standard_static"), windows.get_matching_fuse_method("flat"),
            context_length=length, context_overlap=0, dim=dim,
        )  # fmt: skip
        # newer hosts put one of the part before in front, which others would see
        handler.causal_window_fix = fix
        model, prompt = model.clone(), case[0].conditioning(1)
        model.model_options["context_handler"] = handler
        latent = {"samples": torch.zeros(size)}
        return nodes.common_ksampler(model, 3, 1, 1.0, "euler", "simple", prompt, prompt, latent)[0]["samples"]

    # how many there are in all
    draw.tells = "total_frames" in inspect.signature(windows.IndexListContextWindow).parameters
    return draw


def test_frames_of_a_context_window(pack, case, in_windows):
    """The host draws a long video in parts: a mask for each frame stays with its own."""
    if case[0].name != "wan":
        pytest.skip("no video")
    video = partial(in_windows, size=(1, 16, 4, 8, 6), dim=2, length=2)
    masks = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1).expand(4, 8, 8).contiguous()
    base, everywhere = video(case[1]), video(masked(pack, case, torch.ones(1, 8, 8)))
    assert distance(everywhere, base) > 1e-3
    if not in_windows.tells:
        with pytest.raises(Exception, match="draws the video in parts: nobody tells which"):
            video(masked(pack, case, masks))
        return
    picture = video(masked(pack, case, masks))
    assert distance(picture[:, :, :2], base[:, :, :2]) < 1e-6
    assert distance(picture[:, :, 2:], everywhere[:, :, 2:]) < 1e-5
    assert distance(video(masked(pack, case, masks), fix=True), base) > 1e-3


@pytest.mark.parametrize("axis", [-2, -1])
def test_rows_and_columns_of_a_context_window(pack, case, in_windows, axis):
    """A large picture that the host draws in parts: a mask stays where it is in the whole."""
    size = (*case[0].latent[:-2], 16, 16)
    picture = partial(in_windows, size=size, dim=len(size) + axis, length=8)
    mask = torch.zeros(1, 16, 16)
    mask.narrow(axis, 8, 8).fill_(1)
    if not in_windows.tells:
        with pytest.raises(Exception, match="draws the picture in parts"):
            picture(masked(pack, case, mask))
        return
    base, everywhere, got = (
        picture(model) for model in (case[1], masked(pack, case, torch.ones(1, 8, 8)), masked(pack, case, mask))
    )
    for start, want in ((0, base), (8, everywhere)):
        assert distance(got.narrow(axis, start, 8), want.narrow(axis, start, 8)) < 1e-5
    assert distance(everywhere, base) > 1e-3
    assert distance(picture(masked(pack, case, mask), fix=True), base) > 1e-4


def test_a_picture_that_another_node_cuts_is_refused(pack, case):
    """As those for tiles do, which wrap the model's function: which part it is nobody tells."""
    left, columns = halves()[0], case[0].latent[-1]

    def tiled(apply, given):
        part = given["input"][..., : columns // 2]
        half = apply(part, given["timestep"], **given["c"])
        return torch.cat([half, half], -1)[..., :columns]

    model = masked(pack, case, left)
    model.set_model_unet_function_wrapper(tiled)
    with pytest.raises(Exception, match="draws the picture in parts"):
        drawn(case, model)


def test_the_nodes(pack, case, tmp_path):
    architecture, graft, dense, files = case
    strengths, lora = pack("nodes.strengths"), pack("nodes.lora")
    path = tmp_path / "style.safetensors"
    save_file(files[0], path)
    left, right, *empty = strengths.GraftRegions().split("left | right", 0.0)
    assert torch.equal(left + right, torch.ones_like(left)) and not any(mask.any() for mask in empty)
    when = {"mask": left, "end": 0.5, "blocks": "* = 0.5"}
    made = strengths.strength_of(**when)
    wanted = graft.clone()
    wanted.add_patches(patches_of(graft, files[0]), 0.8, when=made)
    found = pack("nodes.model_files").Found("style.safetensors", "style.safetensors", str(path))
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        for module in (strengths, lora):
            patch.setattr(module, "lora_file", lambda name: found)
        alone = strengths.GraftLora().apply(graft, "style.safetensors", 0.8, **when)["result"]
        (linked,) = strengths.GraftStrength().make(**when)
        stack, rows = lora.GraftLoraStack(), {"lora_2": "style.safetensors", "strength_2": 0.8, "when_2": linked}
        stacked, sent, report, *_ = stack.apply(graft, **rows)["result"]
        sent_on = stack.apply(graft, lora_stack=sent)["result"]
        # as stackers of other packs do, which put rows of their own beside them
        made_anew = stack.apply(graft, lora_stack=[(name, on_model, clip) for name, on_model, clip in sent])["result"]
        with pytest.raises(Exception, match="need a model from Load Diffusion Model"):
            stack.apply(dense, **rows)
    picture = sample(wanted, architecture, steps=2)
    assert torch.equal(sample(alone[0], architecture, steps=2), picture)
    assert "style.safetensors ×0.80" in alone[1]
    assert sent == [("style.safetensors", 0.8, 0.8)] and str(linked) == str(made) and str(made) in report
    # and as loaders of other packs do, which know nothing of it
    _, strength, _ = sent[0]
    loaded = comfy.sd.load_lora_for_models(graft, None, dict(files[0]), strength, 0.0)[0]
    assert copy.deepcopy(strength).when is not None
    for model in (stacked, sent_on[0], made_anew[0], loaded):
        patches = [patch for found in model.residuals.patches.values() for patch in found]
        assert patches and all(patch.when is linked and patch.strength == 0.8 for patch in patches)
    with pytest.raises(Exception, match=r"cannot be read \(2: 1\): write it like"):
        lora.GraftLoraStack().apply(graft, clip_strengths="1 = 0.5, 2: 1")
    assert lora._clip_strengths(" 1 = 0.5, 3=0,") == {1: 0.5, 3: 0.0}
    for course in strengths.COURSES:
        with pytest.raises(Exception, match=r"set end higher than start: end is 0\.2, start is 0\.8"):
            strengths.strength_of(start=0.8, end=0.2, course=course)
    for wrong, why in (("0 = 1, 10 = 0", "count in shares of all steps"), ("0 = nan", "cannot be read"),
                       ("-0.1 = 1", "count in shares"), ("0.5", "cannot be read")):  # fmt: skip
        with pytest.raises(Exception, match=why):
            strengths.strength_of(keyframes=wrong)
    file = lora.LoraFiles().open(str(path))
    misspelt = strengths.strength_of(blocks="* = 0.5, doubel 0-3 = 0")
    text = lora.apply_lora(graft.clone(), file, "a", 1.0, when=misspelt).text
    assert "no block of this model is called doubel 0-3" in text
    assert "no block" not in lora.apply_lora(graft.clone(), file, "a", 1.0, when=made).text
    inspect = pack("nodes.inspect").GraftInspect()
    shown = inspect.inspect(alone[0])
    text, drawn, _ = shown["result"]
    assert "×0.80, in a region of 50 %, by share 0 = 1, 0.5 = 0, with weights of blocks: " in text
    assert drawn.shape == (1, 128 + 26 + 8, 4 * 128 + 3 * 8, 3)
    half = drawn[0, 26 + 64, :, 0]
    assert half[8 + 32] == 1 and half[8 + 96] == 0, "the region: left and not right"
    course = half[128 + 2 * 8 :]
    assert course[96] > course[288] + 0.2, "the course: the first half of the steps"
    assert len(shown["ui"]["images"]) == 2 and len(inspect.inspect(graft)["ui"]["images"]) == 1
    with pytest.raises(Exception, match="need a model from Load Diffusion Model"):
        lora.apply_lora(dense.clone(), lora.LoraFiles().open(str(path)), "style", 1.0, when=made)


def test_the_demo_model_in_its_own_words(pack):
    """What `demo/` draws by region, the nodes draw."""
    loader = pack("nodes.loader")
    model = loader.load_diffusion_model(str(ROOT / "demo" / "graft-demo-Q8_0.gguf"), compute_dtype="fp32")
    left, right = halves()
    strength = pack("ops.strengths").Strength
    for name, mask in (("neon", left), ("blueprint", right)):
        model = model.clone()
        file = pack("ops.files.lora").load_adapters(str(ROOT / "demo" / f"graft-demo-{name}.safetensors"))
        report = pack("nodes.lora").apply_lora(model, file, name, 1.0, when=strength(mask=mask))
        assert report.matched == report.total
    assert model.residuals.varies


MASKED = (
    "SD15", "SDXL", "SD3", "Flux", "Flux2", "Chroma", "QwenImage", "ZImage", "Lumina2", "Krea2", "HunyuanVideo",
    "LTXV", "WAN21_T2V", "WAN21_I2V", "WAN21_Vace",
)  # fmt: skip
"""Families whose tokens have a place that is written down; a name that this host lacks is left out."""


@pytest.fixture(scope="module", params=[name for name in MASKED if name in known_classes()])
def family(request, pack, tmp_path_factory):
    """A small model of a family on this host's classes, by Graft, and patches of a LoRA spread over it."""
    tiny, path = MODELS[request.param], tmp_path_factory.mktemp("family") / "model.gguf"
    with torch.inference_mode(), sizes_of(tiny) as module:
        write_tiny(tiny, module, "weights", path)
        graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
        dense = dense_model(pack, path)
        patches = patches_of(dense, lora_for(graft, dense))
    del dense
    yield tiny, graft, patches
    forget()


@torch.inference_mode()
def test_every_family_has_as_many_tokens_as_its_picture(pack, family):
    """A mask of ones is the plain LoRA bit for bit, one of zeros the base: all rows of all layers are counted right."""
    (tiny, graft, patches), strength = family, pack("ops.strengths").Strength

    def output(**when):
        branch = graft.clone()
        assert branch.add_patches(patches, 0.8, when=strength(**when) if when else None)
        return output_of(branch, tiny)

    base, plain = output_of(graft, tiny), output()
    assert not torch.equal(base, plain)
    assert torch.equal(output(mask=torch.ones(1, 4, 4), elsewhere="full"), plain)
    assert torch.equal(output(mask=torch.zeros(1, 4, 4)), base)
    left, right = (output(mask=mask) for mask in halves())
    assert not torch.equal(left, right) and not torch.equal(left, base)


LAST = re.compile(
    r"single_blocks\.\d+\.linear2|x_block\.mlp\.fc2|img_mlp\.net\.2|layers\.\d+\.feed_forward\.w2"
    r"|(?<!_)blocks\.\d+\.(?:mlp\.down|ffn\.2)|transformer_blocks\.\d+\.ff\.net\.2|^diffusion_model\.out\.2"
)
"""Layers behind which no token hears of another any more, if they are in the last block."""


@torch.inference_mode()
def test_every_family_has_its_tokens_in_their_places(pack, family):
    """A LoRA on the last layer in a half of the picture: there it is the plain LoRA, and elsewhere nothing changes."""
    (tiny, graft, _), strength = family, pack("ops.strengths").Strength
    layers = graft.graft.layers
    last = [path for path in layers if LAST.search(path)][-1]
    rows, columns = layers[last].logical_shape[0], math.prod(layers[last].logical_shape[1:])
    g = torch.Generator().manual_seed(3)
    up, down = torch.randn(rows, 4, generator=g), torch.randn(4, columns, generator=g) / columns**0.5
    if len(layers[last].logical_shape) > 2:
        up, down = up[..., None, None], down.reshape(4, *layers[last].logical_shape[1:])
    patches = {f"{last}.weight": comfy.weight_adapter.LoRAAdapter(set(), (up, down, None, None, None, None))}

    def pictures_of(when=None) -> torch.Tensor:
        branch, seen = graft.clone(), []
        assert when is None or branch.add_patches(patches, 1.0, when=when)
        handle = graft.model.diffusion_model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            output_of(branch, tiny)
        finally:
            handle.remove()
        return seen[0][0] if isinstance(seen[0], (tuple, list)) else seen[0]

    base, plain = pictures_of(), pictures_of(strength())
    changed = plain - base
    assert (changed != 0).any(dim=1).all(), "the LoRA reaches every place"
    for side, mask in (("left", halves()[0]), ("top", halves()[0].transpose(1, 2))):
        along = -1 if side == "left" else -2
        got, half = pictures_of(strength(mask=mask)) - base, base.shape[along] // 2
        # a token in the middle has both; patches are at most two wide
        within, outside = got.narrow(along, 0, half - 1), got.narrow(along, half + 1, got.shape[along] - half - 1)
        assert distance(within, changed.narrow(along, 0, half - 1)) < 1e-5, side
        assert not outside.any(), side
