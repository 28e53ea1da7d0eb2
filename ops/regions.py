"""Masks of the parts of a picture."""

from __future__ import annotations

import itertools

import torch

from ..kernels import AdapterError

SPLITS = ("left | right", "top | bottom", "three columns", "three rows", "four quarters", "rectangle")
SIZE = 512
"""Pixels of a side of the masks that a split makes; they are fitted to any picture."""


def regions(split: str, feather: float, box: tuple[float, float, float, float]) -> list[torch.Tensor]:
    """The parts of a picture as masks ``[SIZE, SIZE]`` that add up to 1 everywhere.

    Args:
        feather: over which share of the picture they blend.
        box: left, top, right and bottom of a rectangle, as shares.

    Raises:
        AdapterError: nothing lies within the rectangle.
    """
    whole = torch.ones(SIZE)
    halves, thirds = _steps(2, feather), _steps(3, feather)
    if split == "rectangle":
        left, top, right, bottom = box
        if left >= right or top >= bottom:
            raise AdapterError(
                f"nothing lies between left {left:g} and right {right:g}, top {top:g} and bottom {bottom:g}: set right "
                "and bottom higher"
            )
        inside = torch.outer(_between(top, bottom, feather), _between(left, right, feather))
        return [inside, 1 - inside]
    if split == "four quarters":
        return [torch.outer(row, column) for row in halves for column in halves]
    parts = thirds if split.startswith("three") else halves
    across = split in ("left | right", "three columns")
    return [torch.outer(whole, part) if across else torch.outer(part, whole) for part in parts]


def _steps(count: int, feather: float) -> list[torch.Tensor]:
    """`count` parts of a line ``[SIZE]`` that add up to 1."""
    edges = [_rise(i / count, feather) for i in range(1, count)]
    bounds = [torch.ones(SIZE), *edges, torch.zeros(SIZE)]
    return [low - high for low, high in itertools.pairwise(bounds)]


def _between(low: float, high: float, feather: float) -> torch.Tensor:
    """1 from `low` to `high`; the picture's own sides do not fade."""
    start = _rise(low, feather) if low > 0 else torch.ones(SIZE)
    end = _rise(high, feather) if high < 1 else torch.zeros(SIZE)
    return (start - end).clamp(min=0)


def _rise(at: float, feather: float) -> torch.Tensor:
    """From 0 to 1 around `at`, over `feather` of the line."""
    place = (torch.arange(SIZE) + 0.5) / SIZE
    return ((place - at) / max(feather, 1e-6) + 0.5).clamp(0, 1)


__all__ = ["SIZE", "SPLITS", "regions"]
