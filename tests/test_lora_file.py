"""Files of every dialect, and files that must not surprise."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import adapter_samples as samples
import gguf
import gguf_samples
import pytest
import torch
from adapter_samples import Sampler
from graft.kernels import AdapterError, by_name
from graft.ops import layers
from graft.ops.adapters import DoRA, LoKr, LoRA, Padded, Patch, Region, from_host
from graft.ops.factors import FactorCache
from graft.ops.files.dialects import extra_dialects, from_llama_cpp
from graft.ops.files.lora import load_adapters
from graft.ops.files.lora_info import lora_info
from graft.ops.files.mapped import is_mapped
from graft.ops.kinds import InputOFT
from graft.ops.packed import PackedTensor
from graft.ops.quantize import quantize
from graft.ops.report import FileReport, cause_of, family_of, family_of_host
from graft.ops.residual import ResidualStack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

H = 32  # hidden size of the toy Flux
FLUX = {
    "img_in": (H, 16), "txt_in": (H, 24),
    "final_layer.linear": (16, H), "final_layer.adaLN_modulation.1": (2 * H, H),
    "double_blocks.0.img_attn.qkv": (3 * H, H), "double_blocks.0.img_attn.proj": (H, H),
    "double_blocks.0.txt_attn.qkv": (3 * H, H), "double_blocks.0.txt_attn.proj": (H, H),
    "double_blocks.0.img_mlp.0": (4 * H, H), "double_blocks.0.img_mod.lin": (6 * H, H),
    "single_blocks.0.linear1": (7 * H, H), "single_blocks.0.linear2": (H, 5 * H),
    "single_blocks.0.modulation.lin": (3 * H, H),
}  # fmt: skip
UNET = {
    "time_embed.0": (64, 16), "input_blocks.0.0": (16, 4, 3, 3), "input_blocks.1.0.in_layers.2": (16, 16, 3, 3),
    "input_blocks.1.1.proj_in": (16, 16, 1, 1), "input_blocks.1.1.transformer_blocks.0.attn1.to_q": (16, 16),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0": (16, 16), "input_blocks.3.0.op": (16, 16, 3, 3),
    "middle_block.1.transformer_blocks.0.attn2.to_k": (16, 24), "output_blocks.2.1.conv": (16, 16, 3, 3),
}  # fmt: skip
SD3 = {
    "joint_blocks.0.x_block.attn.qkv": (3 * H, H), "joint_blocks.0.context_block.attn.qkv": (3 * H, H),
    "joint_blocks.0.context_block.adaLN_modulation.1": (2 * H, H), "joint_blocks.0.x_block.mlp.fc1": (4 * H, H),
}  # fmt: skip


one_thread = pytest.fixture(autouse=True)(samples.one_thread)


def pair(rows: int, columns: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    r = Sampler(rows + columns, torch.float32)
    return r(rank, columns), r(rows, rank)


def lora(name: str, shape, down: str = ".lora_down.weight", up: str = ".lora_up.weight", rank: int = 4) -> dict:
    """A module's LoRA under a dialect's names."""
    a, b = pair(shape[0], math.prod(shape[1:]), rank)
    return {name + down: a, name + up: b}


@pytest.fixture
def written(tmp_path):
    """`written(state)` is the path of a file with these tensors."""

    def write(state: dict, name: str = "style.safetensors", metadata: dict | None = None):
        path = tmp_path / name
        save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)
        return path

    return write


def only(fitted):
    (placed,) = fitted.placed
    return placed


AB = (".lora_A.weight", ".lora_B.weight")
QKV_Q = Region(0, 0, H)
DIALECTS = [
    ("kohya", "lora_unet_double_blocks_0_img_attn_qkv", (), "double_blocks.0.img_attn.qkv", None),
    ("Wan-Fun", "lora_unet__double_blocks_0_img_attn_qkv", (), "double_blocks.0.img_attn.qkv", None),
    ("native", "diffusion_model.double_blocks.0.img_attn.proj", AB, "double_blocks.0.img_attn.proj", None),
    ("native in full", "model.diffusion_model.double_blocks.0.img_attn.proj", AB, "double_blocks.0.img_attn.proj",
     None),
    ("bare", "double_blocks.0.img_attn.proj", AB, "double_blocks.0.img_attn.proj", None),
    ("diffusers q", "transformer.transformer_blocks.0.attn.to_q", AB, "double_blocks.0.img_attn.qkv", QKV_Q),
    ("diffusers v", "transformer.transformer_blocks.0.attn.add_v_proj", AB, "double_blocks.0.txt_attn.qkv",
     Region(0, 2 * H, H)),
    ("diffusers single k", "transformer.single_transformer_blocks.0.attn.to_k", AB, "single_blocks.0.linear1",
     Region(0, H, H)),
    ("diffusers single mlp", "transformer.single_transformer_blocks.0.proj_mlp", AB, "single_blocks.0.linear1",
     Region(0, 3 * H, 4 * H)),
    ("old diffusers", "transformer.x_embedder", (".lora.down.weight", ".lora.up.weight"), "img_in", None),
    ("transformers", "transformer.x_embedder", (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
     "img_in", None),
    ("PEFT", "base_model.model.transformer_blocks.0.attn.to_out.0", AB, "double_blocks.0.img_attn.proj", None),
    ("named PEFT", "transformer.transformer_blocks.0.attn.to_out.0", (".lora_A.style.weight", ".lora_B.style.weight"),
     "double_blocks.0.img_attn.proj", None),
    ("OneTrainer", "lora_transformer_transformer_blocks_0_attn_to_q", (), "double_blocks.0.img_attn.qkv", QKV_Q),
    ("XLabs img", "double_blocks.0.processor.qkv_lora1", (".down.weight", ".up.weight"), "double_blocks.0.img_attn.qkv",
     None),
    ("XLabs txt", "double_blocks.0.processor.proj_lora2", (".down.weight", ".up.weight"),
     "double_blocks.0.txt_attn.proj", None),
    ("XLabs single", "single_blocks.0.processor.qkv_lora", (".down.weight", ".up.weight"), "single_blocks.0.linear1",
     Region(0, 0, 3 * H)),
    ("fal Kontext", "base_model.model.double_blocks.0.img_attn.qkv", AB, "double_blocks.0.img_attn.qkv", None),
    ("SimpleTuner", "lycoris_transformer_blocks_0_ff_net_0_proj", (), "double_blocks.0.img_mlp.0", None),
    ("Mochi", "diffusion_model.img_in", (".lora_A", ".lora_B"), "img_in", None),
]  # fmt: skip


PREFIXES = [
    "transformer.base_model.model.", "base_model.model.", "unet.base_model.model.", "base_model.model.transformer.",
    "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.diffusion_model.", "",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_form_of_adapter_under_every_prefix(written, prefix: str) -> None:
    r = Sampler(5, torch.float32)
    path = f"{prefix}transformer_blocks.0."
    named = {f"{path}attn.to_out.0.lora_{n}.style.weight": t for n, t in zip("AB", pair(H, H), strict=True)}
    named[f"{path}attn.to_out.0.lora_magnitude_vector.style.weight"] = torch.rand(H) + 1
    plain = lora(f"{path}ff.net.0.proj", (4 * H, H), *AB) | {f"{path}ff.net.0.proj.alpha": torch.tensor(2.0)}
    kronecker = {f"{path}attn.to_q.lokr_w1": r(4, 4), f"{path}attn.to_q.lokr_w2": r(H // 4, H // 4)}
    old = lora(f"{path}attn.processor.to_k", (H, H), "_lora.down.weight", "_lora.up.weight")
    column = lora(f"{path}attn.add_q_proj", (H, H), *AB) | {f"{path}attn.add_q_proj.dora_scale": torch.ones(H, 1)}
    native = lora(f"{prefix}single_blocks.0.linear2", (H, 5 * H))
    fitted = load_adapters(written(named | plain | kronecker | old | column | native)).on(FLUX)
    assert not fitted.missing and not fitted.rejected
    placed = {(p.key, p.region): p.adapter for p in fitted.placed}
    assert {place: adapter.kind for place, adapter in placed.items()} == {
        ("double_blocks.0.img_attn.proj.weight", None): "dora",
        ("double_blocks.0.img_mlp.0.weight", None): "lora",
        ("double_blocks.0.img_attn.qkv.weight", QKV_Q): "lokr",
        ("double_blocks.0.img_attn.qkv.weight", Region(0, H, H)): "lora",
        ("double_blocks.0.txt_attn.qkv.weight", QKV_Q): "dora",
        ("single_blocks.0.linear2.weight", None): "lora",
    }
    assert placed["double_blocks.0.img_attn.proj.weight", None].norm == "merged"
    assert placed["double_blocks.0.img_mlp.0.weight", None].low_rank().scale == 0.5


KREA = {
    "blocks.0.attn.wq": (H, H), "blocks.0.attn.wk": (H // 4, H), "blocks.0.attn.wv": (H // 4, H),
    "blocks.0.attn.wo": (H, H),
}  # fmt: skip
FUSED = ["diffusion_model.blocks.0.attn.qkv", "lora_unet_blocks_0_attn_wqkv", "transformer.blocks.0.attn.to_qkv",
         "lycoris_blocks_0_attn_qkv", "transformer.base_model.model.blocks.0.attn.to_qkv"]  # fmt: skip
KREA_ROWS = {"blocks.0.attn.wq": (0, H), "blocks.0.attn.wk": (H, H // 4), "blocks.0.attn.wv": (H + H // 4, H // 4)}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_adapter_goes_to_the_layers_that_the_model_has(written, name: str) -> None:
    state = lora(name, (H + H // 2, H)) | {f"{name}.alpha": torch.tensor(2.0), f"{name}.diff_b": torch.arange(48.0)}
    fitted = load_adapters(written(state)).on(KREA)
    assert len(fitted.matched) == 1 and not fitted.missing
    up, down = state[f"{name}.lora_up.weight"], state[f"{name}.lora_down.weight"]
    placed = {p.key: p.adapter for p in fitted.placed}
    assert placed.keys() == {f"{layer}.{parameter}" for layer in KREA_ROWS for parameter in ("weight", "bias")}
    for layer, (start, rows) in KREA_ROWS.items():
        adapter = placed[f"{layer}.weight"]
        assert torch.equal(adapter.down, down) and torch.equal(adapter.up, up[start : start + rows])
        assert torch.equal(placed[f"{layer}.bias"].diff, state[f"{name}.diff_b"][start : start + rows])


def test_a_fused_adapter_of_another_size_is_refused(written) -> None:
    name = "diffusion_model.blocks.0.attn.qkv"
    state = lora(name, (3 * H, H)) | lora("diffusion_model.blocks.0.attn.wo", (H, H))
    fitted = load_adapters(written(state)).on(KREA)
    assert [p.key for p in fitted.placed] == ["blocks.0.attn.wo.weight"]
    assert "is for 96×32, the weight is 48×32" in fitted.rejected[name]


def test_a_fused_adapter_that_cannot_be_divided_says_why(written) -> None:
    name = "diffusion_model.blocks.0.attn.qkv"
    state = lora(name, (H + H // 2, H)) | {f"{name}.dora_scale": torch.ones(1, H)}
    state |= lora("diffusion_model.blocks.0.attn.wo", (H, H))
    line = load_adapters(written(state)).on(KREA).report(1.0).line
    assert line.endswith(f"1 left out, such as {name}: DoRA's norms are over all rows of the fused layer, which this "
                         "model has in parts")  # fmt: skip


LENS = {"transformer_blocks.0.attn.qkv": (3 * H, H), "transformer_blocks.0.cross.kv_linear": (2 * H, H),
        "layers.0.attention.qkv": (H + 2 * (H // 4), H), "transformer_blocks.0.diff.to_qkv": (5 * H, H)}  # fmt: skip
PARTS = [
    ("diffusion_model.transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.qkv", Region(0, H, H)),
    ("lora_unet_transformer_blocks_0_attn_v_proj", "transformer_blocks.0.attn.qkv", Region(0, 2 * H, H)),
    ("transformer.transformer_blocks.0.cross.to_v", "transformer_blocks.0.cross.kv_linear", Region(0, H, H)),
    ("transformer.layers.0.attention.to_q", "layers.0.attention.qkv", Region(0, 0, H)),
    ("transformer.layers.0.attention.to_v", "layers.0.attention.qkv", Region(0, H + H // 4, H // 4)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layer", "region"), PARTS)
def test_an_adapter_of_a_part_goes_to_its_rows_of_the_fused_layer(written, name, layer, region) -> None:
    placed = only(load_adapters(written(lora(name, (region.length, H)))).on(LENS))
    assert (placed.key, placed.region) == (f"{layer}.weight", region)


def test_another_architectures_fused_layers_are_not_looked_for(written) -> None:
    """Wan's queries have the size of Cosmos-Predict2's, and a LoRA of the one says nothing about the other."""
    wan = {f"blocks.0.self_attn.{letter}": (H, H) for letter in "qkvo"}
    state = lora("lora_unet_blocks_0_self_attn_qkv_proj", (3 * H, H))
    assert len(load_adapters(written(state)).on(wan).placed) == 3
    state |= lora("lora_unet_blocks_0_self_attn_q_proj", (H, H))
    with pytest.raises(AdapterError, match="trained for Cosmos-Predict2 or Anima, model is Wan"):
        load_adapters(written(state)).on(wan)


def test_a_fused_layer_of_other_parts_than_three_is_not_divided(written) -> None:
    """Differential attention has five."""
    with pytest.raises(AdapterError, match="0 of 1 layers match"):
        load_adapters(written(lora("transformer.transformer_blocks.0.diff.to_q", (H, H)))).on(LENS)


def test_a_hosts_part_that_is_not_in_the_layer_is_not_taken(written) -> None:
    """ComfyUI divides Lumina 2's qkv by three, though it has fewer keys than queries."""
    names = {"transformer.layers.0.attention.to_v": ("layers.0.attention.qkv.weight", (0, 2 * H, H))}
    state = lora("transformer.layers.0.attention.to_v", (H // 4, H))
    assert only(load_adapters(written(state)).on(LENS, names)).region == Region(0, H + H // 4, H // 4)


# where several rows are about one dialect's names
SHOWN = {
    "diffusers q": "diffusers", "diffusers v": "diffusers", "diffusers single k": "diffusers",
    "diffusers single mlp": "diffusers", "old diffusers": "diffusers", "transformers": "diffusers",
    "named PEFT": "PEFT", "native in full": "native", "XLabs img": "XLabs", "XLabs txt": "XLabs",
    "XLabs single": "XLabs", "Mochi": "native",
}  # fmt: skip


@pytest.mark.parametrize(("dialect", "name", "suffixes", "layer", "region"), DIALECTS, ids=[d[0] for d in DIALECTS])
def test_a_dialect_finds_its_layer(written, dialect, name, suffixes, layer, region) -> None:
    part = FLUX[layer] if region is None else region.within(FLUX[layer])
    fitted = load_adapters(written(lora(name, part, *suffixes))).on(FLUX)
    placed = only(fitted)
    assert (placed.key, placed.region) == (f"{layer}.weight", region)
    assert isinstance(placed.adapter, LoRA) and placed.adapter.rank == 4
    assert fitted.report(0.8).line == "style.safetensors ×0.80: 1/1 layers, rank 4"
    assert fitted.report(0.8).text.splitlines()[1:] == [f"  {SHOWN.get(dialect, dialect)} names"]


UNET_NAMES = [
    ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
     "input_blocks.1.1.transformer_blocks.0.attn1.to_q"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
     "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"),
    ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
     "middle_block.1.transformer_blocks.0.attn2.to_k"),
    ("lora_unet_down_blocks_0_resnets_0_conv1", "input_blocks.1.0.in_layers.2"),
    ("lora_unet_down_blocks_0_downsamplers_0_conv", "input_blocks.3.0.op"),
    ("lora_unet_up_blocks_0_upsamplers_0_conv", "output_blocks.2.1.conv"),
    ("lora_unet_input_blocks_0_0", "input_blocks.0.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layer"), UNET_NAMES, ids=[n for n, _ in UNET_NAMES])
def test_a_unets_two_sets_of_names(written, name, layer) -> None:
    shape = UNET[layer]
    r = Sampler(0, torch.float32)
    ones = (1,) * len(shape[2:])
    state = {f"{name}.lora_down.weight": r(4, *shape[1:]), f"{name}.lora_up.weight": r(shape[0], 4, *ones)}
    assert only(load_adapters(written(state)).on(UNET)).key == f"{layer}.weight"


def test_attention_processors_of_old_diffusers(written) -> None:
    names = ("_lora.down.weight", "_lora.up.weight")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor."
    state = lora(name + "to_q", (16, 16), *names) | lora(name + "to_out", (16, 16), *names)
    fitted = load_adapters(written(state)).on(UNET)
    assert sorted(p.key.split(".attn1.")[1] for p in fitted.placed) == ["to_out.0.weight", "to_q.weight"]


def test_sd3_swaps_scale_and_shift_of_the_last_context_block(written) -> None:
    state = lora("transformer.transformer_blocks.0.norm1_context.linear", (2 * H, H), *AB)
    state |= lora("transformer.transformer_blocks.0.attn.add_k_proj", (H, H), *AB)
    sliced, swapped = sorted(load_adapters(written(state)).on(SD3).placed, key=lambda p: p.region is None)
    assert swapped.adapter.order == (*range(H, 2 * H), *range(H))
    assert (sliced.key, sliced.region) == ("joint_blocks.0.context_block.attn.qkv.weight", Region(0, H, H))


def test_simpletuners_fused_lokr(written) -> None:
    r = Sampler(0, torch.float32)
    name = "lycoris_single_transformer_blocks_0_attn_to_qkv"
    state = {f"{name}.lokr_w1": r(4, 4), f"{name}.lokr_w2": r(3 * H // 4, H // 4), f"{name}.alpha": torch.tensor(1e10)}
    placed = only(load_adapters(written(state)).on(FLUX))
    assert (placed.key, placed.region) == ("single_blocks.0.linear1.weight", Region(0, 0, 3 * H))
    assert isinstance(placed.adapter, LoKr) and placed.adapter.scale == 1.0


def test_a_control_lora_of_flux_tools(written) -> None:
    state = lora("img_in", (H, 32), *AB) | {"img_in.lora_B.bias": torch.ones(H)}
    state["single_blocks.0.norm.key_norm.scale"] = torch.ones(8)
    fitted = load_adapters(written(state)).on(FLUX)
    weight, bias = fitted.placed
    assert isinstance(weight.adapter, Padded) and weight.adapter.shape == (H, 32)
    assert bias.key == "img_in.bias" and torch.equal(bias.adapter.diff, torch.ones(H))


def test_pefts_magnitudes_are_of_the_merged_weight(written) -> None:
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    state = lora(name, (H, H), *AB) | {f"{name}.lora_magnitude_vector.default.weight": torch.rand(H) + 1}
    adapter = only(load_adapters(written(state)).on(FLUX)).adapter
    assert isinstance(adapter, DoRA) and (adapter.axis, adapter.norm) == (0, "merged")
    assert extra_dialects(state, norm="comfy")[f"{name}.dora_scale"].shape == (H, 1)


def test_pefts_oft_turns_inputs(written) -> None:
    state = {"transformer.transformer_blocks.0.attn.to_out.0.oft_R.weight": torch.randn(4, 28) * 0.01}
    adapter = only(load_adapters(written(state)).on(FLUX)).adapter
    assert isinstance(adapter, InputOFT) and adapter.block == 8


def test_the_bias_of_lora_b_gets_its_scale() -> None:
    state = lora("transformer.x_embedder", (H, 16), *AB)
    state |= {"transformer.x_embedder.alpha": torch.tensor(2.0), "transformer.x_embedder.lora_B.bias": torch.ones(H)}
    assert torch.equal(extra_dialects(state)["transformer.x_embedder.diff_b"], torch.full((H,), 0.5))


def test_a_modulations_difference_gets_its_parameter() -> None:
    assert list(extra_dialects({"diffusion_model.blocks.0.diff_m": torch.zeros(1, 6, 8)})) == [
        "diffusion_model.blocks.0.modulation.diff"
    ]


def test_known_names_stay_and_nothing_is_lost() -> None:
    state = lora("lora_unet_img_in", (H, 16)) | lora("transformer.x", (4, 4), ".lora_A.a.weight", ".lora_B.a.weight")
    state |= lora("transformer.x", (4, 4), ".lora_A.b.weight", ".lora_B.b.weight")
    renamed = extra_dialects(state)
    assert len(renamed) == len(state)
    assert "transformer.x.lora_A.weight" in renamed and "transformer.x.lora_A.b.weight" in renamed


def test_a_hosts_names_come_first(written) -> None:
    names = {"lora_unet_img_in": ("img_in.weight", (0, 0, 8)), "style": "txt_in.weight"}
    state = lora("lora_unet_img_in", (8, 16)) | lora("style", (H, 24))
    placed = {p.key: p for p in load_adapters(written(state)).on(FLUX, names).placed}
    assert placed["img_in.weight"].region == Region(0, 0, 8) and "txt_in.weight" in placed


def test_lora_and_difference_of_one_layer_both_act(written) -> None:
    name = "lora_unet_img_in"
    state = lora(name, (H, 16)) | {f"{name}.diff": torch.ones(H, 16), f"{name}.diff_b": torch.ones(H)}
    fitted = load_adapters(written(state)).on(FLUX)
    assert [(p.key, p.adapter.kind) for p in fitted.placed] == [
        ("img_in.weight", "lora"), ("img_in.weight", "diff"), ("img_in.bias", "diff"),
    ]  # fmt: skip


def test_a_bias_difference_on_a_slice_lands_there(written) -> None:
    name = "transformer.transformer_blocks.0.attn.to_k"
    layer = layers.Linear(H, 3 * H)
    layer.load_weight(torch.zeros(3 * H, H))
    state = lora(name, (H, H), *AB) | {f"{name}.diff_b": torch.ones(H)}
    path = "double_blocks.0.img_attn.qkv"
    stack = ResidualStack()
    load_adapters(written(state)).on({path: layer}).add_to(stack, 0.5)
    stack.build({path: layer}, FactorCache())
    with stack.active({path: layer}, torch.device("cpu")):
        y = layer(torch.zeros(1, H))
    assert torch.equal(y, torch.cat([torch.zeros(1, H), torch.full((1, H), 0.5), torch.zeros(1, H)], 1))


NAME = "lora_unet_img_in"


def fit(written, state: dict, shapes: dict = FLUX):
    """The file with a second, sound adapter, so that what is refused is only left out."""
    return load_adapters(written(lora("lora_unet_txt_in", (H, 24)) | state)).on(shapes)


def scale_of(fitted) -> float:
    return next(p.adapter for p in fitted.placed if p.key == "img_in.weight").low_rank().scale


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(None, 1.0), (torch.tensor(0.0), 0.0), (torch.tensor(-2.0), -0.5), (torch.tensor([2.0]), 0.5),
     (torch.tensor(2), 0.5), (torch.tensor(2.0, dtype=torch.bfloat16), 0.5)],
    ids=["missing", "zero", "negative", "in brackets", "an integer", "bf16"],
)  # fmt: skip
def test_alphas_as_they_come(written, alpha, scale) -> None:
    state = lora(NAME, (H, 16)) | ({} if alpha is None else {f"{NAME}.alpha": alpha})
    assert scale_of(fit(written, state)) == scale


def test_an_alpha_for_each_rank_scales_the_ranks(written) -> None:
    state = lora(NAME, (H, 16)) | {f"{NAME}.alpha": torch.tensor([4.0, 2.0, 0.0, -4.0])}
    factors = next(p.adapter for p in fit(written, state).placed if p.key == "img_in.weight").low_rank()
    wanted = state[f"{NAME}.lora_down.weight"] * torch.tensor([[1.0], [0.5], [0.0], [-1.0]])
    assert torch.equal(factors.down * factors.scale, wanted)


def broken(**changes) -> dict:
    """The LoRA of img_in, with fields replaced; None takes one out."""
    state = lora(NAME, (H, 16))
    for field, value in changes.items():
        key = f"{NAME}.{field.replace('__', '.')}"
        state.pop(key, None)
        if value is not None:
            state[key] = value
    return state


def nan(*shape: int) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor[0, 0] = float("nan")
    return tensor


UP, DOWN = "lora_up__weight", "lora_down__weight"
REFUSED = {
    "alpha NaN": (broken(alpha=torch.tensor(float("nan"))), "alpha is nan"),
    "alphas too few": (broken(alpha=torch.ones(3)), "3 alphas for a rank of 4"),
    "NaN in a factor": (broken(**{UP: nan(H, 4)}), "holds NaN or infinity"),
    "infinity in a factor": (broken(**{DOWN: torch.full((4, 16), float("inf"))}), "holds NaN or infinity"),
    "rank 0": (broken(**{UP: torch.ones(H, 0), DOWN: torch.ones(0, 16), "alpha": torch.tensor(1.0)}), "rank 0"),
    "ranks differ": (broken(**{UP: torch.ones(H, 3)}), "has rank 3, its counterpart 4"),
    "same count, wrong shape": (broken(**{UP: torch.ones(16, 4), DOWN: torch.ones(4, H)}), "is for 16×32, the weight"),
    "up without down": (broken(**{DOWN: None}), "is missing: the file is incomplete"),
    "down without up": (broken(**{UP: None}), "is missing: the file is incomplete"),
    "only alpha": (broken(**{UP: None, DOWN: None, "alpha": torch.tensor(1.0)}), "there is only alpha"),
    "int8 without a scale": (broken(**{UP: torch.ones(H, 4, dtype=torch.int8)}), "int8 without a scale"),
    "LoKr without w2": ({f"{NAME}.lokr_w1": torch.ones(4, 4)}, "lokr_w2 is missing"),
    "LoKr of another size": (
        {f"{NAME}.lokr_w1": torch.ones(4, 4), f"{NAME}.lokr_w2": torch.ones(4, 4)}, "does not make"),
    "LoHa with half a core": (
        {f"{NAME}.hada_{n}": torch.ones(s) for n, s in
         (("w1_a", (2, H)), ("w1_b", (2, 16)), ("w2_a", (2, H)), ("w2_b", (2, 16)), ("t1", (2, 2)))}, "hada_t1"),
    "GLoRA of unclear rank": (
        {f"{NAME}.{n}.weight": torch.ones(s) for n, s in
         (("a1", (16, 4)), ("a2", (5, 16)), ("b1", (H, 4)), ("b2", (4, 16)))}, "ranks of GLoRA's factors differ"),
    "reshape to smaller": (
        lora(NAME, (H, 8)) | {f"{NAME}.reshape_weight": torch.tensor([H, 8])}, "a weight can only be padded"),
    "reshape to nonsense": (lora(NAME, (H, 16)) | {f"{NAME}.reshape_weight": torch.tensor([H, -1, 3])}, "is no shape"),
    "PEFT's OFT that is no matrix": ({f"{NAME}.oft_R.weight": torch.ones(1, 1, 0)}, "which is no triangle"),
    "BOFT without a stage": ({f"{NAME}.oft_blocks": torch.zeros(0, 8, 4, 4)}, "do not cover 32 output rows"),
    "OFT of another size": ({f"{NAME}.oft_blocks": torch.zeros(3, 4, 4)}, "do not cover 32 output rows"),
    "DoRA of another size": (lora(NAME, (H, 16)) | {f"{NAME}.dora_scale": torch.ones(5, 1)}, "dora_scale is 5×1"),
    "difference of another size": ({f"{NAME}.diff": torch.ones(16, H)}, "is for 16×32, the weight is 32×16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_applied_is_left_out_with_a_reason(written, case: str) -> None:
    state, reason = REFUSED[case]
    fitted = fit(written, state)
    assert [p.key for p in fitted.placed] == ["txt_in.weight"]
    assert list(fitted.rejected) == [NAME] and reason in fitted.rejected[NAME]
    assert fitted.report(1.0).line.startswith("style.safetensors ×1.00: 1/2 layers, ")
    assert f"1 left out, such as {NAME}: " in fitted.report(1.0).line


NO_SHAPES = {
    "infinite": torch.tensor([float("inf"), 16.0]), "not a number": torch.tensor([float("nan"), 16.0]),
    "huge": torch.tensor([1e30, 16.0]), "fractions": torch.tensor([32.5, 16.0]), "a scalar": torch.tensor(32),
    "a matrix": torch.ones(2, 2), "complex": torch.ones(2, dtype=torch.complex64), "below": torch.tensor([-32, 16]),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_SHAPES)
def test_a_reshape_to_no_shape_is_refused(written, case: str) -> None:
    state = lora(NAME, (H, 16)) | {f"{NAME}.reshape_weight": NO_SHAPES[case]}
    assert "reshape_weight is" in fit(written, state).rejected[NAME]
    value = ("lora", (*pair(H, 16)[::-1], None, None, None, NO_SHAPES[case].tolist()))
    with pytest.raises(AdapterError, match="which is no shape"):
        from_host(value, (H, 16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int64, torch.uint8])
def test_a_reshape_may_be_of_any_dtype(written, dtype) -> None:
    state = lora(NAME, (H, 16)) | {f"{NAME}.reshape_weight": torch.tensor([H, 16]).to(dtype)}
    assert fit(written, state).rejected == {}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32])
def test_a_bias_of_lora_b_in_an_odd_dtype(written, dtype) -> None:
    state = lora(NAME, (H, 16), *AB) | {f"{NAME}.alpha": torch.tensor(2.0)}
    fitted = fit(written, state | {f"{NAME}.lora_B.bias": torch.ones(H).to(dtype)})
    if dtype.is_floating_point:
        assert torch.equal(next(p.adapter for p in fitted.placed if p.key == "img_in.bias").diff, torch.full((H,), 0.5))
    else:
        assert "without a scale" in fitted.rejected[NAME]


def test_a_reshape_on_a_slice_is_refused(written) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    state = lora(name, (H, 2 * H), *AB) | {f"{name}.reshape_weight": torch.tensor([H, 2 * H])}
    assert "has no room for it" in fit(written, state).rejected[name]


def test_factors_the_wrong_way_round_are_turned_where_only_one_way_fits(written) -> None:
    a, b = pair(H, 16)
    for up, down in ((b.t(), a.t()), (a, b)):
        state = {f"{NAME}.lora_up.weight": up.contiguous(), f"{NAME}.lora_down.weight": down.contiguous()}
        adapter = next(p.adapter for p in fit(written, state).placed if p.key == "img_in.weight")
        assert torch.equal(adapter.up, b) and torch.equal(adapter.down, a)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_dtypes_may_mix(written, dtype) -> None:
    state = lora(NAME, (H, 16)) | {f"{NAME}.lora_up.weight": torch.ones(H, 4).to(dtype)}
    layer = layers.Linear(16, H, bias=False)
    layer.load_weight(torch.zeros(H, 16))
    stack = ResidualStack()
    fit(written, state, {"img_in": layer, "txt_in": FLUX["txt_in"]}).add_to(stack, 1.0)
    del stack.patches["txt_in.weight"]
    stack.build({"img_in": layer}, FactorCache())
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with stack.active({"img_in": layer}, x.device):
        y = layer(x)
    torch.testing.assert_close(y, x @ state[f"{NAME}.lora_down.weight"].t() @ torch.ones(4, H), rtol=1e-5, atol=1e-5)


def test_a_core_beside_a_whole_w2_is_not_read(written) -> None:
    fields = {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(8, 4), "lokr_t2": torch.ones(())}
    state = {f"{NAME}.{name}": tensor for name, tensor in fields.items()}
    adapter = next(p.adapter for p in fit(written, state).placed if p.key == "img_in.weight")
    assert torch.equal(adapter.delta(torch.zeros(H, 16)), torch.ones(H, 16))


def test_boft_without_alpha_is_unconstrained() -> None:
    r = Sampler(3)
    kind, (blocks, *_) = samples.boft(r, (16, 8))
    assert from_host((kind, (blocks, None, None, None)), (16, 8)).constraint == 0.0


def test_a_row_of_zeros_under_dora_stays_sane(caplog) -> None:
    r = Sampler(4)
    weight = r(16, 8, scale=1.0)
    weight[3] = 0
    layer = layers.Linear(8, 16, bias=False)
    layer.load_weight(weight)
    adapter = from_host(samples.lora(r, (16, 8), dora=samples.magnitudes(r, (16, 8), 0)), (16, 8))
    stack = ResidualStack({"layer.weight": [Patch(1.0, adapter)]})
    stack.build({"layer": layer}, FactorCache())
    with stack.active({"layer": layer}, torch.device("cpu")):
        y = layer(r(2, 8, scale=1.0))
    assert y.abs().max() < 100
    assert "1 rows or columns of zeros" in caplog.text


NO_SAFETENSORS = {
    "nothing": (b"", "is empty"),
    "a web page": (b"\n<!DOCTYPE html><html>401</html>", "is a web page"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
    "a pickle": (b"PK\x03\x04" + bytes(64), "a pickle can run code"),
    "a GGUF file": (b"GGUF" + bytes(64), "there is no GGUF version"),
    "text": (b"{'lora': 1}" * 20, "no safetensors, whatever its name"),
    "three bytes": (b"abc", "no safetensors, whatever its name"),
}


@pytest.mark.parametrize("case", NO_SAFETENSORS)
def test_what_is_no_safetensors_is_named(tmp_path, case: str) -> None:
    path = tmp_path / "style.safetensors"
    path.write_bytes(NO_SAFETENSORS[case][0])
    with pytest.raises(AdapterError, match=NO_SAFETENSORS[case][1]) as caught:
        load_adapters(path)
    assert str(caught.value).endswith(f"({path})")


@pytest.mark.parametrize("keep", [4, 40, 300, -1])
def test_a_download_that_stopped_is_damaged(tmp_path, keep: int) -> None:
    path = tmp_path / "style.safetensors"
    path.write_bytes(save(lora(NAME, (H, 16)))[:keep])
    with pytest.raises(AdapterError, match="again"):
        load_adapters(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "style.safetensors")
    with pytest.raises(AdapterError, match="not a regular file"):
        load_adapters(tmp_path / "style.safetensors")


def test_more_tensors_and_longer_names_than_any_lora_has_are_refused(tmp_path) -> None:
    path, numbers = tmp_path / "style.safetensors", torch.zeros((1 << 16) + 1, 1)
    path.write_bytes(save({f"{i}.alpha": number.clone() for i, number in enumerate(numbers)}))
    with pytest.raises(AdapterError, match="65537 tensors, no LoRA has so many"):
        load_adapters(path)
    path.write_bytes(save({"a" * 4096 + ".alpha": torch.zeros(1)}))
    with pytest.raises(AdapterError, match="over 4096 characters"):
        load_adapters(path)


def test_long_names_are_cut_in_messages(written) -> None:
    long = f"lora_unet_{'a' * 2000}"
    with pytest.raises(AdapterError, match=r"such as lora_unet_a+…") as caught:
        load_adapters(written(lora(long, (16, 16)) | lora(f"{long}b", (16, 16)))).on(FLUX)
    assert len(str(caught.value)) < 1000


def test_a_missing_file_and_a_checkpoint_are_refused(tmp_path) -> None:
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapters(tmp_path / "gone.safetensors")
    torch.save({}, tmp_path / "style.pt")
    with pytest.raises(AdapterError, match="a pickle can run code"):
        load_adapters(tmp_path / "style.pt")


def test_made_for_another_architecture_is_one_sentence(written) -> None:
    name = "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn1_to_q"
    state = lora(name, (16, 16)) | lora("lora_unet_mid_block_attentions_0_proj_in", (16, 16))
    with pytest.raises(AdapterError, match=r"trained for SDXL, model is Flux \(0 of 2 layers match\), such as lora_"):
        load_adapters(written(state)).on(FLUX)


def test_partly_for_another_version_is_counted_with_examples(written) -> None:
    state = lora(NAME, (H, 16))
    for i in range(4):
        state |= lora(f"lora_unet_double_blocks_{i + 7}_img_attn_qkv", (3 * H, H))
    line = load_adapters(written(state)).on(FLUX).report(1.0).line
    assert line.startswith("style.safetensors ×1.00: 1/5 layers, rank 4; 4 not in this model, such as ")
    assert line.count("img_attn_qkv") == 3 and line.endswith(", … (the file is for another version of Flux)")


def test_text_encoders_are_counted_in_one_line(written) -> None:
    text = lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", (8, 8))
    text |= lora("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", (8, 8), *AB)
    report = load_adapters(written(lora(NAME, (H, 16)) | text)).on(FLUX).report(0.5)
    assert report.line == "style.safetensors ×0.50: 1/1 layers, rank 4"
    assert report.text.splitlines()[1:] == [
        "  kohya, diffusers names", "  connect a CLIP for the 2 layers of text encoders in this file",
    ]  # fmt: skip
    with pytest.raises(AdapterError, match=r"for a text encoder only \(2 layers\)"):
        load_adapters(written(text)).on(FLUX)


def test_a_file_without_adapters_says_so(written) -> None:
    with pytest.raises(AdapterError, match="is it a LoRA"):
        load_adapters(written({"model.layers.0.weight": torch.ones(2, 2)})).on(FLUX)


@pytest.mark.parametrize(
    ("shapes", "family"), [(FLUX, "Flux"), (UNET, "SD1.5 or SD2"), (SD3, "SD3")], ids=["Flux", "UNet", "SD3"]
)
def test_a_model_is_known_by_its_names(shapes, family) -> None:
    assert family_of(shapes) == family


FAMILIES = [
    ("Anima", "lora_unet_llm_adapter_blocks_0_self_attn_q_proj lora_unet_blocks_0_self_attn_q_proj"),
    ("Cosmos-Predict2 or Anima", "lora_unet_blocks_0_self_attn_q_proj lora_unet_blocks_0_cross_attn_output_proj"),
    ("Cosmos-Predict2 or Anima", "diffusion_model.blocks.0.adaln_modulation_self_attn.1"),
    ("Cosmos", "diffusion_model.blocks.block0.blocks.0.block.attn.to_q.0"),
    ("PixArt", "lora_unet_blocks_0_cross_attn_q_linear lora_unet_blocks_0_attn_qkv"),
    ("PixArt", "blocks.0.cross_attn.kv_linear"),
    ("Wan", "lora_unet_blocks_0_self_attn_q lora_unet_blocks_0_ffn_0"),
    ("Wan", "diffusion_model.blocks.0.cross_attn.k_img"),
    ("Wan", "transformer.blocks.0.attn1.to_out.0"),
    ("OmniGen2 or Boogu", "transformer.ref_image_refiner.0.attn.to_q transformer.layers.0.attn.to_q"),
    ("OmniGen2, Boogu or Lumina 2", "lora_unet_layers_0_attn_to_q"),
    ("Boogu", "double_stream_layers.0.img_self_attn.to_q noise_refiner.0.attn.to_q"),
    ("Boogu", "lora_unet_single_stream_layers_0_feed_forward_linear_1"),
    ("HiDream", "transformer.double_stream_blocks.0.block.attn1.to_q"),
    ("HiDream-O1", "diffusion_model.language_model.layers.0.mlp.up_proj diffusion_model.t_embedder1.mlp.0"),
    ("Ideogram 4", "lora_unet_layers_0_attention_qkv lora_unet_layers_0_attention_o"),
    ("Ideogram 4", "diffusion_model.layers.0.adaln_modulation"),
    ("Z-Image", "diffusion_model.layers.0.attention.to_q diffusion_model.layers.0.feed_forward.w1"),
    ("Z-Image", "lora_unet_layers_0_adaLN_modulation_0"),
    ("Lumina 2", "layers.0.adaLN_modulation.1 layers.0.attention.qkv"),
    ("Lumina 2 or Z-Image", "lora_unet_layers_0_attention_out"),
    ("Lumina 2, Z-Image or Ideogram 4", "lora_unet_layers_0_attention_qkv lora_unet_layers_0_feed_forward_w2"),
    ("TripoSplat", "noise_refiner.0.attn.qkv blocks.0.attn.qkv"),
    ("TripoSplat", "lora_unet_blocks_0_mlp_mlp_0"),
    ("Lens", "lora_unet_transformer_blocks_0_attn_img_qkv lora_unet_transformer_blocks_0_img_mod_1"),
    ("Lens", "transformer_blocks.0.txt_mlp.w1"),
    ("Qwen-Image", "transformer.transformer_blocks.0.img_mlp.net.2 transformer.transformer_blocks.0.img_mod.1"),
    ("Qwen-Image or Lens", "transformer_blocks.0.txt_mod.1"),
    ("JoyImage", "lora_unet_double_blocks_0_attn_img_attn_qkv"),
    ("JoyImage", "double_blocks.0.img_mlp.net.0.proj"),
    ("Hunyuan3D", "latent_in double_blocks.0.img_attn.qkv single_blocks.0.linear1"),
    ("Hunyuan3D", "blocks.0.moe.experts.0.net.2 blocks.0.attn1.to_q"),
    ("HunyuanVideo", "lora_unet_double_blocks_0_img_mod_linear lora_unet_single_blocks_0_linear1"),
    ("HunyuanVideo", "transformer.double_blocks.0.img_attn_qkv"),
    ("Hunyuan-DiT", "blocks.0.attn1.Wqkv"),
    ("Flux", "lora_unet_double_blocks_0_img_attn_qkv lora_unet_single_blocks_0_modulation_lin"),
    ("Flux", "transformer.single_transformer_blocks.0.attn.to_q"),
    ("SD3", "joint_blocks.0.x_block.attn.qkv"),
    ("SD3 or Flux", "transformer.transformer_blocks.0.ff_context.net.2"),
    ("", "transformer.transformer_blocks.0.attn.add_q_proj transformer.transformer_blocks.0.attn.to_q"),
    ("PixelDiT", "patch_blocks.0.attn.qkv_x pixel_blocks.0.attn.qkv"),
    ("Mochi", "diffusion_model.blocks.0.attn.qkv_x"),
    ("Krea 2", "blocks.0.attn.wq blocks.0.mlp.gate"),
    ("Krea 2", "transformer.text_fusion.refiner_blocks.0.attn.to_q"),
    ("Kandinsky 5", "visual_transformer_blocks.0.self_attention.to_query"),
    ("ERNIE-Image", "transformer.layers.0.self_attention.to_q"),
    ("ACE-Step", "transformer_blocks.0.cross_attn.to_q"),
    ("AuraFlow", "transformer.joint_transformer_blocks.0.attn.to_q"),
    ("SeedVR2", "blocks.0.attn.proj_qkv.vid"),
    ("Stable Audio", "transformer.layers.0.self_attn.to_qkv"),
    ("CogVideoX", "blocks.0.ff_proj"),
    ("LTX-Video", "diffusion_model.transformer_blocks.0.attn2.to_q"),
    ("LTX-Video", "transformer_blocks.0.audio_to_video_attn.to_q"),
    ("LTX-Video or PixArt", "transformer.transformer_blocks.0.attn2.to_q"),
    ("Stable Cascade", "lora_prior_unet_down_blocks_0_1_attention"),
    ("SDXL", "lora_unet_input_blocks_7_1_transformer_blocks_3_attn1_to_q"),
    ("SD1.5 or SD2", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "names"), FAMILIES, ids=[n for _, n in FAMILIES])
def test_a_file_is_known_by_the_names_that_differ(family: str, names: str) -> None:
    for suffix in ("", ".lora_down.weight"):
        assert family_of([name + suffix for name in names.split()]) == family


HOST_CLASSES = {
    "Anima": "Anima", "CosmosT2IPredict2": "Cosmos-Predict2 or Anima", "CosmosT2V": "Cosmos", "PixArtSigma": "PixArt",
    "Omnigen2": "OmniGen2", "Boogu": "Boogu", "Ideogram4": "Ideogram 4", "TripoSplat": "TripoSplat", "Lens": "Lens",
    "JoyImage": "JoyImage", "Hunyuan3Dv2_1": "Hunyuan3D", "HunyuanDiT": "Hunyuan-DiT",
    "HunyuanVideoI2V": "HunyuanVideo",
    "PixelDiTT2I": "PixelDiT", "PiD": "PixelDiT", "ZImage": "Z-Image", "Lumina2": "Lumina 2", "HiDreamO1": "HiDream-O1",
    "WAN21_T2V": "Wan", "LTXAV": "LTX-Video", "Chroma": "Flux", "SSD1B": "SDXL", "SD20": "SD1.5 or SD2", "Nobody": "",
    "Wan": "Wan",
}  # fmt: skip


def test_a_hosts_class_is_known_by_its_name() -> None:
    assert {name: family_of_host(name) for name in HOST_CLASSES} == HOST_CLASSES


def test_a_guess_that_may_be_the_model_is_no_cause() -> None:
    names = ["lora_unet_blocks_0_self_attn_q_proj", "lora_unet_blocks_1_self_attn_q_proj"]
    assert cause_of(names, names, 0, "Anima") == "its names are not those of Anima"
    assert cause_of(names, names, 0, "WAN21_T2V") == "trained for Cosmos-Predict2 or Anima, model is Wan"


def test_a_report_from_what_a_hosts_loader_made() -> None:
    state = lora(NAME, (H, 16), rank=4) | lora("lora_unet_nowhere", (8, 8), rank=8)
    a, b = state[f"{NAME}.lora_down.weight"], state[f"{NAME}.lora_up.weight"]
    patches = {"diffusion_model.img_in.weight": ("lora", (b, a, None, None, None))}
    report = FileReport.of("style.safetensors", 0.8, state, patches, list(patches), {}, "Flux")
    assert (report.matched, report.total, report.missing) == (1, 2, ("lora_unet_nowhere",))
    assert report.line == (
        "style.safetensors ×0.80: 1/2 layers, rank 4 to 8; 1 not in this model, such as lora_unet_nowhere"
    )
    with_slice = {("diffusion_model.img_in.weight", (0, 0, 8)): patches["diffusion_model.img_in.weight"]}
    assert FileReport.of("a", 1.0, state, with_slice, [], {"x": "too small"}, "SDXL").line == (
        "a: 0 of 2 layers fit, such as x: too small"
    )


FIELDS = [
    "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale", "reshape_weight", "hada_w1_a",
    "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b",
    "lokr_w2_a", "lokr_w2_b", "lokr_t2", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "rescale",
    "oft_R.weight", "diff", "diff_b", "set_weight", "w_norm", "b_norm", "lora_A.weight", "lora_B.weight",
    "lora_B.bias", "lora_A.other.weight", "lora_magnitude_vector", "lora_A", "", "weight",
]  # fmt: skip
MODULES = [
    "lora_unet_img_in", "transformer.transformer_blocks.0.attn.to_q", "diffusion_model.txt_in", "", ".",
    "transformer.norm_out.linear", "lora_te_text_model", "double_blocks.0.processor.qkv_lora1", "nowhere",
    "lora_unet_apart_to_qkv", "apart.kv",
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool]
SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24, H, 3 * H])


