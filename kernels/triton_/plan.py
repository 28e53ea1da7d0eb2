"""Which kernel multiplies what, and in which tiles: static tables, so that nothing is tuned at first use.

M is the number of rows of x. With one row the matvec reads 0.56 bytes a weight (Q4_K) where decoding to memory and a
GEMM move 4.6. From a few hundred rows on the vendor's GEMM outweighs the decoding, and a fused kernel, whose tensor
cores reach 70 to 80 % of it, loses. Between them it wins: `FUSED` says up to which M, architecture by architecture.
The limits are roofline figures; tiles are those that compile without spills. `benchmarks/bench_gpu.py` measures
both on a GPU; correct the row of a card here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from ..formats import Format

Kernel = Literal["matvec", "matmul", "dequantize"]


@dataclass(frozen=True, slots=True)
class Tile:
    """How the fused kernel cuts a product: ``[m, n]`` outputs a program, `unit` weights of each row at a time."""

    m: int
    n: int
    unit: int = 64
    warps: int = 4
    stages: int = 3


# the first tile that holds all M rows is taken; the last one's m is the largest M that goes to the fused kernel
_SMALL = (Tile(16, 64), Tile(32, 64), Tile(64, 64))
_LARGE = (*_SMALL, Tile(128, 64, warps=8))
# 64 KiB of local memory, and no asynchronous copies into it to keep in flight
_CDNA = (Tile(16, 64, stages=2), Tile(32, 64, stages=2), Tile(64, 64, stages=2))
_RDNA = (Tile(16, 32, stages=2), Tile(32, 32, stages=2))

FUSED: dict[str, tuple[Tile, ...]] = {
    "sm_80": _LARGE,
    "sm_86": _LARGE,
    "sm_89": _LARGE,
    "sm_90": _SMALL,
    "sm_120": _LARGE,
    "gfx942": _CDNA,
    "gfx1100": _RDNA,
}

MATVEC = 1
"""Rows of x up to which the matvec is taken; it decodes the weights again for every one."""


def tiles(architecture: str) -> tuple[Tile, ...]:
    """The fused kernel's tiles on ``sm_86`` or ``gfx942``; those of the next older relative if it has no row.

    Empty where the fused kernel does not pay: Turing's tensor cores are not reached by Triton 3.4 and later.
    """
    if architecture in FUSED:
        return FUSED[architecture]
    if architecture.startswith("sm_"):
        number = int(architecture[3:])
        older = [int(name[3:]) for name in FUSED if name.startswith("sm_") and int(name[3:]) <= number]
        return FUSED[f"sm_{max(older)}"] if older else ()
    if architecture.startswith("gfx9"):
        return _CDNA
    return _RDNA if architecture.startswith(("gfx11", "gfx12")) else ()


def tile(architecture: str, m: int) -> Tile:
    """The tile for M = `m`: the smallest that holds all rows, else the largest there is."""
    rows = tiles(architecture) or _SMALL
    return next((row for row in rows if m <= row.m), rows[-1])


@cache
def architecture(device: torch.device) -> str:
    """``sm_86``, ``gfx942``, or the name of a device type that has no table."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side; 0 where that is not known."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def choose(m: int, n: int, k: int, fmt: Format, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The way for x ``[m, k]`` in `dtype` times a weight ``[n, k]`` in `fmt` on `device`.

    ``dequantize`` means decoding to memory, then the vendor's GEMM; that is also the way where x is fp32, which the
    tensor cores would round, and where the fused kernel, which walks along K alone, would leave multiprocessors idle.
    """
    if not fmt.is_quantized or fmt.triton is None or k % max(32, fmt.block_size):
        return "dequantize"
    if m <= MATVEC:
        return "matvec"
    if dtype == torch.float32:
        return "dequantize"
    cut = next((row for row in tiles(architecture(device)) if m <= row.m), None)
    # such a tile holds all rows: programs lie along N alone
    return "matmul" if cut is not None and -(-n // cut.n) >= multiprocessors(device) else "dequantize"
