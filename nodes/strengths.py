"""LoRAs by region, by step, by prompt and by block: nodes that say where and when one works."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from ..kernels import AdapterError
from ..ops.regions import SPLITS, regions
from ..ops.strengths import APPLIES_TO, ELSEWHERE, PRESETS, Blocks, Curve, Strength
from . import node
from .lora import HOME, WHEN, LoraFiles, apply_lora, lora_file, lora_files
from .patcher import GraftPatcher

log = logging.getLogger(__name__)

COURSES = ("constant", "fade in", "fade out", "rise and fall")
EVERYTHING = "all of the model"
REGIONS = 4


def strength_of(
    mask: torch.Tensor | None = None, start: float = 0.0, end: float = 1.0, course: str = COURSES[0],
    keyframes: str = "", applies_to: str = "all", blocks: str = "", outside: str = "off", only: str = EVERYTHING,
    **_: Any,
) -> Strength:  # fmt: skip
    """What the inputs of the nodes say.

    Raises:
        AdapterError: a text of theirs cannot be read.
    """
    curve = _keyframes(keyframes) or _course(course, start, end)
    rules = blocks if only == EVERYTHING else f"{blocks}, {only}"
    return Strength(curve, _as_mask(mask), applies_to, Blocks.parse(rules), outside)


def _course(course: str, start: float, end: float) -> Curve | None:
    if end <= start:
        raise AdapterError(f"set end higher than start: end is {end:g}, start is {start:g}")
    if course == COURSES[0]:
        return Curve.between(start, end)
    low, high, middle = (start, 0.0, "linear"), (end, 0.0, "hold"), (start + end) / 2
    if course == "fade in":
        keys = (low, (end, 1.0, "hold"), *(((end, 0.0, "hold"),) if end < 1.0 else ()))
    elif course == "fade out":
        keys = (*(((0.0, 0.0, "hold"),) if start > 0.0 else ()), (start, 1.0, "linear"), high)
    else:
        keys = (low, (middle, 1.0, "linear"), high)
    return Curve(keys)


def _keyframes(text: str) -> Curve | None:
    """From ``0 = 1, 0.5 = 0.2``: the share of the steps, and the strength from there on, evenly to the next."""
    keys = []
    for part in filter(None, (part.strip() for part in text.replace("\n", ",").replace(";", ",").split(","))):
        at, _, value = part.partition("=")
        try:
            key = (float(at), float(value), "linear")
        except ValueError:
            key = (math.nan, math.nan, "linear")
        if not all(map(math.isfinite, key[:2])):
            raise AdapterError(
                f"a keyframe cannot be read ({part[:60]}): write it like 0.5 = 0.2, the share of the steps and the "
                "strength from there on"
            )
        if not 0 <= key[0] <= 1:
            raise AdapterError(
                f"a keyframe is at {key[0]:g} ({part[:60]}): count in shares of all steps, from 0 to 1"
            )
        keys.append(key)
    return Curve(tuple(keys)) if keys else None


def _as_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A host's MASK ``[H, W]`` or ``[n, H, W]`` as fp32 ``[n, H, W]``, of values from 0 to 1."""
    if mask is None:
        return None
    return (mask if mask.dim() == 3 else mask.reshape(-1, *mask.shape[-2:])).float().clamp(0, 1)


def _share(default: float, tooltip: str, most: float = 1.0) -> tuple:
    return ("FLOAT", {"default": default, "min": 0.0, "max": most, "step": 0.01, "tooltip": tooltip})


WHERE_AND_WHEN = {
    "mask": ("MASK", {"tooltip": "Where in the picture the LoRA works: all of it on white, none on black. Any size."}),
    "start": _share(0.0, "The LoRA starts at this share of the steps: 0 is the first step."),
    "end": _share(1.0, "The LoRA ends at this share of the steps: 1 is the last step."),
    "course": (list(COURSES), {"default": COURSES[0], "tooltip": "How the strength goes from start to end."}),
    "keyframes": (
        "STRING",
        {
            "default": "",
            "tooltip": "Your own course. 0 = 1, 0.5 = 0.2 goes from full strength at the first step to a fifth at half "
            "of the steps. Leave it empty to use start, end and course.",
        },
    ),
    "applies_to": (list(APPLIES_TO), {"default": "all", "tooltip": "All prompts, or the positive or negative one."}),
    "blocks": (
        "STRING",
        {
            "default": "",
            "tooltip": "Weights for parts of the model, such as: double 0-9 = 0.5, single = 0, * = 1. The first rule "
            "that fits a layer counts.",
        },
    ),
    "outside": (
        list(ELSEWHERE),
        {
            "default": "off",
            "tooltip": "With a mask: how strong the LoRA is on what is not in the picture, such as the words of the "
            "prompt. off keeps regions apart best.",
        },
    ),
    "only": (
        [EVERYTHING, *PRESETS],
        {
            "default": EVERYTHING,
            "tooltip": "Use the LoRA in one part of the model only. content and style are for SDXL; in, middle and out "
            "for SD1.5 and SDXL; double and single for Flux and its like. Rules in blocks come first.",
        },
    ),
}
"""The inputs that say where and when."""


