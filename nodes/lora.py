"""LoRAs on a model: eight rows of toggle, file and strength."""

from __future__ import annotations

import json
import logging
from collections import ChainMap, Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert

from ..kernels import AdapterError
from ..ops.dialects import Target, module_names
from ..ops.lora_file import AdapterFile, load_adapters
from ..ops.report import FileReport, modules_of, place_of, way_of
from . import node
from .patcher import GraftPatcher

log = logging.getLogger(__name__)

ROWS = 8
NONE = "None"
STACK_INPUT = "lora_stack"
ATTACHED = "graft_lora_stack"
"""Under which a MODEL or CLIP carries what was put on it."""

DEMO_LORAS = "graft_demo_loras"
"""A key of our own for the demo's files, so that they don't stand among people's own in other nodes."""


class LoraFiles:
    """The files of one node, read once and again when they change."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, str], tuple[Any, AdapterFile]] = {}

    def open(self, path: str, norm: str = "merged") -> AdapterFile:
        """The file, for a model that takes `norm` (`load_adapters`); AdapterError if it cannot be read as adapters."""
        changed = node.file_state(path)
        known = self._read.get((path, norm))
        if known is None or known[0] != changed:
            known = self._read[path, norm] = (changed, load_adapters(path, norm))
        return known[1]

    def keep(self, paths: set[str]) -> None:
        """Forget the files that no row names any more."""
        self._read = {key: value for key, value in self._read.items() if key[0] in paths}


def apply_lora(
    model: Any, file: AdapterFile, name: str, strength: float, clip: Any = None, strength_clip: float = 0.0
) -> FileReport:
    """Add a file's adapters to `model` and `clip` (clones already) through the host's converters, key maps and loader.

    Raises:
        AdapterError: nothing in the file fits either.
    """
    state = comfy.lora_convert.convert_lora(dict(file.state))
    patches = _load(state, layer_names(model, modules_of(state)))
    taken, rejected = _add(model, patches, strength) if strength else ([], {})
    kind = type(model.model.model_config).__name__
    report = FileReport.of(name, strength, state, dict(ChainMap(*patches)), taken, rejected, kind)
    report = replace(report, dialect=file.dialect, ways=_ways(model, taken))
    if clip is not None:
        for_clip = _load(state, comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
        found = [key for part in for_clip if strength_clip for key in clip.add_patches(part, strength_clip)]
        report = replace(report, on_clip=len({place_of(key) for key in found}))
    if not taken and not report.on_clip and (strength or strength_clip):
        raise AdapterError(report.line)
    return report


def layer_names(model: Any, modules: Collection[str]) -> dict[str, Any]:
    """The host's names for the layers of a MODEL, and ours for those of a file's `modules` that it has none for."""
    theirs = comfy.lora.model_lora_keys_unet(model.model, {})
    unknown = [module for module in modules if module not in theirs]
    ours = module_names(_weight_shapes(model)) if unknown else {}
    # the host tries every name that it is given on every kind of adapter, so it gets no others
    return theirs | {module: _host_key(ours[module]) for module in unknown if module in ours}


def _host_key(target: Target) -> Any:
    """A target as it stands in the host's maps: a parameter, or ``(parameter, part[, function])``."""
    key, region, function = target
    if function is not None:
        return key, region, function
    return key if region is None else (key, tuple(region))


def _weight_shapes(model: Any) -> dict[str, Sequence[int]]:
    """Shapes of weights by layer; a Graft model's state dict would show those of packed bytes."""
    if isinstance(model, GraftPatcher):
        return {path: layer.logical_shape for path, layer in model.graft.layers.items()}
    weights = {key.removesuffix(".weight"): w for key, w in model.model.state_dict().items() if key.endswith(".weight")}
    return {path: weight.shape for path, weight in weights.items() if weight.dim() > 1}


_WHOLE = {".diff", ".set_weight"}
_BESIDE_WHOLE = _WHOLE | {".diff_b", ".diff_m", ".alpha"}


