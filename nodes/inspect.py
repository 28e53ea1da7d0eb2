"""What a model holds and what runs beside it, as text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from . import node
from .patcher import GraftPatcher


def report(model: GraftPatcher) -> str:
    """The file, the adapters by the way that their layers take, and what was rejected, each with its reason."""
    lines = [model.graft.summary]
    stack = model.residuals
    if not stack:
        return "\n".join([*lines, "no adapters"])
    model.build_residuals()
    ways = Counter((r.path, r.reason) for r in stack.residuals.values())
    for (path, reason), count in ways.most_common():
        beside = "beside the packed weight" if path != "exact" else "by the host's own merge on the decoded weight"
        lines.append(f"{count} layers {beside} ({path}{': ' + reason if reason else ''})")
    others = len(model.patches)
    if others:
        lines.append(f"{others} parameters outside of packed layers patched by ComfyUI")
    lines += [f"rejected: {key}: {reason}" for key, reason in model.rejected.items()]
    return "\n".join(lines)


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
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def inspect(self, model: Any, unique_id: str | None = None) -> dict:
        if isinstance(model, GraftPatcher):
            text = report(model)
        else:
            text = f"a {type(model).__name__} of another loader: Graft adds nothing to it"
        return node.result((text,), text, unique_id)
