"""What of Forge's backend Graft touches, found by its features: the names and shapes differ between its branches."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


class NoForge(Exception):
    """The backend has not what Graft needs; the message says what is missing."""


@dataclass
class Host:
    """The parts of a Forge that hooks go into.

    Attributes:
        name: for people, e.g. ``Forge f2.0.1``.
        linear: the layer class of GGUF models, ``ForgeOperationsGGUF.Linear``.
        patcher: ``ModelPatcher``; every LoRA arrives in its `add_patches`.
        merge: Forge's own ``(patches, weight, key, computation_dtype) -> weight``.
        decode: Forge's own decode of one of its GGUF parameters.
        types: GGUF type number to the class that decodes it; missing ones can be added.
        memory: the module whose `bake_gguf_model` re-lays packed bytes out; None if it does not.
        operations: the module with `weights_manual_cast`, which brings weights to the compute device.
        features: what was found, for the report.
    """

    name: str
    linear: type[nn.Module]
    patcher: type
    merge: Callable[..., torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    types: MutableMapping[Any, Any] = field(default_factory=dict)
    type_of: Callable[[int], Any] = int
    memory: ModuleType | Any | None = None
    operations: ModuleType | Any | None = None
    features: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def on_device(
        self, data: torch.Tensor, bias: torch.Tensor | None, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight bytes and bias on the device of the computation, in their own types.

        Where they lie elsewhere, Forge's own mover brings them (on its own stream, if the user chose that).
        """
        if data.device == device and (bias is None or bias.device == device):
            yield data, bias
            return
        move = getattr(self.operations, "weights_manual_cast", None)
        settle = getattr(self.operations, "main_stream_worker", None)
        if move is None or settle is None:
            yield data.to(device), None if bias is None else bias.to(device)
            return
        carrier = _Carrier(data, bias)
        target = torch.empty(0, device=device)
        weight, moved_bias, signal = move(carrier, target, skip_weight_dtype=True, skip_bias_dtype=True)
        with settle(weight, moved_bias, signal):
            yield weight, moved_bias


class _Carrier:
    """What Forge's mover needs to see of a layer: no scale, and no patches that it would merge."""

    scale_weight = None
    weight_function: Sequence[Callable] = ()
    bias_function: Sequence[Callable] = ()

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias


def detect() -> Host:
    """Look at the Forge that this process runs.

    Raises:
        NoForge: something that Graft cannot do without is not there.
    """
    operations = _module("backend.operations")
    gguf = _module("backend.operations_gguf")
    base = _module("backend.patcher.base")
    lora = _module("backend.patcher.lora")
    memory = _module("backend.memory_management")
    linear = getattr(getattr(operations, "ForgeOperationsGGUF", None), "Linear", None)
    if not (isinstance(linear, type) and hasattr(linear, "forward")):
        raise NoForge("this Forge has no ForgeOperationsGGUF.Linear, so it cannot run GGUF models itself: update Forge")
    needed = {
        "ModelPatcher.add_patches": hasattr(getattr(base, "ModelPatcher", None), "add_patches"),
        "merge_lora_to_weight": hasattr(lora, "merge_lora_to_weight"),
        "dequantize_tensor": hasattr(gguf, "dequantize_tensor"),
    }
    if missing := [name for name, found in needed.items() if not found]:
        raise NoForge(f"this Forge lacks {', '.join(missing)}: update Forge, or Graft")
    online = "OnlineLoRAPatch in weight_function" if hasattr(base, "OnlineLoRAPatch") else "forge_online_loras"
    bakes = hasattr(memory, "bake_gguf_model")
    types = getattr(gguf, "quants_mapping", None) or getattr(gguf, "QUANTS_MAPPING", None) or {}
    return Host(
        name=_name(),
        linear=linear,
        patcher=base.ModelPatcher,
        merge=lora.merge_lora_to_weight,
        decode=gguf.dequantize_tensor,
        types=types,
        type_of=type(next(iter(types))) if types else int,
        memory=memory if bakes else None,
        operations=operations,
        features={
            "Forge's LoRA lists": online,
            "Forge's re-layout": "held back: the weights stay the file's bytes" if bakes else "none",
            "Forge's GGUF types": ", ".join(getattr(t, "name", str(t)) for t in types),
        },
    )


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NoForge(f"this Forge has no module {name} ({error}): update Forge, or Graft") from error


def _name() -> str:
    try:
        version = importlib.import_module("modules_forge.forge_version").version
    except (ImportError, AttributeError):
        return "Forge"
    return f"Forge f{version}"