def _load(state: dict[str, Any], names: dict[str, Any]) -> list[dict[Any, Any]]:
    """What the host's loader finds in a file, as patches to put on one after another, and what it would lose.

    It keeps one patch for a parameter, so that a difference would take the place of factors; and the bias of a part of
    a layer gets a key of no parameter.
    """
    again, biases, on_parts = set(), set(), {}
    for module, fields in modules_of(state).items():
        if fields.keys() - _BESIDE_WHOLE:
            again |= {fields[field] for field in _WHOLE & fields.keys()}
        target = names.get(module)
        if ".diff_b" in fields and isinstance(target, tuple):
            biases.add(fields[".diff_b"])
            key = (target[0].removesuffix("weight") + "bias", *target[1:])
            on_parts[key] = ("diff", (state[fields[".diff_b"]],))
    passes = ({k: state[k] for k in state if k in part} for part in (state.keys() - again - biases, again))
    found = [comfy.lora.load_lora(part, names, log_missing=False) for part in passes]
    return [patches for patches in (*found, on_parts) if patches]


def _add(model: Any, passes: Sequence[dict[Any, Any]], strength: float) -> tuple[list, dict[str, str]]:
    """The keys that `model` takes, and why it rejects others of these."""
    if not isinstance(model, GraftPatcher):
        return [key for patches in passes for key in model.add_patches(patches, strength)], {}
    before, model.rejected = model.rejected, {}
    taken = [key for patches in passes for key in model.add_patches(patches, strength)]
    rejected, model.rejected = model.rejected, before | model.rejected
    return taken, rejected


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
    counts: dict[str, float] = {}
    for tags in frequencies.values() if isinstance(frequencies, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, (int, float)):
                counts[tag.strip()] = counts.get(tag.strip(), 0) + count
    return sorted(counts, key=lambda tag: -counts[tag])[:3]


class Row(NamedTuple):
    """A LoRA to apply: the file, its strengths, and where it is written, for messages."""

    name: str
    strength: float
    strength_clip: float
    place: str

    @property
    def incoming(self) -> bool:
        return self.place == STACK_INPUT


