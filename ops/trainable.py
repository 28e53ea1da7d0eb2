"""Factors that learn beside a packed layer, in the forms that they will run in.

    y = F(x) + a·B(Ax)                               LoRA; F: the layer with what runs beside it already, frozen
    y = F(x) + (c − 1)∘(F(x) − b) + c∘a·B(Ax)        DoRA on the output axis, c = m / |W|, b: the bias
    y = F(x) + a·(w1 ⊗ w2) x                         LoKr

They are kept in fp32 and multiplied in x's dtype, as they are where they run. The gradient at x passes through the
frozen weight (`frozen.py`), so that of the base nothing is kept for the way back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from ..kernels import is_slow
from .factors import FactorCache, LayerWeight
from .kinds import Adapter, DoRA, LoKr, LoRA, Patch, Region
from .layers import ConvMath, LinearMath, PackedLayer
from .layout import Layout
from .residual import RunningResidual

GROUPS = 8
"""How many at most LoKr's w1 has on a side; more rows where the place of a slice asks for them."""


@dataclass(frozen=True)
class Target:
    """What is to learn: a layer, or some of its output rows.

    Attributes:
        layer: its path.
        region: rows of a fused layer, such as the queries in a qkv; None for all.
    """

    layer: str
    region: Region | None = None


class Beside:
    """What a layer calls while something learns beside it.

    Attributes:
        beneath: what ran there before, frozen.
        bias: in place of the layer's own, as that of a `RunningResidual`.
    """

    def __init__(self, learner: Trainable, beneath: RunningResidual | Beside | None) -> None:
        self.learner, self.beneath = learner, beneath
        self.bias: torch.Tensor | None = None if beneath is None else beneath.bias

    def __call__(
        self, x: torch.Tensor, layer: PackedLayer, data: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The layer's output; `data` and `bias` are its own, on x's device."""
        if is_slow(x):
            return self(x.float(), layer, data, bias).to(x.dtype)
        at = Layout(layer)
        if at.kernel and x.dim() == len(at.kernel) + 1:
            return self(x.unsqueeze(0), layer, data, bias).squeeze(0)
        # what is changed in place here may be kept beneath for the way back
        beneath = self.beneath
        y = layer.compute(x, data, bias) if beneath is None else beneath(x, layer, data, bias).clone()
        return self.learner.added_to(y, at, x, bias if self.bias is None else self.bias.to(x.device))


class Trainable(nn.Module):
    """What learns beside one layer.

    Attributes:
        whole: the shape of the weight.
        region: the rows that it is about; None for all.
        shape: of these rows.
        rank: the highest that what is added can have.
        alpha: as files have it: what is added is scaled by alpha / rank.
    """

    kind: ClassVar[str]
    rank: int
    alpha: float

    def __init__(self, whole: torch.Size, region: Region | None) -> None:
        super().__init__()
        self.whole, self.region = whole, region
        self.shape = whole if region is None else region.within(whole)

    def adapter(self) -> Adapter:
        """What it is now, around the tensors that learn."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds of it, by the names behind a module's, in the shapes that trainers write.

        They are of the whole weight, with zeros for its other rows, because loaders know no names of slices.
        """
        raise NotImplementedError

    def added_to(self, y: torch.Tensor, at: Layout, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's output from that without it, which may be written to; `bias` is in both."""
        adapter = self.adapter()
        p = SimpleNamespace(**adapter.tensors(self))  # type: ignore[arg-type]  # those of additive ones ask for a shape
        part = y if self.region is None else at.narrow(y, self.region.start, self.region.length)
        adapter.output(p, at, part, x, torch.ones((), device=x.device))
        return y


class TrainableLoRA(Trainable):
    """``B A`` from a random A and a B of zeros, as kohya begins."""

    kind = "LoRA"

    def __init__(
        self, whole: torch.Size, region: Region | None, rank: int, alpha: float, random: torch.Generator
    ) -> None:
        super().__init__(whole, region)
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        self.rank = min(rank, rows, columns)
        self.alpha = alpha or self.rank
        self.down = nn.Parameter(_spread((self.rank, columns), random))
        self.up = nn.Parameter(torch.zeros(rows, self.rank))

    def adapter(self) -> LoRA | DoRA:
        return LoRA(self.up, self.down, self.alpha)

    def tensors(self) -> dict[str, torch.Tensor]:
        up, inner = self.up.detach(), self.shape[1:]
        if self.region is not None:
            up = _within(up.new_zeros(self.whole[0], self.rank), self.region, up)
        return {
            "lora_down.weight": self.down.detach().reshape(-1, *inner),
            "lora_up.weight": up.reshape(*up.shape, *(1 for _ in inner[1:])),
            "alpha": torch.tensor(float(self.alpha)),
        }

    def take(self, adapter: LoRA) -> None:
        """Go on from another one of the same rank."""
        factors = adapter.low_rank()
        with torch.no_grad():
            self.down.copy_(factors.down)
            self.up.copy_(factors.up)
        self.alpha = factors.scale * self.rank


class TrainableDoRA(TrainableLoRA):
    """The same with a magnitude for each output row, from the norms of the weight on.

    The norm stays that of the weight without the LoRA, so that the file works in ComfyUI as it did in training.

    Args:
        norms: of all rows of the weight.
    """

    kind = "DoRA"
    norms: torch.Tensor

    def __init__(
        self, whole: torch.Size, region: Region | None, rank: int, alpha: float, random: torch.Generator,
        norms: torch.Tensor,
    ) -> None:  # fmt: skip
        super().__init__(whole, region, rank, alpha, random)
        self.register_buffer("norms", norms.float(), persistent=False)
        self.magnitude = nn.Parameter(self._own(self.norms).clone())

    def _own(self, norms: torch.Tensor) -> torch.Tensor:
        return norms if self.region is None else norms.narrow(*self.region)

    def adapter(self) -> DoRA:
        return DoRA(LoRA(self.up, self.down, self.alpha), self.magnitude)

    def tensors(self) -> dict[str, torch.Tensor]:
        magnitude = self.magnitude.detach()
        if self.region is not None:
            magnitude = _within(self.norms.clone(), self.region, magnitude)
        column = magnitude.reshape(-1, *(1 for _ in self.shape[1:]))
        return super().tensors() | {"dora_scale": column}

    def take(self, adapter: DoRA) -> None:  # type: ignore[override]
        assert isinstance(adapter.inner, LoRA)
        super().take(adapter.inner)
        with torch.no_grad():
            self.magnitude.copy_(adapter.magnitude.reshape(-1))

    def added_to(self, y: torch.Tensor, at: Layout, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        norms = self._own(self.norms)
        c = torch.where(norms == 0, 1.0, self.magnitude / (norms + torch.finfo(norms.dtype).eps))
        factors = LoRA(self.up, self.down, self.alpha).low_rank()
        start, length = (0, y.shape[at.axis]) if self.region is None else self.region[1:]
        plain = at.narrow(y, start, length)
        if bias is not None:
            plain = plain - at.spread(bias[start : start + length], y)
        # c − 1 is small: as a factor of its own it keeps its digits in bf16
        change = plain * at.spread(c - 1, y)
        change = at.add_mixed(change, at.own(x, factors.down), factors.up * (factors.scale * c).unsqueeze(1))
        end = start + length
        parts = at.narrow(y, 0, start), at.narrow(y, start, length) + change, at.narrow(y, end, y.shape[at.axis] - end)
        return parts[1] if length == y.shape[at.axis] else torch.cat(parts, at.axis)


class TrainableLoKr(Trainable):
    """``w1 ⊗ w2`` as LyCORIS begins: w2 of zeros, of low rank where that is fewer numbers.

    w2 has as many rows as fit into the whole weight, a slice of it and what is above that a whole number of times: so
    w1 with rows of zeros above and below is one of the whole weight, which every loader of a LoKr reads.
    """

    kind = "LoKr"

    def __init__(
        self, whole: torch.Size, region: Region | None, rank: int, alpha: float, random: torch.Generator
    ) -> None:
        super().__init__(whole, region)
        rows, columns, *kernel = self.shape
        most = rows if region is None else math.gcd(whole[0], region.start, rows)
        b = most // _groups(most, GROUPS * most // rows)
        a, c = rows // b, _groups(columns)
        d, positions = columns // c, math.prod(kernel)
        full = rank * (b + d * positions) >= b * d * positions
        self.rank = min(rows, columns * positions) if full else rank
        self.alpha = alpha or rank
        self.w1 = nn.Parameter(_spread((a, c), random))
        self.w2 = nn.Parameter(torch.zeros(b, d, *kernel)) if full else None
        self.w2_a = None if full else nn.Parameter(_spread((b, rank), random))
        self.w2_b = None if full else nn.Parameter(torch.zeros(rank, d * positions))

    def adapter(self) -> LoKr:
        return LoKr(self.w1, self.w2, self.alpha, w2_a=self.w2_a, w2_b=self._second())

    def _second(self) -> torch.Tensor | None:
        return None if self.w2_b is None else self.w2_b.reshape(len(self.w2_b), -1, *self.shape[2:])

    def tensors(self) -> dict[str, torch.Tensor]:
        w1 = self.w1.detach()
        if self.region is not None:
            group = self.shape[0] // len(w1)
            above = Region(0, self.region.start // group, len(w1))
            w1 = _within(w1.new_zeros(self.whole[0] // group, w1.shape[1]), above, w1)
        named = {"lokr_w1": w1, "lokr_w2": self.w2, "lokr_w2_a": self.w2_a, "lokr_w2_b": self.w2_b}
        found = {name: tensor.detach() for name, tensor in named.items() if tensor is not None}
        return {**found, "alpha": torch.tensor(float(self.alpha))}

    def take(self, adapter: LoKr) -> None:
        """Go on from another one of the same shapes."""
        with torch.no_grad():
            for name, own in self.named_parameters():
                own.copy_(getattr(adapter, name).reshape(own.shape))
        self.alpha = adapter.scale * self.rank


KINDS = {cls.kind: cls for cls in (TrainableLoRA, TrainableDoRA, TrainableLoKr)}
"""What can learn."""


def can_learn(layer: PackedLayer) -> bool:
    """Whether something can learn beside this layer."""
    return isinstance(layer, (LinearMath, ConvMath)) and getattr(layer, "groups", 1) == 1 and layer.weight is not None


def beginning(
    kind: str, name: str, layer: PackedLayer, region: Region | None, rank: int, alpha: float, random: torch.Generator,
    before: Sequence[Patch] = (),
) -> Trainable:  # fmt: skip
    """Something that changes nothing yet.

    Args:
        name: the layer's path.
        before: what runs beside the layer already; a DoRA's norms are of the weight with it.

    Raises:
        AdapterError: it cannot learn there.
    """
    whole = torch.Size(layer.logical_shape)
    if kind != TrainableDoRA.kind:
        return KINDS[kind](whole, region, rank, alpha, random)  # type: ignore[call-arg]
    constant = [patch for patch in before if patch.when is None]
    with torch.no_grad():
        norms = LayerWeight(name, layer, constant, None, whole, FactorCache()).row_norms()
    return TrainableDoRA(whole, region, rank, alpha, random, norms)


def _spread(shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    """Even between ±1/√columns, as `torch.nn.Linear` begins."""
    return (2 * torch.rand(shape, generator=random) - 1) / shape[1] ** 0.5


def _within(whole: torch.Tensor, region: Region, part: torch.Tensor) -> torch.Tensor:
    whole.narrow(*region).copy_(part)
    return whole


def _groups(size: int, most: int = GROUPS) -> int:
    return max(n for n in range(1, max(1, most) + 1) if size % n == 0)


__all__ = ["GROUPS", "KINDS", "Beside", "Target", "Trainable", "beginning", "can_learn"]
