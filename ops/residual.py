"""The adapters of one model branch, and how a layer runs them beside its base weight.

    y = F(x) + s·B(Ax)                              one adapter
    h = x·A_catᵀ;  h ∘= S;  y += h·B_catᵀ           any number of additive low-rank ones, rank-concatenated
    F ← patch₁(F) ← patch₂(…)                       all others, as operators around it, in the host's order

A LoRA is call context, not model state. Clones of a model share its layers; each holds a
`ResidualStack`, which is put on the layers for the duration of a model call and taken off after it.
Nothing is patched, so nothing has to be restored, and a new strength is a new S; BOFT alone multiplies its
stages anew.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.weak import WeakIdRef

from ..kernels import AdapterError, LowRank, decoded_rows, is_slow
from .kinds import (
    Adapter,
    Diff,
    LoHa,
    Merge,
    Opaque,
    Pad,
    Padded,
    Patch,
    Region,
    Scale,
    Set,
    merge,
)  # fmt: skip
from .layers import EmbeddingMath, PackedLayer, without_autocast
from .layout import Layout, Operator

log = logging.getLogger(__name__)

# ranks are padded to whole tiles of a tensor core, and so that a LoRA of a similar rank does not recompile
RANK_BUCKET = 16

Merging = Callable[[Sequence[Patch], torch.Tensor, str], torch.Tensor]
"""The host's own merge: ``(patches, fp32 weight that may be written to, key) -> weight``."""


