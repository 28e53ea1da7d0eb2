"""Workflows made with ComfyUI-GGUF: where that pack is missing, newer hosts put our loader in its loaders' place."""

from __future__ import annotations

OLD_LOADERS = {
    "UnetLoaderGGUF": ["unet_name"],
    "UnetLoaderGGUFAdvanced": ["unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"],
}
"""Its loaders of diffusion models and their widgets, in their order. The files have the same names for both packs."""


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

    for old, widgets in OLD_LOADERS.items():
        manager.register(
            io.NodeReplace(
                new_node_id="GraftUNETLoader",
                old_node_id=old,
                old_widget_ids=widgets,
                input_mapping=[{"new_id": "unet_name", "old_id": "unet_name"}],
                output_mapping=[{"new_idx": 0, "old_idx": 0}],
            )
        )