def sound() -> dict[str, dict[str, torch.Tensor]]:
    """A file of each kind that fits the toy's img_in."""
    r, shape = Sampler(9, torch.float32), FLUX["img_in"]
    values = [make(r, shape) for make in samples.KINDS.values()] + [samples.lora(r, shape, reshape=(H, 32))]
    found = {}
    for i, (kind, fields) in enumerate(values):
        named = zip(samples.FIELDS[kind], fields, strict=False)
        found[f"{i} {kind}"] = {f"{NAME}.{n}": torch.as_tensor(v) for n, v in named if v is not None}
    return found


SOUND = sound()


@pytest.mark.parametrize("kind", SOUND)
def test_a_file_of_any_kind_fits(written, kind: str) -> None:
    fitted = load_adapters(written(SOUND[kind])).on(FLUX)
    assert fitted.matched == [NAME] and not fitted.rejected


@st.composite
def states(draw) -> dict[str, torch.Tensor]:
    """A sound file or none, with some of its tensors gone and others of any kind beside or over them."""
    state = dict(draw(st.sampled_from([{}, *SOUND.values()])))
    for key in draw(st.lists(st.sampled_from(sorted(state)), max_size=1)) if state else ():
        state.pop(key)
    for _ in range(draw(st.integers(0 if state else 1, 5))):
        module, field = draw(st.sampled_from(MODULES)), draw(st.sampled_from(FIELDS))
        shape = draw(st.lists(SIZES, max_size=4).filter(lambda s: math.prod(s) < 20_000))
        value = torch.ones(shape) * draw(st.sampled_from([0.0, 0.01, -1.0, float("nan"), 1e30]))
        if draw(st.booleans()):
            value = value.nan_to_num().to(draw(st.sampled_from(DTYPES)))
        state[f"{module}.{field}"] = value
    return state


