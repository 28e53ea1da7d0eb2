"""Pictures of a model: bars of types by groups of layers, of effects by block, regions and courses of strengths."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..ops.overview import OUTSIDE, Effects, Group, percent
from ..ops.report import size_text
from ..ops.strengths import Call, Strength

TILE = 128
"""Pixels of a side of a region."""
LINE, GAP = 26, 8
DARK, BACK, FILL, EDGE, AXIS = "#1c1f26", "#0c0e12", "#7a4a28", "#ff9f5a", "#9aa0aa"
STEPS = 20
"""That a course is drawn over, where it counts steps."""

WIDTH, LABEL, BAR, PLOT = 860, 250, 20, 90
"""Pixels: of a chart, of the names in it, of the height of a bar, and of that of a plot of blocks."""
MOST = 24
"""Groups of layers that are drawn; smaller ones are one bar."""
COLOURS = (
    "#ff9f5a", "#5ab0ff", "#7ddc7d", "#d98cff", "#ffd75a", "#5adcd0", "#ff7a90", "#a8b0c0", "#b0e05a", "#8c8cff",
)  # fmt: skip


def as_image(picture: Image.Image) -> torch.Tensor:
    """``[1, rows, columns, 3]``, 0 to 1, as IMAGE has it."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).float().div(255)


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """One below the other."""
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), DARK)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def types_chart(groups: Mapping[str, Group]) -> Image.Image:
    """A bar for each group of layers, as long as the memory that it takes, in a colour for each type."""
    shown = _largest(groups)
    totals = sum((group.nbytes for group in groups.values()), start=Group().nbytes)
    colours = {name: COLOURS[index % len(COLOURS)] for index, (name, _) in enumerate(totals.most_common())}
    chart = Image.new("RGB", (WIDTH, LINE * (len(shown) + 2) + GAP), DARK)
    draw = ImageDraw.Draw(chart)
    _title("Types by group of layers", draw)
    left = LABEL
    for name, nbytes in totals.most_common():
        draw.rectangle((left, LINE + 6, left + 12, LINE + 18), colours[name])
        text = f"{name}, {size_text(nbytes)}"
        draw.text((left + 18, LINE + 12), text, AXIS, font(), anchor="lm")
        left += 40 + int(draw.textlength(text, font()))
    longest = max((group.size for group in shown.values()), default=1)
    room = WIDTH - LABEL - 90
    for index, (name, group) in enumerate(shown.items(), 2):
        middle = LINE * index + LINE // 2
        _label(name, middle, draw)
        left = float(LABEL)
        for fmt, nbytes in group.nbytes.most_common():
            right = left + room * nbytes / longest
            draw.rectangle((left, middle - BAR / 2, max(left, right - 1), middle + BAR / 2), colours[fmt])
            left = right
        draw.text((left + GAP, middle), size_text(group.size), AXIS, font(), anchor="lm")
    return chart


def _largest(groups: Mapping[str, Group]) -> dict[str, Group]:
    """In the model's order; those that are left are summed up in one."""
    order = sorted(groups, key=lambda name: -groups[name].size)
    kept, left = set(order[:MOST]), order[MOST:]
    shown = {name: group for name, group in groups.items() if name in kept}
    if left:
        others = shown[f"{len(left)} smaller groups"] = Group()
        for name in left:
            others.nbytes += groups[name].nbytes
    return shown


def effects_chart(effects: Mapping[str, Effects]) -> Image.Image:
    """A plot for each LoRA: a bar for each block, as high as the share by which its weights change."""
    rows = [_effect_row(what, found) for what, found in effects.items() if found]
    title = Image.new("RGB", (WIDTH, LINE), DARK)
    _title("Change of the weights by block", ImageDraw.Draw(title))
    return stacked([title, *rows])


