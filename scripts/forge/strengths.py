"""Where and when a LoRA of the prompt works: ``<lora:name:1:start=0:end=0.25:region=left:blocks=double=0.5>``.

Forge gives an extra network the parts between its colons, those with one ``=`` by name and all others by place. Ours
are taken out of them before Forge's own LoRA code looks; the strength then carries them to where patches are added.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch

from ...kernels import AdapterError
from ...ops.places import Architecture, patch_of, picture_of
from ...ops.regions import regions
from ...ops.strengths import Blocks, Call, Curve, Number, Strength

ARGUMENTS = ("start", "end", "region", "feather", "blocks")
REGIONS = {
    "left": ("left | right", 0), "right": ("left | right", 1),
    "top": ("top | bottom", 0), "bottom": ("top | bottom", 1),
    **{f"column-{n + 1}": ("three columns", n) for n in range(3)},
    **{f"row-{n + 1}": ("three rows", n) for n in range(3)},
    "top-left": ("four quarters", 0), "top-right": ("four quarters", 1),
    "bottom-left": ("four quarters", 2), "bottom-right": ("four quarters", 3),
}  # fmt: skip
"""Parts of a picture: name to (how it is split, which one it is)."""

_PATCHES = {"Flux": 2}  # where Forge master keeps its models' patch size to itself


class Told(Number):
    """A LoRA's strength, and where and when it works.

    Its `repr` is what Forge tells lists of LoRAs apart by, so that another region is another list.

    Attributes:
        text: as it stands in the prompt.
    """

    text: str

    def __new__(cls, value: float, when: Strength, text: str) -> Told:
        told = super().__new__(cls, value, when)
        told.text = text
        return told

    def __repr__(self) -> str:
        return f"{float(self)!r} ({self.text})"


def taken_from(params: Any) -> tuple[Any, Strength | None, str]:
    """One LoRA's arguments without ours, what ours say, and their text.

    Args:
        params: Forge's ``ExtraNetworkParams``; it is left as it is.

    Raises:
        AdapterError: one of them cannot be understood.
    """
    told: dict[str, str] = {}
    for item in params.items:
        name, equals, value = str(item).partition("=")
        if equals and name.strip().lower() in ARGUMENTS:
            told[name.strip().lower()] = value.strip()
    if not told:
        return params, None, ""
    plain = copy.copy(params)
    plain.items = [item for item in params.items if not _is_ours(item)]
    plain.positional = [item for item in params.positional if not _is_ours(item)]
    plain.named = {name: value for name, value in params.named.items() if name.strip().lower() not in ARGUMENTS}
    text = ":".join(f"{name}={value}" for name, value in sorted(told.items()))
    return plain, _strength(tuple(sorted(told.items()))), text


def _is_ours(item: Any) -> bool:
    name, equals, _ = str(item).partition("=")
    return bool(equals) and name.strip().lower() in ARGUMENTS


@functools.lru_cache(maxsize=64)
def _strength(told: tuple[tuple[str, str], ...]) -> Strength:
    """The same object for the same words: a mask is fitted to a picture's size once."""
    values = dict(told)
    start, end = (_number(values, name, default) for name, default in (("start", 0.0), ("end", 1.0)))
    if end <= start:
        raise AdapterError(f"end={end:g} is not after start={start:g}: write a larger end, 1 is the last step")
    feather = _number(values, "feather", 0.0, most=0.5)
    if "feather" in values and "region" not in values:
        raise AdapterError("feather needs a region, such as region=left")
    mask = None if "region" not in values else _mask(values["region"], feather).unsqueeze(0)
    try:
        blocks = Blocks.parse(values.get("blocks", ""))
    except AdapterError as error:
        raise AdapterError(f"blocks={values['blocks'][:60]}: {error}") from error
    return Strength(Curve.between(start, end), mask, blocks=blocks)


def _number(values: dict[str, str], name: str, default: float, most: float = 1.0) -> float:
    if name not in values:
        return default
    try:
        value = float(values[name])
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= most:
        raise AdapterError(f"{name}={values[name][:60]} is not a number from 0 to {most:g}, such as {name}=0.25")
    return value


def _mask(text: str, feather: float) -> torch.Tensor:
    """The mask of a region: a name of `REGIONS` or the sides of a rectangle, and with ``not`` in front all the rest."""
    plain = text.strip().lower()
    inside = plain.removeprefix("not ").strip()
    name = re.sub(r"[\s_]+", "-", inside)
    split, number = REGIONS.get(name, ("rectangle", 0))
    mask = regions(split, feather, (0.0, 0.0, 1.0, 1.0) if name in REGIONS else _box(inside, text))[number]
    return mask if inside == plain else 1 - mask


def _box(numbers: str, text: str) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = map(float, numbers.split(","))
    except ValueError:
        left, top, right, bottom = 0.0, 0.0, -1.0, -1.0
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise AdapterError(
            f"region={text[:60]} is unknown: write one of {', '.join(REGIONS)}, or left, top, right and bottom as "
            "shares of the picture, such as region=0,0,0.5,1"
        )
    return left, top, right, bottom


def call_of(
    model: Any, architecture: Architecture | None, step: tuple[int, int], canvas: tuple[int, ...],
    references: Sequence[torch.Tensor], x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any,
) -> Call:  # fmt: skip
    """What Forge's call of a model, ``apply_model(x, t, c_concat, c_crossattn, control, options, …)``, tells strengths.

    Args:
        model: the diffusion model.
        step: the number of the sampler's call of it, and how many there will be.
        canvas: rows and columns of the whole latent, of which extensions draw tiles; empty where nobody has told.
        references: latents that Forge has set for all calls.
    """
    options = args[3] if len(args) > 3 else kwargs.get("transformer_options") or {}
    names = tuple(("positive", "negative")[i] if i < 2 else str(i) for i in options.get("cond_or_uncond") or [0])
    number, total = step
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    behind = [*(kwargs.get("ref_latents") or references)]
    patch = patch_of(model, _PATCHES.get("" if architecture is None else architecture.name, 1))
    picture = picture_of(x, patch, behind=behind, multiple=multiple, options=options)
    if behind and multiple > 1:
        picture = None
    windows = () if canvas in ((), tuple(x.shape[-2:])) else None
    return Call(min(1.0, number / max(1, total)), number, 1.0, names, picture, architecture, windows)


__all__ = ["ARGUMENTS", "REGIONS", "Told", "call_of", "taken_from"]
