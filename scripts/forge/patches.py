"""LoRAs on Forge's patchers: what a patcher carries, and its patches read as adapters.

A patch is ``(strength, value, strength_model, offset, function)``; ours have behind that where and when it works. Where
Forge keeps its own differs from branch to branch, and Forge Neo loses and doubles them when it moves a model off the
GPU in parts. So patches of the layers that Graft runs are never given to Forge: they travel in the patcher's
`model_options`, which every clone takes along, and lie on the layers from the moment the patcher is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...kernels import AdapterError
from ...ops.adapters import Adapter, LoRA, Opaque, Patch, Region, from_host
from ...ops.strengths import Call, Strength

HostPatch = Sequence[Any]

OPTION = "graft_loras"
"""Under which a patcher's `model_options` hold what it carries."""

ON_LAYER = "_graft_patches"
"""Under which a layer holds the patches of its weight and bias."""

AT = "_graft_path"
"""Under which it holds its path in the model."""


@dataclass(frozen=True)
class Added:
    """What one call of a patcher's `add_patches` brought.

    Attributes:
        filename: of the LoRA.
        ours: patches by parameter of a layer that Graft runs.
        others: parameters that Forge patches itself.
        when: where and when it works, as the prompt says it.
        refused: parameters that Forge would patch, which can be nowhere in particular.
    """

    filename: str
    strength: float
    ours: Mapping[str, tuple[HostPatch, ...]]
    others: tuple[str, ...] = ()
    when: str = ""
    refused: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Every parameter that the LoRA reaches."""
        return (*self.ours, *self.others, *self.refused)


class Carried(tuple[Added, ...]):
    """All that a patcher carries; clones share it, however deeply Forge copies a patcher's options."""

    def __deepcopy__(self, memo: dict) -> Carried:
        return self

    @property
    def numbers(self) -> int:
        """How many the factors hold."""
        found = {id(t): t.numel() for added in self for p in added.ours.values() for q in p for t in _tensors(q[1])}
        return sum(found.values())


def carried(patcher: Any) -> Carried:
    """The LoRAs on a patcher, in the order in which they were added."""
    return getattr(patcher, "model_options", {}).get(OPTION, Carried())


def carry(patcher: Any, added: Added) -> None:
    """Put a LoRA behind those that `patcher` carries."""
    patcher.model_options[OPTION] = Carried((*carried(patcher), added))


def by_layer(loras: Carried) -> dict[str, dict[str, list[HostPatch]]]:
    """``{layer: {"weight": patches, "bias": patches}}``."""
    found: dict[str, dict[str, list[HostPatch]]] = {}
    for added in loras:
        for key, patches in added.ours.items():
            path, _, name = key.rpartition(".")
            found.setdefault(path, {}).setdefault(name, []).extend(patches)
    return found


def on_layer(layer: nn.Module) -> Mapping[str, Sequence[HostPatch]]:
    """The patches of a layer's ``weight`` and ``bias``."""
    return layer.__dict__.get(ON_LAYER, {})


def when_of(patch: HostPatch) -> Strength | None:
    """Where and when a patch works; None is everywhere and always."""
    return patch[5] if len(patch) > 5 else None


def constant(layer: nn.Module, call: Call | None) -> dict[str, list[HostPatch]]:
    """A layer's patches as Forge takes them, with the strength of this call; without those that differ within it."""
    found: dict[str, list[HostPatch]] = {}
    for name, listed in on_layer(layer).items():
        for patch in listed:
            when = when_of(patch)
            if when is None:
                found.setdefault(name, []).append(tuple(patch[:5]))
            elif call is not None and when.is_one_number(call):
                strength = patch[0] * when.number(call, layer.__dict__[AT])
                found.setdefault(name, []).append((strength, *patch[1:5]))
    return found


