"""A loader for Raylight, where that is installed: each of its workers opens the GGUF file by itself.

A MODEL cannot be sent from one process to another. The LoRAs' files and strengths can: each worker puts them on its own
model, where they run next to the quantized weights as always.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import nodes as host_nodes

from ..kernels import GraftError
from . import node, raylight_actor
from .loader import COMPUTE_DTYPE, HOME, NONE, GraftUNETLoader, model_file, model_files
from .lora import lora_file
from .model_files import all_present

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
_ITS_OWN = "RayUNETLoader"


class GraftRayLoader:
    """Load Diffusion Model into Raylight (GGUF, Graft)."""

    DESCRIPTION = (
        "Loads a GGUF diffusion model, with its LoRAs, in each of Raylight's workers. Switch FSDP and PipeFusion off."
    )
    SEARCH_ALIASES = ["raylight gguf", "ray gguf", "multi gpu gguf"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("RAY_ACTORS",)
    RETURN_NAMES = ("ray_actors",)
    OUTPUT_TOOLTIPS = ("The workers with the model, for Raylight's samplers.",)
    FUNCTION = "load"
    IS_CHANGED = GraftUNETLoader.IS_CHANGED
    VALIDATE_INPUTS = GraftUNETLoader.VALIDATE_INPUTS

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "ray_actors_init": ("RAY_ACTORS_INIT", {"tooltip": "From Raylight's initializer."}),
                "unet_name": (model_files(), {"tooltip": "A .gguf file in models/diffusion_models or models/unet."}),
            },
            "optional": {
                "compute_dtype": COMPUTE_DTYPE,
                "backend": node.BACKEND,
                "module_name": (
                    [NONE, *model_files()],
                    {"default": NONE, "tooltip": "A GGUF file to add to the model, such as a VACE module."},
                ),
                "lora": ("RAY_LORA", {"tooltip": "LoRAs from Raylight's loader."}),
                "lora_stack": ("LORA_STACK", {"tooltip": "LoRAs from a stacker, such as LoRA Stack (Graft)."}),
            },
        }

    def load(
        self, ray_actors_init: Any, unet_name: str, compute_dtype: str = "auto", backend: str = "auto",
        module_name: str = NONE, lora: list[dict] | None = None, lora_stack: list | None = None,
    ) -> tuple:  # fmt: skip
        import ray

        names = [unet_name, *([] if module_name == NONE else [module_name])]
        path, *module = all_present([model_file(name) for name in names], HOME)
        options = {"compute_dtype": compute_dtype, "backend": backend, "module": module[0] if module else None}
        workers, actors = ray_actors_init[0], ray_actors_init[0]["workers"]
        parallel = ray.get(actors[0].get_parallel_dict.remote())
        for key, what in (("is_fsdp", "FSDP"), ("pipefusion_enabled", "PipeFusion")):
            if parallel.get(key):
                raise GraftError(f"switch {what} off in Raylight's initializer: it cannot divide quantized weights")
        ray.cloudpickle.register_pickle_by_value(raylight_actor)  # no worker could import it by its name
        given = (str(ROOT), path, options, _loras(lora, lora_stack))
        said = ray.get([actor.__ray_call__.remote(raylight_actor.load_in_actor, *given) for actor in actors])
        for text in filter(None, said):
            raise GraftError(text)
        ray.get([call for actor in actors for call in _patches(actor, parallel)])
        return (workers,)


def _loras(lora: list[dict] | None, stack: list | None) -> list[tuple[str, float]]:
    """Files and strengths of both inputs; what has no strength for the model is left out."""
    rows = [row for row in stack or () if row[0] not in ("", NONE)]
    paths = all_present([lora_file(row[0]) for row in rows], "the loras folder")
    found = [(entry["path"], float(entry["strength_model"])) for entry in lora or ()]
    found += [(path, float(row[1])) for path, row in zip(paths, rows, strict=True)]
    return [(path, strength) for path, strength in found if strength]


def _patches(actor: Any, parallel: dict) -> list:
    """What Raylight's own loader asks of a worker after the model."""
    calls = []
    if parallel.get("is_xdit"):
        if parallel.get("ulysses_degree", 1) > 1 or parallel.get("ring_degree", 1) > 1:
            calls.append(actor.patch_usp.remote())
        if parallel.get("cfg_degree", 1) > 1:
            calls.append(actor.patch_cfg.remote())
    return calls


def offer_to_raylight() -> None:
    """Add the node when the server starts, if Raylight is there then."""
    node.at_start(add)


def add() -> bool:
    """Whether Raylight is there, and so the node."""
    if _ITS_OWN not in host_nodes.NODE_CLASS_MAPPINGS:
        return False
    GraftRayLoader.RELATIVE_PYTHON_MODULE = getattr(  # type: ignore[attr-defined]
        host_nodes.NODE_CLASS_MAPPINGS["GraftUNETLoader"], "RELATIVE_PYTHON_MODULE", None
    )
    host_nodes.NODE_CLASS_MAPPINGS["GraftRayLoader"] = GraftRayLoader
    host_nodes.NODE_DISPLAY_NAME_MAPPINGS["GraftRayLoader"] = "Load Diffusion Model into Raylight (GGUF, Graft)"
    log.info("with Raylight: GraftRayLoader")
    return True
