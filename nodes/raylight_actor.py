"""What runs in a worker of Raylight, a process of its own to which this file's function is sent as it stands.

It imports the pack there by its folder, whose nodes nobody has loaded in that process.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

PACKAGE = "graft_in_actor"


def load_in_actor(
    worker: Any, root: str, path: str, options: Mapping[str, Any], loras: Sequence[tuple[str, float]]
) -> str:
    """Have a worker load a GGUF model, with LoRAs on it.

    Args:
        worker: Raylight's `RayWorker`, in its own process.
        root: the pack's folder.
        options: of `load_diffusion_model`.
        loras: files and strengths.

    Returns:
        what went wrong, since our errors cannot be sent; "" if nothing did.
    """
    if PACKAGE not in sys.modules:
        for name, folder in ((PACKAGE, root), (f"{PACKAGE}.nodes", os.path.join(root, "nodes"))):
            package = types.ModuleType(name)
            package.__path__ = [folder]
            sys.modules[name] = package
        importlib.import_module(f"{PACKAGE}.nodes.lora_names").extend_host()
    errors = importlib.import_module(f"{PACKAGE}.kernels")
    lora = importlib.import_module(f"{PACKAGE}.nodes.lora")
    for forget in ("_reset_active_model", "_invalidate_non_fsdp_cache", "_free_cached_aux_models"):
        getattr(worker, forget, lambda: None)()
    try:
        model = importlib.import_module(f"{PACKAGE}.nodes.loader").load_diffusion_model(path, **options)
        for file, strength in loras:
            model = model.clone()
            lora.apply_lora(model, lora.load_adapters(file), os.path.basename(file), strength)
    except errors.GraftError as error:
        return str(error)
    worker.model, worker.lora_list, worker.overwrite_cast_dtype = model, None, None
    worker.is_model_loaded = True
    return ""