fuzz = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(fuzz, max_examples=300)
@given(state=states())
def test_whatever_a_file_holds_it_fits_or_is_refused(tmp_path, state) -> None:
    """Only AdapterError comes out, and what was taken runs."""
    path = tmp_path / "fuzz.safetensors"
    save_file(state, path)
    model = {}
    shapes = {**FLUX, **{f"apart.{letter}": (H, H) for letter in "qkv"}}
    own = ("img_in", "txt_in", "double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1")
    for name in (*own, "apart.q", "apart.k", "apart.v"):
        rows, columns = shapes[name]
        model[name] = layers.Linear(columns, rows)
        model[name].load_weight(torch.eye(rows, columns))
    try:
        fitted = load_adapters(path).on(model)
    except AdapterError as error:
        assert str(error).endswith(f"({path})")
        return
    counted = {*fitted.matched, *fitted.missing, *fitted.rejected}
    assert len(counted) == fitted.report(1.0).total
    stack = ResidualStack()
    fitted.add_to(stack, 0.5)
    stack.build(model, FactorCache())
    with stack.active(model, torch.device("cpu")):
        for name in {key.rpartition(".")[0] for key in stack.patches}:
            own = [p.adapter for p in fitted.placed if p.key == f"{name}.weight"]
            padded = [adapter.shape[1] for adapter in own if isinstance(adapter, Padded)]
            assert model[name](torch.ones(1, max(shapes[name][1], *padded, 0))).dtype == torch.float32


