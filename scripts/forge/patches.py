"""Forge's patch lists, read as adapters.

A patch is ``[strength, value, strength_model, offset, function]``. Forge master keeps the lists of a layer
in ``forge_online_loras = {"weight": [...], "bias": [...]}``; newer branches hang callables with a list
``patch`` on ``weight_function`` and ``bias_function``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...kernels import AdapterError
from ...ops.adapters import Adapter, LoRA, Opaque, Patch, Region, from_host

HostPatch = Sequence[Any]


class Unreadable(Exception):
    """Something hangs on the layer that is not a patch list: Forge's own forward knows what to do with it."""


def host_patches(layer: nn.Module, name: str) -> list[HostPatch]:
    """What Forge has hung on a layer's ``weight`` or ``bias``, in the order in which it would merge them.

    Raises:
        Unreadable: a function of unknown kind is among them.
    """
    found: list[HostPatch] = []
    for function in getattr(layer, f"{name}_function", None) or ():
        patches = getattr(function, "patch", None)
        if patches is None and hasattr(function, "patches"):
            patches = function.patches[function.key]
        if patches is None:
            raise Unreadable(f"{type(function).__name__} on the {name}")
        found += patches
    online = getattr(layer, "forge_online_loras", None) or {}
    found += online.get(name) or ()
    return found


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
        return Patch(strength, adapter, strength_model, region, None, tuple(patch))


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


__all__ = ["AdapterError", "HostPatch", "Reader", "Unreadable", "host_patches", "is_wide", "left_whole"]
