"""What every kind of adapter is to a layer, and the part of a weight that it is about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from ...kernels import AdapterError
from ..layout import Layout, Operator
from .factors import Factors, Shape, times, wide


class Region(NamedTuple):
    """The part of a weight that a patch is about: ``weight.narrow(dim, start, length)``."""

    dim: int
    start: int
    length: int

    def within(self, shape: Shape) -> torch.Size:
        """Shape of this part of a weight of `shape`."""
        if not 0 <= self.dim < len(shape) or self.start < 0 or self.start + self.length > shape[self.dim]:
            raise AdapterError(
                f"the adapter is for {self.length} from {self.start} on along dimension {self.dim} "
                f"of a weight of {times(shape)}: it was made for another model"
            )
        return torch.Size((*shape[: self.dim], self.length, *shape[self.dim + 1 :]))


class Current(Protocol):
    """The weight that a patch finds: the layer's own with the patches before it merged in."""

    name: str
    shape: torch.Size

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of rows, ``[n, in · k]`` in fp32; each is gone with the next step."""
        ...

    def row_norms(self) -> torch.Tensor:
        """``[out]``."""
        ...

    def dense(self) -> torch.Tensor:
        """The whole, in its own shape; read-only."""
        ...

    def base(self) -> torch.Tensor:
        """The layer's own weight, without any patch; read-only."""
        ...


class Adapter:
    """One adapter on one weight, without its strength.

    The default form is that of an additive one, ``F(x) + s·ΔW x``, with ΔW of low rank.

    Attributes:
        kind: as reports call it.
        additive: whether ΔW does not depend on W; such adapters commute.
        is_low_rank: whether it is additive, and cheaper as a pair of factors than as a whole ΔW.
        from_output: whether ``y = F(x)`` is all that the form needs of F.
        idle_at_zero: whether a strength of 0 leaves W as it is.
        reads_weight: whether its tensors depend on the patches before it.
    """

    kind: ClassVar[str]
    additive: ClassVar[bool] = True
    is_low_rank: ClassVar[bool] = False
    from_output: ClassVar[bool] = True
    idle_at_zero: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False

    def check(self, shape: torch.Size) -> None:
        """Raise AdapterError unless it can be applied to a weight of `shape`, ``[out, in, ...]``."""

    def at_strength(self, strength: float) -> Adapter:
        """This adapter at a strength, where what it holds beside the layer depends on one."""
        return self

    def rows(self, start: int, length: int) -> Adapter:
        """This adapter of a fused layer for the part of it that is a layer of its own, `length` rows from `start` on.

        Raises:
            AdapterError: what becomes of these rows depends on the others.
        """
        raise AdapterError(f"{self.kind} acts on all rows of the fused layer together, which this model has in parts")

    def low_rank(self) -> Factors:
        """The adapter as an additive low-rank term; only if it `is_low_rank`."""
        raise NotImplementedError

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        """What the form reads, worked out as far as it goes without x and s."""
        factors = self.low_rank()
        return {"down": factors.down, "up": wide(factors.up) * factors.scale}

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """s·ΔW x, or as much of it as does not pass through W."""
        return at.mix(at.own(x, p.down) * s, p.up)

    def turned(self, p: Any, at: Layout, x: torch.Tensor) -> torch.Tensor | None:
        """x' where ``ΔW x = W x' + added``; None if W has no part in ΔW."""
        return None

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The patched layer's output from the unpatched one's, which may be written to."""
        if self.is_low_rank:
            return at.add_mixed(y, at.own(x, p.down) * s, p.up)
        return y.add_(self.added(p, at, x, s))

    def operator(self, p: Any, at: Layout, f: Operator, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The patched layer's output."""
        return self.output(p, at, f(x), x, s)

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """ΔW in full, in the shape, dtype and place of `weight` and in memory of its own, for norms and merging."""
        factors = self.low_rank()
        return (factors.up.to(weight) @ factors.down.to(weight)).mul_(factors.scale).reshape(weight.shape)

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        """W' in full, as a new tensor; beside W and W' there is no third of their size."""
        return self.delta(weight).mul_(s).add_(weight)