@settings(fuzz, max_examples=150)
@given(
    cut=st.integers(0, 4000), at=st.integers(0, 4000), byte=st.integers(0, 255),
    length=st.none() | st.integers(0, 2**63),
)  # fmt: skip
def test_whatever_happens_to_a_file_it_is_read_or_refused(tmp_path, cut, at, byte, length) -> None:
    data = bytearray(save(lora(NAME, (H, 16))))
    if length is not None:
        data[:8] = length.to_bytes(8, "little")
    data[at % len(data)] = byte
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data[: len(data) - cut % len(data)])
    try:
        file = load_adapters(path)
    except AdapterError as error:
        assert str(error).endswith(f"({path})")
        return
    try:
        file.on(FLUX)
    except AdapterError as error:
        assert str(path) in str(error)


def test_a_header_that_claims_what_is_not_there(tmp_path) -> None:
    tensor = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    header = json.dumps({"x.lora_A.weight": tensor}).encode()
    path = tmp_path / "style.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AdapterError, match="damaged"):
        load_adapters(path)


def test_a_bias_in_fp8_gets_its_scale(written) -> None:
    down, up = pair(H, 16)
    bias = torch.full((H,), 0.5).to(torch.float8_e5m2)
    parts = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": bias, "alpha": torch.tensor(2.0)}
    file = load_adapters(written({f"diffusion_model.img_in.{name}": tensor for name, tensor in parts.items()}))
    assert torch.equal(file.state["diffusion_model.img_in.diff_b"].float(), torch.full((H,), 0.25))


