"""What adapters, or another model, change in a weight, as a LoRA.

Additive adapters of low rank are put side by side, which is exact. All else is a difference in full, and either can be
cut to a rank, of which `Change.error` tells what it loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..kernels import AdapterError
from .kinds import Padded, Patch, merge
from .kinds.factors import Factors, wide

_LEAST = 1e-6  # of the largest singular value: fp32's own rounding
_SVD_IN_FULL = 768  # rows or columns up to which it is quicker than looking for the first few
_OVERSAMPLED, _ITERATIONS = 16, 6


@dataclass(frozen=True)
class Change:
    """ΔW of one parameter: two factors, or the difference itself.

    Attributes:
        shape: of the parameter.
        up, down: fp32 ``[out, r]`` and ``[r, in · k]``, whose product it is; None where it is in full.
        full: fp32, of the parameter's shape; None where it is factors.
        lost, norm: Frobenius norms of what a cut has taken from it, and of what it was before.
    """

    shape: torch.Size
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    full: torch.Tensor | None = None
    lost: float = 0.0
    norm: float = 0.0

    @property
    def rank(self) -> int:
        """Of the factors; 0 where it is in full."""
        return 0 if self.up is None else self.up.shape[1]

    def matrix(self) -> torch.Tensor:
        """``[out, in · k]``; of a vector ``[out, 1]``."""
        if self.full is not None:
            return self.full.reshape(self.shape[0], -1)
        assert self.up is not None and self.down is not None
        return self.up @ self.down


def change_of(
    patches: Sequence[Patch], shape: torch.Size, weight: Callable[[], torch.Tensor],
    host: Callable[[Patch, torch.Tensor], torch.Tensor] | None = None,
) -> Change | None:  # fmt: skip
    """What patches of a parameter add up to, exactly; None where that is nothing.

    Args:
        shape: of the parameter.
        weight: its value without any patch, fp32; asked for only if an adapter depends on it.
        host: merges what is `Opaque`.

    Raises:
        AdapterError: no file of a LoRA can hold it.
    """
    live = [p for p in patches if p.strength or p.strength_model != 1.0 or not p.adapter.idle_at_zero]
    if not live:
        return None
    if any(p.when is not None for p in live):
        raise AdapterError(
            "a LoRA by region, step, prompt or block has no single strength: take it off before you save"
        )
    if any(isinstance(p.adapter, Padded) for p in live):
        raise AdapterError("a control LoRA that makes the model's first layer wider cannot be saved again: take it off")
    if len(shape) > 1 and all(_is_product(p) for p in live):
        ups, downs = zip(*(_placed(p, shape) for p in live), strict=True)
        return _smallest(Change(shape, torch.cat(ups, 1), torch.cat(downs)))
    base = weight()
    return between(merge(base.clone(), live, host, lambda: base), base)


def between(after: torch.Tensor, before: torch.Tensor) -> Change | None:
    """What is to be added to `before`, fp32, to get `after`; None where they are the same."""
    difference = after.float() - before.float()
    return Change(difference.shape, full=difference) if difference.any() else None


def _is_product(patch: Patch) -> bool:
    in_place = patch.region is None or patch.region.dim < 2
    return in_place and patch.adapter.is_low_rank and patch.strength_model == 1.0


def _placed(patch: Patch, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a patch with its strength in them, as ones of the whole weight."""
    factors: Factors = patch.adapter.low_rank()
    up, down = wide(factors.up).float() * (factors.scale * patch.strength), wide(factors.down).float()
    if patch.region is None:
        return up, down
    dim, start, length = patch.region
    if dim == 0:
        whole = up.new_zeros(shape[0], up.shape[1])
        whole.narrow(0, start, length).copy_(up)
        return whole, down
    whole = down.new_zeros(down.shape[0], *shape[1:])
    whole.narrow(1, start, length).copy_(down.view(-1, length, *shape[2:]))
    return up, whole.flatten(1)