def _effect_row(what: str, found: Effects) -> Image.Image:
    row = Image.new("RGB", (WIDTH, PLOT + 2 * LINE), DARK)
    draw = ImageDraw.Draw(row)
    draw.text((GAP, LINE / 2), fitting(what, WIDTH - 2 * GAP, draw), "white", font(), anchor="lm")
    draw.rectangle((GAP, LINE, WIDTH - GAP, LINE + PLOT), BACK)
    highest = max(found.values())
    families = list(_by_family(found))
    slots = sum(len(shares) for _, shares in families) + len(families) - 1
    width = (WIDTH - 4 * GAP) / max(slots, 1)
    left, bottom = 2.0 * GAP, LINE + PLOT
    for name, shares in families:
        start = left
        for share in shares:
            height = (PLOT - 24) * share / highest
            draw.rectangle((left, bottom - height, left + max(1.0, min(width, 40.0) - 2), bottom), EDGE)
            left += min(width, 40.0)
        text = "others" if name == OUTSIDE else f"{name} 0-{len(shares) - 1}"
        start = min(start, WIDTH - GAP - draw.textlength(text, font()))
        draw.text((start, bottom + LINE / 2), text, AXIS, font(), anchor="lm")
        left = max(left, start + draw.textlength(text, font()) + GAP) + GAP
    draw.text((WIDTH - 2 * GAP, LINE + 12), f"highest: {percent(highest)}", AXIS, font(), anchor="rm")
    return row


def _by_family(found: Effects) -> Iterator[tuple[str, list[float]]]:
    """Families of blocks in their order, with a share for each block, 0 where nothing changes."""
    for family in sorted(dict.fromkeys(family for family, _ in found), key=lambda name: name == OUTSIDE):
        shares = {number or 0: share for (name, number), share in found.items() if name == family}
        yield family, [shares.get(number, 0.0) for number in range(max(shares) + 1)]


def _title(text: str, draw: ImageDraw.ImageDraw) -> None:
    draw.text((GAP, LINE / 2), text, "white", font(), anchor="lm")


def _label(text: str, middle: int, draw: ImageDraw.ImageDraw) -> None:
    draw.text((LABEL - GAP, middle), fitting(text, LABEL - 2 * GAP, draw), "white", font(), anchor="rm")


def fitting(text: str, width: int, draw: ImageDraw.ImageDraw) -> str:
    """Its end, which tells files apart better than their folders."""
    text = text.replace("×", "x")  # which the font has not
    while len(text) > 4 and draw.textlength(text, font()) > width:
        text = f"...{text[4:]}"
    return text


@functools.cache
def font() -> Any:
    try:
        return ImageFont.load_default(14)
    except TypeError:  # an older Pillow has one size
        return ImageFont.load_default()


def region_row(name: str, when: Strength) -> Image.Image:
    """``LINE`` pixels of text above a region of ``TILE`` squared, and a course three times as wide."""
    row = Image.new("RGB", (4 * TILE + 3 * GAP, TILE + LINE + GAP), DARK)
    draw = ImageDraw.Draw(row)
    draw.text((GAP, LINE / 2), fitting(name, row.width - 2 * GAP, draw), "white", font(), anchor="lm")
    row.paste(_region(when), (GAP, LINE))
    row.paste(_course(when), (TILE + 2 * GAP, LINE))
    return row


def _region(when: Strength) -> Image.Image:
    """Of a video its first frame's."""
    mask = torch.ones(1, 1, 1) if when.mask is None else when.mask[:1]
    grey = F.interpolate(mask[None].float().cpu(), (TILE, TILE), mode="area")[0, 0]
    return Image.frombytes("L", (TILE, TILE), bytes((grey * 255).to(torch.uint8).flatten().tolist())).convert("RGB")


def _course(when: Strength) -> Image.Image:
    width = 3 * TILE
    shares = [x / width for x in range(width)]
    values = [1.0 if when.curve is None else when.curve(Call(s, s * STEPS, 1 - s)) for s in shares]
    low, high = min(0.0, *values), max(0.0, *values) or 1.0

    def height(value: float) -> float:
        return TILE - 8 - (value - low) / (high - low) * (TILE - 28)

    plot = Image.new("RGB", (width, TILE), BACK)
    draw = ImageDraw.Draw(plot)
    for x, value in enumerate(values):
        draw.line((x, height(0.0), x, height(value)), FILL)
        draw.line((x, height(values[max(0, x - 1)]), x, height(value)), EDGE, width=2)
    draw.line((0, height(0.0), width, height(0.0)), AXIS)
    draw.text((6, 10), f"{high:.2g}", "white", font(), anchor="lm")
    draw.text((width - 6, 10), "first step to last", AXIS, font(), anchor="rm")
    return plot
