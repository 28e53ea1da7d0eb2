"""LoRAs on a model: rows of toggle, file and strength."""

from __future__ import annotations

import json
import logging
import math
from collections import ChainMap, Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert

from ..kernels import AdapterError
from ..ops.files.lora import AdapterFile, load_adapters
from ..ops.files.lora_info import trigger_words
from ..ops.report import FileReport, place_of, way_of
from ..ops.strengths import Number, Strength
from . import node
from .lora_names import LoadedFile
from .model_files import OFFERED, Found, find, listed
from .patcher import GraftPatcher

log = logging.getLogger(__name__)

ROWS = 8
"""That have widgets of their own; any number of others are in one text."""
NONE = "None"
HOME = "the loras folder"
"""In messages, without a slash: newer front ends show it as its code where a node is refused before it runs."""
READABLE = (".safetensors", ".sft", ".gguf")
STACK_INPUT = "lora_stack"
MORE_ROWS, IF_MISSING = "more_rows", "if_missing"
ERROR, SKIP = "error", "skip"
WHEN = "GRAFT_STRENGTH"
"""A strength that depends on the call, on a link."""
ATTACHED = "graft_lora_stack"
"""Under which a MODEL or CLIP carries what was put on it."""

VARYING = "graft_varying_loras"
"""Under which a MODEL carries the names of the LoRAs whose strengths depend on the call."""

DEMO_LORAS = "graft_demo_loras"
"""A key of our own for the demo's files, so that they don't stand among people's own in other nodes."""


