"""What an adapter file says about one weight: one class per kind, in the adapter's own terms.

Every class gives its exact form beside the base weight W, so that W is never rebuilt. The names and the
meaning of each factor are those of the format's trainers (kohya-ss/sd-scripts, LyCORIS, PEFT); where
they disagree on what a strength does, the form follows ComfyUI, since people compare pictures.

In the forms, F is the layer so far without its bias, s the strength, and a = alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from ..kernels.errors import AdapterError

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
                f"of a weight of {_times(shape)}: it was made for another model"
            )
        return torch.Size((*shape[: self.dim], self.length, *shape[self.dim + 1 :]))


class Factors(NamedTuple):
    """ΔW = scale · B · A, flattened: A ``[r, in · k]``, B ``[out, r]``."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


class Adapter:
    """One adapter on one weight, without its strength."""

    kind: ClassVar[str]

    def check(self, shape: torch.Size) -> None:
        """Raise AdapterError unless it can be applied to a weight of `shape`, ``[out, in, ...]``."""

    def low_rank(self) -> Factors | None:
        """The adapter as an additive low-rank term, if it is one."""
        return None


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
                raise AdapterError(f"lora_mid is {_times(self.mid.shape)} for a rank of {self.rank}")
            inner = torch.Size((*self.down.shape[1:2], *self.mid.shape[2:]))
        _check_pair("lora_up", self.up, self.rank, inner, shape)

    def low_rank(self) -> Factors:
        down = self.down.flatten(1)
        if self.mid is not None:
            down = torch.einsum("ij...,jc->ic...", self.mid.float(), down.float()).flatten(1)
        scale = 1.0
        if isinstance(self.alpha, tuple):
            down = down.float() * torch.tensor(self.alpha).unsqueeze(1) / self.rank
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
                    raise AdapterError(f"hada_t{number} is {_times(t.shape)} for a rank of {b.shape[0]}")
                a, inner = a.t(), torch.Size((*b.shape[1:], *t.shape[2:]))
            _check_pair(f"hada_w{number}_a", a, b.shape[0], inner, shape)

    def low_rank(self) -> Factors:
        w1_a, w1_b, w2_a, w2_b = (w.float().flatten(1) for w in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        if self.t1 is not None and self.t2 is not None:
            w1_a, w2_a = w1_a.t(), w2_a.t()
            w1_b = torch.einsum("ij...,jc->ic...", self.t1.float(), w1_b).flatten(1)
            w2_b = torch.einsum("ij...,jc->ic...", self.t2.float(), w2_b).flatten(1)
        up = (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)
        down = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)
        return Factors(down, up, 1.0 if self.alpha is None else self.alpha / self.rank)


