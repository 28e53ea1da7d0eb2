"""Calibration: a sampler run that is watched, and what it tells of the columns of each weight."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import folder_paths
import torch
from comfy.patcher_extension import WrappersMP

from ..kernels import GraftError
from ..ops.calibration import Calibration, watched_layers
from ..ops.files.imatrix import Importance, read_imatrix, write_imatrix
from ..ops.report import examples, layers
from . import node
from .model_files import find, listed
from .ops import entering, plain_key

try:
    from comfy_execution.utils import get_executing_context
except ImportError:  # hosts from before it tell nobody which node runs

    def get_executing_context() -> Any:
        """Nobody knows."""
        return None


log = logging.getLogger(__name__)

TYPE = "GRAFT_IMPORTANCE"
FOLDER = "imatrix"
"""The host's key, and the folder in models/ and in its output, for files of importance."""
EXTENSIONS = {".gguf", ".dat", ".imatrix"}
HOME = "the imatrix folder"
SKETCHED = 512
"""Rows of the sketch of a layer's inputs for a repair: good for ranks up to an eighth of it."""
MORE = 3
"""Further inputs for sampled latents."""
PREFIX = "diffusion_model."

_KEY = "graft_calibrate"
_NOT_WATCHED = "this MODEL is not watched: connect the sampler and this node to the MODEL of Calibrate (Graft)"
_NOTHING_RAN = (
    "no sampler that leads to these latents used the watched MODEL: connect the MODEL of Calibrate (Graft) to the "
    "sampler, and its LATENT to this node"
)


def register_folder() -> None:
    """Let the host list importance matrices, of models/ and of what Save Importance writes."""
    places = [os.path.join(base, FOLDER) for base in (folder_paths.models_dir, folder_paths.get_output_directory())]
    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    paths = [*paths, *(place for place in places if place not in paths)]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | EXTENSIONS)


@dataclass
class Run:
    """What one node's sampling has shown, in one execution of the graph.

    Attributes:
        prompt: the execution.
        calls: of the model.
    """

    prompt: str | None
    calibration: Calibration
    calls: int = 0


class Watcher:
    """Put on a clone of a MODEL: it watches whatever samples with it, and holds the last run of each node.

    A node that runs again replaces what it has shown before, one that the host has cached keeps it, and a run that is
    cancelled leaves nothing.

    Args:
        sketched: rows of the sketches for a repair, see `Calibration`.
        node_id: of the node that made it.
    """

    def __init__(self, sketched: int = 0, node_id: str | None = None) -> None:
        self.sketched, self.node_id = sketched, node_id
        self.runs: dict[str | None, Run] = {}
        self.seen: set[str] = set()
        self._under_way: list[Run] = []
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Watcher:
        """The same for a copy of the MODEL, which other devices run."""
        return self

    def put_on(self, patcher: Any) -> None:
        """Have it watch `patcher` and its clones."""
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, self._sample)
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, self._apply_model)
        patcher.set_attachments(_KEY, self)

    def _sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        context = get_executing_context()
        node_id, prompt = (None, None) if context is None else (context.node_id, context.prompt_id)
        run = Run(prompt, Calibration(self.sketched))
        self._under_way.append(run)
        try:
            sampled = executor(*args, **kwargs)
        finally:
            self._under_way.remove(run)
        with self._lock:
            before = self.runs.get(node_id)
            if before is not None and prompt is not None and before.prompt == prompt:
                # one node may sample several times: for parts of a picture, or a list of prompts
                run.calibration.add(before.calibration)
                run.calls += before.calls
            self.runs[node_id] = run
        return sampled

    def _apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._under_way:
            return executor(*args, **kwargs)
        run, model = self._under_way[-1], executor.class_obj
        watched = {plain_key(name): layer for name, layer in watched_layers(model.diffusion_model).items()}
        with self._lock:
            self.seen |= watched.keys()
            run.calls += 1
        with _alone(model), without_compiling(), run.calibration.watching(watched, entering):
            return executor(*args, **kwargs)

    def importance(self, nodes: Collection[str] | None) -> Importance:
        """What the runs of these nodes have shown, or those of all.

        Raises:
            GraftError: there are none, or what went into a layer was no number.
        """
        runs = [run for node_id, run in self.runs.items() if nodes is None or node_id is None or _leads(node_id, nodes)]
        if not any(run.calls for run in runs):
            raise GraftError(_NOTHING_RAN)
        total = Calibration()
        for run in runs:
            total.add(run.calibration)
        return total.importance(sum(run.calls for run in runs), [f"ComfyUI, {_counted(len(runs), 'sampler run')}"])