GGUF_LORAS = "graft_lora_gguf"
"""A key of our own for GGUF files in the folders of LoRAs, which hosts list no such files from."""


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
    model: Any, file: AdapterFile, name: str, strength: float, clip: Any = None, strength_clip: float = 0.0,
    when: Strength | None = None,
) -> FileReport:  # fmt: skip
    """Add a file's adapters to `model` and `clip` (clones already) through the host's converters, key maps and loader.

    Args:
        when: where and when they work on the model; None is everywhere and always.

    Raises:
        AdapterError: nothing in the file fits either, or the model has no such strengths.
    """
    state = comfy.lora_convert.convert_lora(dict(file.state))
    loaded = LoadedFile(model.model, state, comfy.lora.model_lora_keys_unet(model.model, {}))
    taken, rejected = _add(model, loaded.patches, strength, when, name) if strength else ([], {})
    if when is not None and taken:
        model.set_attachments(VARYING, (*varying_on(model), (when, f"{name} at {strength:g}")))
    kind = type(model.model.model_config).__name__
    found = dict(ChainMap(*loaded.patches))
    report = FileReport.of(name, strength, state, found, taken, rejected | loaded.rejected, kind, loaded.placed)
    report = replace(report, dialect=file.dialect, ways=_ways(model, taken), notes=_unused(model, when))
    if clip is not None:
        for_clip = LoadedFile(None, state, comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
        on_clip = [key for part in for_clip.patches if strength_clip for key in clip.add_patches(part, strength_clip)]
        left_out = {**report.rejected, **for_clip.rejected}
        report = replace(report, on_clip=len({place_of(key) for key in on_clip}), rejected=left_out)
    if not taken and not report.on_clip and (strength or strength_clip):
        raise AdapterError(report.line)
    return report


def _add(
    model: Any, passes: Sequence[dict[Any, Any]], strength: float, when: Strength | None, name: str
) -> tuple[list, dict[str, str]]:
    """The keys that `model` takes, and why it rejects others of these."""
    if not isinstance(model, GraftPatcher):
        if when is not None:
            raise AdapterError(
                "LoRAs by region and step need a model from Load Diffusion Model (GGUF, Graft): load it with that node"
            )
        return [key for patches in passes for key in model.add_patches(patches, strength)], {}
    before, model.rejected = model.rejected, {}
    taken = [key for patches in passes for key in model.add_patches(patches, strength, when=when, source=name)]
    rejected, model.rejected = model.rejected, before | model.rejected
    return taken, rejected


def _unused(model: Any, when: Strength | None) -> tuple[str, ...]:
    """Of weights of blocks, what fits nothing in this model."""
    if when is None or when.blocks is None:
        return ()
    return tuple(f"no block of this model is called {rule}" for rule in when.blocks.unused(model.graft.layers))


def _ways(model: Any, taken: Collection[Any]) -> dict[str, int]:
    """How many of the layers that took a patch take which way, so far; the host merges into all others."""
    if not isinstance(model, GraftPatcher):
        return {}
    planned = model.residuals.planned(model.graft.layers)
    found = (planned.get(place[0]) for place in {place_of(key) for key in taken})
    return Counter("patched by ComfyUI" if r is None else way_of(r.path, r.reason) for r in found)


class Row(NamedTuple):
    """A LoRA to apply: the file, its strengths, and where it is written, for messages."""

    name: str
    strength: float
    strength_clip: float
    place: str
    when: Strength | None = None

    @property
    def incoming(self) -> bool:
        return self.place == STACK_INPUT

    def sent(self) -> tuple[str, float, float]:
        """As it stands in a LORA_STACK: ``(file, model strength, clip strength)``, as all packs know it."""
        return self.name, Number(self.strength, self.when), self.strength_clip


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


def varying_on(model: Any) -> tuple[tuple[Strength, str], ...]:
    """Of the LoRAs on a MODEL whose strengths depend on the call: these, and their names."""
    return getattr(model, "attachments", {}).get(VARYING, ())


class GraftLoraStack:
    """LoRA Stack (Graft)."""

    DESCRIPTION = (
        "Any number of LoRAs in one node, each with its own switch and strength. On a Graft model they run next to the "
        "quantized weights. You can change a strength and nothing is loaded again."
    )
    SEARCH_ALIASES = ["lora loader", "lora stack", "multi lora", "power lora", "gguf lora"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MODEL", "LORA_STACK", "STRING", "STRING", "CLIP")
    RETURN_NAMES = ("MODEL", "LORA_STACK", "report", "trigger_words", "CLIP")
    OUTPUT_TOOLTIPS = (
        "The model with these LoRAs.",
        "All rows as (file, model strength, clip strength). They are on MODEL already: connect this to other packs' "
        "stackers, or to a LoRA Stack of another model.",
        "For each file: how many layers it changes, why not more, and how they are computed.",
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
                {"tooltip": "LoRAs of another stacker. They go on the model first, and none goes on twice."},
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
        for row in range(1, ROWS + 1):
            tooltip = f"Where and when row {row} works, from LoRA Where and When (Graft). Empty: everywhere and always."
            optional[f"when_{row}"] = (WHEN, {"tooltip": tooltip})
        optional["clip_strengths"] = (
            "STRING",
            {
                "default": "",
                "tooltip": "Other strengths for CLIP than for the model, as row = strength, such as: 1 = 0.5, 3 = 0. "
                "Leave it empty to use the same ones.",
            },
        )
        optional[MORE_ROWS] = (
            "STRING",
            {
                "default": "",
                # no braces: the front end would take them for places of its translations
                "tooltip": f"Rows from the {ROWS + 1}th on, as JSON. The node writes it. The help page shows how.",
            },
        )
        optional[IF_MISSING] = (
            [ERROR, SKIP],
            {
                "default": ERROR,
                "tooltip": "What to do if a LoRA file is missing: stop with an error, or skip its row. The report says "
                "which rows were skipped.",
            },
        )
        return {
            "required": {"model": ("MODEL", {"tooltip": "A Graft model, or any other."})},
            "optional": optional,
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> Any:
        paths = [lora_file(row.name).path for row in own_rows(inputs)]
        skips = inputs.get(IF_MISSING) == SKIP
        return [node.UNKNOWN if path is None and skips else node.file_state(path) for path in paths]

    @classmethod
    def VALIDATE_INPUTS(cls, **inputs: Any) -> bool:
        """Raises what is to be said of missing files: a text the host would repeat on every input."""
        _found(own_rows(inputs), skips=inputs.get(IF_MISSING, ERROR) in (SKIP, None))  # None: it is on a link
        return True

    def apply(self, model: Any, clip: Any = None, **inputs: Any) -> dict:
        rows = [*_stacked_rows(inputs), *own_rows(inputs)]
        files, skipped = _found(rows, skips=inputs.get(IF_MISSING) == SKIP)
        rows = [row for row in rows if row.name in files]
        paths = {name: path for name, (_, path) in files.items()}
        reports = [f"{what}: skipped, the file is not here" for what in skipped]
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
                report = apply_lora(targets[0], file, row.name, strength, targets[1], strength_clip, row.when)
                reports.append(report.text + (f"\n  {row.when}" if row.when and strength else ""))
            elif row.strength:
                reports.append(f"{row.name} ×{row.strength:.2f}: on this model already, not put on it again")
            else:
                reports.append(f"{row.name} ×0.00: does nothing at strength 0")
        self._files.keep(set(paths.values()))
        text = "\n".join(reports) or "no LoRA is switched on"
        log.info("%s", text)
        stack = [row.sent() for row in rows]
        outputs = (on_model.value, stack, text, ", ".join(dict.fromkeys(words)), on_clip.value)
        return node.result(outputs, text, *(file.note for file, _ in files.values()))


def lora_files() -> list[str]:
    """What the rows list: what can be read, of what the host's own nodes do, and GGUF."""
    return [name for name in listed("loras", GGUF_LORAS, DEMO_LORAS) if name.lower().endswith(READABLE)]


def lora_file(name: str) -> Found:
    """The file that a workflow calls so."""
    return find(name, "loras", GGUF_LORAS, DEMO_LORAS, among=lora_files())


def _stacked_rows(inputs: dict[str, Any]) -> list[Row]:
    """What came in; some packs leave the clip strength out, others keep empty rows."""
    rows = [row for row in inputs.get(STACK_INPUT) or () if row[0] and row[0] != NONE]
    return [
        Row(name, float(strength), float(strength_clip), STACK_INPUT, getattr(strength, "when", None))
        for row in rows
        for name, strength, strength_clip in [(*row, row[1])[:3]]
    ]


def own_rows(inputs: Mapping[str, Any]) -> list[Row]:
    """The rows of a node itself that are switched on; until the node runs, what comes through a link is None.

    Raises:
        AdapterError: one of its texts cannot be read.
    """
    rows = []
    for_clip = _clip_strengths(inputs.get("clip_strengths") or "")
    for number in range(1, ROWS + 1):
        name = inputs.get(f"lora_{number}")
        if name and name != NONE and inputs.get(f"enabled_{number}", True):
            strength = float(inputs.get(f"strength_{number}", 1.0) or 0.0)
            when = inputs.get(f"when_{number}")
            rows.append(Row(name, strength, for_clip.get(number, strength), f"row {number}", when))
    for number, given in enumerate(_more_rows(inputs.get(MORE_ROWS) or ""), ROWS + 1):
        name, strength = given["lora"], float(given.get("strength", 1.0))
        if name and name != NONE and given.get("on", True):
            strength_clip = float(given.get("strength_clip", for_clip.get(number, strength)))
            rows.append(Row(name, strength, strength_clip, f"row {number}", inputs.get(f"when_{number}")))
    return rows


def _more_rows(text: str) -> list[dict[str, Any]]:
    """From JSON, a list of objects: ``lora``, and what is not as usual of ``on``, ``strength``, ``strength_clip``."""
    try:
        rows = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        example = '[{"lora": "style.safetensors", "strength": 0.8}]'
        raise AdapterError(f"{MORE_ROWS} cannot be read ({text[:60]}): write it as JSON, like {example}")
    return rows


def _is_row(given: Any) -> bool:
    if not isinstance(given, dict) or not isinstance(given.get("lora"), str):
        return False
    numbers = [given[key] for key in ("strength", "strength_clip") if key in given]
    return all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)


def _clip_strengths(text: str) -> dict[int, float]:
    """By row, from ``1 = 0.5, 3 = 0``; AdapterError if it cannot be read."""
    strengths = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        row, _, strength = part.partition("=")
        try:
            strengths[int(row)] = float(strength)
        except ValueError:
            raise AdapterError(
                f"a strength for CLIP cannot be read ({part[:60]}): write it like 1 = 0.5, the row and its strength"
            ) from None
    return strengths


def _found(rows: Sequence[Row], skips: bool = False) -> tuple[dict[str, tuple[Found, str]], list[str]]:
    """The rows' files and where they lie, and those that are missing, with their rows.

    Raises:
        AdapterError: files are missing, and these are not skipped; it names all.
    """
    files = {row.name: lora_file(row.name) for row in rows}
    gone = [row for row in rows if files[row.name].path is None]
    missing = list(dict.fromkeys(f"{row.name} ({row.place}{_offer(files[row.name])})" for row in gone))
    if missing and not skips:
        raise AdapterError(
            f"put {'the file' if len(missing) == 1 else 'these files'} into {HOME}, choose another one, or switch the "
            f"row off: {', '.join(missing)}"
        )
    return {name: (file, file.path) for name, file in files.items() if file.path is not None}, missing


def _offer(file: Found) -> str:
    return f", there is {' and '.join(file.others[:OFFERED])}" if file.others else ""
