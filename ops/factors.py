"""The factors of adapters in memory: concatenated for each layer, kept for the next branch, in sets that a host moves.

A new strength finds the factors that are there; a LoRA that its node has dropped leaves none.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.weak import WeakIdRef

from ..kernels import LowRank
from .kinds import Adapter, Patch, Region, merge
from .layers import PackedLayer
from .layout import Layout, Operator

# ranks are padded to whole tiles of a tensor core, and so that a LoRA of a similar rank does not recompile
RANK_BUCKET = 16


class LayerFactors(nn.Module):
    """The low-rank factors of additive adapters on one layer, rank-concatenated.

    Attributes:
        down: ``[R, in · k]``, R a multiple of `RANK_BUCKET`.
        up0, up1, ...: one ``[n, r]`` for each range of output rows that adapters write to (plain
            parameters of one leaf module, which is what hosts move).
        places: ``(start, first)`` of each: its first output row and its first rank.
        layout: for each rank group of `down`, the index of its patch, its ranks and its own scale alpha / r.
        size: how many strengths it reads.
        owners: which patch each of these is of, -1 for padding.
        sources: the tensors that it was made of, and what happens when one of them goes (`FactorCache`).
    """

    sources: Sequence[weakref.ref[torch.Tensor]] = ()

    def __init__(self, patches: Sequence[Patch], shape: torch.Size, dtype: torch.dtype | None) -> None:
        super().__init__()
        by_rows: dict[tuple[int, int], list[int]] = {}
        for index, patch in enumerate(patches):
            by_rows.setdefault(_output_rows(patch.region, shape), []).append(index)
        downs: list[torch.Tensor] = []
        ups: list[torch.Tensor] = []
        places: list[tuple[int, int]] = []
        layout: list[tuple[int, int, float]] = []
        rank = 0
        for (start, _length), members in by_rows.items():
            first, columns = rank, []
            for index in members:
                factors = patches[index].adapter.low_rank()
                assert factors is not None
                downs.append(_input_columns(factors.down, patches[index].region, shape))
                columns.append(factors.up)
                layout.append((index, factors.down.shape[0], factors.scale))
                rank += factors.down.shape[0]
            places.append((start, first))
            ups.append(_concatenate(columns, 1, dtype))
        down = _concatenate(downs, 0, dtype)
        self.rank, self.layout = rank, tuple(layout)
        self.size = self.padded_rank = math.ceil(rank / RANK_BUCKET) * RANK_BUCKET
        ranks = [index for index, count, _ in self.layout for _ in range(count)]
        self.owners = (*ranks, *[-1] * (self.padded_rank - rank))
        if len(ups) == 1:
            ups[0] = _pad(ups[0], 1, self.padded_rank)
        for index, up in enumerate(ups):
            self.register_parameter(f"up{index}", nn.Parameter(up, requires_grad=False))
        self.down = nn.Parameter(_pad(down, 0, self.padded_rank), requires_grad=False)
        self.places = tuple(places)

    def slots(self, strengths: Sequence[float]) -> list[float]:
        """S: strength · alpha / r of every rank, padded with zeros."""
        values: list[float] = []
        for index, rank, scale in self.layout:
            values += [strengths[index] * scale] * rank
        return values + [0.0] * (self.padded_rank - self.rank)

    def low_rank(self, scale: torch.Tensor) -> LowRank:
        ups = tuple((start, first, getattr(self, f"up{i}")) for i, (start, first) in enumerate(self.places))
        return LowRank(self.down, scale, ups)

    def run(self, patches: Sequence[Patch], at: Layout, f: Operator, s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``F(x) + ((x Aᵀ) ∘ S) Bᵀ`` around any F."""
        y = f(x)
        t = at.own(x, self.down) * (at.spread(s, x) if s.dim() == 1 else s.to(x))
        ups = [getattr(self, f"up{index}") for index in range(len(self.places))]
        if len(ups) == 1 and len(ups[0]) == y.shape[at.axis]:
            return at.add_mixed(y, t, ups[0])
        for up, (start, first) in zip(ups, self.places, strict=True):
            ranks = at.narrow(t, first, up.shape[1])
            at.narrow(y, start, up.shape[0]).add_(at.mix(ranks, up))
        return y


