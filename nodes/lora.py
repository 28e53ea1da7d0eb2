"""LoRAs on a model: eight rows of toggle, file and strength."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import comfy.lora
import comfy.lora_convert
import folder_paths

from ..kernels import AdapterError
from ..ops.lora_file import AdapterFile, load_adapters
from ..ops.report import FileReport, place_of, way_of
from . import node
from .patcher import GraftPatcher

log = logging.getLogger(__name__)

ROWS = 8
NONE = "None"


class LoraFiles:
    """The files of one node, read once and again when they change."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[Any, AdapterFile]] = {}

    def open(self, path: str) -> AdapterFile:
        """The file; AdapterError if it cannot be read as adapters."""
        changed = node.file_state(path)
        known = self._read.get(path)
        if known is None or known[0] != changed:
            known = self._read[path] = (changed, load_adapters(path))
        return known[1]

    def keep(self, paths: set[str]) -> None:
        """Forget the files that no row names any more."""
        self._read = {path: value for path, value in self._read.items() if path in paths}


def apply_lora(model: Any, file: AdapterFile, name: str, strength: float) -> FileReport:
    """Add a file's adapters to `model` (already a clone), through the host's own converters, key map and loader.

    Raises:
        AdapterError: nothing in the file fits the model.
    """
    state = comfy.lora_convert.convert_lora(dict(file.state))
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(state, key_map, log_missing=False)
    rejected = model.rejected if isinstance(model, GraftPatcher) else {}
    before = set(rejected)
    taken = model.add_patches(patches, strength)
    new = {key: why for key, why in rejected.items() if key not in before}
    report = FileReport.of(name, strength, state, patches, taken, new, type(model.model.model_config).__name__)
    if not taken:
        raise AdapterError(report.line)
    return replace(report, dialect=file.dialect, ways=_ways(model, taken))


def _ways(model: Any, taken: Collection[Any]) -> dict[str, int]:
    """How many of the layers that took a patch take which way, so far; the host merges into all others."""
    if not isinstance(model, GraftPatcher):
        return {}
    planned = model.residuals.planned(model.graft.layers)
    found = (planned.get(place[0]) for place in {place_of(key) for key in taken})
    return Counter("patched by ComfyUI" if r is None else way_of(r.path, r.reason) for r in found)


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """What the file says its trainer called the subject; the most frequent tags where it does not say."""
    phrase = metadata.get("modelspec.trigger_phrase") or metadata.get("ss_trigger_words")
    if phrase:
        return [w.strip() for w in phrase.split(",") if w.strip()]
    try:
        frequencies = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except json.JSONDecodeError:
        return []
    counts: dict[str, int] = {}
    for tags in frequencies.values() if isinstance(frequencies, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    return sorted(counts, key=lambda tag: -counts[tag])[:3]


class GraftLoraStack:
    """LoRA Stack (Graft)."""

    DESCRIPTION = (
        "Up to eight LoRAs in one node, each with its own switch and strength. On a Graft model they run beside the "
        "quantized weights; a new strength reloads nothing."
    )
    SEARCH_ALIASES = ["lora loader", "lora stack", "multi lora", "power lora", "gguf lora"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MODEL", "LORA_STACK", "STRING", "STRING")
    RETURN_NAMES = ("MODEL", "LORA_STACK", "report", "trigger_words")
    OUTPUT_TOOLTIPS = (
        "The model with these LoRAs.",
        "The rows as (file, model strength, clip strength), for other stackers.",
        "For each file how many layers it reaches and why not more, and which way they take.",
        "The trigger words that the files name, separated by commas.",
    )
    FUNCTION = "apply"

    def __init__(self) -> None:
        self._files = LoraFiles()

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        files = [NONE, *folder_paths.get_filename_list("loras")]
        optional: dict[str, tuple] = {
            "lora_stack": ("LORA_STACK", {"tooltip": "Rows of another stacker; they come before these."}),
        }
        for row in range(1, ROWS + 1):
            optional[f"enabled_{row}"] = ("BOOLEAN", {"default": True, "tooltip": f"Switches row {row} on and off."})
            optional[f"lora_{row}"] = (files, {"default": NONE, "tooltip": f"LoRA file of row {row}."})
            optional[f"strength_{row}"] = (
                "FLOAT",
                {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.05, "tooltip": f"Strength of row {row}."},
            )
        return {
            "required": {"model": ("MODEL", {"tooltip": "A Graft model, or any other."})},
            "optional": optional,
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> Any:
        names = [name for name, *_ in _rows(inputs)]
        return [node.file_state(folder_paths.get_full_path("loras", name)) for name in names]

    @classmethod
    def VALIDATE_INPUTS(cls, **inputs: Any) -> bool | str:
        for name, *_ in _rows({k: v for k, v in inputs.items() if k != "lora_stack"}):
            if folder_paths.get_full_path("loras", name) is None:
                return f"{name} is not there any more: put it into models/loras, or switch its row off"
        return True

    def apply(self, model: Any, unique_id: str | None = None, **inputs: Any) -> dict:
        rows = _rows(inputs)
        reports: list[str] = []
        words: list[str] = []
        paths = {name: folder_paths.get_full_path_or_raise("loras", name) for name, *_ in rows}
        if any(strength for _, strength, _ in rows):
            model = model.clone()
        for name, strength, _ in rows:
            file = self._files.open(paths[name])
            if strength:
                reports.append(apply_lora(model, file, name, strength).text)
            words += trigger_words(file.metadata)
        self._files.keep(set(paths.values()))
        text = "\n".join(reports) or "no LoRA is switched on"
        log.info("%s", text)
        return node.result((model, rows, text, ", ".join(dict.fromkeys(words))), text, unique_id)


def _rows(inputs: dict[str, Any]) -> list[tuple[str, float, float]]:
    """The stack that came in, then the rows that are switched on: ``(file, model strength, clip strength)``."""
    rows = [tuple(row) for row in inputs.get("lora_stack") or ()]
    for row in range(1, ROWS + 1):
        name = inputs.get(f"lora_{row}", NONE)
        if name and name != NONE and inputs.get(f"enabled_{row}", True):
            strength = float(inputs.get(f"strength_{row}", 1.0))
            rows.append((name, strength, strength))
    return rows
