"""Decode functions of the microscaling types: E2M1 weights under an 8-bit float scale (see `bits` for the arguments).

Layouts after ggml-common.h (`block_mxfp4`, `block_nvfp4`), numbers after the OCP Microscaling Formats specification.
E2M1 values are doubled to be integers (0 1 2 3 4 6 8 12 and their negatives) and the scales halved.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import as_f16, load_u8, load_u32, locate, repeat, unpack
from .legacy import load_nibbles


@triton.jit
def _doubled_e2m1(codes):
    """Packed E2M1 codes to fp32 values, doubled: u32 [R, C] to [R, 4 C]."""
    magnitude = codes & 0x07070707
    # 0 1 2 3 4 6 8 12 is the code itself, plus 1, 2 and 5 for the last three
    high = (magnitude >> 2) & 0x01010101
    five = high & magnitude
    six = high & (magnitude >> 1)
    value = magnitude + five + 2 * (six + (five & six))
    # 12 above zero, so that bytes stay unsigned: a zero with the sign bit set must come out as +0
    negative = ((codes >> 3) & 0x01010101) * 0xFF
    return unpack(value + 0x0C0C0C0C - 2 * (value & negative)) - 12


@triton.jit
def decode_mxfp4(row, unit, mask, table, UNIT: tl.constexpr):
    """MXFP4, 17 bytes: e[1] qs[16], nibbles as in Q4_0. w = 2^(e - 128) q, with E8M0 e."""
    block, group = locate(unit, UNIT, 32, 32)
    e = load_u8(row, block, group, mask, 0, 17)
    # the two smallest are subnormal in fp32
    scale = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
    return repeat(scale, 32) * _doubled_e2m1(load_nibbles(row, unit, mask, 1, 17, UNIT))


@triton.jit
def decode_nvfp4(row, unit, mask, table, UNIT: tl.constexpr):
    """NVFP4, 36 bytes: scales[4], unsigned E4M3, qs[32] for four groups of 16 weights. w = s / 2 q.

    Of a group's 8 bytes the low nibbles are weights 0..7, the high ones 8..15.
    """
    block, group = locate(unit, UNIT, 16, 64)
    e4m3 = load_u8(row, block, group, mask, 0, 36)
    # in the place of an fp16's exponent and mantissa E4M3 means 2^8 less, subnormals included; 0x7F is not a number
    scale = tl.where(e4m3 == 0x7F, 0.0, as_f16((e4m3 & 0x7F) << 7) * 128)
    block, word = locate(unit, UNIT, 4, 64)
    codes = load_u32(row, block, word // 4 * 2 + word % 2, mask, 4, 36) >> (word // 2 % 2 * 4)[None, :]
    return repeat(scale, 16) * _doubled_e2m1(codes & 0x0F0F0F0F)
