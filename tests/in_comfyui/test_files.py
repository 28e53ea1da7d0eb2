"""Files as they are out there: scales beside weights, shapes that tools have changed, a config, other models, gaps."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.ldm.lightricks.model
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ldm.wan.model
import comfy.sd
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, META, Architecture, plain_weight
from generation import dense_model, distance, fingerprint, forget, sample, with_lora
from gguf_samples import write_gguf
from loras import make_lora

WAN = ARCHITECTURES["wan"]


def _ltxv() -> torch.nn.Module:
    return comfy.ldm.lightricks.model.LTXVModel(
        in_channels=128, cross_attention_dim=256, attention_head_dim=8, num_attention_heads=32, num_layers=1, **META
    )


def _krea2() -> torch.nn.Module:
    model = importlib.import_module("comfy.ldm.krea2.model")
    return model.SingleStreamDiT(
        features=256, txtdim=320, heads=2, kvheads=1, layers=1, txtlayers=2, txtheads=20, txtkvheads=20, **META
    )


def _stable_diffusion(**config: Any) -> torch.nn.Module:
    """With one level."""
    return comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1], channel_mult=[1],
        transformer_depth=[1], transformer_depth_output=[1, 1], transformer_depth_middle=1, use_checkpoint=False,
        use_spatial_transformer=True, legacy=False, **config, **META,
    )  # fmt: skip


class Masked(Architecture):
    """An architecture that asks which of the text's tokens count."""

    def conditioning(self, seed: int = 1) -> list:
        (context, extra), = super().conditioning(seed)
        return [[context, {**extra, "attention_mask": torch.ones(1, 20)}]]


LTXV = Masked("ltxv", _ltxv, (1, 128, 2, 4, 4), (20, 4096), None, ("transformer_blocks.0",))
KREA2 = Architecture("krea2", _krea2, (1, 16, 1, 8, 8), (20, 640), None, ("blocks.0",))
SD15 = replace(ARCHITECTURES["sd15"], build=partial(_stable_diffusion, num_heads=8, context_dim=768))
SD20 = replace(
    SD15, name="sd20", context=(20, 1024),
    build=partial(_stable_diffusion, num_head_channels=64, context_dim=1024, use_linear_in_transformer=True),
)  # fmt: skip

Weights = dict[str, tuple[np.ndarray, str]]


def weights(architecture: Architecture, type_name: str = "Q8_0") -> Weights:
    """Seeded ones, matrices in `type_name`, as `write_gguf` takes them."""
    rng, found = np.random.default_rng(0), {}
    for name, tensor in architecture.build().state_dict().items():
        array = plain_weight(name, tuple(tensor.shape), rng).astype(np.float32)
        packed = array.ndim == 2 and name.endswith(".weight") and array.shape[1] % 64 == 0
        found[name] = array, type_name if packed else "F32"
    return found


def load(pack: Any, path: Path) -> Any:
    return pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")


def refusal(pack: Any, path: Path) -> str:
    """The one sentence that the loader says, with the path at its end."""
    with pytest.raises(Exception) as caught:
        load(pack, path)
    assert isinstance(caught.value, pack("kernels").GraftError), repr(caught.value)
    message = str(caught.value)
    assert message.endswith(f"({path})") and "\n" not in message
    return message


@pytest.fixture(autouse=True)
def gone():
    yield
    forget()


# A scale beside the weight


def nvfp4(name: str, array: np.ndarray) -> tuple[Weights, np.ndarray]:
    """As llama.cpp writes it."""
    import gguf
    from gguf_samples import encode

    kind = gguf.GGMLQuantizationType.NVFP4
    scale = np.float32(np.abs(array).max() / (6 * 448))
    decoded = gguf.quants.dequantize(encode(array / scale, kind), kind)
    module = name.removesuffix(".weight")
    scales = {f"{module}.scale": scale, f"{module}.input_scale": np.float32(0.02)}
    return {name: (array / scale, "NVFP4"), **{n: (np.array([s]), "F32") for n, s in scales.items()}}, decoded * scale