class Term(nn.Module):
    """What the form of one patch reads, an operator around the layer so far; a leaf module.

    Attributes:
        size: how many strengths it reads.
        owners: which patch each of these is of.
        layout: as that of `LayerFactors`.
        sources: as those of `LayerFactors`, also of the patches before it if it depends on them.
    """

    size = 1
    owners = (0,)
    layout = ((0, 1, 1.0),)
    sources: Sequence[weakref.ref[torch.Tensor]] = ()

    def __init__(self, patch: Patch, current: LayerWeight, dtype: torch.dtype | None) -> None:
        super().__init__()
        for name, tensor in patch.adapter.tensors(current).items():
            # matrices in the dtype of the matmul; a vector such as DoRA's c keeps its digits
            stored = _stored(tensor, dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor
            self.register_parameter(name, nn.Parameter(ordinary(stored), requires_grad=False))

    def slots(self, strengths: Sequence[float]) -> list[float]:
        return [strengths[0]]

    def run(self, patches: Sequence[Patch], at: Layout, f: Operator, s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The patched layer's output; `patches` is the one patch, or another of the same adapter."""
        adapter, region, s = patches[0].adapter, patches[0].region, s.reshape(()) if s.dim() == 1 else s
        if region is None:
            return adapter.operator(self, at, f, x, s)
        if region.dim == 0:
            return self._run_on_rows(adapter, at, f, s, x, region)
        return self._run_on_columns(adapter, at, f, s, x, region)

    def _run_on_rows(
        self, adapter: Adapter, at: Layout, f: Operator, s: torch.Tensor, x: torch.Tensor, rows: Region
    ) -> torch.Tensor:
        y = f(x)
        part = at.narrow(y, rows.start, rows.length)
        if adapter.from_output:
            patched = adapter.output(self, at, part, x, s)
        else:
            # it needs these rows of the layer on another x: a second call
            patched = adapter.operator(self, at, lambda z: at.narrow(f(z), rows.start, rows.length), x, s)
        if patched is not part:
            part.copy_(patched)
        return y

    def _run_on_columns(
        self, adapter: Adapter, at: Layout, f: Operator, s: torch.Tensor, x: torch.Tensor, cols: Region
    ) -> torch.Tensor:
        part = at.narrow(x, cols.start, cols.length)
        if adapter.additive:
            return adapter.output(self, at, f(x), part, s)
        # W x = W₁ x₁ + W₂ x₂, and only W₁ changes
        rest = x.clone()
        at.narrow(rest, cols.start, cols.length).zero_()

        def on_part(z: torch.Tensor) -> torch.Tensor:
            wide = torch.zeros_like(x)
            at.narrow(wide, cols.start, cols.length).copy_(z)
            return f(wide)

        return adapter.operator(self, at, on_part, part, s).add_(f(rest))


def _output_rows(region: Region | None, shape: torch.Size) -> tuple[int, int]:
    if region is None or region.dim != 0:
        return 0, shape[0]
    return region.start, region.length


def _input_columns(down: torch.Tensor, region: Region | None, shape: torch.Size) -> torch.Tensor:
    """A in the width of the whole layer: an adapter of a column slice reads zeros elsewhere."""
    if region is None or region.dim == 0:
        return down
    kernel = math.prod(shape[2:])
    wide = down.new_zeros(down.shape[0], math.prod(shape[1:]))
    wide[:, region.start * kernel : (region.start + region.length) * kernel] = down
    return wide


def _stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """In `dtype`, or the file's own; fp8, which nothing computes in, as the bf16 that it is a part of."""
    if dtype is None:
        dtype = torch.bfloat16 if tensor.element_size() == 1 else tensor.dtype
    return tensor.to(dtype)


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that autograd may save, even if a host has read the file in inference mode."""
    if not tensor.is_inference():
        return tensor
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage(), *place)


def make_ordinary(member: nn.Module) -> None:
    """The same for what a host has moved in inference mode."""
    for name, parameter in member.named_parameters(recurse=False):
        if parameter.is_inference():
            member.register_parameter(name, nn.Parameter(ordinary(parameter.data), requires_grad=False))


def _concatenate(parts: Sequence[torch.Tensor], dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    """Joined in `dtype`, or without loss: in a dtype that holds all of them."""
    stored = [_stored(p, dtype) for p in parts]
    kinds = {p.dtype for p in stored}
    common = kinds.pop() if len(kinds) == 1 else functools.reduce(torch.promote_types, kinds)
    return torch.cat([p.to(common) for p in stored], dim)


def _pad(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


class LayerWeight:
    """The weight that a patch finds: the layer's own with the patches before it merged in.

    Attributes:
        shape: of the part that the patch is about.
        before: those patches, simplified.
    """

    def __init__(
        self, name: str, layer: PackedLayer, before: Sequence[Patch], region: Region | None, shape: torch.Size,
        cache: FactorCache,
    ) -> None:  # fmt: skip
        self.name, self.layer, self.before, self.region, self.cache = name, layer, tuple(before), region, cache
        self.shape = shape if region is None else region.within(shape)

    def base(self) -> torch.Tensor:
        whole = self.layer.dequantized(dtype=self._dtype)
        return whole if self.region is None else whole.narrow(*self.region)

    def dense(self) -> torch.Tensor:
        if not self.before:
            return self.base()
        whole = merge(self.layer.dequantized(dtype=self._dtype), self.before)
        return whole if self.region is None else whole.narrow(*self.region)

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        if self.before or self.region is not None:
            yield slice(0, self.shape[0]), self.dense().flatten(1)
            return
        yield from self.layer.chunks(self.layer.weight.data, self._dtype)

    def row_norms(self) -> torch.Tensor:
        key = (self.name, self.region)
        known = None if self.before else self.cache.row_norms.get(key)
        if known is None:
            known = torch.cat([weight.norm(dim=1) for _, weight in self.chunks()])
            if not self.before:
                self.cache.row_norms[key] = known
        return known

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.layer.weight.dtype == torch.float64 else torch.float32


_Member = TypeVar("_Member", LayerFactors, Term)


class FactorSet:
    """Factors that a host moves and counts as one model. Each factor that it knows of lies in one set.

    Stacks have factors in common. One that needs some of a set and not all divides it, so that what only the others
    need can leave by itself.

    Attributes:
        module: the factors; empty once the set is divided.
        host: what the host moves them by; told to `detach` before it loses them.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        self.module = nn.ModuleList(members)
        self.host: Any = None
        self._parts: tuple[FactorSet, ...] = ()

    def divide(self, wanted: Container[nn.Module]) -> tuple[FactorSet, FactorSet]:
        """Make two of this one: those that are `wanted`, and the rest."""
        self.leave_host()
        inside = FactorSet(member for member in self.module if member in wanted)
        rest = FactorSet(member for member in self.module if member not in wanted)
        self.module, self._parts = nn.ModuleList(), (inside, rest)
        return inside, rest

    def leave_host(self) -> None:
        """Have it forget these factors, so that another one may move them."""
        if self.host is not None:
            self.host.detach()
        self.module, self.host = nn.ModuleList(self.module), None

    def undivided(self) -> list[FactorSet]:
        """This one, or all that it was divided into."""
        return [s for part in self._parts for s in part.undivided()] if self._parts else [self]


class StackFactors(nn.ModuleList):
    """All factors of a stack, and the sets that they lie in once a host has asked for these (`FactorCache.sets`)."""

    sets: list[FactorSet] | None = None


class FactorCache:
    """The factors of each layer and its adapters: a new strength finds the ones that are there already, but for BOFT's.

    A stack keeps its own alive, and so do its copies. The last few are kept beyond that, since hosts drop a branch
    before they build the next one, but none whose adapters are gone: a member holds no tensor of a file, and is let
    go of as soon as one that it was made of is.

    Args:
        keep: how many are kept.
        busy: whether the host is at its models now and must not lose one; what nobody needs then goes a little later.

    Attributes:
        row_norms: of base weights, for DoRA.
    """

    def __init__(self, keep: int = 3, busy: Callable[[], bool] = lambda: False) -> None:
        self._members: weakref.WeakValueDictionary[tuple, nn.Module] = weakref.WeakValueDictionary()
        self._stacks: weakref.WeakValueDictionary[tuple, StackFactors] = weakref.WeakValueDictionary()
        self._sets: weakref.WeakSet[FactorSet] = weakref.WeakSet()
        self._recent: dict[tuple, StackFactors] = {}
        self._leaving: list[StackFactors] = []
        self._keep, self._busy = keep, busy
        self.row_norms: dict[tuple[str, Region | None], torch.Tensor] = {}

    def __deepcopy__(self, memo: dict) -> FactorCache:
        """That of a copy of the layers: none are built yet."""
        return FactorCache(self._keep, self._busy)

    def factors(self, key: str, patches: Sequence[Patch], shape: torch.Size, dtype: torch.dtype | None) -> LayerFactors:
        identity = (key, shape, dtype, *((_identity(p.adapter), p.region) for p in patches))
        return self._find(identity, lambda: LayerFactors(patches, shape, dtype))

    def term(self, patch: Patch, current: LayerWeight, dtype: torch.dtype | None) -> Term:
        seen = current.before if patch.adapter.reads_weight else ()
        before = tuple((_identity(p.adapter), p.region, p.strength) for p in seen)
        identity = (current.name, current.shape, dtype, _identity(patch.adapter), patch.region, before)
        return self._find(identity, lambda: Term(patch, current, dtype))

    def _find(self, identity: tuple, make: Callable[[], _Member]) -> _Member:
        found = self._members.get(identity)
        if found is None:
            found = self._members[identity] = make()
            gone = functools.partial(_let_go, weakref.ref(self), id(found))
            found.sources = [weakref.ref(tensor, gone) for tensor in _tensors_in(identity)]
        return found  # type: ignore[return-value]

    def module(self, members: Sequence[nn.Module], keep: bool = True) -> StackFactors:
        """One module around the factors of a stack, the same one for the same factors.

        Args:
            keep: whether it counts among the last few.
        """
        if not self._busy():
            self._leaving.clear()
        identity = tuple(map(id, members))
        module = self._stacks.get(identity)
        if module is None:
            module = self._stacks[identity] = StackFactors(members)
        if keep:
            self._recent.pop(identity, None)
            self._recent[identity] = module
            for oldest in list(self._recent)[: -self._keep or None]:
                self._recent.pop(oldest, None)
        return module

    def sets(self, factors: StackFactors) -> list[FactorSet]:
        """The sets that hold these factors and no others."""
        if factors.sets is None:
            factors.sets = self._sets_of(factors)
        return [s for part in factors.sets for s in part.undivided()]

    def _sets_of(self, factors: StackFactors) -> list[FactorSet]:
        found, left = [], dict.fromkeys(factors)
        for known in list(self._sets):
            shared = [member for member in known.module if member in left]
            if not shared:
                continue
            if len(shared) < len(known.module):
                known, rest = known.divide(left)
                self._sets.update((known, rest))
            found.append(known)
            for member in shared:
                del left[member]
        if left:
            found.append(FactorSet(left))
            self._sets.add(found[-1])
        return found


def _identity(value: Any) -> Any:
    """An adapter is the same one if its tensors are: hosts wrap a file's tensors anew on every run.

    A reference to a tensor that is gone equals none to another one, even in its place.
    """
    if isinstance(value, torch.Tensor):
        return WeakIdRef(value)
    if isinstance(value, (Adapter, Patch)):
        return (type(value), *map(_identity, vars(value).values()))
    if isinstance(value, (tuple, list)):
        return tuple(map(_identity, value))
    return value


def _tensors_in(identity: tuple) -> Iterator[torch.Tensor]:
    for part in identity:
        if isinstance(part, tuple):
            yield from _tensors_in(part)
        elif isinstance(part, WeakIdRef):
            yield part()


def _let_go(cache: Callable[[], FactorCache | None], member: int, source: object) -> None:
    """Of what is kept and has this member: nobody can ask for it again."""
    found = cache()
    if found is not None:
        if found._busy():
            found._leaving += (module for key, module in found._recent.items() if member in key)
        found._recent = {key: module for key, module in found._recent.items() if member not in key}


__all__ = [
    "RANK_BUCKET", "FactorCache", "FactorSet", "LayerFactors", "LayerWeight", "StackFactors", "Term", "make_ordinary",
    "ordinary",
]  # fmt: skip
