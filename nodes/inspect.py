"""What a model holds and what runs beside it, as text."""

from __future__ import annotations

from typing import Any

from ..ops.adapters import Patch
from ..ops.report import examples, layers, way_of
from . import node
from .lora import rows_on
from .patcher import GraftPatcher


def report(model: GraftPatcher) -> str:
    """The file, its adapters, the ways that their layers take, and what was rejected, each with its reason."""
    lines = [model.graft.summary]
    if not model.residuals:
        return "\n".join([*lines, "no adapters"])
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
        lines.append(f"{others} parameters outside of packed layers patched by ComfyUI")
    lines += [f"rejected: {key}: {reason}" for key, reason in model.rejected.items()]
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
    return f"{what} ×{patch.strength:.2f}{scaled}"


class GraftInspect:
    """Inspect Model (Graft)."""

    DESCRIPTION = "Shows what a Graft model holds, which adapters run beside it, which way each layer takes, and why."
    SEARCH_ALIASES = ["gguf info", "model info", "lora report", "inspect gguf"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The same text as on the node.",)
    OUTPUT_NODE = True
    FUNCTION = "inspect"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {"model": ("MODEL", {"tooltip": "A model from the Graft loader, with or without LoRAs."})},
        }

    def inspect(self, model: Any) -> dict:
        if isinstance(model, GraftPatcher):
            text = report(model)
        else:
            text = f"a {type(model).__name__} of another loader: Graft adds nothing to it"
        return node.result((text,), text)