def foreign(layer: nn.Module) -> str:
    """What somebody else has hung on a layer, for which only Forge's own forward knows what to do; mostly ""."""
    for name in ("weight", "bias"):
        for function in getattr(layer, f"{name}_function", None) or ():
            return f"{type(function).__name__} on the {name}"
    return "LoRAs of Forge's own" if getattr(layer, "forge_online_loras", None) else ""


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return _tensors(tuple(vars(value).values()) if isinstance(value, Adapter) else getattr(value, "weights", ()))


Known = dict[tuple, tuple[Any, Adapter, "Region | None"]]


class Reader:
    """Turns patches of one layer into adapters, each once: Forge wraps the same tensors anew for each strength.

    Attributes:
        known: what this reader has read, for the next one.
    """

    def __init__(self, before: Known | None = None) -> None:
        self._before = before or {}
        self.known: Known = {}

    def read(self, patch: HostPatch, shape: torch.Size) -> Patch:
        """One patch of a parameter of `shape`.

        Raises:
            AdapterError: it cannot be applied to this parameter.
        """
        strength, value, strength_model, offset, function = (*patch, 1.0, None, None)[:5]
        offset = None if offset is None else tuple(offset)
        key = (len(shape), offset, function, _identity(value))
        found = self.known.get(key) or self._before.get(key)
        # with the value, whose tensors' ids must not come back for others
        _, adapter, region = self.known[key] = found or (value, *_adapter(value, shape, offset, function))
        return Patch(strength, adapter, strength_model, region, None, tuple(patch), when_of(patch))


def _adapter(value: Any, shape: torch.Size, offset: Any, function: Any) -> tuple[Adapter, Region | None]:
    region = None if offset is None else Region(*offset)
    if region is None and _is_lora(value) and len(shape) > 1:
        value, region = _fit_columns(value, shape)
    return from_host(value, shape, region, function), region


def _identity(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_identity, value))
    if isinstance(value, (str, float, int, type(None))):
        return value
    fields = getattr(value, "weights", None)
    return id(value) if fields is None else (type(value), _identity(fields))


def left_whole(patch: Patch, reason: str) -> Patch:
    """The same patch, to be merged by Forge's own code into the decoded weight of its layer."""
    return Patch(
        patch.strength, Opaque(patch.origin, reason), patch.strength_model, patch.region, patch.function, patch.origin
    )


def is_wide(adapter: Adapter, shape: torch.Size) -> bool:
    """Whether a LoRA's rank is no longer low: its two factors hold more than the weight itself."""
    if not isinstance(adapter, LoRA):
        return False
    inner = shape.numel() // shape[0]
    return adapter.rank * (shape[0] + inner) > shape[0] * inner


def _is_lora(value: Any) -> bool:
    kind = getattr(value, "name", None) or (value[0] if isinstance(value, tuple) and len(value) == 2 else None)
    return kind == "lora"


def _fit_columns(value: Any, shape: torch.Size) -> tuple[Any, Region | None]:
    """Control LoRAs of Flux Tools change the number of input channels: Forge pads what is narrower with zeros."""
    fields = getattr(value, "weights", None) or value[1]
    up, down, mid = fields[0], fields[1], fields[3]
    reshape = fields[5] if len(fields) > 5 else None
    if mid is not None or reshape is not None or len(shape) != 2 or not _is_pair(up, down, shape[0]):
        return value, None
    if down.shape[1] > shape[1]:
        return ("lora", (*fields[:5], (shape[0], down.shape[1]))), None
    if down.shape[1] < shape[1]:
        return value, Region(1, 0, down.shape[1])
    return value, None


def _is_pair(up: torch.Tensor | None, down: torch.Tensor | None, rows: int) -> bool:
    """Whether up and down are matrices the right way round for `rows` outputs."""
    if up is None or down is None or up.dim() != 2 or down.dim() != 2:
        return False
    return up.shape[0] == rows and up.shape[1] == down.shape[0]


__all__ = [
    "AdapterError", "Added", "Carried", "HostPatch", "Reader", "by_layer", "carried", "carry", "constant", "foreign",
    "is_wide", "left_whole", "on_layer", "when_of",
]  # fmt: skip