@pytest.mark.parametrize("field", ["oft_blocks", "oft_R.default.weight"])
def test_turns_beyond_all_measure_are_refused_when_the_file_loads(written, field) -> None:
    """In `I - Q` the identity is lost: there may be no inverse, which would show while sampling."""
    blocks = torch.ones(H // 4, 4, 4).triu(1) if field == "oft_blocks" else torch.ones(4, 6)
    for largest in (1e4, 1e30):
        path = written({f"lora_unet_img_in.{field}": blocks * largest})
        if largest == 1e4:
            assert load_adapters(path).on(FLUX).matched
            continue
        with pytest.raises(AdapterError, match=r"beyond 1e\+06: the training has diverged"):
            load_adapters(path).on(FLUX)


GGUF_NAMES = {
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "llama.cpp": ("{}.weight.lora_a", "{}.weight.lora_b"),
}


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("names", GGUF_NAMES)
def test_a_gguf_file_is_read_as_one_of_safetensors(names, kind, tmp_path):
    """Of any type; llama.cpp's own adapters have one alpha for all of them, and a rank of 1 has lost a dimension."""
    stored, plain = {}, {}
    for module, rank in (("double_blocks.0.img_attn.proj", 32), ("img_in", 1)):
        rows, columns = FLUX[module]
        down, up = pair(rows, columns, rank)
        spelled = module.replace(".", "_") if names == "kohya" else module
        for part, tensor, template in zip("AB", (down, up), GGUF_NAMES[names], strict=True):
            used = kind if rank == 32 or kind == "F16" else "F32"
            array = tensor.numpy()[0] if rank == 1 and part == "A" else tensor.numpy()
            stored[template.format(spelled)] = array, used
            data = gguf_samples.encode(tensor.numpy(), gguf.GGMLQuantizationType[used])
            decoded = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[used]).astype("float32"))
            plain[f"diffusion_model.{module}.lora_{part}.weight"] = decoded.reshape(tensor.shape)
        plain[f"diffusion_model.{module}.alpha"] = torch.tensor(8.0)
        if names != "llama.cpp":
            alpha = GGUF_NAMES[names][0].rpartition(".lora")[0].format(spelled) + ".alpha"
            stored[alpha] = torch.tensor([8.0]).numpy(), "F32"
    metadata = {"general.type": "adapter", "adapter.lora.alpha": 8.0} if names == "llama.cpp" else {}
    path = gguf_samples.write_gguf(tmp_path / "a.gguf", stored, "flux", metadata, orig_shapes=False)
    save_file(plain, tmp_path / "a.safetensors")
    ours, theirs = (load_adapters(p).on(FLUX) for p in (path, tmp_path / "a.safetensors"))
    assert len(ours.placed) == 2 and not ours.missing and not ours.rejected
    want = {placed.key: placed.adapter for placed in theirs.placed}
    for placed in ours.placed:
        shape = torch.zeros(FLUX[placed.target.layer])
        assert torch.equal(placed.adapter.delta(shape), want[placed.key].delta(shape))


