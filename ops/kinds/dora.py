"""DoRA: a magnitude for each row or column of the weight that another adapter has changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...kernels import AdapterError
from ..layout import Layout, Operator
from .adapter import Adapter, Current
from .factors import check_factors, times, wide

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class DoRA(Adapter):
    """A magnitude for each output row or input column of ``W + ΔW`` (Liu et al. 2024).

    With ``c = m / (norm + eps)``, ``W' = W + s·(c ∘ (W + ΔW) − W)``; s stays outside of c. The norm is that of
    the input columns of W + ΔW, or of the output rows: of W as ComfyUI has it, of W + ΔW in LyCORIS and PEFT.

    Attributes:
        inner: what gives ΔW.
        magnitude: m, ``[out]`` or ``[in]``.
        axis: 0 for output rows, 1 for input columns.
        norm: ``comfy`` or ``merged``; says whose norm on axis 0.
    """

    inner: Adapter
    magnitude: torch.Tensor
    axis: int = 0
    norm: str = "comfy"

    kind: ClassVar[str] = "dora"
    additive: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = True

    @property
    def from_output(self) -> bool:  # type: ignore[override]
        return self.axis == 0 and self.inner.additive

    def check(self, shape: torch.Size) -> None:
        self.inner.check(shape)
        check_factors("DoRA", dora_scale=self.magnitude)
        if self.magnitude.numel() != shape[self.axis]:
            raise AdapterError(f"dora_scale has {self.magnitude.numel()} magnitudes for a weight of {times(shape)}")

    def rows(self, start: int, length: int) -> DoRA:
        if self.axis:
            raise AdapterError("DoRA's norms are over all rows of the fused layer, which this model has in parts")
        inner, magnitude = self.inner.rows(start, length), self.magnitude.narrow(0, start, length)
        return replace(self, inner=inner, magnitude=magnitude)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        c = self._ratio(self._norms(current), current.name)
        if not self.inner.is_low_rank:
            return {**self.inner.tensors(current), "c": c, "gain": c - 1}
        factors = self.inner.low_rank()
        down, up = wide(factors.down).to(c), wide(factors.up).to(c) * factors.scale
        if self.axis == 0:
            return {"down": down, "up": up * c.unsqueeze(1), "gain": c - 1}
        return {"down": down * c.repeat_interleave(down.shape[1] // c.numel()), "up": up, "gain": c - 1}

    def _norms(self, current: Current) -> torch.Tensor:
        if self.axis == 0 and self.norm == "comfy":
            return current.row_norms()
        if not self.inner.is_low_rank:
            weight = current.dense()
            return self._norms_of(self.inner.delta(weight).add_(weight))
        factors = self.inner.low_rank()
        squares: list[torch.Tensor] = []
        for rows, weight in current.chunks():
            block = torch.addmm(weight, factors.up[rows].to(weight), factors.down.to(weight), alpha=factors.scale)
            per_column = block.square().sum(0).reshape(self.magnitude.numel(), -1).sum(1) if self.axis else None
            squares.append(block.square().sum(1) if per_column is None else per_column)
        return (torch.stack(squares).sum(0) if self.axis else torch.cat(squares)).sqrt()

    def _norms_of(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.movedim(self.axis, 0).flatten(1).norm(dim=1)

    def _ratio(self, norms: torch.Tensor, name: str) -> torch.Tensor:
        """c; 1 where a row of zeros would have made it magnitude / eps."""
        norms = norms.to(self.magnitude.device)
        c = self.magnitude.to(norms) / (norms + torch.finfo(norms.dtype).eps)
        empty = norms == 0
        if empty.any():
            log.warning("%s: DoRA leaves %d rows or columns of zeros as they are", name, int(empty.sum()))
            c = torch.where(empty, 1.0, c)
        return c

    def operator(self, p: Any, at: Layout, f: Operator, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if self.axis == 0:
            turned = self.inner.turned(p, at, x)
            return self._on_rows(p, at, f(x), x, s, None if turned is None else f(turned))
        scaled = x * at.spread(p.c, x) if hasattr(p, "c") else x  # else c is in the down factor
        turned = self.inner.turned(p, at, scaled)

        def change(out: torch.Tensor | None) -> torch.Tensor:
            changed = torch.addcmul(x, x, at.spread(p.gain, x, s), out=out)
            return changed if turned is None else changed.add_(s * turned)

        return Adapter.output(self.inner, p, at, at.run_on(f, x, change), scaled, s)

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return self._on_rows(p, at, y, x, s, None)

    def _on_rows(
        self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor, through: torch.Tensor | None
    ) -> torch.Tensor:
        # c − 1 is small: as a factor of its own it keeps its digits in bf16
        y = y.addcmul_(y, at.spread(p.gain, y, s))
        if not hasattr(p, "c"):  # c is in the up factor
            return self.inner.output(p, at, y, x, s)
        difference = self.inner.added(p, at, x, s)
        return y.addcmul_(difference if through is None else difference + s * through, at.spread(p.c, y))

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        whole = self.inner.delta(weight).add_(weight)
        own = self.axis == 0 and self.norm == "comfy"
        c = self._ratio(self._norms_of(weight if own else whole), "weight").to(weight.device)
        c = c.reshape((-1, *(1,) * (weight.dim() - 1)) if self.axis == 0 else (1, -1, *(1,) * (weight.dim() - 2)))
        return whole.mul_(c).sub_(weight).mul_(s).add_(weight)
