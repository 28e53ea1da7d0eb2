"""A plot of losses, drawn without a library for plots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 768, 432
LEFT, TOP, RIGHT, BOTTOM = 72, 44, 20, 44
PAPER, INK, GREY, LINE, FAINT, STRONG = "#fbfaf7", "#1c1f24", "#7b8087", "#dcdad3", "#b9d3c7", "#1a7f5a"
_TICKS = 5


def loss_plot(losses: Sequence[float], title: str) -> torch.Tensor:
    """The loss of each step, pale, and its running mean: an IMAGE ``[1, HEIGHT, WIDTH, 3]`` in 0..1."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((LEFT, 16), title, INK, _font(15))
    smooth = smoothed(losses)
    # single steps may be far off: they do not set the scale
    highest = max([*smooth, sorted(losses)[int(0.98 * (len(losses) - 1))]]) if losses else 1.0
    lowest = min(losses, default=0.0)
    span = (highest - lowest) or abs(highest) or 1.0
    low, high = lowest - 0.05 * span, highest + 0.05 * span
    for tick in range(_TICKS):
        value = low + (high - low) * tick / (_TICKS - 1)
        y = _y(value, low, high)
        pen.line((LEFT, y, WIDTH - RIGHT, y), LINE)
        pen.text((LEFT - 8, y), f"{value:.3g}", GREY, _font(12), anchor="rm")
        step = round(max(1, len(losses)) * tick / (_TICKS - 1))
        x = LEFT + (WIDTH - LEFT - RIGHT) * tick / (_TICKS - 1)
        pen.text((x, HEIGHT - BOTTOM + 8), str(step), GREY, _font(12), anchor="mt")
    for values, colour, width in ((losses, FAINT, 1), (smooth, STRONG, 3)):
        points = [(_x(index, len(values)), _y(value, low, high)) for index, value in enumerate(values)]
        if len(points) > 1:
            pen.line(points, colour, width, joint="curve")
        elif points:
            pen.ellipse((points[0][0] - 3, points[0][1] - 3, points[0][0] + 3, points[0][1] + 3), colour)
    pen.text((WIDTH - RIGHT, HEIGHT - 12), "steps", GREY, _font(12), anchor="rs")
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(1, HEIGHT, WIDTH, 3).float() / 255


def smoothed(losses: Sequence[float]) -> list[float]:
    """Their running mean, over about a thirtieth of them, without the zero that such a mean begins with."""
    keep = 1 - 1 / max(1.0, len(losses) / 30)
    mean, weight, found = 0.0, 0.0, []
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        found.append(mean / weight)
    return found


def _x(index: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (index + 1) / max(1, count)


def _y(value: float, low: float, high: float) -> float:
    inside = min(max((value - low) / (high - low), 0.0), 1.0)
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * inside


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """PIL's own; before PIL 10.1 it has one size."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


__all__ = ["HEIGHT", "WIDTH", "loss_plot", "smoothed"]
