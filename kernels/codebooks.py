"""The code books of the i-quants and of the 4-bit float types.

An i-quant stores, instead of weights, the number of an entry in a fixed code book; IQ2 and IQ3 store the
magnitudes that way and the signs apart. The books are part of the format (`ggml-common.h` of ggml: `iq1s_grid`,
`iq2xxs_grid`, ..., `kvalues_iq4nl`, `kvalues_mxfp4`). `codebooks.bin` holds the grids one after another in the
order of `GRIDS`, every magnitude as its number among the book's levels, in 2 or 4 bits, lowest bits first.
It is read when a book is first asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from .errors import CorruptFile

DATA = Path(__file__).with_name("codebooks.bin")


@dataclass(frozen=True, slots=True)
class Grid:
    """A code book in `codebooks.bin`: `entries` vectors of `width` levels."""

    entries: int
    width: int
    levels: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits that the number of a level takes in the file."""
        return 2 if len(self.levels) <= 4 else 4

    @property
    def nbytes(self) -> int:
        return self.entries * self.width * self.bits // 8


_IQ2_LEVELS = (8, 25, 43)

GRIDS: dict[str, Grid] = {
    "iq1s": Grid(2048, 8, (-1, 0, 1)),
    "iq2xxs": Grid(256, 8, _IQ2_LEVELS),
    "iq2xs": Grid(512, 8, _IQ2_LEVELS),
    "iq2s": Grid(1024, 8, _IQ2_LEVELS),
    "iq3xxs": Grid(256, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    "iq3s": Grid(512, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
}

# MXFP4 and NVFP4 share the sixteen E2M1 values of the OCP MX specification, doubled to be integers
KVALUES: dict[str, tuple[int, ...]] = {
    "iq4nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "mxfp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}

NAMES: tuple[str, ...] = (*GRIDS, *KVALUES)


@cache
def _file() -> dict[str, bytes]:
    """The packed bytes of every grid."""
    data = DATA.read_bytes()
    if len(data) != sum(grid.nbytes for grid in GRIDS.values()):
        raise CorruptFile(f"the code books are damaged ({len(data)} bytes): install Graft again ({DATA})")
    parts, start = {}, 0
    for name, grid in GRIDS.items():
        parts[name] = data[start : start + grid.nbytes]
        start += grid.nbytes
    return parts


@cache
def _entries(name: str) -> torch.Tensor:
    """A book on the CPU: int8 [entries, width]; a row of kvalues has one entry."""
    # the device is named everywhere: a host may have set another default while it builds a model
    if name in KVALUES:
        return torch.tensor(KVALUES[name], dtype=torch.int8, device="cpu").unsqueeze(1)
    grid = GRIDS[name]
    packed = torch.frombuffer(bytearray(_file()[name]), dtype=torch.uint8)
    numbers = torch.stack([packed >> shift & (1 << grid.bits) - 1 for shift in range(0, 8, grid.bits)], dim=1)
    levels = torch.tensor(grid.levels, dtype=torch.int8, device="cpu")
    return levels[numbers.flatten().long()].view(grid.entries, grid.width)


@cache
def table(name: str, device: torch.device) -> torch.Tensor:
    """A book as 32-bit words for a kernel to load: int32, one-dimensional, cached per device.

    A grid entry lies as ggml stores it, one signed byte a weight, the first weight in the lowest byte: two words
    an entry for `iq1s`, `iq2xxs`, `iq2xs` and `iq2s`, one for `iq3xxs` and `iq3s`. `iq4nl` and `mxfp4` are one
    value a word, the latter doubled. KeyError for a name not in `NAMES`.
    """
    entries = _entries(name)
    words = entries.int() if name in KVALUES else entries.view(torch.int32)
    return words.flatten().to(device)


@cache
def values(name: str, device: torch.device) -> torch.Tensor:
    """A book as numbers: fp32 [entries, width], cached per device; width 1 for `iq4nl` and `mxfp4` (doubled)."""
    return _entries(name).to(torch.float32).to(device)


@cache
def signs(bits: Literal[7, 8], device: torch.device) -> torch.Tensor:
    """The factors +1 and -1 of eight weights: fp32 [2**bits, 8], cached per device.

    Bit i of the number set means that weight i is negative. IQ2_XXS, IQ2_XS and IQ3_XXS spend 7 bits on 8 signs:
    the number of negative weights is even, so the eighth sign is the parity of the seven (`ksigns_iq2xs` of ggml).
    """
    number = torch.arange(2**bits, device="cpu").unsqueeze(1)
    negative = number >> torch.arange(8, device="cpu") & 1
    if bits == 7:
        negative[:, 7] = negative.sum(1) & 1
    return (1 - 2 * negative).to(torch.float32).to(device)