def int8(name: str, array: np.ndarray) -> tuple[Weights, np.ndarray]:
    """As ComfyUI-GGUF writes it, a scale for each row; its note is added to the metadata."""
    scale = np.abs(array).max(1, keepdims=True) / 127
    codes = np.round(array / scale).astype(np.float32)
    return {name: (codes, "I8"), f"{name}_scale": (scale, "F32")}, codes * scale


def fp8(name: str, array: np.ndarray) -> tuple[Weights, np.ndarray]:
    """As of an fp8 checkpoint whose scales were kept, and not applied."""
    codes, scale = torch.from_numpy(array * 100).to(torch.float8_e4m3fn).float().numpy(), np.float32(0.01)
    beside = {f"{name.removesuffix('.weight')}.scale_weight": (np.array([scale]), "F32")}
    return {name: (codes, "F16"), **beside}, codes * scale


@pytest.mark.parametrize("kind", [nvfp4, int8, fp8])
def test_a_scale_beside_the_weight_is_applied(pack, tmp_path, kind):
    """On every layer, beside a LoRA, and in what merge nodes and files get to see."""
    tensors, dense, notes = {}, {}, {}
    for name, (array, type_name) in weights(WAN).items():
        in_file, decoded = kind(name, array) if type_name == "Q8_0" else ({name: (array, type_name)}, array)
        tensors |= in_file
        dense[name] = torch.from_numpy(decoded.astype(np.float32))
        if f"{name}_scale" in in_file:
            notes[f"comfy.gguf.quant.{name}"] = json.dumps({"format": "int8_tensorwise", "per_row": True})
    graft = load(pack, write_gguf(tmp_path / "a.gguf", tensors, "wan", notes))
    packed = [layer for layer in graft.graft.layers.values() if layer.fmt.is_quantized]
    assert len(packed) > 20 if kind is not fp8 else not packed
    stock = comfy.sd.load_diffusion_model_state_dict(dict(dense), model_options={"dtype": torch.float32})
    before, base, want = fingerprint(graft), sample(graft, WAN), sample(stock, WAN)
    assert distance(base, want) < 1e-5
    shapes = {key: value.shape for key, value in stock.model.state_dict().items()}
    lora = make_lora(stock.model, shapes, "native", WAN.lora_layers)
    effect = sample(with_lora(stock, lora), WAN) - want
    assert distance(sample(with_lora(graft, lora), WAN) - base, effect) < 1e-4 < effect.norm() / want.norm()
    assert torch.equal(sample(graft, WAN), base) and fingerprint(graft) == before
    key = "diffusion_model.blocks.1.ffn.2.weight"
    for shown in (graft.model_state_dict()[key], graft.get_key_patches("diffusion_model.")[key][0][0]):
        assert distance(shown.to(torch.float32), dense["blocks.1.ffn.2.weight"]) < 1e-6
    saved = graft.merged_state_dict(torch.float32)
    assert saved.keys() == stock.model.diffusion_model.state_dict().keys()
    assert distance(saved["blocks.1.ffn.2.weight"], dense["blocks.1.ffn.2.weight"]) < 1e-6


def test_a_rotated_weight_is_refused(pack, tmp_path):
    tensors, name = weights(WAN), "blocks.0.ffn.0.weight"
    tensors |= int8(name, tensors[name][0])[0]
    note = json.dumps({"format": "int8_tensorwise", "convrot": True, "weight_rotated": True, "convrot_groupsize": 256})
    path = write_gguf(tmp_path / "a.gguf", tensors, "wan", {f"comfy.gguf.quant.{name}": note})
    assert refusal(pack, path).startswith(f"{name} is rotated (ConvRot), which Graft cannot undo: get the model in")


# Shapes that tools have changed


