"""What a model holds and what runs beside it, as text and as pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.utils
import nodes
import torch

from ..ops import int8, overview
from ..ops.adapters import Patch
from ..ops.overview import Effects
from ..ops.report import examples, layers, size_text, way_of
from ..ops.strengths import Strength
from . import charts, node
from .lora import rows_on, varying_on
from .patcher import GraftPatcher, merge

FOUND = 40
"""Layers and entries of the metadata that a search shows at most."""
_NOTHING = torch.zeros(1, 1, 1, 3)


def report(model: GraftPatcher) -> str:
    """The file, its adapters, the ways that their layers take, and what was rejected, each with its reason."""
    rejected = [f"rejected: {key}: {reason}" for key, reason in model.rejected.items()]
    lines = [model.graft.summary, *int8.report(model.graft.layers)]
    if not model.residuals:
        return "\n".join([*lines, "no adapters", *rejected])
    files = [f"{name} ×{strength:.2f}" for name, strength in rows_on(model)]
    lines += [f"from LoRA Stack: {', '.join(files)}"] if files else []
    lines += [f"{what}: {layers(count)}" for what, count in adapters(model).items()]
    planned = model.residuals.planned(model.graft.layers)
    ways: dict[str, list[str]] = {}
    for name, residual in planned.items():
        ways.setdefault(way_of(residual.path, residual.reason), []).append(name)
    for way, names in sorted(ways.items(), key=lambda item: -len(item[1])):
        lines.append(f"{layers(len(names))} {way}: {examples(names)}")
    others = len(model.patches)
    if others:
        lines.append(f"{others} other parameters, patched by ComfyUI itself")
    lines += rejected
    lines += [f"rejected: {name}: {reason}" for name, residual in planned.items() for reason in residual.rejected]
    return "\n".join(lines)


def adapters(model: GraftPatcher) -> dict[str, int]:
    """How many layers have an adapter of a kind, rank and strength, in the order in which they were added."""
    found: dict[str, set[str]] = {}
    for key, patches in model.residuals.patches.items():
        for patch in patches:
            found.setdefault(_described(patch), set()).add(key.rpartition(".")[0])
    return {what: len(names) for what, names in found.items()}


def _described(patch: Patch) -> str:
    rank = getattr(getattr(patch.adapter, "inner", patch.adapter), "rank", None)
    what = patch.adapter.kind if rank is None else f"{patch.adapter.kind}, rank {rank}"
    scaled = "" if patch.strength_model == 1.0 else f", all before it ×{patch.strength_model:.2f}"
    when = "" if patch.when is None else f", {patch.when}"
    return f"{what} ×{patch.strength:.2f}{scaled}{when}"


def effects(model: GraftPatcher) -> dict[str, Effects]:
    """How much each LoRA changes each block, by its file where it is known and else by what it is."""
    if not model.residuals:
        return {}
    bar = comfy.utils.ProgressBar(len(model.graft.layers))

    def step() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return overview.effects(
        model.graft.layers, model.residuals.patches, _label, lambda key, p, weight: merge(model, [p], weight, key), step
    )


def _label(patch: Patch) -> str:
    return f"{patch.source} ×{patch.strength:.2f}" if patch.source else _described(patch)


def found_in(model: GraftPatcher, search: str) -> list[str]:
    """The layers and the entries of the files' metadata in which all words of a search are; all entries for ``*``."""
    notes = [f"{key}: {text}" for key, text in model.graft.notes.items()]
    notes = notes if search.strip() == "*" else overview.matching(search, notes)
    lines = [*notes, *map(functools.partial(_layer_line, model), overview.matching(search, model.graft.layers))]
    left = len(lines) - FOUND
    return [*(lines or [f"nothing is called {search.strip()}"])[:FOUND], *([f"and {left} more"] if left > 0 else [])]


def _layer_line(model: GraftPatcher, name: str) -> str:
    """``double_blocks.0.img_attn.qkv: Q4_K, 9216 × 3072, 15.9 MB; style.safetensors ×0.80``."""
    layer, patches = model.graft.layers[name], model.residuals.patches
    shape = " × ".join(map(str, layer.logical_shape))
    size = size_text(layer.weight.numel() * layer.weight.element_size())
    on = dict.fromkeys(_label(p) for key in (f"{name}.weight", f"{name}.bias") for p in patches.get(key, ()))
    line = f"{name.removeprefix(overview.PREFIX)}: {layer.fmt.name if layer.fmt else 'empty'}, {shape}, {size}"
    return "; ".join([line, *on])


def regions(model: GraftPatcher) -> torch.Tensor:
    """A row for each strength that depends on the call, ``[1, rows, columns, 3]``: its region, and its course.

    The region is white where the LoRA works; the course goes over the steps from left to right. One black pixel if
    every strength is a constant.
    """
    patches = (patch for found in model.residuals.patches.values() for patch in found)
    names: dict[Strength, list[str]] = {patch.when: [] for patch in patches if patch.when is not None}
    for when, name in varying_on(model):
        names.get(when, []).append(name)
    if not names:
        return _NOTHING
    rows = [charts.region_row(", ".join(dict.fromkeys(called)) or "a LoRA", when) for when, called in names.items()]
    return charts.as_image(charts.stacked(rows))


class GraftInspect:
    """Inspect Model (Graft)."""

    DESCRIPTION = (
        "Shows what is in a Graft model: the types of its layers, the LoRAs on it, how much each LoRA changes each "
        "block, and how the layers are computed."
    )
    SEARCH_ALIASES = ["gguf info", "model info", "lora report", "inspect gguf"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("STRING", "IMAGE", "IMAGE")
    RETURN_NAMES = ("report", "regions", "chart")
    OUTPUT_TOOLTIPS = (
        "The same text as on the node.",
        "A row for each LoRA by region or step: its region, and its strength over the steps.",
        "The types of the layers as bars, and below how much each LoRA changes the weights of each block.",
    )
    OUTPUT_NODE = True
    FUNCTION = "inspect"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        tooltip = "Shows the layers and metadata with all of these words, such as: 12 img_attn. * shows all metadata."
        return {
            "required": {"model": ("MODEL", {"tooltip": "A model from the Graft loader, with or without LoRAs."})},
            "optional": {"search": ("STRING", {"default": "", "tooltip": tooltip})},
        }

    def inspect(self, model: Any, search: str = "") -> dict:
        if not isinstance(model, GraftPatcher):
            text = f"a {type(model).__name__} of another loader: Graft adds nothing to it"
            return node.result((text, _NOTHING, _NOTHING), text)
        changes, groups = effects(model), overview.groups(model.graft.layers)
        lines = found_in(model, search) if search.strip() else []
        lines += [report(model), *overview.told(groups)]
        lines += [overview.effect_line(what, found) for what, found in changes.items()]
        drawn = [charts.types_chart(groups), *([charts.effects_chart(changes)] if any(changes.values()) else [])]
        text, chart, where = "\n".join(lines), charts.as_image(charts.stacked(drawn)), regions(model)
        result = node.result((text, where, chart), text)
        shown = [where, chart] if where.numel() > 3 else [chart]
        result["ui"]["images"] = [image for picture in shown for image in _previewed(picture)]
        return result


def _previewed(picture: torch.Tensor) -> Iterator[dict]:
    yield from nodes.PreviewImage().save_images(picture)["ui"]["images"]
