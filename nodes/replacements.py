"""Workflows made with ComfyUI-GGUF: where that pack is missing, our loaders stand in its loaders' place.

Newer hosts replace nodes of workflows that people open. In prompts that come through the API we do it before them: on
a node without the title that only the front end sends along, or without one of its inputs, they fail (HTTP 500).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nodes as host_nodes

from ..ops.workflows import Loader, loader_of

COMFYUI_GGUF = (
    "UnetLoaderGGUF", "UnetLoaderGGUFAdvanced", "CLIPLoaderGGUF", "DualCLIPLoaderGGUF", "TripleCLIPLoaderGGUF",
    "QuadrupleCLIPLoaderGGUF",
)  # fmt: skip
"""Its loaders; files have the same names for both packs."""


def _kept(loader: Loader) -> Mapping[str, str]:
    """What ours takes over from a loader of that pack, which has no choice of a device."""
    return {name: own for name, own in loader.kept.items() if name != "device"}


def offer_replacements() -> None:
    """Tell the host about them; one without a server, and an older one, has no place for it."""
    try:
        from server import PromptServer
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    if hasattr(server, "add_on_prompt_handler"):
        server.add_on_prompt_handler(replace_in_request)
    manager = getattr(server, "node_replace_manager", None)
    if manager is None:
        return
    from comfy_api.latest import io

    for old in COMFYUI_GGUF:
        loader = loader_of(old)
        assert loader is not None
        kept = [{"new_id": own, "old_id": name} for name, own in _kept(loader).items()]
        manager.register(
            io.NodeReplace(
                new_node_id=loader.ours,
                old_node_id=old,
                old_widget_ids=[name for name in loader.widgets if name != "device"],
                input_mapping=kept + [{"new_id": name, "set_value": value} for name, value in loader.set.items()],
                output_mapping=[{"new_idx": 0, "old_idx": 0}],
            )
        )


def replace_in_request(request: dict[str, Any]) -> dict[str, Any]:
    """Put our loaders into the prompt of a request for the queue; what an input lacks the host says as for any node."""
    prompt = request.get("prompt")
    for node in prompt.values() if isinstance(prompt, dict) else ():
        old = node.get("class_type") if isinstance(node, dict) else None
        loader = loader_of(old) if "GGUF" in str(old) and old not in host_nodes.NODE_CLASS_MAPPINGS else None
        if loader is not None:
            inputs = node.get("inputs", {})
            kept = {own: inputs[name] for name, own in _kept(loader).items() if inputs.get(name) not in (None, "none")}
            node |= {"class_type": loader.ours, "inputs": {**kept, **loader.set}}
    return request
