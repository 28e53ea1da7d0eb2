"""Scales that files keep in tensors beside the weights.

NVFP4 has a scale for every 16 weights, which means something only times one for the whole weight. llama.cpp writes that
one as F32 ``[1]`` under ``X.scale`` and multiplies what comes out of the matmul by it; others call it
``X.weight.scale``. ComfyUI-GGUF's int8 files have I8 weights with ``X.weight_scale`` ``[rows, 1]`` and a note in the
metadata, and files made of fp8 checkpoints may have kept ``X.scale_weight``. All mean ``W = scale · decoded``, and a
packed weight takes its scale along (`PackedTensor.scale`).

``X.input_scale`` is of another kind: the range of x, for hardware that divides x by it, rounds to 4 or 8 bits,
multiplies, and puts the range back. Where x is not rounded it cancels, so here it is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import torch

from ...kernels.errors import CorruptFile, UnsupportedFormat
from ...kernels.formats import BY_NAME
from ..packed import PackedTensor, as_weight
from .gguf import GGUFFile, GGUFTensor

_OF_WEIGHT = ("scale", "weight.scale", "weight_scale", "scale_weight")
_OF_INPUT = ("input_scale", "weight.input_scale", "weight_input_scale", "scale_input")
_MARKER = "scaled_fp8"
"""Stands beside no weight, and says of a checkpoint that it was in fp8."""

_OF_OTHERS = re.compile(
    r"""weight[._](scale|zero|absmax|quant|nested|format|packed|shape)[\w.]*
    | (input|output|pre_quant|w|wt|block|group|channel|smooth)_?scales?(_\w+)? | scales | scale_(inv|2|output)
    | qweight | qzeros | g_idx | zero_points? | comfy_quant | SCB | smooth_factor\w* | absmax | quant_map""",
    re.VERBOSE,
)
"""What other formats keep beside a weight: ComfyUI's own, bitsandbytes', GPTQ's, SVDQuant's."""

_NOTE = "comfy.gguf.quant."
_ONE = torch.tensor([0x00, 0x3C], dtype=torch.uint8)  # in fp16


def weights_of(tensors: Mapping[str, GGUFTensor], file: GGUFFile) -> dict[str, torch.Tensor]:
    """A state dict of these tensors of a file, in which scales from beside the weights are applied.

    Raises:
        UnsupportedFormat: there is something beside a weight that this cannot apply.
        CorruptFile: a scale is missing.
    """
    scales: dict[str, str] = {}
    spent = {_MARKER}
    for name in tensors:
        weight, kind = _belongs_to(name)
        if weight not in tensors or (kind == "scale" and len(tensors[weight].shape) < 2):  # that of a norm
            continue
        if kind in _OF_INPUT or (kind in _OF_WEIGHT and scales.setdefault(weight, name) == name):
            spent.add(name)
        elif kind in _OF_WEIGHT or _OF_OTHERS.fullmatch(kind):
            raise UnsupportedFormat(_unknown(name, weight, file))
    _check_notes(tensors, scales, file)
    return {
        name: _scaled(tensor, tensors[scales[name]], file) if name in scales else as_weight(tensor)
        for name, tensor in tensors.items()
        if name not in spent
    }


def _belongs_to(name: str) -> tuple[str, str]:
    """The weight beside which a tensor of this name may stand, and as what: ``X.weight`` and ``input_scale``."""
    module, inside, rest = name.partition(".weight.")
    if inside:
        return f"{module}.weight", f"weight.{rest}"
    module, _, kind = name.rpartition(".")
    return f"{module}.weight", kind


def _unknown(name: str, weight: str, file: GGUFFile) -> str:
    return (
        f"{name} says how {weight} is quantized, in a way that Graft does not know: get the model in another type of "
        f"GGUF, such as Q8_0 ({file.path})"
    )


def _check_notes(tensors: Mapping[str, GGUFTensor], scales: Mapping[str, str], file: GGUFFile) -> None:
    """ComfyUI-GGUF's notes on its int8 weights, in JSON under ``comfy.gguf.quant.X.weight``."""
    names = {tensor.name: name for name, tensor in tensors.items()}
    for key in file.metadata:
        name = names.get(key.removeprefix(_NOTE)) if key.startswith(_NOTE) else None
        if name is None:
            continue
        try:
            note = json.loads(str(file.metadata[key]))
            how = note["format"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UnsupportedFormat(_unknown(f"{key} in the metadata", name, file)) from None
        # before there was `weight_rotated`, converters noted a rotation and made none; readers go by it
        if note.get("convrot") and note.get("weight_rotated"):
            raise UnsupportedFormat(
                f"{name} is rotated (ConvRot), which Graft cannot undo: get the model in another type of GGUF, such as "
                f"Q8_0, or use ComfyUI-GGUF ({file.path})"
            )
        if how != "int8_tensorwise":
            raise UnsupportedFormat(_unknown(f"{key} in the metadata", name, file))
        if name not in scales:
            raise CorruptFile(f"{name} needs {name}_scale, which is missing: get the model again ({file.path})")


def _scaled(tensor: GGUFTensor, beside: GGUFTensor, file: GGUFFile) -> torch.Tensor:
    """The weight ``scale · decoded``, packed if its type is."""
    shape = tensor.shape
    scale = as_weight(beside).to(torch.float32).flatten()
    one_a_row = beside.shape[:1] == shape[:1] and scale.numel() == shape[0]
    if scale.numel() != 1 and not one_a_row:
        raise UnsupportedFormat(
            f"{beside.name} is {list(beside.shape)}, and Graft can scale {tensor.name} {list(shape)} only as a whole "
            f"or by rows: get the model in another type of GGUF, such as Q8_0 ({file.path})"
        )
    if tensor.fmt.name == "I8" and tensor.parameters % BY_NAME["Q8_0"].block_size == 0:
        return PackedTensor(_as_q8_0(tensor.data), BY_NAME["Q8_0"], shape, scale=scale)
    if tensor.fmt.is_quantized:
        return PackedTensor(tensor.data, tensor.fmt, shape, scale=scale)
    plain = as_weight(tensor)
    plain = plain.to(torch.promote_types(plain.dtype, torch.float32))
    return plain * scale.view(-1, *[1] * (len(shape) - 1))


def _as_q8_0(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes, given as ``uint8 [n]``, in Q8_0's blocks with a scale of 1: exactly, in about a byte a weight."""
    codes = codes.view(-1, BY_NAME["Q8_0"].block_size)
    return torch.cat([_ONE.expand(len(codes), 2), codes], dim=1).flatten()
