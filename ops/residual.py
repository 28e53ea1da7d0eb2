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
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..kernels import AdapterError, LowRank, is_slow
from .calls import calls_on
from .factors import FactorCache, LayerFactors, LayerWeight, StackFactors, Term, make_ordinary
from .kinds import (
    BOFT,
    Diff,
    DoRA,
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
from .strengths import Call, RowStrengths

log = logging.getLogger(__name__)

Merging = Callable[[Sequence[Patch], torch.Tensor, str], torch.Tensor]
"""The host's own merge: ``(patches, fp32 weight that may be written to, key) -> weight``."""


class LayerResidual:
    """What the patches of one layer amount to, without their strengths' place.

    Attributes:
        path: ``residual`` or ``exact``.
        reason: why it is not the former, or what makes it dear.
        rejected: why patches were left out, if any were.
        members: the modules with the factors, in the order in which they act, and the patches of each.
        size: how many strengths they read.
        wide: whether they hold fp64.
    """

    def __init__(self, key: str, layer: PackedLayer, weight: Sequence[Patch], bias: Sequence[Patch]) -> None:
        self.key = key
        # a difference alone can have a strength that differs from call to call
        self.bias_patches = tuple(p for p in bias if p.when is None or isinstance(p.adapter, Diff))
        misfits = {index: why for index, patch in enumerate(weight) if (why := unfit(patch, layer))}
        fitting = [patch for index, patch in enumerate(weight) if index not in misfits]
        self.weight_patches, self.rejected = _simplified(fitting, torch.Size(layer.logical_shape))
        self.rejected += misfits.values()
        self.path, self.reason = _path_of(self.weight_patches, layer)
        self.members: list[tuple[LayerFactors | Term, list[Patch]]] = []
        self.size, self.wide = 0, False
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
            # those whose strength differs from call to call leave the norms of DoRA as they are
            before += [patch for patch in run if patch.when is None]
            if isinstance(run[0].adapter, Pad):
                shape = torch.Size(run[0].adapter.shape)
        self.size = sum(member.size for member, _ in self.members)
        self.wide = any(p.dtype == torch.float64 for member, _ in self.members for p in member.parameters())

    def at(self, call: Call | None = None) -> list[tuple[Sequence[float], RowStrengths | None]]:
        """The strengths of every member, in order, as far as each is one number in this call.

        Beside each, these by row, where they differ from row to row.
        """
        if call is None:
            return [(member.slots([p.strength for p in patches]), None) for member, patches in self.members]
        found: list[tuple[Sequence[float], RowStrengths | None]] = []
        place = call.place(self.key)
        for member, patches in self.members:
            numbers = tuple(p.strength * (1.0 if p.when is None else p.when.number(call, self.key)) for p in patches)
            differing = [None if p.when is None or p.when.is_one_number(call) else p.when for p in patches]
            key = (numbers, member.layout, tuple(map(id, differing)), place)
            if key not in call.shared:
                call.shared[key] = tuple(member.slots(numbers)), {}
            slots, made = call.shared[key]
            rows = RowStrengths(slots, member.owners, differing, call, self.key, made) if any(differing) else None
            found.append((slots, rows))
        return found

    def bias_on(self, device: torch.device, layer: PackedLayer, host: Merging | None) -> torch.Tensor | None:
        """The patched bias in fp32, or None if nothing is patched; worked out once for each device."""
        if self.bias_patches and device not in self._biases:
            self._biases[device] = self._patched_bias(layer, host).to(device)
        return self._biases.get(device)

    def _patched_bias(self, layer: PackedLayer, host: Merging | None) -> torch.Tensor:
        rows = layer.logical_shape[0]
        bias = torch.zeros(rows) if layer.bias is None else layer.bias.detach().float().cpu()
        through = functools.partial(_through_host, host, self.key + ".bias")
        return merge(bias.clone(), [p for p in self.bias_patches if p.when is None], through, lambda: bias)


class RunningResidual:
    """A layer's residual during one model call, on one device: what the layer calls.

    Attributes:
        residual: what runs.
        low_rank: the part that goes into the layer's own kernel.
        rows: its strengths, where they differ from row to row.
        steps: what goes around that, each with its patches, their strengths, and these by row where they differ.
        bias: in place of the layer's own.
    """

    def __init__(
        self, residual: LayerResidual, scale: torch.Tensor, bias: torch.Tensor | None, host: Merging | None,
        call: Call | None = None, rows: Sequence[RowStrengths | None] | None = None,
    ) -> None:  # fmt: skip
        self.residual, self.bias, self.host = residual, bias, host
        members = residual.members
        parts = scale.split([member.size for member, _ in members]) if members else ()
        rows = rows or [None] * len(members)
        self.steps = [(*member, s, by_row) for member, s, by_row in zip(members, parts, rows, strict=True)]
        # differences of the bias whose strength is no constant
        self.bias_steps = [(p, _alone(p, call, residual.key)) for p in residual.bias_patches if p.when]
        self.call = call
        self.low_rank: LowRank | None = None
        self.rows: RowStrengths | None = None
        lowest = self.steps[0][0] if self.steps else None
        if isinstance(lowest, LayerFactors):
            _, _, s, self.rows = self.steps.pop(0)
            self.low_rank = lowest.low_rank(s)

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
        y = self._run(x, layer, data, bias)
        if self.bias_steps:
            at = Layout(layer)
            for patch, rows in self.bias_steps:
                zeros = torch.zeros(y.shape[at.axis], device=y.device)
                difference = merge(zeros, [replace(patch, strength=1.0, when=None)])
                y = y.add_(at.spread(difference, y) * at.by_row(rows, x).to(y.dtype))
        return y

    def _run(self, x: torch.Tensor, layer: PackedLayer, data: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.residual.path == "exact":
            return self._exact(x, layer, data, bias)
        low_rank = self.low_rank
        if low_rank is not None and low_rank.down.device != x.device:
            low_rank = _moved(low_rank, x.device)
        if not self.steps and self.rows is None:
            return layer.compute(x, data, bias, low_rank)
        at = Layout(layer)
        if x.dim() == len(at.kernel) + 1 and at.kernel:
            return self._run(x.unsqueeze(0), layer, data, bias).squeeze(0)
        if low_rank is not None and self.rows is not None:
            by_row = self.rows.on(x, at.lead(x), bool(at.kernel))
            low_rank = replace(low_rank, scale=by_row if at.kernel else by_row.view(-1, by_row.shape[-1]))
        if not self.steps:
            return layer.compute(x, data, bias, low_rank)
        f: Operator = functools.partial(layer.compute, data=data, low_rank=low_rank)
        for member, patches, s, rows in self.steps:
            # in x's dtype: a strength of several dimensions would change that of what it is multiplied with
            s = s.to(x.device) if rows is None else at.by_row(rows, x).to(x.dtype)
            f = functools.partial(member.run, patches, at, f, s)
        y = f(x)
        return y if bias is None else y.add_(at.spread(_lengthened(bias, y.shape[at.axis]), y))

    def _exact(
        self, x: torch.Tensor, layer: PackedLayer, data: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """On the decoded weight with everything merged in."""
        through = functools.partial(_through_host, self.host, self.residual.key + ".weight")
        patches = [_at_call(patch, self.call, self.residual.key) for patch in self.residual.weight_patches]
        weight = merge(layer.dequantized(data), patches, through, lambda: layer.dequantized(data))
        return layer.compute_dense(x, weight.to(x.dtype) if x.is_floating_point() else weight, bias)


def unfit(patch: Patch, layer: PackedLayer) -> str:
    """Why the strength of `patch` cannot be what it is on this layer; "" where it can."""
    adapter, when = patch.adapter, patch.when
    if when is None:
        return ""
    inner = adapter.inner if isinstance(adapter, (DoRA, Padded)) else adapter
    if isinstance(adapter, Set):
        return "it replaces a weight at any strength: a schedule, a mask or weights of blocks need a LoRA"
    if isinstance(inner, BOFT):
        return "BOFT multiplies its stages anew for each strength: it takes no schedule, mask or weights of blocks"
    if when.mask is None and when.applies_to == "all":
        return ""
    path, reason = _path_of([patch], layer)
    if path == "exact" or isinstance(layer, EmbeddingMath):
        return f"it cannot differ from place to place ({reason or 'an embedding'}): take the mask off"
    if len(layer.logical_shape) > 2 and not adapter.from_output:
        return f"{adapter.kind} on a convolution changes what goes in, where no place has its own strength"
    return ""


def _at_call(patch: Patch, call: Call | None, key: str) -> Patch:
    """`patch` with the strength that it has in this call, where that is one number."""
    if patch.when is None or call is None:
        return patch
    return replace(patch, strength=patch.strength * patch.when.number(call, key), when=None)


def _alone(patch: Patch, call: Call | None, key: str) -> RowStrengths:
    """Those of one patch."""
    call = call or Call()
    assert patch.when is not None
    when = None if patch.when.is_one_number(call) else patch.when
    return RowStrengths((patch.strength * patch.when.number(call, key),), (0,), [when], call, key, {})


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
    inner = [replace(p, strength=patch.strength * p.strength, when=patch.when) for p in adapter.patches]
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
    _cache: weakref.ref[FactorCache] | None = None  # that of the model whose factors these are
    _factors: StackFactors | None = None  # as long as the stack, so is what the host counts them by

    def __bool__(self) -> bool:
        return bool(self.patches)

    @property
    def varies(self) -> bool:
        """Whether a strength depends on the call."""
        return any(patch.when is not None for patches in self.patches.values() for patch in patches)

    def copy(self) -> ResidualStack:
        """An independent stack with the same patches, built already if this one is."""
        patches = {k: list(v) for k, v in self.patches.items()}
        built = self._residuals, self._scales, self._dtype, self._cache, self._factors
        return ResidualStack(patches, self.merge, *built)

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
            cache: that of the layers; for a copy of the model, which may be on another device, they are built anew.
            dtype: of the factors; None keeps the files' own.
            keep: whether the cache is to keep them beyond this stack.

        Returns:
            a module with every factor in leaf modules, for a host that moves and counts memory.
        """
        if self._dtype != dtype or self._cache is None or self._cache() is not cache:
            self._residuals, self._scales, self._dtype, self._cache = None, {}, dtype, weakref.ref(cache)
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
    def running(
        self, layers: Mapping[str, PackedLayer], device: torch.device, call: Call | None = None
    ) -> dict[str, RunningResidual]:
        """By layer of `layers`, what runs beside it on `device`; all strengths lie in one small buffer.

        Args:
            call: what they may depend on; None takes each as a constant.
        """
        residuals = self.residuals
        if not self.varies:
            call = None
        scales = self._scales.get(device) if call is None else None
        rows: dict[str, list[RowStrengths | None]] = {}
        if scales is None:
            found = {name: residual.at(call) for name, residual in residuals.items()}
            rows = {name: [by_row for _, by_row in members] for name, members in found.items()}
            values = array("d")
            for slots, _ in (member for members in found.values() for member in members):
                values.extend(slots)
            dtype = torch.float64 if any(r.wide for r in residuals.values()) else torch.float32
            # many more than torch.tensor is made for
            scales = torch.frombuffer(values, dtype=torch.float64).to(dtype).to(device) if values else torch.empty(0)
        if call is None:
            self._scales[device] = scales
        parts = scales.split([r.size for r in residuals.values()])
        return {
            name: RunningResidual(
                residual, scale, residual.bias_on(device, layers[name], self.merge), self.merge, call, rows.get(name)
            )
            for (name, residual), scale in zip(residuals.items(), parts, strict=True)
            if name in layers
        }

    @contextlib.contextmanager
    def active(
        self, layers: Mapping[str, PackedLayer], device: torch.device, call: Call | None = None
    ) -> Iterator[None]:
        """Run the model, or a part of it, with these adapters and no others.

        Other threads wait for their turn on these layers. A branch without any adapters may be asked within a call of
        one that has some, for a guidance by the model as it was. Once all blocks are left nothing is on the layers.

        Args:
            call: what their strengths may depend on.
        """
        calls = calls_on(layers)
        with calls.lock:
            if torch.is_grad_enabled():  # else nothing is saved for a way back, and each call would walk all factors
                for member in (m for r in self.residuals.values() for m, _ in r.members):
                    make_ordinary(member)
            running = self.running(layers, device, call) if self.residuals else {}
            with calls.enter({layer: running.get(name) for name, layer in layers.items()}):
                yield


__all__ = ["LayerResidual", "Merging", "ResidualStack", "RunningResidual"]