@pytest.mark.parametrize("alpha, scale", [(8.0, 0.5), (0.0, 1.0), (None, 1.0)])
def test_the_scale_of_llama_cpps_files(alpha, scale):
    """It takes an alpha of 0 for none."""
    down, up = pair(32, 16, 16)
    named = from_llama_cpp({"x.weight.lora_a": down, "x.weight.lora_b": up}, alpha)
    assert float(named.get("x.alpha", torch.tensor(16.0))) / 16 == scale


def packed_where_it_fits(value: Any) -> tuple[Any, Any, int]:
    """A host's value with factors in Q8_0, the same decoded, and how many there are."""
    kind, fields = value if len(value) == 2 else ("diff", value)
    packed, plain = list(fields), list(fields)
    for index, tensor in enumerate(fields):
        if torch.is_tensor(tensor) and tensor.dim() > 1 and tensor.numel() % 32 == 0:
            data = quantize(tensor.reshape(-1, 32), by_name("Q8_0"))
            packed[index] = PackedTensor(data.flatten(), by_name("Q8_0"), tensor.shape)
            plain[index] = packed[index].dequantize(torch.float32)
    count = sum(isinstance(tensor, PackedTensor) for tensor in packed)
    return (kind, tuple(packed)), (kind, tuple(plain)), count


