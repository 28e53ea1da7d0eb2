"""What runs in this Forge right now: the settings, the loaded model and its LoRAs, as plain rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...kernels import BACKENDS, NoBackend, choose, int8
from ...ops.int8 import RULES, report
from ...ops.report import FileReport, examples
from . import layout, patches
from .engine import DTYPES, MODES, Engine, Settings
from .layers import LayerState, state_of

OPTIONS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "graft_mode": ("mode", "LoRAs on GGUF models", MODES, "Graft"),
    "graft_backend": ("backend", "Kernels", BACKENDS, "Graft backend"),
    "graft_dtype": ("dtype", "Computation dtype", tuple(DTYPES), "Graft dtype"),
}
"""Forge's options: name to (field of `Settings`, label, choices, name in the infotext)."""

_ONE_STRENGTH = "left out: Forge patches these, with one strength for all of the picture"
DIFFUSION_MODEL, TEXT_ENCODERS = "Diffusion model", "Text encoders"


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
        when: where and when it works, as the prompt says it; "" is everywhere and always.
        residual: layers beside which it runs.
        others: its other layers, by what happens there and why.
        waiting: layers that have not run since it was added.
        matched, total: modules of the file that this part of the model has, and that the file has for it; 0 of 0 if
            nobody has looked.
        note: why not more of the file, or nothing of it, is used.
    """

    name: str
    part: str
    strength: float
    when: str = ""
    residual: int = 0
    others: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    matched: int = 0
    total: int = 0
    note: str = ""

    @property
    def layers(self) -> int:
        return self.residual + self.waiting + sum(self.others.values())


def patchers(model: Any) -> Iterator[tuple[str, Any]]:
    """``(title, ModelPatcher)`` of Forge's loaded model; nothing if none is loaded."""
    objects = getattr(model, "forge_objects", None)
    unet, clip = getattr(objects, "unet", None), getattr(objects, "clip", None)
    if unet is not None:
        yield DIFFUSION_MODEL, unet
    if clip is not None:
        yield TEXT_ENCODERS, clip.patcher


def gguf_layers(engine: Engine, model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerState]]:
    """``(path, layer, state)`` of every layer that Graft can run."""
    for path, module in model.named_modules():
        if engine.host.is_layer(module):
            state = state_of(module)
            if state is not None:
                yield path, module, state


def parts(engine: Engine, model: Any) -> list[Part]:
    """The models of the loaded checkpoint."""
    return [_part(engine, title, patcher.model) for title, patcher in patchers(model)]


def _part(engine: Engine, title: str, model: nn.Module) -> Part:
    inner = getattr(model, "diffusion_model", None)
    names = [inner] if inner is not None else model.children() if title == TEXT_ENCODERS else [model]
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
        for added in patches.carried(patcher):
            lora = UsedLora(stem(added.filename), title, added.strength, added.when)
            for key in added.ours:
                _place(engine, patcher.model, key, lora)
            if added.others:
                lora.others[_with_forge(engine, patcher.model, added.others)] += len(added.others)
            if added.refused:
                lora.others[_ONE_STRENGTH] += len(added.refused)
            if fate := engine.fates.get(added.filename):
                _count(lora, fate.report)
            found.append(lora)
    return found + _left_out(engine)


def _count(lora: UsedLora, report: FileReport) -> None:
    """How much of its file this part of the model has."""
    if lora.part == TEXT_ENCODERS:
        lora.matched, lora.total = report.on_clip or 0, report.text_encoder
        return
    lora.matched, lora.total = report.matched, report.total
    if report.missing:
        cause = f" ({report.cause})" if report.cause else ""
        lora.note = f"{len(report.missing)} not in this model, such as {examples(report.missing)}{cause}"


def _left_out(engine: Engine) -> list[UsedLora]:
    """LoRAs of the prompt of which nothing is on the model."""
    loaded = getattr(engine.host.networks, "loaded_networks", ())
    names = (getattr(getattr(net, "network_on_disk", None), "filename", None) for net in loaded)
    fates = {name: engine.fates[name] for name in names if name in engine.fates}
    return [
        UsedLora(stem(name), "none", fate.report.strength, matched=fate.report.matched, total=fate.report.total,
                 note=_why_not(fate.report))
        for name, fate in fates.items() if not fate.used
    ]  # fmt: skip


def _why_not(report: FileReport) -> str:
    if not report.matched:
        return report.line
    return f"Forge has left it out, since this model has too little of it: {report.line}"


def stem(filename: Any) -> str:
    """What people call a LoRA: its file's name."""
    return os.path.splitext(os.path.basename(str(filename)))[0]


def _with_forge(engine: Engine, model: nn.Module, keys: Sequence[str]) -> str:
    """Why Forge patches these parameters itself."""
    ours = any(engine.runs(model, key) for key in keys)
    return "patched by Forge, as Graft was off" if ours else "patched by Forge: no GGUF layer"


def _place(engine: Engine, model: nn.Module, key: str, lora: UsedLora) -> None:
    """Count what becomes of `lora` at one parameter."""
    state = state_of(model.get_submodule(key.rpartition(".")[0]))
    if state is None or state.refused or engine.settings.mode == "off":
        reason = state.refused if state is not None and state.refused else "Graft is off"
        lora.others[f"merged by Forge in each step: {reason}"] += 1
    elif not state.path:
        lora.waiting += 1
    elif state.left_out:
        lora.others[f"left out: {state.left_out[0]}"] += 1
    elif state.path == "residual":
        lora.residual += 1
    else:
        lora.others[f"merged for each call, exactly: {state.reason}"] += 1


def int8_of(engine: Engine, model: Any, device: torch.device) -> list[tuple[str, str]]:
    """Where int8 is asked for: how many layers multiply in it and which do not, or why none does."""
    if engine.settings.dtype not in RULES:
        return []
    if reason := int8.unavailable(device):
        return [("int8", f"not used: {reason}")]
    states = [state for _, patcher in patchers(model) for _, _, state in gguf_layers(engine, patcher.model)]
    found = {state.where: state.math for state in states if state.int8}
    return [("int8", "; ".join(report(found)) or "from the next picture on")]


def backend_of(engine: Engine, device: torch.device) -> str:
    """Which backend decodes on `device`, and why not a better one."""
    wanted = engine.settings.backend
    try:
        return str(choose(device, None, wanted))
    except NoBackend as error:
        return f"{choose(device)}; {error}"
