"""OFT and BOFT: the weight turned in blocks, its outputs as LyCORIS has it or its inputs as PEFT does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...kernels import AdapterError
from ..layout import Layout, Operator
from .adapter import Adapter, Current
from .factors import check_factors, times, wide

_LARGEST = 1e6
"""Of Q; one of 1 turns by a right angle."""


@dataclass(frozen=True, eq=False, repr=False)
class OFT(Adapter):
    """``W' = Rᵀ W`` in blocks of output rows, ``R = (I + Q)(I − Q)⁻¹``, ``Q = blocks − blocksᵀ`` (Qiu et al. 2023).

    In the host's form, ``y + s²·((Rᵀ − I) y)``: it applies the strength twice and leaves out LyCORIS's `rescale`.

    Attributes:
        blocks: ``[number, size, size]``, number · size = out.
        constraint: the largest norm of Q, 0 for none (the file's alpha).
    """

    blocks: torch.Tensor
    constraint: float = 0.0

    kind: ClassVar[str] = "oft"
    additive: ClassVar[bool] = False

    def check(self, shape: torch.Size) -> None:
        check_factors("OFT", oft_blocks=self.blocks)
        _check_angles("OFT", self.blocks, self.constraint)
        count, size, width = self.blocks.shape
        if size != width or count * size != shape[0]:
            raise AdapterError(f"OFT blocks of {times(self.blocks.shape)} do not cover {shape[0]} output rows")

    def rows(self, start: int, length: int) -> OFT:
        return replace(self, blocks=_blocks_of(self, self.blocks.shape[1], start, length), constraint=0.0)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {"turn": _cayley(self.blocks, self.constraint)}

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.turn(y, p.turn, s * s)

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        columns = weight.flatten(1).t()
        turned = _in_blocks(columns, _cayley(self.blocks, self.constraint))
        return (columns + s * s * turned).t().reshape(weight.shape)


@dataclass(frozen=True, eq=False, repr=False)
class InputOFT(Adapter):
    """``W' = W Rᵀ`` in blocks of input columns: PEFT's OFT, ``F(x + s·x(R − I))``.

    R is PEFT's default, five terms of Cayley's series, ``I + 2Q + 2Q² + 2Q³ + Q⁴`` with Q skew-symmetric.

    Attributes:
        upper: ``[number, b·(b − 1)/2]``, Q above its diagonal, row by row; one block may stand for all of them.
    """

    upper: torch.Tensor

    kind: ClassVar[str] = "oft"
    additive: ClassVar[bool] = False
    from_output: ClassVar[bool] = False

    @property
    def block(self) -> int:
        return (1 + math.isqrt(1 + 8 * self.upper.shape[1])) // 2

    def check(self, shape: torch.Size) -> None:
        check_factors("OFT", oft_R=self.upper)
        _check_angles("OFT", self.upper)
        size = self.block
        if self.upper.dim() != 2 or size * (size - 1) // 2 != self.upper.shape[1] or size < 2:
            raise AdapterError(f"oft_R is {times(self.upper.shape)}, which is no triangle: the file is damaged")
        if len(shape) != 2:
            raise AdapterError("PEFT's OFT on a convolution folds overlapping patches, which no weight can: left out")
        count = self.upper.shape[0]
        if shape[1] != count * size and (count != 1 or shape[1] % size):
            raise AdapterError(f"{count} OFT blocks of {size} do not cover {shape[1]} input columns")

    def rows(self, start: int, length: int) -> InputOFT:
        return self

    def _turn(self, columns: int) -> torch.Tensor:
        """``R − I`` of every block."""
        size = self.block
        q = self.upper.new_zeros(self.upper.shape[0], size, size, dtype=torch.float64)
        rows, cols = torch.triu_indices(size, size, 1)
        q[:, rows, cols] = self.upper.double()
        q = q - q.transpose(-1, -2)
        square = q @ q
        turn = 2 * q + 2 * square + 2 * square @ q + square @ square
        turn = turn.expand(columns // size, -1, -1)
        return turn if self.upper.dtype == torch.float64 else turn.float()

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {"turn": self._turn(current.shape[1])}

    def operator(self, p: Any, at: Layout, f: Operator, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.run_on(f, x, lambda out: at.turn(x.clone() if out is None else out.copy_(x), p.turn, s))

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        # row w of W becomes w R, as x becomes x R where W stands for its transpose
        return _in_blocks(weight, self._turn(weight.shape[1]).transpose(-1, -2))


@dataclass(frozen=True, eq=False, repr=False)
class BOFT(Adapter):
    """OFT as a product of m butterfly stages (Liu et al. 2024; LyCORIS).

    Stage i is ``s·Rᵢ + (1 − s)·I`` on blocks of rows 2ⁱ·b/2 apart; BF their product, times `rescale`:
    ``y + s·(BF(y) − y)``. Together LyCORIS's stages reach from one end of y to the other, so that BF would be a matrix
    as wide as y; a few neighbours at a time make blocks that are small, yet wide enough for a matmul.

    Attributes:
        blocks: ``[m, number, b, b]``, number · b = out.
        constraint: the largest norm of Q, 0 for none (the file's alpha).
        rescale: ``[out]``.
        strength: s of the stages.
    """

    blocks: torch.Tensor
    constraint: float = 0.0
    rescale: torch.Tensor | None = None
    strength: float = 1.0

    kind: ClassVar[str] = "boft"
    additive: ClassVar[bool] = False
    PASS: ClassVar[int] = 30
    """Multiply-adds for an output in whose time a CPU reads and writes it once."""

    def check(self, shape: torch.Size) -> None:
        check_factors("BOFT", oft_blocks=self.blocks, rescale=self.rescale)
        _check_angles("BOFT", self.blocks, self.constraint)
        stages, count, size, width = self.blocks.shape
        covers = stages > 0 and size > 0 and size % 2 == 0 and shape[0] % (2**stages * (size // 2)) == 0
        if size != width or count * size != shape[0] or not covers:
            raise AdapterError(f"BOFT blocks of {times(self.blocks.shape)} do not cover {shape[0]} output rows")
        if self.rescale is not None and self.rescale.numel() != shape[0]:
            raise AdapterError(f"BOFT rescales {self.rescale.numel()} rows of {shape[0]}")

    def rows(self, start: int, length: int) -> BOFT:
        stages, _, size, _ = self.blocks.shape
        blocks = _blocks_of(self, 2**stages * size // 2, start, length)
        rescale = None if self.rescale is None else self.rescale.flatten().narrow(0, start, length)
        return replace(self, blocks=blocks, constraint=0.0, rescale=rescale)

    def at_strength(self, strength: float) -> BOFT:
        return replace(self, strength=strength)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        turns = self._turns() * self.strength
        bounds = self._bounds()
        return {
            f"product{i}": self._product(turns, first, last, self.rescale if i == len(bounds) - 1 else None)
            for i, (first, last) in enumerate(bounds)
        }

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.turn_through(y, list(p.parameters()), s)

    def _turns(self) -> torch.Tensor:
        # y·Rᵢᵀ: the host turns by R here, by its transpose in OFT
        return _cayley(self.blocks, self.constraint).transpose(-1, -2)

    def _bounds(self) -> list[tuple[int, int]]:
        """First and last + 1 of the stages that are multiplied: few products, each a pass over y, or narrow ones."""
        stages, size = self.blocks.shape[0], self.blocks.shape[-1]

        def split(products: int) -> list[tuple[int, int]]:
            return [(i * stages // products, (i + 1) * stages // products) for i in range(products)]

        def cost(products: int) -> int:
            return sum(size * 2 ** (last - first - 1) + self.PASS for first, last in split(products))

        return split(min(range(1, stages + 1), key=cost))

    def _product(self, turns: torch.Tensor, first: int, last: int, rescale: torch.Tensor | None) -> torch.Tensor:
        """The product of some stages, as `Layout.turn_through` takes it: ``[c, k, g, h, h, g]``."""
        apart, together, half = 2**first, 2 ** (last - first), turns.shape[-1] // 2
        size = together * half
        own = []
        for stage in range(first, last):
            below = 2 ** (stage - first)
            # of each block, the place: above and below this stage within the product, and below the product
            place = turns[stage].unflatten(0, (-1, together // 2 // below, below, apart))
            own.append(place.permute(0, 3, 1, 2, 4, 5).flatten(0, 3))
        gain = None
        if rescale is not None:
            gain = (wide(rescale).flatten() - 1).view(-1, together, apart, half).transpose(1, 2).flatten()
        units = torch.eye(size, dtype=turns.dtype, device=turns.device).repeat(1, turns[0].numel() // (2 * half * size))
        product = (units + _butterfly(units, own, gain)).unflatten(1, (-1, apart, size)).movedim(0, 2)
        product = product.unflatten(3, (together, half)).unflatten(2, (together, half))
        return product.transpose(-1, -2).contiguous()

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        columns = weight.flatten(1).t()
        gain = None if self.rescale is None else wide(self.rescale).flatten() - 1
        change = _butterfly(columns, self._turns().to(weight) * s, gain)
        return (columns + s * change).t().reshape(weight.shape)


def _check_angles(kind: str, q: torch.Tensor, constraint: float = 0.0) -> None:
    """Refuse numbers beside which the identity is lost: then ``I − Q`` may have no inverse."""
    if constraint <= 0 and q.numel() and float(q.double().abs().max()) > _LARGEST:
        raise AdapterError(f"this {kind} holds numbers beyond {_LARGEST:.0e}: the training has diverged, leave it out")


def _cayley(blocks: torch.Tensor, constraint: float) -> torch.Tensor:
    """``R − I = 2Q(I − Q)⁻¹`` of ``[..., b, b]`` blocks, with the norm of all of Q held to `constraint`."""
    blocks64 = _constrained(blocks.double(), constraint)
    q = blocks64 - blocks64.transpose(-1, -2)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    turn = 2 * torch.linalg.solve(identity - q, q, left=False)
    return turn if blocks.dtype == torch.float64 else turn.float()


def _blocks_of(adapter: OFT | BOFT, reach: int, start: int, length: int) -> torch.Tensor:
    """The blocks of some rows, where only `reach` of these are mixed with each other, within the constraint on all."""
    if start % reach or length % reach:
        raise AdapterError(
            f"its blocks mix {reach} rows of the fused layer with each other, and this model has parts of "
            f"{length} rows: only a model with the fused layer can run it"
        )
    size = adapter.blocks.shape[-1]
    blocks = _constrained(adapter.blocks.double(), adapter.constraint)
    return blocks.narrow(-3, start // size, length // size).to(wide(adapter.blocks).dtype)


def _constrained(blocks: torch.Tensor, constraint: float) -> torch.Tensor:
    """`blocks`, made smaller where the norm of all of their Q is larger than `constraint`."""
    if constraint <= 0:
        return blocks
    norm = (blocks - blocks.transpose(-1, -2)).norm() + 1e-8
    return blocks * (constraint / norm) if norm > constraint else blocks


def _in_blocks(y: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """``[..., number · b]`` times ``[number, b, b]``, block by block."""
    count, size, _ = blocks.shape
    return torch.einsum("...kn,knm->...km", y.unflatten(-1, (count, size)), blocks.to(y)).flatten(-2)


def _butterfly(y: torch.Tensor, turns: Iterable[torch.Tensor], gain: torch.Tensor | None) -> torch.Tensor:
    """BF(y) − y over y's last axis, without the rounding of a difference of nearly equal numbers.

    Args:
        turns: of each stage ``[number, b, b]``, less I.
        gain: ``[out]``, less 1.
    """
    change = torch.zeros_like(y)
    for stage, turn in enumerate(turns):
        k = 2**stage * turn.shape[-1] // 2
        mixed = (y + change).unflatten(-1, (-1, 2, k)).transpose(-1, -2).flatten(-3)
        change = change + _in_blocks(mixed, turn).unflatten(-1, (-1, k, 2)).transpose(-1, -2).flatten(-3)
    return change if gain is None else change + (y + change) * gain.to(y)
