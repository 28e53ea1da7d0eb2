"""LoRA and LoHa: ΔW as a product of two factors, in whatever shape the trainer wrote them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...kernels import AdapterError
from ...kernels.scratch import rows_per_chunk
from ..layout import Layout
from .adapter import Adapter, Current
from .factors import Factors, check_factors, check_pair, check_rank, through_core, times, wide


@dataclass(frozen=True, eq=False, repr=False)
class LoRA(Adapter):
    """``ΔW = a · up · down`` (Hu et al. 2021); for convolutions kohya's LoCon, a k×k down and a 1×1 up.

    With `mid`, LoCon's Tucker form: a 1×1 down, k×k mid, 1×1 up.

    Attributes:
        up: ``[out, r]`` or ``[out, r, 1, 1]``.
        down: ``[r, in]`` or ``[r, in, k, k]``.
        alpha: None stands for r; one for each rank is taken as it is.
        mid: ``[r, r, k, k]``.
    """

    up: torch.Tensor
    down: torch.Tensor
    alpha: float | tuple[float, ...] | None = None
    mid: torch.Tensor | None = None

    kind: ClassVar[str] = "lora"
    is_low_rank: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def check(self, shape: torch.Size) -> None:
        check_factors("LoRA", up=self.up, down=self.down, mid=self.mid)
        check_rank(self.rank)
        if isinstance(self.alpha, tuple) and len(self.alpha) != self.rank:
            raise AdapterError(f"there are {len(self.alpha)} alphas for a rank of {self.rank}: the file is damaged")
        if self.mid is None:
            inner = self.down.shape[1:]
        else:
            if self.mid.shape[:2] != (self.rank, self.rank):
                raise AdapterError(f"lora_mid is {times(self.mid.shape)} for a rank of {self.rank}")
            if math.prod(self.down.shape[2:]) != 1:
                raise AdapterError(f"lora_down is {times(self.down.shape)} beside a lora_mid: the file is damaged")
            inner = torch.Size((*self.down.shape[1:2], *self.mid.shape[2:]))
        check_pair("lora_up", self.up, self.rank, inner, shape)

    def rows(self, start: int, length: int) -> LoRA:
        return replace(self, up=self.up.narrow(0, start, length))

    def low_rank(self) -> Factors:
        down = self.down.flatten(1)
        if self.mid is not None:
            down = through_core(self.mid, down)
        scale = 1.0
        if isinstance(self.alpha, tuple):
            down = wide(down) * torch.tensor(self.alpha).unsqueeze(1) / self.rank
        elif self.alpha is not None:
            scale = self.alpha / self.rank
        return Factors(down, self.up.flatten(1), scale)


@dataclass(frozen=True, eq=False, repr=False)
class LoHa(Adapter):
    """``ΔW = a · (w1_a · w1_b) ∘ (w2_a · w2_b)`` (FedPara, Hyeon-Woo et al. 2022; LyCORIS): a LoRA of rank r².

    ``B[:, (i,j)] = w1_a[:, i] ∘ w2_a[:, j]`` and ``A[(i,j)] = w1_b[i] ∘ w2_b[j]``. In the Tucker form a
    k×k core stands between: ``mid[(i,i'), (j,j')] = t1[i,j] ∘ t2[i',j']``.

    Attributes:
        w1_a, w2_a: ``[out, r]``; with `t1`, ``[r, out]``.
        w1_b, w2_b: ``[r, in]`` or ``[r, in · k · k]``; with `t1`, ``[r, in]``.
        t1, t2: ``[r, r, k, k]``.
    """

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    alpha: float | None = None
    t1: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    kind: ClassVar[str] = "loha"

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def check(self, shape: torch.Size) -> None:
        check_factors("LoHa", hada_w1_a=self.w1_a, hada_w1_b=self.w1_b, hada_w2_a=self.w2_a, hada_w2_b=self.w2_b)
        check_factors("LoHa", hada_t1=self.t1, hada_t2=self.t2)
        check_rank(self.rank)
        if (self.t1 is None) != (self.t2 is None):
            raise AdapterError("one of hada_t1 and hada_t2 is missing: the file is incomplete")
        for number, a, b, t in ((1, self.w1_a, self.w1_b, self.t1), (2, self.w2_a, self.w2_b, self.t2)):
            inner = b.shape[1:]
            if t is not None:
                if t.shape[:2] != (b.shape[0], b.shape[0]):
                    raise AdapterError(f"hada_t{number} is {times(t.shape)} for a rank of {b.shape[0]}")
                a, inner = a.t(), torch.Size((*b.shape[1:], *t.shape[2:]))
            check_pair(f"hada_w{number}_a", a, b.shape[0], inner, shape)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def rows(self, start: int, length: int) -> LoHa:
        axis = 0 if self.t1 is None else 1
        w1_a, w2_a = (w.narrow(axis, start, length) for w in (self.w1_a, self.w2_a))
        return replace(self, w1_a=w1_a, w2_a=w2_a)

    @property
    def is_low_rank(self) -> bool:  # type: ignore[override]
        rows, columns = (self.w1_a.shape[1], self.w1_b.shape[1]) if self.t1 is not None else self._matrix_shape()
        if self.t1 is not None:
            columns *= math.prod(self.t1.shape[2:])
        return self.w1_b.shape[0] * self.w2_b.shape[0] * (rows + columns) < rows * columns

    def _matrix_shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], math.prod(self.w1_b.shape[1:])

    def _pairs(self) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Both products' factors ``[out, r]`` and ``[r, in · k]``, with Tucker's cores taken in."""
        first = (wide(self.w1_a).flatten(1), wide(self.w1_b).flatten(1))
        second = (wide(self.w2_a).flatten(1), wide(self.w2_b).flatten(1))
        if self.t1 is None or self.t2 is None:
            return first, second
        return (first[0].t(), through_core(self.t1, first[1])), (second[0].t(), through_core(self.t2, second[1]))

    def low_rank(self) -> Factors:
        (w1_a, w1_b), (w2_a, w2_b) = self._pairs()
        up = (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)
        down = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)
        return Factors(down, up, self.scale)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        if self.is_low_rank:
            return super().tensors(current)
        (w1_a, w1_b), (w2_a, w2_b) = self._pairs()
        return {"w1_a": w1_a * self.scale, "w1_b": w1_b, "w2_a": w2_a, "w2_b": w2_b}

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if self.is_low_rank:
            return super().added(p, at, x, s)
        w1_a, w1_b, w2_a, w2_b = (w.to(x) for w in (p.w1_a, p.w1_b, p.w2_a, p.w2_b))
        step = rows_per_chunk(x.device, w1_b.shape[1], x.dtype)
        starts = range(0, w1_a.shape[0], step)
        rows = (at.own(x, (w1_a[i : i + step] @ w1_b) * (w2_a[i : i + step] @ w2_b)) for i in starts)
        return torch.cat(list(rows), at.axis) * s

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        (w1_a, w1_b), (w2_a, w2_b) = ((a.to(weight), b.to(weight)) for a, b in self._pairs())
        return (w1_a @ w1_b).mul_(w2_a @ w2_b).mul_(self.scale).reshape(weight.shape)
