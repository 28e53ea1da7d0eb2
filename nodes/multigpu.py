"""Our loaders under the wrappers of ComfyUI-MultiGPU, where that is installed: a node for each, as it names its own.

That pack wraps a list of loaders that it knows. Which packs are there is known once all are loaded: when the server
starts.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import nodes as host_nodes

from . import node

log = logging.getLogger(__name__)

_PLAIN, _TEXT = "override_class", "override_class_clip"
_SHARING, _SHARING_TEXT = (
    "override_class_with_distorch_safetensor_v2", "override_class_with_distorch_safetensor_v2_clip",
)  # fmt: skip
WRAPPERS = {
    "GraftUNETLoader": {"MultiGPU": _PLAIN, "DisTorch2MultiGPU": _SHARING},
    "GraftCheckpointLoader": {"MultiGPU": _PLAIN, "DisTorch2MultiGPU": _SHARING},
    "GraftCLIPLoader": {"MultiGPU": _TEXT, "DisTorch2MultiGPU": _SHARING_TEXT},
    "GraftVAELoader": {"MultiGPU": _PLAIN},
    "GraftControlNetLoader": {"MultiGPU": _PLAIN},
}
"""Our loaders, and by the ends of the nodes' names that pack's functions which make them."""

_ITS_OWN = "UNETLoaderMultiGPU"


def offer_wrapped() -> None:
    """Add the nodes when the server starts, if it does."""
    node.at_start(wrap)


def wrap() -> list[str]:
    """Add the nodes; returns their names."""
    its_own = host_nodes.NODE_CLASS_MAPPINGS.get(_ITS_OWN)
    made_by = sys.modules.get(getattr(its_own, "__module__", ""))
    added = []
    for name, wrappers in WRAPPERS.items():
        for ending, function in wrappers.items():
            make = getattr(made_by, function, None)
            if make is None:
                continue
            host_nodes.NODE_CLASS_MAPPINGS[name + ending] = _made(make, host_nodes.NODE_CLASS_MAPPINGS[name])
            title = host_nodes.NODE_DISPLAY_NAME_MAPPINGS[name]
            host_nodes.NODE_DISPLAY_NAME_MAPPINGS[name + ending] = f"{title} {ending}"
            added.append(name + ending)
    if added:
        log.info("with ComfyUI-MultiGPU: %s", ", ".join(added))
    return added


def _made(make: Any, loader: type) -> type:
    wrapped = make(loader)
    # whoever looks for the pack of a node, as newer hosts do, finds ours
    wrapped.RELATIVE_PYTHON_MODULE = getattr(loader, "RELATIVE_PYTHON_MODULE", None)
    return wrapped