class LayerFactors(nn.Module):
    """The low-rank factors of additive adapters on one layer, rank-concatenated.

    Attributes:
        down: ``[R, in · k]``, R a multiple of `RANK_BUCKET`.
        up0, up1, ...: one ``[n, r]`` for each range of output rows that adapters write to (plain
            parameters of one leaf module, which is what hosts move).
        places: ``(start, first)`` of each: its first output row and its first rank.
        order: for each rank group of `down`, the index of its patch and its own scale alpha / r.
        size: how many strengths it reads.
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
        self.order: list[tuple[int, int, float]] = []
        rank = 0
        for (start, _length), members in by_rows.items():
            first, columns = rank, []
            for index in members:
                factors = patches[index].adapter.low_rank()
                assert factors is not None
                downs.append(_input_columns(factors.down, patches[index].region, shape))
                columns.append(factors.up)
                self.order.append((index, factors.down.shape[0], factors.scale))
                rank += factors.down.shape[0]
            places.append((start, first))
            ups.append(_concatenate(columns, 1, dtype))
        down = _concatenate(downs, 0, dtype)
        self.rank = rank
        self.size = self.padded_rank = math.ceil(rank / RANK_BUCKET) * RANK_BUCKET
        if len(ups) == 1:
            ups[0] = _pad(ups[0], 1, self.padded_rank)
        for index, up in enumerate(ups):
            self.register_parameter(f"up{index}", nn.Parameter(up, requires_grad=False))
        self.down = nn.Parameter(_pad(down, 0, self.padded_rank), requires_grad=False)
        self.places = tuple(places)

    def slots(self, patches: Sequence[Patch]) -> list[float]:
        """S: strength · alpha / r of every rank, padded with zeros."""
        values: list[float] = []
        for index, rank, scale in self.order:
            values += [patches[index].strength * scale] * rank
        return values + [0.0] * (self.padded_rank - self.rank)

    def low_rank(self, scale: torch.Tensor) -> LowRank:
        ups = tuple((start, first, getattr(self, f"up{i}")) for i, (start, first) in enumerate(self.places))
        return LowRank(self.down, scale, ups)

    def run(
        self, patches: Sequence[Patch], at: Layout, f: Operator, s: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        """``F(x) + ((x Aᵀ) ∘ S) Bᵀ`` around any F."""
        y = f(x)
        t = at.own(x, self.down) * at.spread(s, x)
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
        sources: as those of `LayerFactors`, also of the patches before it if it depends on them.
    """

    size = 1
    sources: Sequence[weakref.ref[torch.Tensor]] = ()

    def __init__(self, patch: Patch, current: LayerWeight, dtype: torch.dtype | None) -> None:
        super().__init__()
        for name, tensor in patch.adapter.tensors(current).items():
            # matrices in the dtype of the matmul; a vector such as DoRA's c keeps its digits
            stored = _stored(tensor, dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor
            self.register_parameter(name, nn.Parameter(_ordinary(stored), requires_grad=False))

    def slots(self, patches: Sequence[Patch]) -> list[float]:
        return [patches[0].strength]

    def run(
        self, patches: Sequence[Patch], at: Layout, f: Operator, s: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        """The patched layer's output; `patches` is the one patch, or another of the same adapter."""
        adapter, region, s = patches[0].adapter, patches[0].region, s.reshape(())
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


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that autograd may save, even if a host has read the file in inference mode."""
    if not tensor.is_inference():
        return tensor
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage(), *place)


def _make_ordinary(member: nn.Module) -> None:
    """The same for what a host has moved in inference mode."""
    for name, parameter in member.named_parameters(recurse=False):
        if parameter.is_inference():
            member.register_parameter(name, nn.Parameter(_ordinary(parameter.data), requires_grad=False))


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
        layer = self.layer
        data, fmt = layer.weight.data, layer.format_of(layer.weight.data)
        yield from decoded_rows(data, fmt, self.shape[0], math.prod(self.shape[1:]), self._dtype, layer.backend)

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


class LayerResidual:
    """What the patches of one layer amount to, without their strengths' place.

    Attributes:
        path: ``residual`` or ``exact``.
        reason: why it is not the former, or what makes it dear.
        rejected: why patches were left out, if any were.
        members: the modules with the factors, in the order in which they act, and the patches of each.
        size: how many strengths they read.
    """

    def __init__(self, key: str, layer: PackedLayer, weight: Sequence[Patch], bias: Sequence[Patch]) -> None:
        self.key = key
        self.bias_patches = tuple(bias)
        self.weight_patches, self.rejected = _simplified(weight, torch.Size(layer.logical_shape))
        self.path, self.reason = _path_of(self.weight_patches, layer)
        self.members: list[tuple[LayerFactors | Term, list[Patch]]] = []
        self.size = 0
        self._biases: dict[torch.device, torch.Tensor] = {}

    def build(self, layer: PackedLayer, cache: FactorCache, dtype: torch.dtype | None) -> None:
        """Make the modules that hold the factors, or find them in the cache."""
        if self.path != "residual":
            return
        shape = torch.Size(layer.logical_shape)
        before: list[Patch] = []
        for run in _runs(self.weight_patches):
            low_rank = [p for p in run if p.adapter.is_low_rank]
            if low_rank:
                self.members.append((cache.factors(self.key, low_rank, shape, dtype), low_rank))
            for patch in (p for p in run if not p.adapter.is_low_rank):
                current = LayerWeight(self.key, layer, before, patch.region, shape, cache)
                self.members.append((cache.term(patch, current, dtype), [patch]))
            before += run
            if isinstance(run[0].adapter, Pad):
                shape = torch.Size(run[0].adapter.shape)
        self.size = sum(member.size for member, _ in self.members)

    def slots(self) -> list[float]:
        """The strengths of every member, in order."""
        return [value for member, patches in self.members for value in member.slots(patches)]

    def bias_on(self, device: torch.device, layer: PackedLayer, host: Merging | None) -> torch.Tensor | None:
        """The patched bias in fp32, or None if nothing is patched; worked out once for each device."""
        if self.bias_patches and device not in self._biases:
            self._biases[device] = self._patched_bias(layer, host).to(device)
        return self._biases.get(device)

    def _patched_bias(self, layer: PackedLayer, host: Merging | None) -> torch.Tensor:
        rows = layer.logical_shape[0]
        bias = torch.zeros(rows) if layer.bias is None else layer.bias.detach().float().cpu()
        through = functools.partial(_through_host, host, self.key + ".bias")
        return merge(bias.clone(), self.bias_patches, through, lambda: bias)


class RunningResidual:
    """A layer's residual during one model call, on one device: what the layer calls.

    Attributes:
        residual: what runs.
        low_rank: the part that goes into the layer's own kernel.
        steps: what goes around that, each with its patches and their strengths.
        bias: in place of the layer's own.
    """

    def __init__(
        self, residual: LayerResidual, scale: torch.Tensor, bias: torch.Tensor | None, host: Merging | None
    ) -> None:
        self.residual, self.bias, self.host = residual, bias, host
        members = residual.members
        parts = scale.split([member.size for member, _ in members]) if members else ()
        self.steps = [(member, patches, s) for (member, patches), s in zip(members, parts, strict=True)]
        self.low_rank: LowRank | None = None
        lowest = self.steps[0][0] if self.steps else None
        if isinstance(lowest, LayerFactors):
            self.low_rank = lowest.low_rank(self.steps.pop(0)[2])

    def __call__(
        self, x: torch.Tensor, layer: PackedLayer, data: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The layer's output with its adapters.

        Args:
            data, bias: the layer's own, on x's device.
        """
        if is_slow(x):
            return self(x.float(), layer, data, bias).to(x.dtype)
        if self.bias is not None:
            bias = self.bias.to(x.device)
        if self.residual.path == "exact":
            return self._exact(x, layer, data, bias)
        low_rank = self.low_rank
        if low_rank is not None and low_rank.down.device != x.device:
            low_rank = _moved(low_rank, x.device)
        if not self.steps:
            return layer.compute(x, data, bias, low_rank)
        at = Layout(layer)
        if x.dim() == len(at.kernel) + 1 and at.kernel:
            return self(x.unsqueeze(0), layer, data, bias).squeeze(0)
        f: Operator = functools.partial(layer.compute, data=data, low_rank=low_rank)
        for member, patches, s in self.steps:
            f = functools.partial(member.run, patches, at, f, s.to(x.device))
        y = f(x)
        return y if bias is None else y.add_(at.spread(_lengthened(bias, y.shape[at.axis]), y))

    def _exact(
        self, x: torch.Tensor, layer: PackedLayer, data: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """On the decoded weight with everything merged in."""
        through = functools.partial(_through_host, self.host, self.residual.key + ".weight")
        patches = self.residual.weight_patches
        weight = merge(layer.dequantized(data), patches, through, lambda: layer.dequantized(data))
        return layer.compute_dense(x, weight.to(x.dtype) if x.is_floating_point() else weight, bias)


def _through_host(host: Merging | None, key: str, patch: Patch, weight: torch.Tensor) -> torch.Tensor:
    if host is None:
        reason = patch.adapter.reason if isinstance(patch.adapter, Opaque) else patch.adapter.kind
        raise AdapterError(f"{key}: {reason}, and there is no host that knows it: leave it out")
    return host([patch], weight, key)


def _moved(low_rank: LowRank, device: torch.device) -> LowRank:
    """Copies where the host has left the factors elsewhere."""
    ups = tuple((start, first, up.to(device)) for start, first, up in low_rank.ups)
    return LowRank(low_rank.down.to(device), low_rank.scale.to(device), ups)


def _lengthened(bias: torch.Tensor, rows: int) -> torch.Tensor:
    """A bias for output rows that an adapter has added."""
    return bias if bias.shape[0] == rows else torch.nn.functional.pad(bias, (0, rows - bias.shape[0]))


def _simplified(patches: Sequence[Patch], shape: torch.Size) -> tuple[tuple[Patch, ...], list[str]]:
    """The same patches, each with one thing to do: no strength_model, no padding inside, no idle ones.

    Returns:
        them, and why others were left out.
    """
    simple: list[Patch] = []
    rejected: list[str] = []
    original = shape
    for patch in (part for p in patches for part in _expanded(p)):
        adapter = patch.adapter
        try:
            if isinstance(adapter, Padded):
                adapter.check(shape)
                simple.append(Patch(1.0, Pad(tuple(shape), adapter.shape)))
                shape = torch.Size(adapter.shape)
                adapter = adapter.inner
                patch = replace(patch, adapter=adapter)
            elif shape != original and not isinstance(adapter, (Opaque, Scale)):
                patch = _on_the_unpadded(patch, shape, original)
        except AdapterError as error:
            rejected.append(str(error))
            continue
        if isinstance(adapter, Set) and patch.region is None:
            # nothing of what was there is left, but for its shape
            simple = [p for p in simple if isinstance(p.adapter, Pad)]
        if patch.strength or not adapter.idle_at_zero or patch.strength_model != 1.0:
            simple.append(replace(patch, adapter=adapter.at_strength(patch.strength)))
    return tuple(simple), rejected


def _expanded(patch: Patch) -> list[Patch]:
    """`patch` without its strength_model, and a merged model as its weight and its own adapters."""
    if isinstance(patch.adapter, Opaque):
        return [patch]
    parts = [] if patch.strength_model == 1.0 else [Patch(patch.strength_model, Scale(), region=patch.region)]
    patch = replace(patch, strength_model=1.0)
    adapter = patch.adapter
    if not isinstance(adapter, Merge) or patch.region is not None:
        return [*parts, patch]
    if not all(p.adapter.additive and p.strength_model == 1.0 for p in adapter.patches):
        return [*parts, patch]
    inner = [replace(p, strength=patch.strength * p.strength) for p in adapter.patches]
    return [*parts, replace(patch, adapter=Diff(adapter.weight)), *(q for p in inner for q in _expanded(p))]


def _on_the_unpadded(patch: Patch, shape: torch.Size, original: torch.Size) -> Patch:
    """`patch` where it belongs, once one before it has widened the weight from `original` to `shape`."""
    try:
        patch.adapter.check(shape if patch.region is None else patch.region.within(shape))
        return patch
    except AdapterError:
        if patch.region is not None or shape[0] != original[0]:
            raise
        patch.adapter.check(original)
        return replace(patch, region=Region(1, 0, original[1]))


def _path_of(patches: Sequence[Patch], layer: PackedLayer) -> tuple[str, str]:
    opaque = next((p.adapter.reason for p in patches if isinstance(p.adapter, Opaque)), "")
    if opaque:
        return "exact", opaque
    special = next((p.adapter.kind for p in patches if not p.adapter.is_low_rank), "")
    if special and isinstance(layer, EmbeddingMath):
        return "exact", f"{special} on an embedding"
    if patches and getattr(layer, "groups", 1) != 1:
        return "exact", "a grouped convolution"
    dear = next((p.adapter for p in patches if isinstance(p.adapter, LoHa) and not p.adapter.is_low_rank), None)
    return "residual", "" if dear is None else f"LoHa of rank {dear.rank} costs as much as a second weight"


def _runs(patches: Sequence[Patch]) -> Iterator[list[Patch]]:
    """Stretches of additive patches, whose order does not matter, and each other one by itself."""
    run: list[Patch] = []
    for patch in patches:
        if patch.adapter.additive:
            run.append(patch)
            continue
        if run:
            yield run
        yield [patch]
        run = []
    if run:
        yield run


_Member = TypeVar("_Member", LayerFactors, Term)


class FactorSet:
    """Factors that a host moves and counts as one model. Each factor that it knows of lies in one set.

    Stacks have factors in common. One that needs some of a set and not all divides it, so that what only the others
    need can leave by itself.

    Attributes:
        module: the factors; empty once the set is divided.
        host: what the host moves them by; told to `detach` before the set is divided.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        self.module = nn.ModuleList(members)
        self.host: Any = None
        self._parts: tuple[FactorSet, ...] = ()

    def divide(self, wanted: Container[nn.Module]) -> tuple[FactorSet, FactorSet]:
        """Make two of this one: those that are `wanted`, and the rest."""
        if self.host is not None:
            self.host.detach()
        inside = FactorSet(member for member in self.module if member in wanted)
        rest = FactorSet(member for member in self.module if member not in wanted)
        self.module, self.host, self._parts = nn.ModuleList(), None, (inside, rest)
        return inside, rest

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

    Attributes:
        row_norms: of base weights, for DoRA.
    """

    def __init__(self, keep: int = 3) -> None:
        self._members: weakref.WeakValueDictionary[tuple, nn.Module] = weakref.WeakValueDictionary()
        self._stacks: weakref.WeakValueDictionary[tuple, StackFactors] = weakref.WeakValueDictionary()
        self._sets: weakref.WeakSet[FactorSet] = weakref.WeakSet()
        self._recent: dict[tuple, StackFactors] = {}
        self._keep = keep
        self.row_norms: dict[tuple[str, Region | None], torch.Tensor] = {}

    def __deepcopy__(self, memo: dict) -> FactorCache:
        """That of a copy of the layers: none are built yet."""
        return FactorCache(self._keep)

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
        found._recent = {key: module for key, module in found._recent.items() if member not in key}


@dataclass
class ResidualStack:
    """The adapters of one branch: patches by parameter name, in the order in which they were added.

    Attributes:
        patches: ``{"blocks.0.attn.qkv.weight": [Patch, ...], "blocks.0.attn.qkv.bias": [...]}``.
        merge: the host's own merge, for kinds that have no activation-space form here.
    """

    patches: dict[str, list[Patch]] = field(default_factory=dict)
    merge: Merging | None = None
    _residuals: Mapping[str, LayerResidual] | None = None
    _scales: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    _dtype: torch.dtype | None = None
    _factors: StackFactors | None = None  # as long as the stack, so is what the host counts them by

    def __bool__(self) -> bool:
        return bool(self.patches)

    def copy(self) -> ResidualStack:
        """An independent stack with the same patches, built already if this one is."""
        patches = {k: list(v) for k, v in self.patches.items()}
        return ResidualStack(patches, self.merge, self._residuals, self._scales, self._dtype, self._factors)

    def __deepcopy__(self, memo: dict) -> ResidualStack:
        """The same patches for a copy of the layers: factors are built for it anew, tensors of files are shared."""
        return ResidualStack({k: list(v) for k, v in self.patches.items()}, self.merge)

    def add(self, key: str, patch: Patch) -> None:
        """Put `patch` behind those that parameter `key` has."""
        self.patches.setdefault(key, []).append(patch)
        self._residuals, self._factors, self._scales = None, None, {}

    @torch.no_grad()
    @torch.inference_mode(False)
    def build(
        self, layers: Mapping[str, PackedLayer], cache: FactorCache, dtype: torch.dtype | None = None,
        keep: bool = True,
    ) -> StackFactors:  # fmt: skip
        """Concatenate the factors, or find them in the cache.

        Hosts call this in inference mode, and may want a gradient through the same factors later.

        Args:
            layers: by path, without ``.weight``.
            dtype: of the factors; None keeps the files' own.
            keep: whether the cache is to keep them beyond this stack.

        Returns:
            a module with every factor in leaf modules, for a host that moves and counts memory.
        """
        if self._dtype != dtype:
            self._residuals, self._scales, self._dtype = None, {}, dtype
        planned = self.planned(layers)
        if self._residuals is None:
            weights = (layers[name].weight for name in planned)
            with contextlib.ExitStack() as stack:
                # what is worked out here is kept, and not for this call alone
                for device in {torch.device("cpu"), *(weight.device for weight in weights if weight is not None)}:
                    stack.enter_context(without_autocast(device))
                for name, residual in planned.items():
                    residual.build(layers[name], cache, dtype)
            self._residuals = planned
        self._factors = cache.module([member for r in planned.values() for member, _ in r.members], keep)
        return self._factors

    def planned(self, layers: Mapping[str, PackedLayer]) -> Mapping[str, LayerResidual]:
        """What the patches of each layer amount to and which way it takes; needs no factors, and so no `build`."""
        if self._residuals is not None:
            return self._residuals
        patches = self.patches.get
        return {
            name: LayerResidual(name, layers[name], patches(f"{name}.weight", ()), patches(f"{name}.bias", ()))
            for name in dict.fromkeys(key.rpartition(".")[0] for key in self.patches)
        }

    @property
    def residuals(self) -> Mapping[str, LayerResidual]:
        """By layer; empty before `build`."""
        return self._residuals or {}

    @torch.no_grad()
    @torch.inference_mode(False)
    def running(self, layers: Mapping[str, PackedLayer], device: torch.device) -> dict[str, RunningResidual]:
        """By layer, what runs beside it on `device`; all strengths lie in one small buffer."""
        residuals = self.residuals
        if device not in self._scales:
            values = [value for r in residuals.values() for value in r.slots()]
            self._scales[device] = torch.tensor(values, dtype=self._scale_dtype()).to(device)
        parts = self._scales[device].split([r.size for r in residuals.values()])
        return {
            name: RunningResidual(residual, scale, residual.bias_on(device, layers[name], self.merge), self.merge)
            for (name, residual), scale in zip(residuals.items(), parts, strict=True)
        }

    def _scale_dtype(self) -> torch.dtype:
        members = (member for r in self.residuals.values() for member, _ in r.members)
        wide = any(p.dtype == torch.float64 for member in members for p in member.parameters())
        return torch.float64 if wide else torch.float32

    @contextlib.contextmanager
    def active(self, layers: Mapping[str, PackedLayer], device: torch.device) -> Iterator[None]:
        """Run the model with these adapters and no others; behind the block, with those that it had before.

        A branch without any may be asked within a call of one that has some, for a guidance by the model as it was.
        """
        if torch.is_grad_enabled():  # else nothing is saved for a way back, and every model call would walk all factors
            for member in (m for r in self.residuals.values() for m, _ in r.members):
                _make_ordinary(member)
        running = self.running(layers, device) if self.residuals else {}
        changed = {n: layer.residual for n, layer in layers.items() if layer.residual is not running.get(n)}
        try:
            for name in changed:
                layers[name].residual = running.get(name)
            yield
        finally:
            for name, before in changed.items():
                layers[name].residual = before


__all__ = ["FactorCache", "LayerResidual", "Merging", "ResidualStack", "RunningResidual"]
