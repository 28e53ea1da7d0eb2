"""LoKr: ΔW as a Kronecker product."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...kernels import AdapterError
from ..layout import Layout
from .adapter import Adapter, Current
from .factors import alike, check_factors, check_rank, same_inputs, through_core, times, wide
from .reshaped import Part


@dataclass(frozen=True, eq=False, repr=False)
class LoKr(Adapter):
    """``ΔW = a · w1 ⊗ w2`` (Kronecker product; LyCORIS), either factor whole or itself of low rank.

    On x seen as ``[..., c, d]``, w2 acts on the last axis and w1 on the one before it. ``a`` is alpha over
    the rank of w2, else that of w1, and 1 where both are whole.

    Attributes:
        w1: ``[a, c]``, or w1_a ``[a, r]`` and w1_b ``[r, c]``.
        w2: ``[b, d]`` or ``[b, d, k, k]``, or w2_a ``[b, r]`` and w2_b ``[r, d]`` or ``[r, d · k · k]``.
        t2: ``[r, r, k, k]``, with w2_a ``[r, b]`` and w2_b ``[r, d]``; read only where w2 is not whole.
    """

    w1: torch.Tensor | None
    w2: torch.Tensor | None
    alpha: float | None = None
    w1_a: torch.Tensor | None = None
    w1_b: torch.Tensor | None = None
    w2_a: torch.Tensor | None = None
    w2_b: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    kind: ClassVar[str] = "lokr"

    @property
    def scale(self) -> float:
        rank = self.w2_b.shape[0] if self.w2 is None and self.w2_b is not None else None
        if rank is None and self.w1 is None and self.w1_b is not None:
            rank = self.w1_b.shape[0]
        return 1.0 if self.alpha is None or rank is None else self.alpha / rank

    def check(self, shape: torch.Size) -> None:
        names = ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")
        check_factors("LoKr", **{f"lokr_{name}": getattr(self, name) for name in names})
        for name in ("w1", "w2"):
            whole, a, b = (getattr(self, name + end) for end in ("", "_a", "_b"))
            if whole is None and (a is None or b is None):
                raise AdapterError(f"lokr_{name} is missing: the file is incomplete")
        left, right = self.shapes()
        got = (left[0] * right[0], left[1] * math.prod(right[1:]))
        kernels = len(right) == 2 or same_inputs((1, *right[2:]), (1, *shape[2:]))
        if len(left) != 2 or got != (shape[0], math.prod(shape[1:])) or not kernels:
            raise AdapterError(
                f"LoKr of {times(left)} and {times(right)} does not make {times(shape)}: "
                "it was made for another model"
            )

    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """Shapes of the whole w1 and w2.

        Raises:
            AdapterError: their own factors do not fit each other.
        """
        left = _product_shape("lokr_w1", self.w1, self.w1_a, self.w1_b)
        if self.t2 is None or self.w2 is not None:
            return left, _product_shape("lokr_w2", self.w2, self.w2_a, self.w2_b)
        assert self.w2_a is not None and self.w2_b is not None
        if self.t2.shape[:2] != (self.w2_a.shape[0], self.w2_b.shape[0]):
            raise AdapterError(f"lokr_t2 is {times(self.t2.shape)} for ranks of {self.w2_a.shape[0]}")
        return left, torch.Size((self.w2_a.shape[1], self.w2_b.shape[1], *self.t2.shape[2:]))

    def rows(self, start: int, length: int) -> Adapter:
        """A LoKr of fewer groups; of its rows a part, where a group is not for this layer alone."""
        group = self.shapes()[1][0]
        first, last = start // group, -(-(start + length) // group)
        name = "w1" if self.w1 is not None else "w1_a"
        groups = replace(self, **{name: getattr(self, name).narrow(0, first, last - first)})
        if (last - first) * group == length:
            return groups
        return Part(groups, groups._count(), start - first * group, length)

    def _count(self) -> int:
        """Rows of ΔW."""
        left, right = self.shapes()
        return left[0] * right[0]

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        if len(current.shape) > 2 and current.shape[1] % self.shapes()[0][1]:
            # w1 reaches into the kernels, so nothing is left to separate
            return {"weight": self.delta(torch.empty(self._count(), *current.shape[1:]))}
        w1 = self._first()
        if self.w2 is not None:
            return {"w1": w1 * self.scale, "w2": self.w2.flatten(1)}
        w2_a, w2_b = self._second()
        return {"w1": w1 * self.scale, "w2_a": w2_a, "w2_b": w2_b}

    def _first(self) -> torch.Tensor:
        return wide(self.w1) if self.w1 is not None else torch.mm(*alike(self.w1_a, self.w1_b))

    def _second(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w2's factors ``[b, r]`` and ``[r, d · k]``."""
        assert self.w2_a is not None and self.w2_b is not None
        if self.t2 is None:
            return self.w2_a, self.w2_b.flatten(1)
        return self.w2_a.t(), through_core(self.t2, self.w2_b.flatten(1))

    def _in_groups(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """t and w, by which ``t wᵀ`` is s·ΔW x group by group; w1 acts where there is least of it."""
        w1 = p.w1.to(x) * s
        groups = at.grouped(x, w1.shape[1])
        if self.w2 is not None:
            return at.across(groups, w1), p.w2
        return at.across(at.own(groups, p.w2_b), w1), p.w2_a

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if s.dim():
            return self.added(p, at, x, s.new_ones(())) * s
        if hasattr(p, "weight"):
            return at.own(x, p.weight) * s
        t, w = self._in_groups(p, at, x, s)
        return at.joined(at.own(t, w) if self.w2 is not None else at.mix(t, w), p.w1.shape[0])

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if at.kernel or s.dim():
            return super().output(p, at, y, x, s)
        at.add_mixed(at.grouped(y, p.w1.shape[0]), *self._in_groups(p, at, x, s))
        return y

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        w1 = self._first().to(weight)
        if self.w2 is not None:
            w2 = self.w2.to(weight).flatten(1)
        else:
            w2_a, w2_b = self._second()
            w2 = w2_a.to(weight) @ w2_b.to(weight)
        return torch.kron(w1.contiguous(), w2.contiguous()).mul_(self.scale).reshape(weight.shape)


def _product_shape(
    name: str, whole: torch.Tensor | None, a: torch.Tensor | None, b: torch.Tensor | None
) -> torch.Size:
    if whole is not None:
        return whole.shape
    assert a is not None and b is not None
    if a.dim() != 2 or a.shape[1] != b.shape[0]:
        raise AdapterError(f"{name}_a is {times(a.shape)}, {name}_b {times(b.shape)}: the file is damaged")
    check_rank(b.shape[0])
    return torch.Size((a.shape[0], *b.shape[1:]))
