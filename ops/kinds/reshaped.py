"""Adapters that reach a weight in another shape or order than their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...kernels import AdapterError
from ..layout import Layout, Operator
from .adapter import Adapter, Current
from .factors import Factors, misfit, times


@dataclass(frozen=True, eq=False, repr=False)
class Permuted(Adapter):
    """``ΔW' = ΔW[order]``: an adapter whose difference the host reorders, e.g. scale and shift swapped.

    Attributes:
        order: for each output row, the row of ΔW that it gets.
    """

    inner: Adapter
    order: tuple[int, ...]

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.inner.kind

    def check(self, shape: torch.Size) -> None:
        self.inner.check(shape)

    @property
    def is_low_rank(self) -> bool:  # type: ignore[override]
        return self.inner.is_low_rank

    def low_rank(self) -> Factors:
        factors = self.inner.low_rank()
        return factors._replace(up=factors.up[list(self.order)])

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        if self.is_low_rank:
            return super().tensors(current)
        return {**self.inner.tensors(current), "order": torch.tensor(self.order)}

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if self.is_low_rank:
            return super().added(p, at, x, s)
        return self.inner.added(p, at, x, s).index_select(at.axis, p.order.to(x.device))

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        return self.inner.delta(weight)[list(self.order)]


@dataclass(frozen=True, eq=False, repr=False)
class Part(Adapter):
    """``ΔW' = ΔW[start : start + length]``: rows of an adapter that cannot be made for them alone.

    Attributes:
        inner: an additive adapter of `whole` rows.
    """

    inner: Adapter
    whole: int
    start: int
    length: int

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.inner.kind

    def check(self, shape: torch.Size) -> None:
        if self.length != shape[0] or not 0 <= self.start <= self.whole - self.length:
            raise AdapterError(misfit((self.length, *shape[1:]), shape))
        self.inner.check(torch.Size((self.whole, *shape[1:])))

    def rows(self, start: int, length: int) -> Part:
        return replace(self, start=self.start + start, length=length)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return self.inner.tensors(current)

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return self.inner.added(p, at, x, s).narrow(at.axis, self.start, self.length)

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        whole = self.inner.delta(weight.new_empty((self.whole, *weight.shape[1:])))
        return whole.narrow(0, self.start, self.length).clone()  # the other rows would be held with a part of them


@dataclass(frozen=True, eq=False, repr=False)
class Padded(Adapter):
    """Pads W with zeros to `shape`, then applies `inner`: ``pad(F(x[..., :in]))`` (Flux Tools' control LoRAs).

    Attributes:
        shape: of the weight from here on, no smaller than it was in any dimension.
    """

    inner: Adapter
    shape: tuple[int, ...]

    additive: ClassVar[bool] = False
    idle_at_zero: ClassVar[bool] = False

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.inner.kind

    def check(self, shape: torch.Size) -> None:
        larger = len(self.shape) == len(shape) and all(n >= m for n, m in zip(self.shape, shape, strict=True))
        if not larger or tuple(self.shape[2:]) != tuple(shape[2:]):
            raise AdapterError(
                f"the adapter makes a weight of {times(shape)} into {times(self.shape)}: "
                "a weight can only be padded, so it was made for another model"
            )
        self.inner.check(torch.Size(self.shape))

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        return self.inner.merged(Pad(tuple(weight.shape), self.shape).merged(weight, 1.0), s)


@dataclass(frozen=True, eq=False, repr=False)
class Pad(Adapter):
    """``pad_out(F(x[..., :in]))``: what `Padded` does to the weight first.

    Attributes:
        before, shape: of the weight, until then and from then on.
    """

    before: tuple[int, ...]
    shape: tuple[int, ...]

    kind: ClassVar[str] = "pad"
    idle_at_zero: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    from_output: ClassVar[bool] = False

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {}

    def operator(self, p: Any, at: Layout, f: Operator, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        y = f(at.narrow(x, 0, self.before[1]))
        return F.pad(y, (*(0, 0) * len(at.kernel), 0, self.shape[0] - self.before[0]))

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        wide = weight.new_zeros(self.shape)
        wide[: self.before[0], : self.before[1]] = weight
        return wide