def _smallest(change: Change) -> Change:
    """In full where that is fewer numbers than the factors."""
    rows, columns = change.shape[0], math.prod(change.shape[1:])
    if change.rank * (rows + columns) < rows * columns:
        return change
    return Change(change.shape, full=change.matrix().reshape(change.shape))


def cut(change: Change, rank: int, inputs: torch.Tensor | None = None) -> Change:
    """The nearest change of at most this rank; vectors stay as they are.

    Args:
        inputs: fp32 ``[n, in · k]``, what the weight is multiplied by, or a sketch of it. Then the nearest is that
            which changes the products with these least, and so are the norms (EoRA, arXiv 2410.21271).

    Raises:
        AdapterError: the inputs are of another width, or the change is not finite.
    """
    if len(change.shape) < 2 or (change.full is None and change.rank <= rank):
        return change
    whole = change.matrix()
    if not torch.isfinite(whole).all():
        raise AdapterError("a LoRA or model holds numbers that are not finite: its training diverged, or it is damaged")
    if inputs is not None and inputs.shape[1] != whole.shape[1]:
        raise AdapterError(
            f"the calibration is of another model, with {inputs.shape[1]} columns where a weight has {whole.shape[1]}"
        )
    if inputs is not None and not inputs.any():
        return replace(cut(change, rank), lost=0.0, norm=0.0)  # nothing went in, so nothing tells what counts
    if inputs is not None:
        up, down = _nearest_by(whole, inputs, rank)
    else:
        left, values, right = _of_product(change) if change.full is None else _of_matrix(whole, rank)
        kept = _worth_keeping(values, rank)
        up, down = left[:, :kept] * values[:kept], right[:kept]
    # of one size each, so that halves hold either; trainers leave layers whose change is nothing at all
    balance = (down.norm() / up.norm()).sqrt() if up.any() and down.any() else 1.0
    nearest = replace(change, up=up * balance, down=down / balance, full=None)
    missing = whole - nearest.matrix()
    if inputs is not None:
        whole, missing = whole @ inputs.T, missing @ inputs.T
    return replace(nearest, lost=float(missing.norm()), norm=float(whole.norm()))


def _worth_keeping(values: torch.Tensor, rank: int) -> int:
    """How many singular values: what is only rounding needs no rank."""
    return min(rank, max(1, int((values > _LEAST * values[0]).sum())))


def _nearest_by(matrix: torch.Tensor, inputs: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The product P of a rank for which ``|(matrix - P) inputsᵀ|`` is the least.

    That is UUᵀ·matrix with the first left singular vectors U of ``matrix · inputsᵀ``.
    """
    u, values, _ = torch.linalg.svd(matrix @ inputs.T, full_matrices=False)
    up = u[:, : _worth_keeping(values, rank)]
    return up, up.T @ matrix


def _of_product(change: Change) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of a product, by way of one as small as its rank."""
    assert change.up is not None and change.down is not None
    left, upper = torch.linalg.qr(change.up)
    right, lower = torch.linalg.qr(change.down.T)
    u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ u, values, v @ right.T


def _of_matrix(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first singular values and vectors, by subspace iteration where all of them would take long.

    (Halko, Martinsson, Tropp 2011, algorithm 4.4.)
    """
    wanted = rank + _OVERSAMPLED
    if min(matrix.shape) <= max(_SVD_IN_FULL, 2 * wanted):
        return torch.linalg.svd(matrix, full_matrices=False)
    start = torch.randn(matrix.shape[1], wanted, generator=torch.Generator().manual_seed(0)).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ basis)
    u, values, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, values, v


def error(changes: Sequence[Change]) -> float:
    """What cuts have lost of all that was changed, ``|ΔW - BA| / |ΔW|`` over all weights that were cut."""
    norm = math.sqrt(sum(change.norm**2 for change in changes))
    return math.sqrt(sum(change.lost**2 for change in changes)) / norm if norm else 0.0


__all__ = ["Change", "between", "change_of", "cut", "error"]