def _leads(node_id: str, nodes: Collection[str]) -> bool:
    """Whether it is one of `nodes`, or a node that one of them expanded into, which the host names after it."""
    return node_id in nodes or node_id.partition(".")[0] in nodes


def _alone(model: Any) -> contextlib.AbstractContextManager:
    """Keep other threads from running a Graft model's layers, which clones share."""
    graft = getattr(model, "graft", None)
    return contextlib.nullcontext() if graft is None else graft.calls.lock


@contextlib.contextmanager
def without_compiling() -> Iterator[None]:
    """Run what `torch.compile` has compiled as it was written: a compiled graph calls no layers."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None:
        yield
        return
    with set_stance("force_eager"):
        yield


def leading_to(prompt: Any, node_id: str) -> set[str]:
    """The nodes that a node's inputs come from, near and far.

    Args:
        prompt: the host's dynamic prompt, in which nodes are asked for by id.
    """
    found: set[str] = set()
    left = [node_id]
    while left:
        at = left.pop()
        if at in found or not prompt.has_node(at):
            continue
        found.add(at)
        inputs = prompt.get_node(at).get("inputs", {}).values()
        left += [value[0] for value in inputs if isinstance(value, list) and len(value) == 2 and value[0] is not None]
    return found


def report(importance: Importance, seen: Collection[str]) -> str:
    """How much was seen, and which layers were not."""
    counted = {name.removesuffix(".weight") for name in importance}
    most = max((importance.rows(name) for name in importance), default=0)
    lines = [
        f"{layers(len(counted))} in {_counted(importance.calls, 'model call')}, up to {most:,} rows each",
        *importance.datasets,
    ]
    unseen = sorted(set(seen) - counted)
    if unseen:
        lines.append(f"{layers(len(unseen))} did not run, so nothing is known of them: {examples(unseen)}")
    return "\n".join(lines)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


class GraftCalibrate:
    """Calibrate (Graft)."""

    DESCRIPTION = (
        "Watches how a model is used, so that quantizing keeps what counts. Connect it between the model and a "
        "sampler, and the sampler's LATENT to Importance (Graft). The pictures stay the same."
    )
    SEARCH_ALIASES = ["imatrix", "importance matrix", "calibration", "calibrate gguf"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The same model, watched. Connect it to any samplers, and to Importance (Graft).",)
    FUNCTION = "watch"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        tooltip = "Any model, with or without LoRAs. Best is the model that you will quantize, before it is quantized."
        repair = {
            "default": False,
            "tooltip": "Also collects what a repair LoRA needs, see Save LoRA (Graft). It takes memory: 2 KB for each "
            "column of each weight, about 4 GB for Flux.",
        }
        return {
            "required": {"model": ("MODEL", {"tooltip": tooltip})},
            "optional": {"for_repair": ("BOOLEAN", repair)},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def watch(self, model: Any, for_repair: bool = False, unique_id: str | None = None) -> tuple[Any]:
        clone = model.clone()
        Watcher(SKETCHED if for_repair else 0, unique_id).put_on(clone)
        return (clone,)


class GraftImportance:
    """Importance (Graft)."""

    DESCRIPTION = (
        "Collects what Calibrate (Graft) has seen when the samplers are done: how much each column of a weight counts. "
        "Connect it to Save Diffusion Model as GGUF (Graft) or to Save Importance (Graft)."
    )
    SEARCH_ALIASES = ["imatrix", "importance matrix", "calibration result"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = (TYPE, "STRING")
    RETURN_NAMES = ("importance", "report")
    OUTPUT_TOOLTIPS = ("For Save as GGUF and for Save Importance.", "How much was seen, and which layers were not.")
    FUNCTION = "collect"
    INPUT_IS_LIST = True  # a list of latents is one calibration

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        more = ("LATENT", {"tooltip": "The latent of another sampler that used the watched model. May stay empty."})
        before = (TYPE, {"tooltip": "An earlier calibration of this model, to be added. May stay empty."})
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The MODEL of Calibrate (Graft)."}),
                "samples": ("LATENT", {"tooltip": "The latent of a sampler that used the watched model."}),
            },
            "optional": {f"samples_{number}": more for number in range(2, MORE + 2)} | {"importance": before},
            "hidden": {"prompt": "DYNPROMPT", "unique_id": "UNIQUE_ID"},
        }

    def collect(
        self, model: list, samples: list, importance: list | None = None, prompt: list | None = None,
        unique_id: list | None = None, **_: Any,
    ) -> dict:  # fmt: skip
        watcher = model[0].attachments.get(_KEY)
        if watcher is None:
            raise GraftError(_NOT_WATCHED)
        known = prompt and unique_id and prompt[0] is not None
        nodes = _sampled_by(prompt[0], unique_id[0], watcher.node_id) if known else None  # type: ignore[index]
        found = watcher.importance(nodes)
        for before in importance or ():
            found = found if before is None else before + found
        text = report(found, watcher.seen)
        log.info("%s", text)
        return node.result((found, text), text)


def _sampled_by(prompt: Any, node_id: str, calibrate: str | None) -> set[str]:
    """The nodes behind the latents of an Importance node; those behind an earlier calibration are counted there.

    One whose model no longer comes from the node `calibrate` may have shown something before, when it did.
    """
    inputs: Mapping[str, Any] = prompt.get_node(node_id).get("inputs", {})
    links = [value[0] for name, value in inputs.items() if name.startswith("samples") and isinstance(value, list)]
    found = {node_id for link in links for node_id in leading_to(prompt, link)}
    if calibrate is None or not prompt.has_node(calibrate):
        return found
    return {node_id for node_id in found if calibrate in leading_to(prompt, node_id)}


class GraftSaveImatrix:
    """Save Importance (Graft)."""

    DESCRIPTION = "Writes an importance matrix in llama.cpp's GGUF format into output/imatrix."
    SEARCH_ALIASES = ["save imatrix", "export imatrix", "importance matrix"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    OUTPUT_TOOLTIPS = ("Where the file is.",)
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        tooltip = "Folder and beginning of the file's name, in ComfyUI's output."
        prefix = {"default": f"{FOLDER}/Graft", "tooltip": tooltip}
        return {
            "required": {
                "importance": (TYPE, {"tooltip": "From Importance (Graft)."}),
                "filename_prefix": ("STRING", prefix),
            },
        }

    def save(self, importance: Importance, filename_prefix: str) -> dict:
        output = folder_paths.get_output_directory()
        folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, output)
        path = os.path.join(folder, f"{name}_{counter:05}_.gguf")
        write_imatrix(path, importance)
        text = f"{len(importance)} weights, {os.path.getsize(path):,} bytes: {path}"
        log.info("%s", text)
        return node.result((path,), text)


class GraftLoadImatrix:
    """Load Importance (Graft)."""

    DESCRIPTION = (
        "Loads an importance matrix from Save Importance (Graft) or from llama.cpp's llama-imatrix: .gguf or .dat."
    )
    SEARCH_ALIASES = ["load imatrix", "importance matrix", "imatrix.dat"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = (TYPE, "STRING")
    RETURN_NAMES = ("importance", "report")
    OUTPUT_TOOLTIPS = ("For Save as GGUF, or to add to another calibration.", "What the file holds.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        tooltip = "A file in models/imatrix or output/imatrix."
        return {"required": {"imatrix_name": (listed(FOLDER), {"tooltip": tooltip})}}

    @classmethod
    def IS_CHANGED(cls, imatrix_name: str | None = None, **_: Any) -> Any:
        return node.UNKNOWN if imatrix_name is None else node.file_state(find(imatrix_name, FOLDER).path)

    @classmethod
    def VALIDATE_INPUTS(cls, imatrix_name: str | None = None) -> bool | str:
        return imatrix_name is None or find(imatrix_name, FOLDER).valid(HOME)

    def load(self, imatrix_name: str) -> dict:
        found = find(imatrix_name, FOLDER)
        importance = read_imatrix(found.present(HOME))
        text = report(importance, ())
        return node.result((importance, text), text, found.note)