@pytest.mark.parametrize("name", samples.KINDS)
def test_packed_factors_do_what_they_decode_to(name):
    """Of every kind, as a GGUF file has them; what a layer's factors are made of them is ordinary."""
    r = Sampler(3, torch.float32)
    shape = (64, 64)
    packed, plain, count = packed_where_it_fits(samples.KINDS[name](r, shape))
    layer, x = samples.make_layer(shape, r(*shape)), samples.make_input(shape, r)
    got, want = (samples.run(layer, x, [samples.patch_of(value, shape, 0.7)]) for value in (packed, plain))
    assert count and torch.equal(got, want) and type(got) is torch.Tensor
    assert not torch.equal(got, layer(x))


def test_factors_of_a_gguf_file_stay_packed(tmp_path):
    """In copies of the file's bytes: a file that is deleted or replaced later changes nothing."""
    shape = (64, 64)
    down, up = pair(*shape, 32)
    stored = {"img_in.lora_A.weight": (down.numpy(), "Q8_0"), "img_in.lora_B.weight": (up.numpy(), "Q4_0")}
    path = gguf_samples.write_gguf(tmp_path / "a.gguf", stored, "flux", orig_shapes=False)
    (placed,) = load_adapters(path).on({"img_in": shape}).placed
    assert [factor.fmt.name for factor in (placed.adapter.down, placed.adapter.up)] == ["Q8_0", "Q4_0"]
    assert not is_mapped(path)


