"""Workflows made with ComfyUI-GGUF: where that pack is missing, newer hosts put our loaders in its loaders' place."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Replacement:
    """How a loader of ours stands for one of theirs.

    Attributes:
        new: our node.
        widgets: of the old node, in its order.
        kept: the inputs that both have; files have the same names for both packs.
        values: what the new node is to have beside them.
    """

    new: str
    widgets: list[str]
    kept: dict[str, str]
    values: dict[str, str] = field(default_factory=dict)


def _text_encoders(count: int, **values: str) -> Replacement:
    names = [f"clip_name{number}" for number in range(1, count + 1)]
    widgets = names if values else [*names, "type"]
    return Replacement("GraftCLIPLoader", widgets, {name: name for name in widgets}, values)


_DIFFUSION_MODEL = {"unet_name": "unet_name"}
REPLACEMENTS = {
    "UnetLoaderGGUF": Replacement("GraftUNETLoader", ["unet_name"], _DIFFUSION_MODEL),
    "UnetLoaderGGUFAdvanced": Replacement(
        "GraftUNETLoader", ["unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"], _DIFFUSION_MODEL
    ),
    "CLIPLoaderGGUF": Replacement(
        "GraftCLIPLoader", ["clip_name", "type"], {"clip_name1": "clip_name", "type": "type"}
    ),
    "DualCLIPLoaderGGUF": _text_encoders(2),
    "TripleCLIPLoaderGGUF": _text_encoders(3, type="sd3"),
    "QuadrupleCLIPLoaderGGUF": _text_encoders(4, type="hidream"),
}


def offer_replacements() -> None:
    """Tell the host about them; an older one, or one without a server, has no place for it."""
    try:
        from server import PromptServer
    except ImportError:
        return
    manager = getattr(getattr(PromptServer, "instance", None), "node_replace_manager", None)
    if manager is None:
        return
    from comfy_api.latest import io

    for old, by in REPLACEMENTS.items():
        kept = [{"new_id": name, "old_id": old_name} for name, old_name in by.kept.items()]
        manager.register(
            io.NodeReplace(
                new_node_id=by.new,
                old_node_id=old,
                old_widget_ids=by.widgets,
                input_mapping=kept + [{"new_id": name, "set_value": value} for name, value in by.values.items()],
                output_mapping=[{"new_idx": 0, "old_idx": 0}],
            )
        )