class _Stacked:
    """A MODEL or CLIP with the rows that LoRA Stacks have put on it, which its clones carry along."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._cloned = False
        self._left = Counter(rows_on(value))  # those of an incoming stack are found here once each

    def has(self, row: Row) -> bool:
        """Whether the row is on it already; asked again, whether it is twice."""
        key = (row.name, row.strength)
        self._left[key] -= 1
        return self._left[key] >= 0

    def changed(self, row: Row, strength: float) -> Any:
        """It, a clone by now if `strength` is to change it, with the row noted."""
        if strength and not self._cloned:
            self.value, self._cloned = self.value.clone(), True
        if strength:
            patcher = getattr(self.value, "patcher", self.value)
            patcher.set_attachments(ATTACHED, (*rows_on(self.value), (row.name, row.strength)))
        return self.value


def rows_on(target: Any) -> tuple[tuple[str, float], ...]:
    """The files and strengths that LoRA Stacks have put on a MODEL or CLIP; none on None."""
    return getattr(getattr(target, "patcher", target), "attachments", {}).get(ATTACHED, ())


class GraftLoraStack:
    """LoRA Stack (Graft)."""

    DESCRIPTION = (
        "Up to eight LoRAs in one node, each with its own switch and strength. On a Graft model they run beside the "
        "quantized weights; a new strength reloads nothing."
    )
    SEARCH_ALIASES = ["lora loader", "lora stack", "multi lora", "power lora", "gguf lora"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MODEL", "LORA_STACK", "STRING", "STRING", "CLIP")
    RETURN_NAMES = ("MODEL", "LORA_STACK", "report", "trigger_words", "CLIP")
    OUTPUT_TOOLTIPS = (
        "The model with these LoRAs.",
        "All rows as (file, model strength, clip strength). They are on MODEL already: connect this to other packs' "
        "stackers, or to a LoRA Stack of another model.",
        "For each file how many layers it reaches and why not more, and which way they take.",
        "The trigger words that the files name, separated by commas.",
        "The CLIP that came in, with the text encoder layers of these LoRAs.",
    )
    FUNCTION = "apply"
    HAS_INTERMEDIATE_OUTPUT = True

    def __init__(self) -> None:
        self._files = LoraFiles()

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        files = [NONE, *lora_files()]
        optional: dict[str, tuple] = {
            STACK_INPUT: (
                "LORA_STACK",
                {"tooltip": "Rows of another stacker, put on the model before these; not those that it has already."},
            ),
        }
        for row in range(1, ROWS + 1):
            optional[f"enabled_{row}"] = ("BOOLEAN", {"default": True, "tooltip": f"Switches row {row} on and off."})
            optional[f"lora_{row}"] = (files, {"default": NONE, "tooltip": f"LoRA file of row {row}."})
            optional[f"strength_{row}"] = (
                "FLOAT",
                {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.05, "tooltip": f"Strength of row {row}."},
            )
        # last, since workflows keep the order
        optional["clip"] = ("CLIP", {"tooltip": "For LoRAs that were trained with the text encoder; may stay empty."})
        return {
            "required": {"model": ("MODEL", {"tooltip": "A Graft model, or any other."})},
            "optional": optional,
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> Any:
        return [node.file_state(lora_path(row.name)) for row in _own_rows(inputs)]

    @classmethod
    def VALIDATE_INPUTS(cls, **_: Any) -> bool:
        """All that the host would check; a missing file `apply` names once, the host would for every input."""
        return True

    def apply(self, model: Any, clip: Any = None, **inputs: Any) -> dict:
        rows = [*_stacked_rows(inputs), *_own_rows(inputs)]
        paths = _paths(rows)
        reports: list[str] = []
        words: list[str] = []
        on_model, on_clip = _Stacked(model), _Stacked(clip)
        norm = "merged" if isinstance(model, GraftPatcher) else "comfy"
        for row in rows:
            # what came with the stack may be there already, since both outputs of a LoRA Stack carry its rows
            strength = 0.0 if row.incoming and on_model.has(row) else row.strength
            strength_clip = 0.0 if clip is None or (row.incoming and on_clip.has(row)) else row.strength_clip
            file = self._files.open(paths[row.name], norm)
            words += trigger_words(file.metadata)
            if strength or strength_clip:
                targets = on_model.changed(row, strength), on_clip.changed(row, strength_clip)
                reports.append(apply_lora(targets[0], file, row.name, strength, targets[1], strength_clip).text)
            elif row.strength:
                reports.append(f"{row.name} ×{row.strength:.2f}: on this model already, not put on it again")
        self._files.keep(set(paths.values()))
        text = "\n".join(reports) or "no LoRA is switched on"
        log.info("%s", text)
        stack = [(row.name, row.strength, row.strength_clip) for row in rows]
        return node.result((on_model.value, stack, text, ", ".join(dict.fromkeys(words)), on_clip.value), text)


def lora_files() -> list[str]:
    """What the rows list."""
    return node.files("loras", DEMO_LORAS)


def lora_path(name: str) -> str | None:
    """Where a listed file lies, or None if it is gone."""
    return node.file_path(name, "loras", DEMO_LORAS)


def _stacked_rows(inputs: dict[str, Any]) -> list[Row]:
    """What came in; some packs leave the clip strength out, others keep empty rows."""
    rows = [(*row, row[1])[:3] for row in inputs.get(STACK_INPUT) or () if row[0] and row[0] != NONE]
    return [Row(name, float(strength), float(strength_clip), STACK_INPUT) for name, strength, strength_clip in rows]


def _own_rows(inputs: dict[str, Any]) -> list[Row]:
    """The rows that are switched on; until the node runs, what comes through a link is None."""
    rows = []
    for number in range(1, ROWS + 1):
        name = inputs.get(f"lora_{number}")
        if name and name != NONE and inputs.get(f"enabled_{number}", True):
            strength = float(inputs.get(f"strength_{number}", 1.0) or 0.0)
            rows.append(Row(name, strength, strength, f"row {number}"))
    return rows


def _paths(rows: Sequence[Row]) -> dict[str, str]:
    """Where the rows' files lie; AdapterError that names all which are missing."""
    paths = {row.name: lora_path(row.name) for row in rows}
    missing = dict.fromkeys(f"{row.name} ({row.place})" for row in rows if paths[row.name] is None)
    if missing:
        raise AdapterError(
            f"not in models/loras: {', '.join(missing)}: put the file there, choose another one, or switch its row off"
        )
    return {name: path for name, path in paths.items() if path is not None}