def same_picture(
    pack: Any, architecture: Architecture, folder: Path, changed: Callable[[str, np.ndarray], np.ndarray]
) -> None:
    """Of a file with `changed` shapes and of one with the model's own, which is the host's, too."""
    tensors = weights(architecture)
    plain = write_gguf(folder / "plain.gguf", tensors, architecture.name)
    other = {name: (changed(name, array), kind) for name, (array, kind) in tensors.items()}
    assert any(array.shape != tensors[name][0].shape for name, (array, _) in other.items())
    # small ones are not worth a block, in whatever shape
    odd = write_gguf(folder / "odd.gguf", {n: (a, "F32" if a.ndim < 2 else k) for n, (a, k) in other.items()})
    want, got = sample(load(pack, plain), architecture), sample(load(pack, odd), architecture)
    assert torch.equal(got, want)
    assert distance(got, sample(dense_model(pack, plain), architecture)) < 1e-5


def without_leading_ones(name: str, array: np.ndarray) -> np.ndarray:
    """As ggml keeps it."""
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    return array


@pytest.mark.parametrize("architecture", [WAN, KREA2], ids=lambda a: a.name)
def test_ones_in_front_may_be_lost(pack, tmp_path, architecture):
    """Of parameters that are the host's own (Wan's modulation), and of a layer that it knows the model by (Krea 2)."""
    pytest.importorskip(f"comfy.ldm.{architecture.name}.model", reason=f"this ComfyUI has no {architecture.name}")
    same_picture(pack, architecture, tmp_path, without_leading_ones)


@pytest.mark.parametrize("architecture", [SD20, SD15], ids=lambda a: a.name)
def test_ones_behind_may_be_kept_or_lost(pack, tmp_path, architecture):
    """Of the projections around attention, a Linear in Stable Diffusion 2 and XL and a convolution in 1.5."""

    def other_rank(name: str, array: np.ndarray) -> np.ndarray:
        if not name.endswith(("proj_in.weight", "proj_out.weight")):
            return array
        return array[..., None, None] if array.ndim == 2 else array[..., 0, 0]

    same_picture(pack, architecture, tmp_path, other_rank)


# The model's config in the metadata


def test_the_config_of_a_file_is_the_hosts_to_read(pack, tmp_path):
    """As that of a safetensors file, on hosts that read one of a diffusion model."""
    config = {"config": json.dumps({"transformer": {"timestep_scale_multiplier": 500.0}})}
    tensors = weights(LTXV)
    plain, configured = (write_gguf(tmp_path / n, tensors, "ltxv", m) for n, m in (("a.gguf", {}), ("b.gguf", config)))
    dense = dense_model(pack, plain).model.diffusion_model.state_dict()
    reads = "metadata" in inspect.signature(comfy.sd.load_diffusion_model_state_dict).parameters
    stock = comfy.sd.load_diffusion_model_state_dict(
        dense, model_options={"dtype": torch.float32}, **({"metadata": config} if reads else {})
    )
    want, got, without = (sample(m, LTXV) for m in (stock, load(pack, configured), load(pack, plain)))
    assert distance(got, want) < 1e-5
    assert (distance(without, want) > 1e-3) == reads, "the config has an effect where the host reads it"


def test_a_config_that_is_none_is_told(pack, tmp_path, monkeypatch):
    if "metadata" not in inspect.signature(comfy.sd.load_diffusion_model_state_dict).parameters:
        pytest.skip("this ComfyUI reads no config of a diffusion model")
    path = write_gguf(tmp_path / "a.gguf", weights(LTXV), "ltxv", {"config": "not JSON"})
    assert "(JSONDecodeError: " in refusal(pack, path)


# No diffusion model at all

