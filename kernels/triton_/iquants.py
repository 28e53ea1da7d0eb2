"""Decode functions of the i-quants: weights from a code book (see `bits` for the arguments).

Layouts after ggml-common.h (`block_iq1_s` ...) and formulas after `dequantize_row_*` of ggml-quants.c. An entry of a
grid is 4 or 8 weights, one a byte, in one or two words of the table. An octet is 8 weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import (
    as_f16,
    bytes_of,
    load_f16,
    load_u8,
    load_u16,
    load_u32,
    locate,
    negate,
    repeat,
    unpack_signed,
    with_parity,
)  # fmt: skip
from .legacy import load_nibbles


@triton.jit
def _look_up(table, octets, UNIT: tl.constexpr):
    """Entries of 8 weights: indices u32 [R, UNIT / 8] to packed u32 [R, UNIT / 4]."""
    word = repeat(octets.to(tl.int32) * 2, 2) + (tl.arange(0, UNIT // 4) % 2)[None, :]
    return tl.load(table + word).to(tl.uint32, bitcast=True)


@triton.jit
def _nibbles(octets, UNIT: tl.constexpr):
    """Bytes [R, UNIT / 8] to their low and high nibbles [R, UNIT / 4], with bits above them."""
    return repeat(octets, 2) >> (tl.arange(0, UNIT // 4) % 2 * 4)[None, :]


@triton.jit
def _load_scales(row, unit, mask, FIELD: tl.constexpr, TYPE_SIZE: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr):
    """4-bit scales of groups of STEP weights from the bytes at FIELD, low nibbles first: fp32 [R, UNIT / STEP]."""
    block, group = locate(unit, UNIT, STEP, 256)
    scales = load_u8(row, block, group // 2, mask, FIELD, TYPE_SIZE) >> (group % 2 * 4)[None, :]
    return (scales & 0x0F).to(tl.float32)


@triton.jit
def decode_iq2_xxs(row, unit, mask, table, UNIT: tl.constexpr):
    """IQ2_XXS, 66 bytes: d[2] and eight times (index[4] u32), for 32 weights each.

    The word: four times 7 sign bits, a 4-bit scale s. w = d (0.5 + s) / 4 sign grid[index].
    """
    block, group = locate(unit, UNIT, 32, 256)
    word = load_u32(row, block, 2 * group, mask, 6, 66)
    scale = load_f16(row, block, mask, 0, 66) * (0.5 + (word >> 28).to(tl.float32)) * 0.25
    block, octet = locate(unit, UNIT, 8, 256)
    index = load_u8(row, block, octet // 4 * 8 + octet % 4, mask, 2, 66)
    signs = with_parity((repeat(word, 4) >> (octet % 4 * 7)[None, :]) & 0x7F)
    return repeat(scale, 32) * unpack_signed(negate(_look_up(table, index, UNIT), _nibbles(signs, UNIT)))


@triton.jit
def decode_iq2_xs(row, unit, mask, table, UNIT: tl.constexpr):
    """IQ2_XS, 74 bytes: d[2] qs[64] scales[8]; a u16 of qs: a 9-bit index, 7 sign bits.

    w = d (0.5 + s) / 4 sign grid[index], a 4-bit s for each 16 weights.
    """
    block, _ = locate(unit, UNIT, 16, 256)
    scale = load_f16(row, block, mask, 0, 74) * (0.5 + _load_scales(row, unit, mask, 66, 74, 16, UNIT)) * 0.25
    block, octet = locate(unit, UNIT, 8, 256)
    code = load_u16(row, block, octet, mask, 2, 74)
    codes = negate(_look_up(table, code & 0x1FF, UNIT), _nibbles(with_parity(code >> 9), UNIT))
    return repeat(scale, 16) * unpack_signed(codes)


@triton.jit
def decode_iq2_s(row, unit, mask, table, UNIT: tl.constexpr):
    """IQ2_S, 82 bytes: d[2] index[32] signs[32] qh[8] scales[8]; qh holds bits 8..9 of four indices a byte.

    w = d (0.5 + s) / 4 sign grid[index], a 4-bit s for each 16 weights.
    """
    block, _ = locate(unit, UNIT, 16, 256)
    scale = load_f16(row, block, mask, 0, 82) * (0.5 + _load_scales(row, unit, mask, 74, 82, 16, UNIT)) * 0.25
    block, octet = locate(unit, UNIT, 8, 256)
    high = load_u8(row, block, octet // 4, mask, 66, 82) >> (octet % 4 * 2)[None, :]
    index = load_u8(row, block, octet, mask, 2, 82) | ((high & 3) << 8)
    signs = load_u8(row, block, octet, mask, 34, 82)
    return repeat(scale, 16) * unpack_signed(negate(_look_up(table, index, UNIT), _nibbles(signs, UNIT)))


@triton.jit
def decode_iq3_xxs(row, unit, mask, table, UNIT: tl.constexpr):
    """IQ3_XXS, 98 bytes: d[2] index[64] u32[8]; a word for 32 weights: four times 7 sign bits, a 4-bit scale s.

    w = d (0.5 + s) / 2 sign grid[index], entries of four weights.
    """
    block, group = locate(unit, UNIT, 32, 256)
    word = load_u32(row, block, group, mask, 66, 98)
    scale = load_f16(row, block, mask, 0, 98) * (0.5 + (word >> 28).to(tl.float32)) * 0.5
    octet = tl.arange(0, UNIT // 8)
    signs = with_parity((repeat(word, 4) >> (octet % 4 * 7)[None, :]) & 0x7F)
    block, entry = locate(unit, UNIT, 4, 256)
    index = load_u8(row, block, entry, mask, 2, 98)
    grid = tl.load(table + index).to(tl.uint32, bitcast=True)
    return repeat(scale, 32) * unpack_signed(negate(grid, _nibbles(signs, UNIT)))


@triton.jit
def decode_iq3_s(row, unit, mask, table, UNIT: tl.constexpr):
    """IQ3_S, 110 bytes: d[2] index[64] qh[8] signs[32] scales[4]; qh holds bit 8 of eight indices a byte.

    w = d (1 + 2 s) sign grid[index], entries of four weights, a 4-bit s for each 32 weights.
    """
    block, _ = locate(unit, UNIT, 32, 256)
    scale = load_f16(row, block, mask, 0, 110) * (1 + 2 * _load_scales(row, unit, mask, 106, 110, 32, UNIT))
    block, octet = locate(unit, UNIT, 8, 256)
    signs = load_u8(row, block, octet, mask, 74, 110)
    block, entry = locate(unit, UNIT, 4, 256)
    high = load_u8(row, block, entry // 8, mask, 66, 110) >> (entry % 8)[None, :]
    index = load_u8(row, block, entry, mask, 2, 110) | ((high & 1) << 8)
    grid = tl.load(table + index).to(tl.uint32, bitcast=True)
    return repeat(scale, 32) * unpack_signed(negate(grid, _nibbles(signs, UNIT)))


@triton.jit
def decode_iq1_s(row, unit, mask, table, UNIT: tl.constexpr):
    """IQ1_S, 50 bytes: d[2] index[32] qh[16]; a u16 of qh for 32 weights: 4 x 3 bits of index, a 3-bit s, a sign.

    w = d (2 s + 1) (grid[index] ± 1/8).
    """
    block, group = locate(unit, UNIT, 32, 256)
    high = load_u16(row, block, group, mask, 34, 50)
    scale = load_f16(row, block, mask, 0, 50) * (2 * ((high >> 12) & 7) + 1).to(tl.float32)
    delta = tl.where((high & 0x8000) == 0, 0.125, -0.125)
    block, octet = locate(unit, UNIT, 8, 256)
    index = load_u8(row, block, octet, mask, 2, 50)
    index |= ((repeat(high, 4) >> (octet % 4 * 3)[None, :]) & 7) << 8
    return repeat(scale, 32) * (unpack_signed(_look_up(table, index, UNIT)) + repeat(delta, 32))


@triton.jit
def decode_iq1_m(row, unit, mask, table, UNIT: tl.constexpr):
    """IQ1_M, 56 bytes: index[32] qh[16] scales[8]; a nibble of qh for 8 weights: bits 8..10 of the index, a sign.

    A u16 of scales: four 3-bit scales s of 16 weights, and above them four bits of d, the lowest first.
    w = d (2 s + 1) (grid[index] ± 1/8).
    """
    block, group = locate(unit, UNIT, 16, 256)
    low = load_u32(row, block, 0, mask, 48, 56)
    high = load_u32(row, block, 1, mask, 48, 56)
    d = ((low >> 12) & 0xF) | ((low >> 24) & 0xF0) | ((high >> 4) & 0xF00) | ((high >> 16) & 0xF000)
    scales = load_u16(row, block, group // 4, mask, 48, 56) >> (group % 4 * 3)[None, :]
    scale = as_f16(d) * (2 * (scales & 7) + 1).to(tl.float32)
    block, octet = locate(unit, UNIT, 8, 256)
    qh = load_u8(row, block, octet // 2, mask, 32, 56) >> (octet % 2 * 4)[None, :]
    delta = tl.where((qh & 8) == 0, 0.125, -0.125)
    index = load_u8(row, block, octet, mask, 0, 56) | ((qh & 7) << 8)
    return repeat(scale, 16) * (unpack_signed(_look_up(table, index, UNIT)) + repeat(delta, 8))


@triton.jit
def _look_up_nibbles(table, codes):
    """Packed 4-bit codes u32 [R, C] to the values of the table: fp32 [R, 4 C]."""
    return tl.load(table + (bytes_of(codes) & 0x0F)).to(tl.float32)


@triton.jit
def decode_iq4_nl(row, unit, mask, table, UNIT: tl.constexpr):
    """IQ4_NL, 18 bytes: d[2] qs[16], nibbles as in Q4_0. w = d kvalues[q]."""
    block, _ = locate(unit, UNIT, 32, 32)
    d = load_f16(row, block, mask, 0, 18)
    return repeat(d, 32) * _look_up_nibbles(table, load_nibbles(row, unit, mask, 2, 18, UNIT))


@triton.jit
def decode_iq4_xs(row, unit, mask, table, UNIT: tl.constexpr):
    """IQ4_XS, 136 bytes: d[2] scales_h[2] scales_l[4] qs[128]. w = d (s - 32) kvalues[q].

    The 6-bit s of group g of 32 weights: nibble g of scales_l and above it two bits of scales_h at 2 g.
    """
    block, group = locate(unit, UNIT, 32, 256)
    first = load_u32(row, block, 0, mask, 0, 136)
    low = load_u32(row, block, 0, mask, 4, 136) >> (4 * group)[None, :]
    high = first >> (16 + 2 * group)[None, :]
    scale = as_f16(first) * (((low & 0x0F) | ((high & 3) << 4)).to(tl.float32) - 32)
    block, word = locate(unit, UNIT, 4, 256)
    codes = load_u32(row, block, word // 8 * 4 + word % 4, mask, 8, 136) >> (word // 4 % 2 * 4)[None, :]
    return repeat(scale, 32) * _look_up_nibbles(table, codes & 0x0F0F0F0F)
