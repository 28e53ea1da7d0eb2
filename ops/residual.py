"""The adapters of one model branch, and how a layer runs them beside its base weight.

    y = F(x) + s·B(Ax)                              one adapter
    h = x·A_catᵀ;  h ∘= S;  y += h·B_catᵀ           any number of them, rank-concatenated

A LoRA is call context, not model state. Clones of a model share its layers; each holds a
`ResidualStack`, which is put on the layers for the duration of a model call and taken off after it.
Nothing is patched, so nothing has to be restored, and a new strength is a new S.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..kernels import LowRank
from .adapters import Diff, Opaque, Patch, Region
from .layers import PackedLayer

# ranks are padded to whole tiles of a tensor core, and so that a LoRA of a similar rank does not recompile
RANK_BUCKET = 16

Merge = Callable[[Sequence[Patch], torch.Tensor, str], torch.Tensor]
"""The host's own merge: ``(patches, fp32 weight that may be written to, key) -> weight``."""


class LayerFactors(nn.Module):
    """The low-rank factors of all adapters on one layer, rank-concatenated.

    Attributes:
        down: ``[R, in · k]``, R a multiple of `RANK_BUCKET`.
        up0, up1, ...: one ``[n, r]`` for each range of output rows that adapters write to (plain
            parameters of one leaf module, which is what hosts move).
        places: ``(start, first)`` of each: its first output row and its first rank.
        order: for each rank group of `down`, the index of its patch and its own scale alpha / r.
    """

    def __init__(self, patches: Sequence[Patch], shape: torch.Size, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.sources = [p.adapter for p in patches]  # keeps the identities in the cache's key alive
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
        self.padded_rank = math.ceil(rank / RANK_BUCKET) * RANK_BUCKET
        if len(ups) == 1:
            ups[0] = _pad(ups[0], 1, self.padded_rank)
        for index, up in enumerate(ups):
            self.register_parameter(f"up{index}", nn.Parameter(up, requires_grad=False))
        self.down = nn.Parameter(_pad(down, 0, self.padded_rank), requires_grad=False)
        self.places = tuple(places)

    def scales(self, patches: Sequence[Patch]) -> list[float]:
        """S: strength · alpha / r of every rank, padded with zeros."""
        values: list[float] = []
        for index, rank, scale in self.order:
            values += [patches[index].strength * scale] * rank
        return values + [0.0] * (self.padded_rank - self.rank)

    def low_rank(self, scale: torch.Tensor) -> LowRank:
        ups = tuple((start, first, getattr(self, f"up{i}")) for i, (start, first) in enumerate(self.places))
        return LowRank(self.down, scale, ups)


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


def _concatenate(parts: Sequence[torch.Tensor], dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    """Joined in `dtype`, or without loss: in the common dtype of mixed parts."""
    if dtype is None:
        kinds = {p.dtype for p in parts}
        dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    return torch.cat([p.to(dtype) for p in parts], dim)


def _pad(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


class LayerResidual:
    """What runs beside one layer's base weight during a model call.

    Attributes:
        path: ``residual`` or ``exact``, and `reason` says why it is not the former.
    """

    def __init__(self, key: str, weight: Sequence[Patch], bias: Sequence[Patch], merge: Merge | None) -> None:
        self.key = key
        self.weight_patches = tuple(p for p in weight if p.strength or p.strength_model != 1.0)
        self.bias_patches = tuple(bias)
        self.merge = merge
        self.factors: LayerFactors | None = None
        self.low_rank: LowRank | None = None
        self.reason = next(filter(None, map(_why_not_low_rank, self.weight_patches)), "")
        self.path = "exact" if self.reason else "residual"
        self._biases: dict[torch.device, torch.Tensor] = {}

    def __call__(
        self, x: torch.Tensor, layer: PackedLayer, data: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        bias = self.patched_bias(bias, x, layer)
        if self.path == "residual":
            return layer.compute(x, data, bias, self.low_rank)
        assert self.merge is not None
        weight = self.merge(self.weight_patches, layer.dequantized(data), self.key + ".weight")
        return layer.compute_dense(x, weight.to(x.dtype) if x.is_floating_point() else weight, bias)

    def patched_bias(self, bias: torch.Tensor | None, x: torch.Tensor, layer: PackedLayer) -> torch.Tensor | None:
        """The bias with its differences added in fp32; worked out once for each device."""
        if not self.bias_patches:
            return bias
        patched = self._biases.get(x.device)
        if patched is None:
            patched = x.new_zeros(layer.logical_shape[0], dtype=torch.float32) if bias is None else bias.float()
            if all(isinstance(p.adapter, Diff) and p.strength_model == 1.0 for p in self.bias_patches):
                for patch in self.bias_patches:
                    assert isinstance(patch.adapter, Diff)
                    delta = patch.adapter.diff.to(x.device, torch.float32).reshape(-1)
                    start, length = _output_rows(patch.region, layer.logical_shape)
                    patched = patched.clone()
                    patched[start : start + length] += patch.strength * delta
            else:
                assert self.merge is not None
                patched = self.merge(self.bias_patches, patched.clone(), self.key + ".bias")
            self._biases[x.device] = patched
        return patched


def _why_not_low_rank(patch: Patch) -> str:
    if isinstance(patch.adapter, Opaque):
        return patch.adapter.reason
    if patch.adapter.low_rank() is None:
        return f"{patch.adapter.kind} has no low-rank form"
    if patch.strength_model != 1.0:
        return "the base weight is scaled (strength_model)"
    if patch.function is not None:
        return "its difference passes through a function of the host"
    return ""


class FactorCache:
    """Concatenated factors by layer and adapters: a new strength finds the ones that are there already.

    The last few stacks are kept alive, since hosts drop a branch before they build the next one.
    """

    def __init__(self, keep: int = 3) -> None:
        self._factors: weakref.WeakValueDictionary[tuple, LayerFactors] = weakref.WeakValueDictionary()
        self._modules: dict[tuple, nn.ModuleList] = {}
        self._keep = keep

    def factors(self, key: str, patches: Sequence[Patch], shape: torch.Size, dtype: torch.dtype | None) -> LayerFactors:
        identity = (key, dtype, *((_identity(p.adapter), p.region) for p in patches))
        found = self._factors.get(identity)
        if found is None:
            found = self._factors[identity] = LayerFactors(patches, shape, dtype)
        return found

    def module(self, members: Sequence[LayerFactors]) -> nn.ModuleList:
        """One module around the factors of a stack, the same one for the same factors."""
        identity = tuple(map(id, members))
        module = self._modules.pop(identity, None) or nn.ModuleList(members)
        self._modules[identity] = module
        while len(self._modules) > self._keep:
            self._modules.pop(next(iter(self._modules)))
        return module


def _identity(adapter: object) -> tuple:
    """An adapter is the same one if its tensors are: hosts wrap a file's tensors anew on every run."""
    return tuple(id(v) if isinstance(v, torch.Tensor) else v for v in vars(adapter).values())


@dataclass
class ResidualStack:
    """The adapters of one branch: patches by parameter name, in the order in which they were added.

    Attributes:
        patches: ``{"blocks.0.attn.qkv.weight": [Patch, ...], "blocks.0.attn.qkv.bias": [...]}``.
        merge: the host's own merge, for kinds that have no activation-space form here.
    """

    patches: dict[str, list[Patch]] = field(default_factory=dict)
    merge: Merge | None = None
    _residuals: dict[str, LayerResidual] | None = None
    _scales: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.patches)

    def copy(self) -> ResidualStack:
        """An independent stack with the same patches, built already if this one is."""
        return ResidualStack({k: list(v) for k, v in self.patches.items()}, self.merge, self._residuals, self._scales)

    def add(self, key: str, patch: Patch) -> None:
        """Put `patch` behind those that parameter `key` has."""
        self.patches.setdefault(key, []).append(patch)
        self._residuals, self._scales = None, {}

    def build(
        self, layers: Mapping[str, PackedLayer], cache: FactorCache, dtype: torch.dtype | None = None
    ) -> nn.ModuleList:
        """Concatenate the factors, or find them in the cache.

        Args:
            layers: by path, without ``.weight``.
            dtype: of the factors; None keeps the files' own.

        Returns:
            a module with every factor, for a host that moves and counts memory.
        """
        if self._residuals is None:
            names = dict.fromkeys(key.rpartition(".")[0] for key in self.patches)
            self._residuals = {}
            for name in names:
                weight, bias = self.patches.get(name + ".weight", ()), self.patches.get(name + ".bias", ())
                residual = self._residuals[name] = LayerResidual(name, weight, bias, self.merge)
                if residual.path == "residual" and residual.weight_patches:
                    shape = layers[name].logical_shape
                    residual.factors = cache.factors(name, residual.weight_patches, shape, dtype)
        return cache.module([r.factors for r in self._residuals.values() if r.factors is not None])

    @property
    def residuals(self) -> Mapping[str, LayerResidual]:
        """By layer; empty before `build`."""
        return self._residuals or {}

    def place(self, device: torch.device) -> None:
        """Point every layer's low-rank term at this device's strengths: one small buffer for all of them."""
        members = [r for r in self.residuals.values() if r.factors is not None]
        if device not in self._scales:
            values = [s for r in members if r.factors for s in r.factors.scales(r.weight_patches)]
            self._scales[device] = torch.tensor(values, dtype=torch.float32).to(device)
        parts = self._scales[device].split([r.factors.padded_rank for r in members if r.factors]) if members else ()
        for residual, scale in zip(members, parts, strict=True):
            assert residual.factors is not None
            residual.low_rank = residual.factors.low_rank(scale)

    @contextlib.contextmanager
    def active(self, layers: Mapping[str, PackedLayer], device: torch.device) -> Iterator[None]:
        """Run the model with these adapters: on every layer inside the block, on none after it."""
        self.place(device)
        previous = {name: layers[name].residual for name in self.residuals}
        try:
            for name, residual in self.residuals.items():
                layers[name].residual = residual
            yield
        finally:
            for name, residual in previous.items():
                layers[name].residual = residual


__all__ = ["FactorCache", "LayerFactors", "LayerResidual", "Merge", "ResidualStack"]