OTHERS = {
    "controlnet_blocks.0.weight": "this is a ControlNet, not a diffusion model: put it into models/controlnet",
    "single_blocks.0.linear1.lora_A.weight": "this is a LoRA, not a diffusion model: put it into models/loras",
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_looks_like_a_small_flux_is_named(pack, tmp_path, name):
    """XLabs' ControlNets have its first blocks."""
    flux = ("img_in.weight", "txt_in.weight", "double_blocks.0.img_attn.norm.key_norm.scale", name)
    path = write_gguf(tmp_path / "a.gguf", {n: (np.ones((64, 64), np.float32), "F32") for n in flux})
    assert refusal(pack, path).startswith(OTHERS[name])


# Incomplete and odd models


def _without(*names: str) -> Callable[[Weights], Weights]:
    return lambda tensors: {n: value for n, value in tensors.items() if not n.startswith(names)}


def _cut(name: str, rows: int) -> Callable[[Weights], Weights]:
    return lambda tensors: {**tensors, name: (tensors[name][0][:rows], tensors[name][1])}


def _flat(name: str) -> Callable[[Weights], Weights]:
    return lambda tensors: {**tensors, name: (tensors[name][0].reshape(-1), "F32")}


def _three_blocks(tensors: Weights) -> Weights:
    """The second of them is missing."""
    return {n.replace("blocks.1.", "blocks.2."): value for n, value in tensors.items()}


def _narrow(tensors: Weights) -> Weights:
    """Less than a head wide."""
    return {**tensors, "head.modulation": (tensors["head.modulation"][0][..., :64], "F32")}


VARIANT = "update ComfyUI, or get another file of it (it is damaged, or a variant that this ComfyUI does not know):"
INCOMPLETE = (
    "the file is incomplete: get it from another source, or update ComfyUI if this is a new variant of the model: "
    "it lacks"
)
UNFIT = f"the file does not fit the model: {VARIANT}"
NO_MODEL = f"ComfyUI makes no model out of this file: {VARIANT}"
ODD: Mapping[str, tuple[Callable[[Weights], Weights], str]] = {
    "a layer of a block": (_without("blocks.1.ffn.2.weight"), f"{INCOMPLETE} blocks.1.ffn.2.weight ("),
    "a scale of a block": (_without("blocks.1.self_attn.norm_q"), f"{INCOMPLETE} blocks.1.self_attn.norm_q.weight ("),
    "a parameter of a block": (_without("blocks.0.modulation"), f"{INCOMPLETE} blocks.0.modulation ("),
    "one of two layers": (_without("time_embedding.2.weight"), f"{INCOMPLETE} time_embedding.2.weight ("),
    "a block before others": (_three_blocks, f"{INCOMPLETE} blocks.1 ("),
    "what the host detects by": (
        _without("head.head.weight"),
        "the file is incomplete: get it from another source, head.head.weight is missing",
    ),
    "a wrong number of rows": (
        _cut("blocks.1.ffn.0.weight", 512),
        f"{UNFIT} blocks.1.ffn.0.weight is [512, 256] and not [1024, 256] (",
    ),
    "a wrong number of rows in the host's own": (
        _cut("blocks.0.self_attn.norm_q.weight", 128),
        f"{UNFIT} blocks.0.self_attn.norm_q.weight is [128] and not [256] (",
    ),
    "no columns": (
        _flat("patch_embedding.weight"),
        f"{NO_MODEL} what it reads from patch_embedding.weight [16384] (IndexError: ",
    ),
    "less than a head": (
        _narrow,
        f"{NO_MODEL} what it reads from head.modulation [1, 2, 64], head.head.weight [64, 256], ",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_incomplete_and_odd_models_are_refused_by_name(pack, tmp_path, case):
    change, message = ODD[case]
    path = write_gguf(tmp_path / "a.gguf", change(weights(WAN)), "wan")
    assert refusal(pack, path).startswith(message)


def test_an_odd_text_encoder_is_refused_by_name(pack, tmp_path):
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    path = write_gguf(tmp_path / "a.gguf", {name: (np.ones((8, 64), np.float32), "F16")}, "pig")
    with pytest.raises(pack("kernels").GraftError) as caught:
        pack("nodes.text_encoder").load_text_encoders([str(path)], "stable_diffusion", "cpu")
    said = str(caught.value)
    assert said.startswith(f"{UNFIT} {name} is [8, 64] and not [3072, 768] (")
    assert said.endswith(f"({path})")


def test_a_part_that_is_missing_as_a_whole_is_told(pack, tmp_path):
    """Some are kept elsewhere or never run: the report names it, and a call says which layer."""
    path = write_gguf(tmp_path / "a.gguf", _without("time_projection.")(weights(WAN)), "wan")
    graft = load(pack, path)
    assert graft.graft.summary.endswith(" · the file has no time_projection")
    with pytest.raises(pack("kernels").GraftError, match=r"the file brought no weight for time_projection\.1 of shape"):
        sample(graft, WAN)
