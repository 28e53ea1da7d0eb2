"""GLoRA: a LoRA beside the weight and one in front of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..layout import Layout, Operator
from .adapter import Adapter, Current
from .factors import check_factors, check_pair, check_rank, wide


@dataclass(frozen=True, eq=False, repr=False)
class GLoRA(Adapter):
    """``ΔW = a · (W · a1 · a2 + b1 · b2)`` (Chavan et al. 2023; LyCORIS): ``F(x + s·a·(x a2ᵀ) a1ᵀ) + s·a·(x b2ᵀ) b1ᵀ``.

    Files of older LyCORIS name the factors the other way round, ``W · a2 · a1 + b2 · b1``; `from_host` turns them.

    Attributes:
        a1: ``[in, r]``. a2: ``[r, in]``. b1: ``[out, r]``. b2: ``[r, in]`` or ``[r, in, k, k]``.
    """

    a1: torch.Tensor
    a2: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor
    alpha: float | None = None

    kind: ClassVar[str] = "glora"
    additive: ClassVar[bool] = False
    from_output: ClassVar[bool] = False

    @property
    def rank(self) -> int:
        return self.a2.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self, shape: torch.Size) -> None:
        check_factors("GLoRA", a1=self.a1, a2=self.a2, b1=self.b1, b2=self.b2)
        check_rank(self.rank)
        check_pair("b1", self.b1, self.b2.shape[0], self.b2.shape[1:], shape)
        check_pair("a1", self.a1, self.rank, self.a2.shape[1:], torch.Size((shape[1], shape[1])))

    def rows(self, start: int, length: int) -> GLoRA:
        return replace(self, b1=self.b1.narrow(0, start, length))

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        a1, a2, b1, b2 = (wide(t).flatten(1) for t in (self.a1, self.a2, self.b1, self.b2))
        return {"a1": a1 * self.scale, "a2": a2, "b1": b1 * self.scale, "b2": b2}

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.mix(at.own(x, p.b2) * s, p.b1)

    def turned(self, p: Any, at: Layout, x: torch.Tensor) -> torch.Tensor:
        return at.mix(at.mix(x, p.a2), p.a1)

    def operator(self, p: Any, at: Layout, f: Operator, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        y = at.run_on(f, x, lambda out: at.plus_mixed(x, at.mix(x, p.a2) * s, p.a1, out))
        return at.add_mixed(y, at.own(x, p.b2) * s, p.b1)

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        a1, a2, b1, b2 = (t.to(weight).flatten(1) for t in (self.a1, self.a2, self.b1, self.b2))
        through = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
        return (b1 @ b2).reshape(weight.shape).add_(through).mul_(self.scale)
