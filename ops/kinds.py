"""What an adapter file says about one weight: one class per kind, in the adapter's own terms.

Every class gives its exact form beside the base weight W, so that W is never rebuilt. The names and the
meaning of each factor are those of the format's trainers (kohya-ss/sd-scripts, LyCORIS, PEFT); where
they disagree on what a strength does, the form follows ComfyUI, since people compare pictures.

In the forms, F is the layer so far without its bias, s the strength, and a = alpha / rank. `p` holds the
tensors that a form reads, under the names that `tensors` gave them; nothing is worked out twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from ..kernels import AdapterError, dequantize, linear
from ..kernels.scratch import rows_per_chunk
from .layout import Layout, Operator
from .packed import PackedTensor

log = logging.getLogger(__name__)

Shape = Sequence[int]


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


class Factors(NamedTuple):
    """ΔW = scale · B · A, flattened: A ``[r, in · k]``, B ``[out, r]``."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


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

    def low_rank(self) -> Factors:
        """The adapter as an additive low-rank term; only if it `is_low_rank`."""
        raise NotImplementedError

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        """What the form reads, worked out as far as it goes without x and s."""
        factors = self.low_rank()
        return {"down": factors.down, "up": _wide(factors.up) * factors.scale}

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
        """ΔW in full, in the shape, dtype and place of `weight`, for norms and the exact path."""
        factors = self.low_rank()
        return (factors.up.to(weight) @ factors.down.to(weight) * factors.scale).reshape(weight.shape)

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        """W' in full, as a new tensor."""
        return weight + s * self.delta(weight)


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
        _check_factors("LoRA", up=self.up, down=self.down, mid=self.mid)
        _check_rank(self.rank)
        if isinstance(self.alpha, tuple) and len(self.alpha) != self.rank:
            raise AdapterError(f"there are {len(self.alpha)} alphas for a rank of {self.rank}: the file is damaged")
        if self.mid is None:
            inner = self.down.shape[1:]
        else:
            if self.mid.shape[:2] != (self.rank, self.rank):
                raise AdapterError(f"lora_mid is {times(self.mid.shape)} for a rank of {self.rank}")
            inner = torch.Size((*self.down.shape[1:2], *self.mid.shape[2:]))
        _check_pair("lora_up", self.up, self.rank, inner, shape)

    def low_rank(self) -> Factors:
        down = self.down.flatten(1)
        if self.mid is not None:
            down = _through_core(self.mid, down)
        scale = 1.0
        if isinstance(self.alpha, tuple):
            down = _wide(down) * torch.tensor(self.alpha).unsqueeze(1) / self.rank
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
        _check_factors("LoHa", hada_w1_a=self.w1_a, hada_w1_b=self.w1_b, hada_w2_a=self.w2_a, hada_w2_b=self.w2_b)
        _check_factors("LoHa", hada_t1=self.t1, hada_t2=self.t2)
        _check_rank(self.rank)
        if (self.t1 is None) != (self.t2 is None):
            raise AdapterError("one of hada_t1 and hada_t2 is missing: the file is incomplete")
        for number, a, b, t in ((1, self.w1_a, self.w1_b, self.t1), (2, self.w2_a, self.w2_b, self.t2)):
            inner = b.shape[1:]
            if t is not None:
                if t.shape[:2] != (b.shape[0], b.shape[0]):
                    raise AdapterError(f"hada_t{number} is {times(t.shape)} for a rank of {b.shape[0]}")
                a, inner = a.t(), torch.Size((*b.shape[1:], *t.shape[2:]))
            _check_pair(f"hada_w{number}_a", a, b.shape[0], inner, shape)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

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
        first = (_wide(self.w1_a).flatten(1), _wide(self.w1_b).flatten(1))
        second = (_wide(self.w2_a).flatten(1), _wide(self.w2_b).flatten(1))
        if self.t1 is None or self.t2 is None:
            return first, second
        return (first[0].t(), _through_core(self.t1, first[1])), (second[0].t(), _through_core(self.t2, second[1]))

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
        return ((w1_a @ w1_b) * (w2_a @ w2_b) * self.scale).reshape(weight.shape)


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
        _check_factors("LoKr", **{f"lokr_{name}": getattr(self, name) for name in names})
        for name in ("w1", "w2"):
            whole, a, b = (getattr(self, name + end) for end in ("", "_a", "_b"))
            if whole is None and (a is None or b is None):
                raise AdapterError(f"lokr_{name} is missing: the file is incomplete")
        left, right = self.shapes()
        got = (left[0] * right[0], left[1] * math.prod(right[1:]))
        kernels = len(right) == 2 or _same_inputs((1, *right[2:]), (1, *shape[2:]))
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

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        if len(current.shape) > 2 and current.shape[1] % self.shapes()[0][1]:
            # w1 reaches into the kernels, so nothing is left to separate
            return {"weight": self.delta(torch.empty(current.shape))}
        w1 = self._first()
        if self.w2 is not None:
            return {"w1": w1 * self.scale, "w2": self.w2.flatten(1)}
        w2_a, w2_b = self._second()
        return {"w1": w1 * self.scale, "w2_a": w2_a, "w2_b": w2_b}

    def _first(self) -> torch.Tensor:
        return _wide(self.w1) if self.w1 is not None else _wide(self.w1_a) @ _wide(self.w1_b)

    def _second(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w2's factors ``[b, r]`` and ``[r, d · k]``."""
        assert self.w2_a is not None and self.w2_b is not None
        if self.t2 is None:
            return self.w2_a, self.w2_b.flatten(1)
        return self.w2_a.t(), _through_core(self.t2, self.w2_b.flatten(1))

    def _in_groups(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """t and w, by which ``t wᵀ`` is s·ΔW x group by group; w1 acts where there is least of it."""
        w1 = p.w1.to(x) * s
        groups = at.grouped(x, w1.shape[1])
        if self.w2 is not None:
            return at.across(groups, w1), p.w2
        return at.across(at.own(groups, p.w2_b), w1), p.w2_a

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if hasattr(p, "weight"):
            return at.own(x, p.weight) * s
        t, w = self._in_groups(p, at, x, s)
        return at.joined(at.own(t, w) if self.w2 is not None else at.mix(t, w), p.w1.shape[0])

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if at.kernel:
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
        return (torch.kron(w1, w2) * self.scale).reshape(weight.shape)


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
        _check_factors("GLoRA", a1=self.a1, a2=self.a2, b1=self.b1, b2=self.b2)
        _check_rank(self.rank)
        _check_pair("b1", self.b1, self.b2.shape[0], self.b2.shape[1:], shape)
        _check_pair("a1", self.a1, self.rank, self.a2.shape[1:], torch.Size((shape[1], shape[1])))

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        a1, a2, b1, b2 = (_wide(t).flatten(1) for t in (self.a1, self.a2, self.b1, self.b2))
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
        return (through + (b1 @ b2).reshape(weight.shape)) * self.scale


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
        _check_factors("OFT", oft_blocks=self.blocks)
        count, size, width = self.blocks.shape
        if size != width or count * size != shape[0]:
            raise AdapterError(f"OFT blocks of {times(self.blocks.shape)} do not cover {shape[0]} output rows")

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
        _check_factors("OFT", oft_R=self.upper)
        size = self.block
        if self.upper.dim() != 2 or size * (size - 1) // 2 != self.upper.shape[1] or size < 2:
            raise AdapterError(f"oft_R is {times(self.upper.shape)}, which is no triangle: the file is damaged")
        if len(shape) != 2:
            raise AdapterError("PEFT's OFT on a convolution folds overlapping patches, which no weight can: left out")
        count = self.upper.shape[0]
        if shape[1] != count * size and (count != 1 or shape[1] % size):
            raise AdapterError(f"{count} OFT blocks of {size} do not cover {shape[1]} input columns")

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
        _check_factors("BOFT", oft_blocks=self.blocks, rescale=self.rescale)
        stages, count, size, width = self.blocks.shape
        covers = stages > 0 and size > 0 and size % 2 == 0 and shape[0] % (2**stages * (size // 2)) == 0
        if size != width or count * size != shape[0] or not covers:
            raise AdapterError(f"BOFT blocks of {times(self.blocks.shape)} do not cover {shape[0]} output rows")
        if self.rescale is not None and self.rescale.numel() != shape[0]:
            raise AdapterError(f"BOFT rescales {self.rescale.numel()} rows of {shape[0]}")

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
            gain = (_wide(rescale).flatten() - 1).view(-1, together, apart, half).transpose(1, 2).flatten()
        units = torch.eye(size, dtype=turns.dtype, device=turns.device).repeat(1, turns[0].numel() // (2 * half * size))
        product = (units + _butterfly(units, own, gain)).unflatten(1, (-1, apart, size)).movedim(0, 2)
        product = product.unflatten(3, (together, half)).unflatten(2, (together, half))
        return product.transpose(-1, -2).contiguous()

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        columns = weight.flatten(1).t()
        gain = None if self.rescale is None else _wide(self.rescale).flatten() - 1
        change = _butterfly(columns, self._turns().to(weight) * s, gain)
        return (columns + s * change).t().reshape(weight.shape)


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
        _check_factors("DoRA", dora_scale=self.magnitude)
        if self.magnitude.numel() != shape[self.axis]:
            raise AdapterError(f"dora_scale has {self.magnitude.numel()} magnitudes for a weight of {times(shape)}")

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        c = self._ratio(self._norms(current), current.name)
        if not self.inner.is_low_rank:
            return {**self.inner.tensors(current), "c": c, "gain": c - 1}
        factors = self.inner.low_rank()
        down, up = _wide(factors.down).to(c), _wide(factors.up).to(c) * factors.scale
        if self.axis == 0:
            return {"down": down, "up": up * c.unsqueeze(1), "gain": c - 1}
        return {"down": down * c.repeat_interleave(down.shape[1] // c.numel()), "up": up, "gain": c - 1}

    def _norms(self, current: Current) -> torch.Tensor:
        if self.axis == 0 and self.norm == "comfy":
            return current.row_norms()
        if not self.inner.is_low_rank:
            weight = current.dense()
            return self._norms_of(weight + self.inner.delta(weight))
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
            changed = torch.addcmul(x, x, at.spread(p.gain.to(x.device) * s, x), out=out)
            return changed if turned is None else changed.add_(s * turned)

        return Adapter.output(self.inner, p, at, at.run_on(f, x, change), scaled, s)

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return self._on_rows(p, at, y, x, s, None)

    def _on_rows(
        self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor, through: torch.Tensor | None
    ) -> torch.Tensor:
        # c − 1 is small: as a factor of its own it keeps its digits in bf16
        y = y.addcmul_(y, at.spread(p.gain.to(y.device) * s, y))
        if not hasattr(p, "c"):  # c is in the up factor
            return self.inner.output(p, at, y, x, s)
        difference = self.inner.added(p, at, x, s)
        return y.addcmul_(difference if through is None else difference + s * through, at.spread(p.c, y))

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        whole = weight + self.inner.delta(weight)
        own = self.axis == 0 and self.norm == "comfy"
        c = self._ratio(self._norms_of(weight if own else whole), "weight").to(weight.device)
        c = c.reshape((-1, *(1,) * (weight.dim() - 1)) if self.axis == 0 else (1, -1, *(1,) * (weight.dim() - 2)))
        return weight + s * (c * whole - weight)


@dataclass(frozen=True, eq=False, repr=False)
class Diff(Adapter):
    """``ΔW = diff``: a full difference.

    Attributes:
        diff: of the parameter's shape.
    """

    diff: torch.Tensor

    kind: ClassVar[str] = "diff"

    def check(self, shape: torch.Size) -> None:
        _check_factors("diff", diff=self.diff)
        _check_same(self.diff, shape)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {"weight": self.diff.packed if isinstance(self.diff, PackedTensor) else self.diff}

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.diff, PackedTensor):
            return at.own(x, p.weight) * s
        if at.kernel:
            return at.own(x, dequantize(p.weight.to(x.device), self.diff.fmt, self.diff.shape, x.dtype)) * s
        return linear(x, p.weight.to(x.device), self.diff.fmt, rows=self.diff.shape[0]) * s

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        diff = self.diff.dequantize(torch.float32) if isinstance(self.diff, PackedTensor) else self.diff
        return diff.to(weight)


@dataclass(frozen=True, eq=False, repr=False)
class ModelDiff(Adapter):
    """``ΔW = target − W₀`` with W₀ the base weight: another model as a LoRA (ComfyUI's ``model_as_lora``).

    Attributes:
        target: of the parameter's shape.
    """

    target: torch.Tensor

    kind: ClassVar[str] = "model_as_lora"

    def check(self, shape: torch.Size) -> None:
        _check_factors("model_as_lora", target=self.target)
        _check_same(self.target, shape)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        base = current.base()
        return {"weight": self.target.to(base) - base}

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.own(x, p.weight) * s


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
        _check_factors("set", value=self.value)
        _check_same(self.value, shape)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {"weight": self.value}

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.own(x, p.weight)

    def operator(self, p: Any, at: Layout, f: Operator, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.own(x, p.weight)

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        return self.value.to(weight, copy=True)


@dataclass(frozen=True, eq=False, repr=False)
class Merge(Adapter):
    """``ΔW = weight with patches of its own``: another model merged in (ComfyUI's model merging).

    Attributes:
        weight: of the parameter's shape.
        patches: in that model's order.
    """

    weight: torch.Tensor
    patches: tuple[Patch, ...] = ()

    kind: ClassVar[str] = "merge"

    def check(self, shape: torch.Size) -> None:
        _check_same(self.weight, shape)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {"weight": self.delta(current.base())}

    def added(self, p: Any, at: Layout, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return at.own(x, p.weight) * s

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        return merge(Diff(self.weight).delta(weight).clone(), self.patches)


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


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Adapter):
    """``W' = s·W``: a patch's ``strength_model``."""

    kind: ClassVar[str] = "scale"
    idle_at_zero: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {}

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return y.mul_(s)

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        return weight * s


@dataclass(frozen=True, eq=False, repr=False)
class Opaque(Adapter):
    """A patch that only the host understands: it runs through the host's own merge on the decoded weight.

    Attributes:
        value: what the host's patch list holds.
        reason: why it takes this path, for the report.
    """

    value: Any
    reason: str

    kind: ClassVar[str] = "exact"
    additive: ClassVar[bool] = False


@dataclass(frozen=True, eq=False, repr=False)
class Patch:
    """One entry of a parameter's patch list, in the order in which nodes added them.

    ``W ← strength_model · W``, then the adapter with `strength`, both within `region`.

    Attributes:
        function: applied to ΔW on its way into the weight; `from_host` takes permutations of rows in.
        origin: the host's own tuple, for its merge and save.
    """

    strength: float
    adapter: Adapter
    strength_model: float = 1.0
    region: Region | None = None
    function: Callable[[torch.Tensor], torch.Tensor] | None = None
    origin: tuple | None = None


def merge(
    weight: torch.Tensor,
    patches: Sequence[Patch],
    host: Callable[[Patch, torch.Tensor], torch.Tensor] | None = None,
    base: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """`weight` with `patches` merged in: what the forms stand for, in full.

    Args:
        weight: fp32 or fp64, may be written to.
        host: merges an `Opaque` patch.
        base: the weight without any patch, for `ModelDiff`; None if `weight` is that.

    Raises:
        AdapterError: a patch is opaque, and there is no host.
    """
    original = weight.clone() if base is None and any(isinstance(p.adapter, ModelDiff) for p in patches) else None
    for patch in patches:
        if isinstance(patch.adapter, Opaque):
            if host is None:
                raise AdapterError(f"{patch.adapter.reason}, and no host is there that knows it: leave it out")
            weight = host(patch, weight)
            continue
        part = weight if patch.region is None else weight.narrow(*patch.region)
        part = part * patch.strength_model if patch.strength_model != 1.0 else part
        adapter = patch.adapter
        if isinstance(adapter, ModelDiff):
            first = original if base is None else base()
            assert first is not None
            adapter = Diff(adapter.target.to(first) - (first if patch.region is None else first.narrow(*patch.region)))
        if patch.strength or not adapter.idle_at_zero:
            part = adapter.merged(part, patch.strength)
        if patch.region is None:
            weight = part
        else:
            weight.narrow(*patch.region).copy_(part)
    return weight


def _wide(tensor: torch.Tensor | None) -> torch.Tensor:
    """In a dtype that a product of factors keeps its digits in."""
    assert tensor is not None
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _through_core(core: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A Tucker core ``[r, r', k, ...]`` behind a 1×1 down ``[r', in]``: one ``[r, in · k]``."""
    return torch.einsum("ij...,jc->ic...", _wide(core), _wide(down)).flatten(1)


def _cayley(blocks: torch.Tensor, constraint: float) -> torch.Tensor:
    """``R − I = 2Q(I − Q)⁻¹`` of ``[..., b, b]`` blocks, with the norm of all of Q held to `constraint`."""
    q = blocks.double() - blocks.double().transpose(-1, -2)
    if constraint > 0:
        norm = q.norm() + 1e-8
        if norm > constraint:
            q = q * (constraint / norm)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    turn = 2 * torch.linalg.solve(identity - q, q, left=False)
    return turn if blocks.dtype == torch.float64 else turn.float()


def _in_blocks(y: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """``[..., number · b]`` times ``[number, b, b]``, block by block."""
    count, size, _ = blocks.shape
    return torch.einsum("...kn,knm->...km", y.unflatten(-1, (count, size)), blocks.to(y)).flatten(-2)


def times(shape: Shape) -> str:
    return "×".join(map(str, shape))


def _check_factors(kind: str, **factors: torch.Tensor | None) -> None:
    """Every factor holds finite floats."""
    for name, factor in factors.items():
        if factor is None:
            continue
        if not factor.is_floating_point():
            raise AdapterError(
                f"{name} of this {kind} is {str(factor.dtype).removeprefix('torch.')} without a scale: "
                "get a file with bf16, fp16 or fp8 factors"
            )
        wide = factor.float() if factor.element_size() == 1 else factor
        if not torch.isfinite(wide).all():
            raise AdapterError(f"{name} of this {kind} holds NaN or infinity: the training has diverged")


def _check_rank(rank: int) -> None:
    if rank == 0:
        raise AdapterError("the adapter has rank 0, so it does nothing")


def _check_same(tensor: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise AdapterError(_misfit(tensor.shape, shape))


def _check_pair(name: str, up: torch.Tensor, rank: int, inner: Shape, shape: torch.Size) -> None:
    """An up factor and the input dimensions of its down factor make a weight of `shape`."""
    if math.prod(up.shape[1:]) != rank:
        raise AdapterError(f"{name} has rank {math.prod(up.shape[1:])}, its counterpart {rank}: the file is damaged")
    if up.shape[0] != shape[0] or not _same_inputs(inner, shape[1:]):
        raise AdapterError(_misfit((up.shape[0], *inner), shape))


def _same_inputs(inner: Shape, wanted: Shape) -> bool:
    """Equal but for dimensions of 1 at the end, or flattened."""
    if len(inner) == 1:
        return inner[0] == math.prod(wanted)
    length = max(len(inner), len(wanted))
    return _extended(inner, length) == _extended(wanted, length)


def _extended(shape: Shape, length: int) -> tuple[int, ...]:
    return (*shape, *(1,) * (length - len(shape)))


def _misfit(got: Shape, shape: Shape) -> str:
    return f"the adapter is for {times(got)}, the weight is {times(shape)}: it was made for another model"


def _product_shape(
    name: str, whole: torch.Tensor | None, a: torch.Tensor | None, b: torch.Tensor | None
) -> torch.Size:
    if whole is not None:
        return whole.shape
    assert a is not None and b is not None
    if a.dim() != 2 or a.shape[1] != b.shape[0]:
        raise AdapterError(f"{name}_a is {times(a.shape)}, {name}_b {times(b.shape)}: the file is damaged")
    _check_rank(b.shape[0])
    return torch.Size((a.shape[0], *b.shape[1:]))


__all__ = [
    "BOFT", "OFT", "Adapter", "Current", "Diff", "DoRA", "Factors", "GLoRA", "InputOFT", "LoHa", "LoKr", "LoRA",
    "Merge", "ModelDiff", "Opaque", "Pad", "Padded", "Patch", "Permuted", "Region", "Scale", "Set", "merge",
    "times",
]  # fmt: skip
