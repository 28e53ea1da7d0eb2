"""Decode functions of the ternary quants: 256 weights of -1, 0 or 1 and one scale (see `bits` for the arguments).

Layouts after ggml-common.h (`block_tq1_0`, `block_tq2_0`) and formulas after `dequantize_row_*` of ggml-quants.c.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import load_f16, load_u32, locate, repeat, unpack
from .kquants import load_twos


@triton.jit
def _digits(words, power):
    """Digit `power` of four bytes, each a fraction of base 3 scaled by 256: ``(b 3^power mod 256) 3 >> 8``."""
    # 3^power from a packed table; two bytes at a time, so that the products have 16 bits of room
    factor = tl.where(power == 4, 81, (0x1B090301 >> (power * 8)) & 0xFF).to(tl.uint32)[None, :]
    even = ((words & 0x00FF00FF) * factor) & 0x00FF00FF
    odd = (((words >> 8) & 0x00FF00FF) * factor) & 0x00FF00FF
    return ((even * 3 >> 8) & 0x00030003) | ((odd * 3) & 0x03000300)


@triton.jit
def decode_tq1_0(row, unit, mask, table, UNIT: tl.constexpr):
    """TQ1_0, 54 bytes: qs[48] qh[4] d[2], five digits a byte in qs and four in qh. w = d (q - 1).

    Weights 0..159 are digits 0..4 of bytes 0..31, 160..239 of bytes 32..47, 240..255 digits 0..3 of the four of qh.
    """
    block, _ = locate(unit, UNIT, 32, 256)
    d = load_f16(row, block, mask, 52, 54)
    block, word = locate(unit, UNIT, 4, 256)
    source = tl.where(word < 40, word % 8, tl.where(word < 60, 8 + word % 4, 12))
    power = tl.where(word < 40, word // 8, tl.where(word < 60, (word - 40) // 4, word - 60))
    codes = _digits(load_u32(row, block, source, mask, 0, 54), power)
    return repeat(d, 32) * (unpack(codes) - 1)


@triton.jit
def decode_tq2_0(row, unit, mask, table, UNIT: tl.constexpr):
    """TQ2_0, 66 bytes: qs[64] d[2], bits as in Q2_K. w = d (q - 1)."""
    block, _ = locate(unit, UNIT, 32, 256)
    d = load_f16(row, block, mask, 64, 66)
    return repeat(d, 32) * (unpack(load_twos(row, unit, mask, 0, 66, UNIT)) - 1)
