"""Loading a GGUF diffusion model: file, architecture, patcher."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Mapping
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from .. import kernels
from ..kernels import CorruptFile, UnsupportedFormat
from ..ops.gguf_file import GGUFFile, describe, diffusion_tensors, open_gguf
from ..ops.layers import EmbeddingMath, packed_layers, unpack_leftovers
from ..ops.packed import as_weight, convert_rows
from . import node
from .ops import GraftOps
from .patcher import Graft, GraftPatcher, adopt, make_savable

log = logging.getLogger(__name__)

FOLDER = "unet_gguf"
"""The key under which packs for GGUF share their list of models; never replaced where one is there."""

DEMO_FOLDER = "graft_demo"
"""A key of our own for the demo model, since other packs rewrite the shared one."""

REMEDY = "put it into models/diffusion_models, or choose another file"

PROBED = ("patch_embedding", "img_in.proj", "dec_net.cond_embed")
"""Layers, all small, of whose weights the host reads more than they compute: the channels of Wan and HunyuanVideo
models from its shape, the dtype of Z-Image's pixel decoder."""

SMALL_TABLE = 1 << 18
"""Weights of an Embedding up to which it is held decoded, 1 MiB: a host may read rows of a table without asking the
layer for them, as Wan S2V's do, and would find bytes."""

FOLLOWED = ("t_embedder.mlp.0", "x_embedder", "blocks.*.attn2.to_k")
"""Layers of Hunyuan3D 2.1 to whose weights' dtype the host casts what goes in, and with it all that comes after."""

COMPUTE_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def model_files() -> list[str]:
    """What the loader lists."""
    return node.files(FOLDER, DEMO_FOLDER)


def model_path(name: str) -> str | None:
    """Where a listed file lies, or None if it is gone."""
    return node.file_path(name, FOLDER, DEMO_FOLDER)


def load_diffusion_model(
    path: str, compute_dtype: str = "auto", backend: str = "auto", disable_dynamic: bool = False
) -> GraftPatcher:
    """Load a GGUF diffusion model of any architecture that the host knows.

    Args:
        path: the file.
        compute_dtype: ``auto`` (what the host chooses for the device), ``bf16``, ``fp16`` or ``fp32``.
        backend: ``auto``, ``triton``, ``cpu`` or ``torch``.
        disable_dynamic: the host's wish for a patcher without dynamic VRAM.

    Raises:
        CorruptFile: the file is damaged or is no GGUF file.
        UnsupportedFormat: the host does not know the architecture, or the file is not a diffusion model.
        NoBackend: the backend cannot run here.
    """
    file = open_gguf(path)
    state = _in_hosts_names({name: as_weight(tensor) for name, tensor in diffusion_tensors(file).items()})
    device = comfy.model_management.get_torch_device()
    choice = kernels.choose(torch.device(device), None, backend)
    dtype = COMPUTE_DTYPES[compute_dtype]
    options: dict[str, Any] = {"custom_operations": GraftOps} | ({} if dtype is None else {"dtype": dtype})
    patcher = _load_state_dict(state, options, disable_dynamic)
    if patcher is None:
        raise UnsupportedFormat(
            f"this ComfyUI does not know the architecture of the file (it calls itself "
            f"{file.architecture or 'nothing'}): update ComfyUI, {path}"
        )
    if dtype is not None:
        # on a device that it thinks slow in this dtype the host would go back to fp32
        patcher.model.manual_cast_dtype = dtype
    unpack_leftovers(patcher.model, _declared_dtype)
    _unpack_probed(patcher.model)
    patcher.model.graft = Graft(patcher.model, _summary(file, patcher, choice), backend)
    if choice.name == "triton":
        _warm(file, patcher, device)
    make_savable(patcher.model)
    patcher.cached_patcher_init = (load_diffusion_model, (path, compute_dtype, backend))
    return adopt(patcher)