def test_gguf_files_that_are_no_loras(tmp_path):
    model = gguf_samples.write_gguf(tmp_path / "m.gguf", {"img_in.weight": (pair(32, 16)[0].numpy(), "F16")})
    with pytest.raises(AdapterError, match=r"the file is a GGUF model: load it as a model \(.*m.gguf\)"):
        load_adapters(model)
    whole = gguf_samples.write_gguf(tmp_path / "l.gguf", {"img_in.lora_A.weight": (pair(32, 32)[0].numpy(), "Q8_0")})
    data = whole.read_bytes()
    for length in (4, 40, len(data) // 2, len(data) - 32):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(AdapterError, match=r"cut.gguf"):
            load_adapters(tmp_path / "cut.gguf")


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_what_a_file_says_of_itself_is_read_without_its_tensors(tmp_path, suffix):
    told = {"ss_output_name": "a\nb\x07", "ss_network_alpha": "None", "modelspec.trigger_phrase": " ohwx ,, a\tb"}
    tags = {"10_a": {"cat ": 2, "dog": 3}, "5_b": {"cat": 4}}
    told |= {"ss_unet_lr": "x" * 5000, "ss_tag_frequency": json.dumps(tags)}
    factors = {f"lora_unet_img_in.lora_{side}.weight": torch.ones(4, 32) for side in ("down", "up")}
    path = tmp_path / f"a{suffix}"
    if suffix == ".gguf":
        gguf_samples.write_gguf(path, {k: (t.numpy(), "Q8_0") for k, t in factors.items()}, metadata=told)
    else:
        save_file(factors, path, told)
    info = lora_info(path)
    assert info.words == ["ohwx", "a b"]
    assert info.notes == [
        ("kind", "rank 4"), ("names", "kohya"), ("title", "a b\ufffd"), ("learning rate", "x" * 600),
        ("words in captions", "cat (6), dog (3)"),
    ]  # fmt: skip


@pytest.mark.parametrize("tags", ["[1]", "{", '{"a": 1}', '{"a": {"b": "c"}}', '{"a": {"b": 1e999}}', "[" * 9999, "7"])
def test_odd_captions_are_nothing_to_tell(tmp_path, tags):
    lora = {"lora_unet_img_in.lora_down.weight": torch.ones(4, 4)}
    save_file(lora, tmp_path / "a.safetensors", {"ss_tag_frequency": tags})
    assert lora_info(tmp_path / "a.safetensors").notes == [("kind", "rank 4"), ("names", "kohya")]
