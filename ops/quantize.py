"""Quantizing weights: rows of floats to the bytes of a GGUF type.

libgguf has the quantizers of llama.cpp and gives their bytes; this hands it rows on all cores, and keeps from it what
it does not survive.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch

from ..kernels import Format, GraftError, UnsupportedFormat, cpu

_LARGEST_HALF = 65504.0
"""The scales of blocks are fp16."""

_LEAST_IMPORTANCE = 1e-4
"""Of the mean: where a whole block counts nothing, quantizers write zeros or worse."""


def quantize(weight: torch.Tensor, fmt: Format, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes of a weight in a type, for quantized ones those that libgguf writes.

    Args:
        weight: fp32 ``[rows, columns]`` on the CPU.
        fmt: the type; rows have to fill its blocks.
        importance: fp32 ``[columns]``, the mean square of what each column is multiplied with. Columns below
            1/10,000 of the mean count as that.

    Returns:
        uint8 ``[rows, row_bytes]``.

    Raises:
        UnsupportedFormat: nothing here writes this type, or not without `importance`.
        CorruptFile: the rows do not fill whole blocks.
        GraftError: a weight is not finite, or too large for the type.
    """
    rows, columns = weight.shape
    importance = None if importance is None else _weighing(importance, columns)
    if reason := cannot_write(fmt, importance is not None):
        raise UnsupportedFormat(reason)
    out = torch.empty(rows, fmt.row_bytes(columns), dtype=torch.uint8)
    weight = weight.detach().to(torch.float32).contiguous()
    if not out.numel():
        return out
    _check_range(weight, fmt)
    if not fmt.is_quantized:
        assert fmt.dtype is not None
        return out.copy_(weight.to(fmt.dtype).view(torch.uint8).reshape(out.shape))
    _prepare(fmt)
    parts = min(rows, torch.get_num_threads())
    pairs = list(zip(weight.tensor_split(parts), out.tensor_split(parts), strict=True))
    if len(pairs) == 1:
        cpu.encode(*_args(pairs[0], fmt, importance))
        return out
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(lambda pair: cpu.encode(*_args(pair, fmt, importance)), pairs))
    return out


def cannot_write(fmt: Format, with_importance: bool = False) -> str | None:
    """Why no weight can be written in this type here, with what to do about it; None if it can."""
    if not fmt.is_quantized:
        known = fmt.dtype is not None and fmt.dtype.is_floating_point
        return None if known else f"weights cannot be written in {fmt.name}: choose Q8_0 or another type"
    if reason := cpu.cannot_encode(fmt):
        return (
            f"no weight can be written in {fmt.name}, {reason}: where it has no wheel for your platform, make the "
            "file in F16 or BF16, or on another computer"
        )
    if needs_importance(fmt) and not with_importance:
        return (
            f"{fmt.name} needs an importance matrix, without it the model is lost: connect one to `importance`, or "
            "choose IQ3_XXS or a larger type"
        )
    return None


def needs_importance(fmt: Format) -> bool:
    """Whether llama.cpp writes this type with an importance matrix only."""
    return fmt.name.startswith(("IQ1", "IQ2"))


def _args(
    pair: tuple[torch.Tensor, torch.Tensor], fmt: Format, importance: torch.Tensor | None
) -> tuple[torch.Tensor, Format, torch.Tensor | None, torch.Tensor]:
    return pair[0], fmt, importance, pair[1]


def _check_range(weight: torch.Tensor, fmt: Format) -> None:
    least, largest = (float(edge) for edge in torch.aminmax(weight))
    if not (abs(least) < float("inf") and abs(largest) < float("inf")):
        raise GraftError("a weight is not a finite number: the model or a LoRA on it is damaged")
    if max(-least, largest) > _LARGEST_HALF and fmt.name not in ("F32", "BF16", "F64"):
        raise GraftError(f"a weight is {max(-least, largest):.3g}, larger than {fmt.name} can hold: keep it in BF16")


def _weighing(importance: torch.Tensor, columns: int) -> torch.Tensor | None:
    """`importance` as the quantizers survive it; None where it says nothing."""
    if tuple(importance.shape) != (columns,):
        raise GraftError(f"the importance is of {list(importance.shape)} columns, and the weight has {columns}")
    importance = importance.detach().to("cpu", torch.float32)
    mean = float(importance.mean())
    if not (float(importance.min()) >= 0 and mean < float("inf")):
        raise GraftError("the importance holds numbers that are negative or not finite: collect it again")
    return importance.clamp(min=_LEAST_IMPORTANCE * mean).contiguous() if mean else None


@functools.cache
def _prepare(fmt: Format) -> None:
    """Let libgguf make the tables of a type, which it does at first use and not for several threads."""
    block = torch.ones(1, fmt.block_size)
    cpu.encode(block, fmt, torch.ones(fmt.block_size), torch.empty(1, fmt.type_size, dtype=torch.uint8))


__all__ = ["cannot_write", "needs_importance", "quantize"]