def _in_hosts_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` as the host would rename it from diffusers' names, which it does where it knows no architecture."""
    if comfy.model_detection.model_config_from_unet(dict(state), "") is not None:
        return state
    return convert_rows(state, comfy.model_detection.convert_diffusers_mmdit) or state


def _declared_dtype(module: torch.nn.Module, name: str) -> torch.dtype:
    """What the host built a parameter in, where it notes that: there the file's tensor has taken its place."""
    return getattr(module, f"{name}_comfy_model_dtype", None) or torch.float32


def _unpack_probed(model: torch.nn.Module) -> None:
    """Hold weights decoded so that the host finds what it looks for.

    `PROBED` and small tables are in fp32, `FOLLOWED` as the host computes.
    """
    for path, layer in packed_layers(model.diffusion_model).items():
        if layer.fmt is None or not layer.fmt.is_quantized:
            continue
        small_table = isinstance(layer, EmbeddingMath) and layer.logical_shape.numel() <= SMALL_TABLE
        if path in PROBED or small_table:
            layer.load_weight(layer.dequantized())
        elif any(fnmatch.fnmatchcase(path, pattern) for pattern in FOLLOWED):
            layer.load_weight(layer.dequantized(dtype=model.manual_cast_dtype or model.get_dtype()))


def _warm(file: GGUFFile, patcher: Any, device: torch.device) -> None:
    """Compile the kernels of the file's types now, with progress on the node, and not in the first step."""
    fmts = {tensor.fmt for tensor in file.tensors.values() if tensor.fmt.is_quantized}
    bar = comfy.utils.ProgressBar(len(fmts))
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    kernels.warm(fmts, torch.device(device), dtype, lambda line: bar.update(1))


def _load_state_dict(state: Mapping[str, torch.Tensor], options: dict, disable_dynamic: bool) -> Any:
    """The host's own loader, on which it decides about architecture, dtypes and the patcher's class."""
    extra = {"disable_dynamic": True} if disable_dynamic else {}
    return comfy.sd.load_diffusion_model_state_dict(dict(state), model_options=options, **extra)


def _summary(file: GGUFFile, patcher: Any, choice: kernels.Choice) -> str:
    """``Flux · 11.9B · Q4_K 228, Q6_K 76, F32 471 · 6.6 GB · bfloat16 · triton``, under the host's name for it."""
    _, _, rest = describe(file).partition(" · ")
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    faster = "bf16" if dtype == torch.float32 and kernels.has_fast_bf16() else ""
    faster = "fp32" if dtype in kernels.SLOW_DTYPES else faster
    on_cpu = patcher.load_device.type == "cpu"
    hint = f" (compute_dtype {faster} is faster on this processor)" if faster and on_cpu else ""
    name = type(patcher.model.model_config).__name__
    return f"{name} · {rest} · {str(dtype).removeprefix('torch.')}{hint} · {choice}"


class GraftUNETLoader:
    """Load Diffusion Model (GGUF, Graft)."""

    DESCRIPTION = (
        "Loads a GGUF diffusion model. LoRAs from any LoRA node run beside the quantized weights: "
        "exact, and the file's bytes stay as they are."
    )
    SEARCH_ALIASES = ["gguf", "unet loader gguf", "load gguf", "quantized model", "q4", "q8"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model; every LoRA and sampling node takes it.",)
    FUNCTION = "load"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "unet_name": (
                    model_files(),
                    {"tooltip": "A .gguf file in models/diffusion_models or models/unet."},
                ),
            },
            "optional": {
                "compute_dtype": (
                    list(COMPUTE_DTYPES),
                    {"default": "auto", "tooltip": "Precision of the computation; auto takes what ComfyUI chooses."},
                ),
                "backend": node.BACKEND,
            },
        }

    @classmethod
    def IS_CHANGED(cls, unet_name: str | None, **_: Any) -> Any:
        return node.UNKNOWN if unet_name is None else node.file_state(model_path(unet_name))

    @classmethod
    def VALIDATE_INPUTS(cls, unet_name: str | None) -> bool | str:
        if unet_name is not None and model_path(unet_name) is None:
            return node.missing(unet_name, REMEDY)
        return True

    def load(self, unet_name: str, compute_dtype: str = "auto", backend: str = "auto") -> dict:
        path = model_path(unet_name)
        if path is None:
            raise CorruptFile(node.missing(unet_name, REMEDY))
        patcher = load_diffusion_model(path, compute_dtype, backend)
        log.info("%s: %s", os.path.basename(path), patcher.graft.summary)
        return node.result((patcher,), patcher.graft.summary)