@dataclass(frozen=True, eq=False, repr=False)
class LoKr(Adapter):
    """``ΔW = a · w1 ⊗ w2`` (Kronecker product; LyCORIS), either factor whole or itself of low rank.

    On x seen as ``[..., c, d]``, w2 acts on the last axis and w1 on the one before it. ``a`` is alpha over
    the rank of w2, else that of w1, and 1 where both are whole.

    Attributes:
        w1: ``[a, c]``, or w1_a ``[a, r]`` and w1_b ``[r, c]``.
        w2: ``[b, d]`` or ``[b, d, k, k]``, or w2_a ``[b, r]`` and w2_b ``[r, d]`` or ``[r, d · k · k]``.
        t2: ``[r, r, k, k]``, with w2_a ``[r, b]`` and w2_b ``[r, d]``.
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
        if got != (shape[0], math.prod(shape[1:])) or (len(right) > 2 and right[2:] != shape[2:]):
            raise AdapterError(
                f"LoKr of {_times(left)} and {_times(right)} does not make {_times(shape)}: "
                "it was made for another model"
            )

    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """Shapes of the whole w1 and w2.

        Raises:
            AdapterError: their own factors do not fit each other.
        """
        left = _product_shape("lokr_w1", self.w1, self.w1_a, self.w1_b)
        if self.t2 is None:
            return left, _product_shape("lokr_w2", self.w2, self.w2_a, self.w2_b)
        assert self.w2_a is not None and self.w2_b is not None
        if self.t2.shape[:2] != (self.w2_a.shape[0], self.w2_b.shape[0]):
            raise AdapterError(f"lokr_t2 is {_times(self.t2.shape)} for ranks of {self.w2_a.shape[0]}")
        return left, torch.Size((self.w2_a.shape[1], self.w2_b.shape[1], *self.t2.shape[2:]))


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

    @property
    def rank(self) -> int:
        return self.a2.shape[0]

    def check(self, shape: torch.Size) -> None:
        _check_factors("GLoRA", a1=self.a1, a2=self.a2, b1=self.b1, b2=self.b2)
        _check_rank(self.rank)
        _check_pair("b1", self.b1, self.b2.shape[0], self.b2.shape[1:], shape)
        _check_pair("a1", self.a1, self.rank, self.a2.shape[1:], torch.Size((shape[1], shape[1])))


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

    def check(self, shape: torch.Size) -> None:
        _check_factors("OFT", oft_blocks=self.blocks)
        count, size, width = self.blocks.shape
        if size != width or count * size != shape[0]:
            raise AdapterError(f"OFT blocks of {_times(self.blocks.shape)} do not cover {shape[0]} output rows")


@dataclass(frozen=True, eq=False, repr=False)
class BOFT(Adapter):
    """OFT as a product of m butterfly stages (Liu et al. 2024; LyCORIS).

    Stage i is ``s·Rᵢ + (1 − s)·I`` on blocks of rows 2ⁱ·b/2 apart; BF their product, times `rescale`:
    ``y + s·(BF(y) − y)``.

    Attributes:
        blocks: ``[m, number, b, b]``, number · b = out.
        constraint: the largest norm of Q, 0 for none (the file's alpha).
        rescale: ``[out]``.
    """

    blocks: torch.Tensor
    constraint: float = 0.0
    rescale: torch.Tensor | None = None

    kind: ClassVar[str] = "boft"

    def check(self, shape: torch.Size) -> None:
        _check_factors("BOFT", oft_blocks=self.blocks, rescale=self.rescale)
        stages, count, size, width = self.blocks.shape
        if size != width or size % 2 or count * size != shape[0] or shape[0] % (2**stages * (size // 2)):
            raise AdapterError(f"BOFT blocks of {_times(self.blocks.shape)} do not cover {shape[0]} output rows")
        if self.rescale is not None and self.rescale.numel() != shape[0]:
            raise AdapterError(f"BOFT rescales {self.rescale.numel()} rows of {shape[0]}")


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

    def check(self, shape: torch.Size) -> None:
        self.inner.check(shape)
        _check_factors("DoRA", dora_scale=self.magnitude)
        if self.magnitude.numel() != shape[self.axis]:
            raise AdapterError(f"dora_scale has {self.magnitude.numel()} magnitudes for a weight of {_times(shape)}")


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


@dataclass(frozen=True, eq=False, repr=False)
class Set(Adapter):
    """``W' = value``: takes the place of whatever was there; its strength says nothing.

    Attributes:
        value: of the parameter's shape.
    """

    value: torch.Tensor

    kind: ClassVar[str] = "set"

    def check(self, shape: torch.Size) -> None:
        _check_factors("set", value=self.value)
        _check_same(self.value, shape)


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

    def low_rank(self) -> Factors | None:
        factors = self.inner.low_rank()
        return factors and factors._replace(up=factors.up[list(self.order)])


@dataclass(frozen=True, eq=False, repr=False)
class Padded(Adapter):
    """Pads W with zeros to `shape`, then applies `inner`: ``pad(F(x[..., :in]))`` (Flux Tools' control LoRAs).

    Attributes:
        shape: of the weight from here on, no smaller than it was in any dimension.
    """

    inner: Adapter
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.inner.kind

    def check(self, shape: torch.Size) -> None:
        larger = len(self.shape) == len(shape) and all(n >= m for n, m in zip(self.shape, shape, strict=True))
        if not larger or tuple(self.shape[2:]) != tuple(shape[2:]):
            raise AdapterError(
                f"the adapter makes a weight of {_times(shape)} into {_times(self.shape)}: "
                "a weight can only be padded, so it was made for another model"
            )
        self.inner.check(torch.Size(self.shape))


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


def from_host(
    value: Any,
    shape: Shape,
    region: Region | None = None,
    function: Callable[[torch.Tensor], torch.Tensor] | None = None,
    norm: str = "comfy",
) -> Adapter:
    """One of our classes for what a host's patch list holds.

    Args:
        value: an object of ``comfy.weight_adapter`` (known by `name` and `weights`), a tuple ``(diff,)``,
            ``(kind, (...))``, a list for a merge, or an Adapter, which is only checked.
        shape: of the whole parameter, ``[out, in, ...]`` or ``[out]``.
        region: the part of it that the value is about.
        function: what the host passes the difference through.
        norm: whose norm DoRA on the output axis divides by: ``comfy`` or ``merged``.

    Returns:
        the adapter; an `Opaque` one if its kind is unknown here.

    Raises:
        AdapterError: it cannot be applied to this parameter.
    """
    part = torch.Size(shape) if region is None else region.within(shape)
    try:
        adapter = _parse(value, part, norm)
        adapter = adapter if function is None else _through(adapter, function, part, value)
        if region is not None and isinstance(adapter, Padded):
            raise AdapterError("the adapter pads a part of a weight, which has no room for it: leave it out")
        adapter.check(part)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise AdapterError(f"the adapter is malformed ({error}): get the file again") from error
    return adapter


def _parse(value: Any, shape: torch.Size, norm: str) -> Adapter:
    if isinstance(value, Adapter):
        return value
    if hasattr(value, "name") and hasattr(value, "weights"):
        return _of_kind(value.name, value.weights, shape, norm, value)
    if isinstance(value, list):
        return _merge(value, shape, norm)
    if isinstance(value, torch.Tensor):
        return Diff(value)
    if isinstance(value, tuple) and len(value) == 1:
        return Diff(value[0])
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return _of_kind(value[0], value[1], shape, norm, value)
    return Opaque(value, f"a patch of unknown form ({type(value).__name__})")


def _of_kind(kind: str, fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    parse = _PARSERS.get(kind)
    if parse is None:
        return Opaque(value, f"adapter kind {kind!r} is unknown here")
    return parse(fields, shape, norm, value)


def _parse_lora(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    up, down, alpha, mid, magnitude, reshape = (*fields, None, None)[:6]
    if up is None or down is None:
        raise AdapterError("one of lora_up and lora_down is missing: the file is incomplete")
    inside = shape if reshape is None else torch.Size(int(n) for n in reshape)
    up, down = _oriented(up, down, inside) if mid is None else (up, down)
    adapter = _decomposed(LoRA(up, down, _alpha(alpha, down.shape[0]), mid), magnitude, inside, norm)
    return adapter if reshape is None else Padded(adapter, tuple(inside))


def _parse_loha(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, magnitude = fields
    return _decomposed(LoHa(w1_a, w1_b, w2_a, w2_b, _number(alpha), t1, t2), magnitude, shape, norm)


def _parse_lokr(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, magnitude = fields
    return _decomposed(LoKr(w1, w2, _number(alpha), w1_a, w1_b, w2_a, w2_b, t2), magnitude, shape, norm)


def _parse_glora(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    a1, a2, b1, b2, alpha, magnitude = fields
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if not old and not new:
        raise AdapterError("the ranks of GLoRA's factors differ from each other: the file is damaged")
    # both only fit a rank as large as the weight, where the host takes the old names
    if old and (not new or a2.shape[0] == shape[0] == shape[1]):
        if math.prod(shape[2:]) > 1:
            return Opaque(value, "a GLoRA of old LyCORIS on a k×k convolution mixes kernel positions")
        a1, a2, b1, b2 = a2.flatten(1), a1.flatten(1), b2, b1
    return _decomposed(GLoRA(a1, a2, b1, b2, _number(alpha)), magnitude, shape, norm)


def _parse_oft(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    blocks, rescale, constraint, magnitude = (*fields, None, None, None)[:4]
    if magnitude is not None:
        return Opaque(value, "OFT under DoRA")
    limit = _number(constraint) or 0.0
    return BOFT(blocks, limit, rescale) if blocks.dim() == 4 else OFT(blocks, limit)


def _parse_diff(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    diff, options = (*fields, {})[:2]
    if options.get("pad_weight") and diff.shape != shape:
        return Padded(Diff(diff), tuple(diff.shape))
    return Diff(diff)


_PARSERS: dict[str, Callable[[Any, torch.Size, str, Any], Adapter]] = {
    "lora": _parse_lora,
    "loha": _parse_loha,
    "lokr": _parse_lokr,
    "glora": _parse_glora,
    "oft": _parse_oft,
    "boft": _parse_oft,
    "diff": _parse_diff,
    "set": lambda fields, shape, norm, value: Set(fields[0]),
    "model_as_lora": lambda fields, shape, norm, value: ModelDiff(fields[0]),
}


def _merge(value: list, shape: torch.Size, norm: str) -> Adapter:
    """ComfyUI's ``[(weight, convert), patch, ...]``; Forge has the weight alone in first place."""
    head, *rest = value
    weight = head[1](head[0]) if isinstance(head, tuple) else head
    patches = []
    for entry in rest:
        strength, inner, strength_model, offset, function = (*entry, None, None)[:5]
        region = None if offset is None else Region(*offset)
        patches.append(Patch(strength, from_host(inner, shape, region, function, norm), strength_model, region))
    if any(isinstance(p.adapter, Opaque) for p in patches):
        return Opaque(value, "a merged model has a patch of unknown kind")
    return Merge(weight, tuple(patches))


def _decomposed(adapter: Adapter, magnitude: torch.Tensor | None, shape: torch.Size, norm: str) -> Adapter:
    """`adapter` under DoRA, if the file has magnitudes.

    A vector without further dimensions is PEFT's ``lora_magnitude_vector``, which is meant for the norm of the merged
    weight; the host would broadcast it to a square.
    """
    if magnitude is None:
        return adapter
    if magnitude.dim() == 1:
        return DoRA(adapter, magnitude, 0, "merged")
    axis = 0 if magnitude.shape[0] == shape[0] else 1
    if magnitude.numel() != shape[axis]:
        raise AdapterError(f"dora_scale is {_times(magnitude.shape)} for a weight of {_times(shape)}")
    return DoRA(adapter, magnitude.flatten(), axis, norm)


def _through(adapter: Adapter, function: Callable, shape: torch.Size, value: Any) -> Adapter:
    """`adapter` with the host's function on its ΔW taken in, where that reorders rows."""
    if isinstance(adapter, (Set, Opaque)):
        return adapter
    order = _row_order(function, shape)
    if order is None or isinstance(adapter, (Padded, GLoRA, OFT, BOFT, ModelDiff)):
        return Opaque(value, "its difference passes through a function of the host")
    if isinstance(adapter, DoRA):
        inner = _through(adapter.inner, function, shape, value)
        return inner if isinstance(inner, Opaque) else DoRA(inner, adapter.magnitude, adapter.axis, adapter.norm)
    return Permuted(adapter, order)


def _row_order(function: Callable[[torch.Tensor], torch.Tensor], shape: torch.Size) -> tuple[int, ...] | None:
    """The permutation of rows that `function` is, or None if it is something else."""
    rows = shape[0]
    ones = (1,) * (len(shape) - 1)
    try:
        moved = function(torch.arange(rows, dtype=torch.float64).reshape(rows, *ones))
        order = [int(i) for i in moved.reshape(-1).tolist()]
        # the same on a few columns of arbitrary values: nothing but rows may have moved
        probe = torch.randn(rows, *(min(n, 3) for n in shape[1:]), generator=torch.Generator().manual_seed(0))
        pure = torch.equal(function(probe.clone()), probe[order])
    except Exception:
        return None  # whatever a stranger's function raises on this, it is no permutation
    return tuple(order) if pure and sorted(order) == list(range(rows)) else None


def _times(shape: Shape) -> str:
    return "×".join(map(str, shape))


def _alpha(alpha: Any, rank: int) -> float | tuple[float, ...] | None:
    """A file's alpha: none, a number in any wrapping, or one for each rank."""
    if isinstance(alpha, torch.Tensor) and alpha.numel() > 1:
        alpha = alpha.flatten().tolist()
    if isinstance(alpha, (list, tuple)) and len(alpha) != 1:
        if len(alpha) != rank:
            raise AdapterError(f"there are {len(alpha)} alphas for a rank of {rank}: the file is damaged")
        return tuple(_finite(float(a)) for a in alpha)
    return _number(alpha)


def _number(alpha: Any) -> float | None:
    if alpha is None:
        return None
    if isinstance(alpha, torch.Tensor) or (isinstance(alpha, (list, tuple)) and len(alpha) == 1):
        values = torch.as_tensor(alpha)
        if values.numel() != 1:
            raise AdapterError(f"there are {values.numel()} alphas where one is needed: the file is damaged")
        return _finite(float(values.item()))
    return _finite(float(alpha))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise AdapterError(f"alpha is {value}: the training has diverged or the file is damaged")
    return value


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
    return f"the adapter is for {_times(got)}, the weight is {_times(shape)}: it was made for another model"


def _oriented(up: torch.Tensor, down: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Up and down the right way round, where a file has them transposed or swapped and only one way fits."""

    def fits(b: torch.Tensor, a: torch.Tensor) -> bool:
        columns = math.prod(shape[1:])
        return b.shape[0] == shape[0] and b.shape[1] == a.shape[0] and math.prod(a.shape[1:]) == columns

    if up.dim() != 2 or down.dim() != 2 or fits(up, down):
        return up, down
    others = [pair for pair in ((up.t(), down.t()), (down, up)) if fits(*pair)]
    return others[0] if len(others) == 1 else (up, down)


def _product_shape(
    name: str, whole: torch.Tensor | None, a: torch.Tensor | None, b: torch.Tensor | None
) -> torch.Size:
    if whole is not None:
        return whole.shape
    assert a is not None and b is not None
    if a.dim() != 2 or a.shape[1] != b.shape[0]:
        raise AdapterError(f"{name}_a is {_times(a.shape)}, {name}_b {_times(b.shape)}: the file is damaged")
    _check_rank(b.shape[0])
    return torch.Size((a.shape[0], *b.shape[1:]))


__all__ = [
    "BOFT", "OFT", "Adapter", "Diff", "DoRA", "Factors", "GLoRA", "LoHa", "LoKr", "LoRA", "Merge", "ModelDiff",
    "Opaque", "Padded", "Patch", "Permuted", "Region", "Set", "from_host",
]  # fmt: skip
