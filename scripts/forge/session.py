"""What runs in this Forge right now: the settings, the loaded model and its LoRAs, as plain rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...kernels import BACKENDS, NoBackend, choose
from . import layout
from .engine import DTYPES, MODES, Engine, LayerState, Settings, state_of

OPTIONS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "graft_mode": ("mode", "LoRAs on GGUF models", MODES, "Graft"),
    "graft_backend": ("backend", "Kernels", BACKENDS, "Graft backend"),
    "graft_dtype": ("dtype", "Computation dtype", tuple(DTYPES), "Graft dtype"),
}
"""Forge's options: name to (field of `Settings`, label, choices, name in the infotext)."""


def settings_from(options: Any) -> Settings:
    """`Settings` from Forge's `shared.opts`; what is missing or unknown there is ``auto``."""
    values = {}
    for name, (attribute, _, choices, _) in OPTIONS.items():
        value = getattr(options, name, "auto")
        values[attribute] = value if value in choices else "auto"
    return Settings(**values)


def infotext(settings: Settings) -> dict[str, str]:
    """What goes into an image's parameters: the mode, and whatever else is not ``auto``."""
    values = {title: getattr(settings, attribute) for attribute, _, _, title in OPTIONS.values()}
    return {title: value for title, value in values.items() if title == "Graft" or value != "auto"}


@dataclass
class Part:
    """One model of a loaded checkpoint, e.g. its diffusion transformer or its text encoders.

    Attributes:
        types: GGUF types of the layers that Graft runs, with their numbers.
        others: parameters elsewhere, by dtype.
        nbytes: of all parameters.
        baked: layers that Forge holds in its own layout.
        refused: layers that run in Forge's own forward, by reason.
    """

    title: str
    architecture: str
    types: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    baked: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def layers(self) -> int:
        return sum(self.types.values())


@dataclass
class UsedLora:
    """One LoRA on one part of the model.

    Attributes:
        residual: layers beside which it runs.
        others: its other layers, by what happens there and why.
        waiting: layers that have not run since it was added.
    """

    name: str
    part: str
    strength: float
    residual: int = 0
    others: Counter[str] = field(default_factory=Counter)
    waiting: int = 0

    @property
    def layers(self) -> int:
        return self.residual + self.waiting + sum(self.others.values())


def patchers(model: Any) -> Iterator[tuple[str, Any]]:
    """``(title, ModelPatcher)`` of Forge's loaded model; nothing if none is loaded."""
    objects = getattr(model, "forge_objects", None)
    unet, clip = getattr(objects, "unet", None), getattr(objects, "clip", None)
    if unet is not None:
        yield "Diffusion model", unet
    if clip is not None:
        yield "Text encoders", clip.patcher


def gguf_layers(engine: Engine, model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerState]]:
    """``(path, layer, state)`` of every layer that Graft can run."""
    for path, module in model.named_modules():
        if isinstance(module, engine.host.linear):
            state = state_of(module)
            if state is not None:
                yield path, module, state


def parts(engine: Engine, model: Any) -> list[Part]:
    """The models of the loaded checkpoint."""
    return [_part(engine, title, patcher.model) for title, patcher in patchers(model)]


def _part(engine: Engine, title: str, model: nn.Module) -> Part:
    inner = getattr(model, "diffusion_model", None)
    names = [inner] if inner is not None else model.children() if title == "Text encoders" else [model]
    part = Part(title, ", ".join(type(m).__name__.removeprefix("Integrated") for m in names))
    seen = set()
    for _, layer, state in gguf_layers(engine, model):
        part.types[state.fmt.name] += 1
        part.nbytes += layer.weight.data.nbytes
        part.baked += state.fmt.name in layout.BAKED and getattr(layer.weight, "baked", False)
        if state.refused:
            part.refused[state.refused] += 1
        seen.add(id(layer.weight))
    for parameter in model.parameters():
        if id(parameter) not in seen:
            part.others[str(parameter.data.dtype).removeprefix("torch.")] += 1
            part.nbytes += parameter.data.nbytes
    return part


def used_loras(engine: Engine, model: Any) -> list[UsedLora]:
    """The LoRAs that hang on the loaded model, and what each of their layers does with them."""
    found = []
    for title, patcher in patchers(model):
        for (name, strength, online), keys in _hanging(patcher).items():
            lora = UsedLora(name, title, strength)
            for key in keys:
                _place(engine, patcher.model, key, online, lora)
            found.append(lora)
    return found


def _hanging(patcher: Any) -> dict[tuple[str, float, bool], list[str]]:
    """``(name, strength, stays beside the weights) -> parameter names``, in either of Forge's shapes."""
    found: dict[tuple[str, float, bool], list[str]] = {}
    for (filename, strength, _, online), keys in getattr(patcher, "lora_patches", {}).items():
        found[_stem(filename), strength, bool(online)] = list(keys)
    for key, wrappers in getattr(patcher, "weight_wrapper_patches", {}).items():
        for wrapper in wrappers:
            if hasattr(wrapper, "patch"):
                found.setdefault((_stem(wrapper.name), wrapper.patch[0][0], True), []).append(key)
    return found


def _stem(filename: Any) -> str:
    return os.path.splitext(os.path.basename(str(filename)))[0]


def _place(engine: Engine, model: nn.Module, key: str, online: bool, lora: UsedLora) -> None:
    """Count what becomes of `lora` at one parameter."""
    if not online:
        ours = engine.runs(model, key)
        lora.others["merged by Forge, as Graft was off" if ours else "merged by Forge: no GGUF layer"] += 1
        return
    layer = model.get_submodule(key.rpartition(".")[0])
    state = state_of(layer)
    if state is None or state.refused or engine.settings.mode == "off":
        reason = state.refused if state is not None and state.refused else "Graft is off"
        lora.others[f"Forge's online mode: {reason}"] += 1
    elif not state.path:
        lora.waiting += 1
    elif state.left_out:
        lora.others[f"left out: {state.left_out[0]}"] += 1
    elif state.path == "residual":
        lora.residual += 1
    else:
        lora.others[f"merged for each call, exactly: {state.reason}"] += 1


def backend_of(engine: Engine, device: torch.device) -> str:
    """Which backend decodes on `device`, and why not a better one."""
    wanted = engine.settings.backend
    try:
        return str(choose(device, None, wanted))
    except NoBackend as error:
        return f"{choose(device)}; {error}"
