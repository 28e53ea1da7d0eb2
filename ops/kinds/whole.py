"""Adapters that hold a whole weight or a whole difference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...kernels import linear
from ..layout import Layout, Operator
from ..packed import PackedTensor
from .adapter import Adapter, Current
from .factors import check_factors, check_same


class SecondWeight(Adapter):
    """What runs as a weight of its own beside W, ``F(x) + s·weight x``."""

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.own(x, p.weight) * s


@dataclass(frozen=True, eq=False, repr=False)
class Diff(SecondWeight):
    """``ΔW = diff``: a full difference.

    Attributes:
        diff: of the parameter's shape.
    """

    diff: torch.Tensor

    kind: ClassVar[str] = "diff"

    def check(self, shape: torch.Size) -> None:
        check_factors("diff", diff=self.diff)
        check_same(self.diff, shape)

    def rows(self, start: int, length: int) -> Diff:
        return replace(self, diff=self.diff.narrow(0, start, length))

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {"weight": self.diff.packed if isinstance(self.diff, PackedTensor) else self.diff}

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.diff, PackedTensor):
            return super().added(p, at, x, s)
        diff = self.diff.with_packed(p.weight.to(x.device))
        if at.kernel:
            return at.own(x, diff.dequantize(x.dtype)) * s
        return linear(x, diff.packed, diff.fmt, rows=diff.shape[0], scale=diff.scale) * s

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        if isinstance(self.diff, PackedTensor):
            return self.diff.dequantize(torch.float32).to(weight)
        return self.diff.to(weight, copy=True)


@dataclass(frozen=True, eq=False, repr=False)
class ModelDiff(SecondWeight):
    """``ΔW = target − W₀`` with W₀ the base weight: another model as a LoRA (ComfyUI's ``model_as_lora``).

    Attributes:
        target: of the parameter's shape.
    """

    target: torch.Tensor

    kind: ClassVar[str] = "model_as_lora"

    def check(self, shape: torch.Size) -> None:
        check_factors("model_as_lora", target=self.target)
        check_same(self.target, shape)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        base = current.base()
        return {"weight": self.target.to(base) - base}


@dataclass(frozen=True, eq=False, repr=False)
class Set(Adapter):
    """``W' = value``: takes the place of whatever was there; its strength says nothing.

    Attributes:
        value: of the parameter's shape.
    """

    value: torch.Tensor

    kind: ClassVar[str] = "set"
    idle_at_zero: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def check(self, shape: torch.Size) -> None:
        check_factors("set", value=self.value)
        check_same(self.value, shape)

    def rows(self, start: int, length: int) -> Set:
        return replace(self, value=self.value.narrow(0, start, length))

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {"weight": self.value}

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.own(x, p.weight)

    def operator(self, p: Any, at: Layout, f: Operator, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.own(x, p.weight)

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        return self.value.to(weight, copy=True)
