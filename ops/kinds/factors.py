"""What an adapter's tensors have to be, and the products that several kinds form of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...kernels import AdapterError

Shape = Sequence[int]


class Factors(NamedTuple):
    """ΔW = scale · B · A, flattened: A ``[r, in · k]``, B ``[out, r]``."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def times(shape: Shape) -> str:
    """A shape as messages write it: ``3072×64``."""
    return "×".join(map(str, shape))


def wide(tensor: torch.Tensor | None) -> torch.Tensor:
    """In a dtype that a product of factors keeps its digits in."""
    assert tensor is not None
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def alike(first: torch.Tensor | None, second: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors, `wide` and in one dtype: no product takes two."""
    a, b = wide(first), wide(second)
    common = torch.promote_types(a.dtype, b.dtype)
    return a.to(common), b.to(common)


def through_core(core: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A Tucker core ``[r, r', k, ...]`` behind a 1×1 down ``[r', in]``: one ``[r, in · k]``."""
    return torch.einsum("ij...,jc->ic...", *alike(core, down)).flatten(1)


def check_factors(kind: str, **factors: torch.Tensor | None) -> None:
    """Every factor holds finite floats."""
    for name, factor in factors.items():
        if factor is None:
            continue
        if not factor.is_floating_point():
            raise AdapterError(
                f"{name} of this {kind} is {str(factor.dtype).removeprefix('torch.')} without a scale: "
                "get a file with bf16, fp16 or fp8 factors"
            )
        values = factor.float() if factor.element_size() == 1 else factor
        if not torch.isfinite(values).all():
            raise AdapterError(f"{name} of this {kind} holds NaN or infinity: the training has diverged")


def check_rank(rank: int) -> None:
    if rank == 0:
        raise AdapterError("the adapter has rank 0, so it does nothing")


def check_same(tensor: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise AdapterError(misfit(tensor.shape, shape))


def check_pair(name: str, up: torch.Tensor, rank: int, inner: Shape, shape: torch.Size) -> None:
    """An up factor and the input dimensions of its down factor make a weight of `shape`."""
    if math.prod(up.shape[1:]) != rank:
        raise AdapterError(f"{name} has rank {math.prod(up.shape[1:])}, its counterpart {rank}: the file is damaged")
    if up.shape[0] != shape[0] or not same_inputs(inner, shape[1:]):
        raise AdapterError(misfit((up.shape[0], *inner), shape))


def same_inputs(inner: Shape, wanted: Shape) -> bool:
    """Equal but for dimensions of 1 at the end, or flattened."""
    if len(inner) == 1:
        return inner[0] == math.prod(wanted)
    length = max(len(inner), len(wanted))
    return _extended(inner, length) == _extended(wanted, length)


def _extended(shape: Shape, length: int) -> tuple[int, ...]:
    return (*shape, *(1,) * (length - len(shape)))


def misfit(got: Shape, shape: Shape) -> str:
    return f"the adapter is for {times(got)}, the weight is {times(shape)}: it was made for another model"
