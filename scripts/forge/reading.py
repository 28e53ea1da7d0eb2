"""Model files that Forge reads wrongly or not at all, read by Graft: text encoders of llama.cpp, VAEs, newer types.

What Forge's own reader and its own renaming do right is left to them.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ...kernels import Format, UnsupportedFormat, dequantize
from ...ops.files.contents import TEXT_ENCODER, VAE, other_kind
from ...ops.files.gguf import GGUFTensor, open_gguf
from ...ops.files.scales import weights_of
from ...ops.files.text_encoders import text_encoder_tensors
from ...ops.layers import format_of
from ...ops.packed import PackedTensor
from .host import Host


class TextEncoder(dict[str, torch.Tensor]):
    """A text encoder's state dict, which knows what its file calls the architecture."""

    architecture = ""


def state_dict(path: str | os.PathLike[str], host: Host) -> dict[str, torch.Tensor] | None:
    """A GGUF file as Forge's reader would give it; None where that one reads it as well.

    Raises:
        GraftError: the file is damaged, or holds what nobody can read.
    """
    if host.parameter is None:
        return None
    file = open_gguf(path)
    kind = other_kind(file)
    if kind is VAE:  # Forge has no packed layers for one: decoded, it is as one of safetensors
        return {name: _decoded(weight) for name, weight in weights_of(file.tensors, file).items()}
    # Forge's own way is to decode the whole table, where it has no layer for a packed one
    if "Embedding" in host.layers and kind is TEXT_ENCODER:
        tensors = text_encoder_tensors(file, tokenizer=False)
        state = TextEncoder((k, _parameter(v, host)) for k, v in tensors.items() if not k.startswith("lm_head."))
        state.architecture = file.architecture or ""
        return state
    state = weights_of(file.tensors, file)
    scaled = any(_scale_of(tensor) is not None for tensor in state.values())
    if not scaled and all(_is_known(tensor, host) for tensor in file.tensors.values()):
        return None
    return {name: _parameter(tensor, host) for name, tensor in state.items()}


def _decoded(weight: torch.Tensor) -> torch.Tensor:
    return weight.dequantize(torch.float32) if isinstance(weight, PackedTensor) else weight.clone()


def _scale_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """What stands beside a packed weight in the file, and multiplies it."""
    return tensor.scale if isinstance(tensor, PackedTensor) else None


def _is_known(tensor: GGUFTensor, host: Host) -> bool:
    try:
        host.type_of(tensor.fmt.ggml_type)
    except ValueError:
        return False
    return True


def _parameter(tensor: torch.Tensor, host: Host) -> torch.Tensor:
    fmt = format_of(tensor)
    if not isinstance(tensor, PackedTensor):
        # Forge takes norms and biases of bf16 for something packed
        tensor = tensor.float() if tensor.dim() < 2 and tensor.dtype == torch.bfloat16 else tensor
        return host.gguf_parameter(tensor, fmt, tensor.shape, None)
    kind = _class_of(fmt, host) if tensor.scale is None else ForeignType(fmt, tensor.scale)
    return host.gguf_parameter(tensor.packed, fmt, tensor.shape, kind)


def _class_of(fmt: Format, host: Host) -> Any:
    """Forge's class for a type, or one of ours in its shape."""
    try:
        return host.types.get(host.type_of(fmt.ggml_type)) or ForeignType(fmt)
    except ValueError:
        return ForeignType(fmt)


def placed(state: dict[str, torch.Tensor], guess: Any) -> dict[str, torch.Tensor] | None:
    """A text encoder under the names where Forge looks for it, if it would take it for another one; else None.

    In llama.cpp's files Qwen3-VL's text model has the same names as Qwen3, and what sees pictures is elsewhere.

    Args:
        guess: Forge's description of the model that it is for.
    """
    if getattr(state, "architecture", "") != "qwen3vl":
        return None
    target = next((name for name in guess.clip_target({}) if name.startswith("qwen3vl")), None)
    if target is None:
        return None
    return {f"{guess.text_encoder_key_prefix[0]}{target}.{name}": tensor for name, tensor in state.items()}


_PID_MODULATION = ".adaLN_modulation.0."


def is_pid_modulation(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is a packed weight with both modulations of one of PiD's pixel blocks."""
    return "pixel_blocks." in name and _PID_MODULATION in name and getattr(tensor, "gguf_cls", None) is not None


def pid_parts(
    name: str, parameter: Any, fmt: Format, shape: torch.Size, state: dict[str, torch.Tensor], host: Host
) -> dict[str, torch.Tensor]:
    """The two layers that Forge has for one such weight, as it makes them of floats.

    Args:
        state: the rest of the file, under Forge's names.
    """
    pixel = next(tensor for key, tensor in state.items() if key.endswith("pixel_embedder.proj.weight")).shape[0]
    groups = parameter.data.reshape(shape[0] // (6 * pixel), 6, -1)  # of all that has one place in a patch
    base, field = name.removeprefix("core.").removeprefix("net.").split(_PID_MODULATION)
    rows = shape[0] // 2, *shape[1:]
    return {
        f"{base}.adaLN_modulation_{part}.{field}": host.gguf_parameter(
            groups[:, first : first + 3].reshape(-1), fmt, rows, parameter.gguf_cls
        )
        for part, first in (("msa", 0), ("mlp", 3))
    }


class ForeignType:
    """A GGUF type that Forge has no decode for, in the shape of one of its own type classes.

    Attributes:
        scale: what the weights of this one parameter are multiplied by, fp32 ``[1]`` or ``[rows]``; None for most.
    """

    def __init__(self, fmt: Format, scale: torch.Tensor | None = None) -> None:
        self.fmt, self.scale = fmt, scale
        self.__name__ = fmt.name

    def bake(self, parameter: Any) -> None:
        """There is nothing to re-lay out."""
        parameter.baked = True

    def dequantize_pytorch(self, parameter: Any) -> torch.Tensor:
        """The weights in the parameter's computation dtype and logical shape."""
        shape = tuple(map(int, parameter.real_shape))
        data = parameter.data.view(torch.uint8)
        scale = None if self.scale is None else self.scale.to(data.device)
        return dequantize(data, self.fmt, shape, parameter.computation_dtype, scale=scale)

    def quantize_pytorch(self, data: torch.Tensor, parent: Any) -> torch.Tensor:
        raise UnsupportedFormat(
            f"a LoRA cannot be merged into {self.fmt.name} weights without losing it: turn Graft on in the tab Graft"
        )


__all__ = ["ForeignType", "TextEncoder", "is_pid_modulation", "pid_parts", "placed", "state_dict"]