class GraftStrength:
    """LoRA Where and When (Graft)."""

    DESCRIPTION = (
        "Says where in the picture, in which steps, for which prompt and in which blocks a LoRA works. For a row of "
        "LoRA Stack (Graft): choose Link where and when in the row's menu, and connect this node to the new input."
    )
    SEARCH_ALIASES = ["lora schedule", "lora mask", "regional lora", "lora block weight"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = (WHEN,)
    RETURN_NAMES = ("when",)
    OUTPUT_TOOLTIPS = ("For one or more rows of LoRA Stack (Graft).",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}, "optional": dict(WHERE_AND_WHEN)}

    def make(self, **inputs: Any) -> tuple[Strength]:
        return (strength_of(**inputs),)


class GraftLora:
    """Load LoRA by Region and Step (Graft)."""

    DESCRIPTION = (
        "Puts one LoRA on a part of the picture, on some of the steps, on one prompt or on some blocks. Chain this "
        "node for more LoRAs. Regions may overlap, and all of them run in one pass."
    )
    SEARCH_ALIASES = ["lora mask", "regional lora", "lora schedule", "lora block weight", "lora region"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("MODEL", "report")
    OUTPUT_TOOLTIPS = ("The model with this LoRA.", "How many layers the LoRA changes, and why not more.")
    FUNCTION = "apply"
    HAS_INTERMEDIATE_OUTPUT = True

    def __init__(self) -> None:
        self._files = LoraFiles()

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A model from the Graft loader."}),
                "lora_name": (lora_files(), {"tooltip": "A LoRA file in models/loras."}),
                "strength": (
                    "FLOAT",
                    {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.05, "tooltip": "Strength where it works."},
                ),
            },
            "optional": dict(WHERE_AND_WHEN),
        }

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None, **_: Any) -> Any:
        return node.UNKNOWN if lora_name is None else node.file_state(lora_file(lora_name).path)

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None = None) -> bool | str:
        return lora_name is None or lora_file(lora_name).valid(HOME)

    def apply(self, model: Any, lora_name: str, strength: float, **inputs: Any) -> dict:
        found = lora_file(lora_name)
        path = found.present(HOME, AdapterError)
        file = self._files.open(path, "merged" if isinstance(model, GraftPatcher) else "comfy")
        self._files.keep({path})
        clone = model.clone()
        text = apply_lora(clone, file, lora_name, strength, when=strength_of(**inputs)).text
        log.info("%s", text)
        return node.result((clone, text), text, found.note)


class GraftRegions:
    """Split into Regions (Graft)."""

    DESCRIPTION = "Makes masks of the parts of a picture, for LoRAs by region. They fit a picture of any size."
    SEARCH_ALIASES = ["regions", "split mask", "left right mask", "rectangle mask"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MASK",) * REGIONS
    RETURN_NAMES = tuple(f"region_{number}" for number in range(1, REGIONS + 1))
    OUTPUT_TOOLTIPS = (
        "Regions go from left to right, from top to bottom. With a rectangle, region_1 is it and region_2 the rest.",
    ) * REGIONS
    FUNCTION = "split"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "split": (list(SPLITS), {"tooltip": "How the picture is divided."}),
                "feather": _share(0.0, "How wide regions blend into each other, as a share of the picture.", 0.5),
            },
            "optional": {
                "left": _share(0.0, "Left side of the rectangle, as a share of the width."),
                "top": _share(0.0, "Top of the rectangle, as a share of the height."),
                "right": _share(0.5, "Right side of the rectangle, as a share of the width."),
                "bottom": _share(1.0, "Bottom of the rectangle, as a share of the height."),
            },
        }

    def split(
        self, split: str, feather: float, left: float = 0.0, top: float = 0.0, right: float = 0.5, bottom: float = 1.0
    ) -> tuple:
        masks = [mask.unsqueeze(0) for mask in regions(split, feather, (left, top, right, bottom))]
        return tuple(masks + [torch.zeros_like(masks[0])] * (REGIONS - len(masks)))
