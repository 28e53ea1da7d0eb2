"""Small models of the architectures that ComfyUI knows: shapes from its own classes, seeded weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ldm.wan.model
import comfy.model_detection
import comfy.ops
import gguf
import numpy as np
import torch
from comfy.ldm.flux.model import FluxParams
from gguf_samples import encode

META = {"operations": comfy.ops.disable_weight_init, "device": "meta", "dtype": torch.float32}
ROWS_QUANTIZED = 64
"""Rows of a weight that are really quantized; the others repeat them in another order, which is quick."""


SMALL = 1 << 14
"""Weights below this number of elements are not quantized."""


@dataclass(frozen=True)
class Architecture:
    """One architecture, the latent it samples and the conditioning it needs."""

    name: str
    build: Callable[[], torch.nn.Module]
    latent: tuple[int, ...]
    context: tuple[int, int]
    pooled: int | None
    lora_layers: tuple[str, ...]

    def conditioning(self, seed: int = 1) -> list:
        g = torch.Generator().manual_seed(seed)
        extra = {} if self.pooled is None else {"pooled_output": torch.randn(1, self.pooled, generator=g)}
        return [[torch.randn(1, *self.context, generator=g), extra]]


def flux_of(width: int = 3072) -> torch.nn.Module:
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__annotations__ else {}
    axes = [16, 56, 56]
    return comfy.ldm.flux.model.Flux(
        in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=4096, hidden_size=width,
        mlp_ratio=4.0, num_heads=width // sum(axes), depth=1, depth_single_blocks=1, axes_dim=axes, theta=10000,
        qkv_bias=True, guidance_embed=True, **newer, **META,
    )  # fmt: skip


@contextmanager
def flux_as_wide_as_its_file() -> Iterator[None]:
    """ComfyUI 0.3.64 takes every Flux to be 3072 wide; within this one it is as wide as its file, as in 0.19."""
    detect = comfy.model_detection.detect_unet_config

    def detect_width(state_dict: dict, key_prefix: str, *args: Any, **kwargs: Any) -> dict | None:
        config = detect(state_dict, key_prefix, *args, **kwargs)
        if config is not None and config.get("image_model") == "flux":
            width = state_dict[f"{key_prefix}img_in.weight"].shape[0]
            config |= {"hidden_size": width, "num_heads": width // sum(config["axes_dim"])}
        return config

    comfy.model_detection.detect_unet_config = detect_width
    try:
        yield
    finally:
        comfy.model_detection.detect_unet_config = detect


def _sd3() -> torch.nn.Module:
    return comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper(
        input_size=None, pos_embed_scaling_factor=None, pos_embed_max_size=32, num_patches=1024, in_channels=16,
        patch_size=2, depth=4, adm_in_channels=2048,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 256}},
        **META,
    )  # fmt: skip


def _wan() -> torch.nn.Module:
    return comfy.ldm.wan.model.WanModel(
        model_type="t2v", patch_size=(1, 2, 2), in_dim=16, dim=256, ffn_dim=1024, freq_dim=256, text_dim=4096,
        out_dim=16, num_heads=2, num_layers=2, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
        **META,
    )  # fmt: skip


def _sd15() -> torch.nn.Module:
    return comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, num_heads=8,
        use_spatial_transformer=True, context_dim=768, use_checkpoint=False, legacy=False, **META,
    )  # fmt: skip


_FLUX = Architecture(
    "flux", flux_of, (1, 16, 16, 16), (24, 4096), 768, ("double_blocks.0.img_attn", "single_blocks.0.linear1")
)
ARCHITECTURES = {
    a.name: a
    for a in (
        _FLUX,
        Architecture("sd3", _sd3, (1, 16, 16, 16), (20, 4096), 2048, ("joint_blocks.0", "joint_blocks.2")),
        Architecture("wan", _wan, (1, 16, 3, 8, 8), (20, 4096), None, ("blocks.0", "blocks.1")),
        Architecture(
            "sd15", _sd15, (1, 4, 8, 8), (20, 768), None, ("input_blocks.1", "middle_block.1", "output_blocks.2")
        ),
    )
}
NARROW = {**ARCHITECTURES, "flux": replace(_FLUX, build=partial(flux_of, 1024))}
"""The same with a ninth of Flux's 480 M weights, for tests that merge them again and again."""


def write_model(architecture: Architecture, type_name: str, path: Path, seed: int = 0) -> Path:
    """Write a GGUF file of seeded weights as converters do: big ones in `type_name`, small ones as F16 and F32.

    Convolutions are folded into rows of 256 with their true shape in the metadata.
    """
    writer = gguf.GGUFWriter(str(path), architecture.name)
    rng = np.random.default_rng(seed)
    qtype = gguf.GGMLQuantizationType[type_name]
    for name, tensor in architecture.build().state_dict().items():
        shape = tuple(tensor.shape)
        rows = _packed_rows(name, shape, gguf.GGML_QUANT_SIZES[qtype][0])
        if rows is None:
            writer.add_tensor(name, plain_weight(name, shape, rng))
            continue
        some = rng.standard_normal((min(rows[0], ROWS_QUANTIZED), rows[1]), dtype=np.float32) / _root_of_inputs(shape)
        writer.add_tensor(name, encode(some, qtype)[rng.integers(0, len(some), rows[0])], raw_dtype=qtype)
        if rows != shape:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _packed_rows(name: str, shape: tuple[int, ...], block: int) -> tuple[int, int] | None:
    """How a weight is laid out when it is packed, or None if converters leave it alone."""
    count = math.prod(shape)
    if len(shape) not in (2, 4) or count < SMALL or count % max(block, 256) or "embed" in name:
        return None
    return (shape[0], shape[1]) if len(shape) == 2 and shape[1] % block == 0 else (count // 256, 256)


def plain_weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Seeded numbers for a tensor of this name, scaled by its inputs, in the type that converters leave it in."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) < 2:
        scales = name.endswith(("scale", "weight"))
        return np.asarray(1 + 0.1 * values if scales else 0.05 * values, dtype=np.float32)
    wide = math.prod(shape) < SMALL or len(shape) > 4
    return (values / _root_of_inputs(shape)).astype(np.float32 if wide else np.float16)


def _root_of_inputs(shape: tuple[int, ...]) -> float:
    return max(1, math.prod(shape[1:])) ** 0.5
