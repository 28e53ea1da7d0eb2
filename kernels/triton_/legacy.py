"""Decode functions of the legacy quants: blocks of 32 weights with one scale (see `bits` for the arguments).

Layouts after ggml-common.h (`block_q4_0` ...) and formulas after `dequantize_row_*` of ggml-quants.c. Low nibbles
hold weights 0..15 of a block, high nibbles 16..31.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import load_f16, load_quads, load_u32, locate, repeat, spread, unpack, unpack_signed


@triton.jit
def decode_bf16(row, unit, mask, table, UNIT: tl.constexpr):
    """BF16: the upper half of an fp32. Any UNIT down to 1."""
    halves = row.to(tl.pointer_type(tl.bfloat16))
    column = unit * UNIT + tl.arange(0, UNIT)
    return tl.load(halves[:, None] + column[None, :], mask=mask[:, None], other=0).to(tl.float32)


@triton.jit
def load_nibbles(row, unit, mask, FIELD: tl.constexpr, TYPE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Codes of 16 bytes of nibbles at byte FIELD of each block of 32: packed u32 [R, UNIT / 4]."""
    block, word = locate(unit, UNIT, 4, 32)
    packed = load_u32(row, block, word % 4, mask, FIELD, TYPE_SIZE)
    return (packed >> (word // 4 * 4)[None, :]) & 0x0F0F0F0F


@triton.jit
def _load_fives(row, unit, mask, FIELD: tl.constexpr, TYPE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Codes of ``qh[4] | qs[16]`` at byte FIELD; bit i of qh is bit 4 of weight i: packed u32 [R, UNIT / 4]."""
    block, group = locate(unit, UNIT, 32, 32)
    high = repeat(load_u32(row, block, group, mask, FIELD, TYPE_SIZE), 8)
    word = tl.arange(0, UNIT // 4) % 8
    return load_nibbles(row, unit, mask, FIELD + 4, TYPE_SIZE, UNIT) | (spread(high >> (4 * word)[None, :]) << 4)


@triton.jit
def decode_q4_0(row, unit, mask, table, UNIT: tl.constexpr):
    """Q4_0, 18 bytes: d[2] qs[16]. w = d (q - 8)."""
    block, _ = locate(unit, UNIT, 32, 32)
    d = load_f16(row, block, mask, 0, 18)
    return repeat(d, 32) * (unpack(load_nibbles(row, unit, mask, 2, 18, UNIT)) - 8)


@triton.jit
def decode_q4_1(row, unit, mask, table, UNIT: tl.constexpr):
    """Q4_1, 20 bytes: d[2] m[2] qs[16]. w = d q + m."""
    block, _ = locate(unit, UNIT, 32, 32)
    d = load_f16(row, block, mask, 0, 20)
    m = load_f16(row, block, mask, 2, 20)
    return repeat(d, 32) * unpack(load_nibbles(row, unit, mask, 4, 20, UNIT)) + repeat(m, 32)


@triton.jit
def decode_q5_0(row, unit, mask, table, UNIT: tl.constexpr):
    """Q5_0, 22 bytes: d[2] qh[4] qs[16]. w = d (q - 16)."""
    block, _ = locate(unit, UNIT, 32, 32)
    d = load_f16(row, block, mask, 0, 22)
    return repeat(d, 32) * (unpack(_load_fives(row, unit, mask, 2, 22, UNIT)) - 16)


@triton.jit
def decode_q5_1(row, unit, mask, table, UNIT: tl.constexpr):
    """Q5_1, 24 bytes: d[2] m[2] qh[4] qs[16]. w = d q + m."""
    block, _ = locate(unit, UNIT, 32, 32)
    d = load_f16(row, block, mask, 0, 24)
    m = load_f16(row, block, mask, 2, 24)
    return repeat(d, 32) * unpack(_load_fives(row, unit, mask, 4, 24, UNIT)) + repeat(m, 32)


@triton.jit
def _load_pairs(row, unit, mask, UNIT: tl.constexpr):
    """Codes of pairs of Q8_0's blocks, 17 words each, from rows that begin with a word: packed u32 [R, UNIT / 4].

    The first block's codes begin in the middle of a pair's first word, those of the second with its tenth.
    """
    R: tl.constexpr = row.shape[0]
    PAIRS: tl.constexpr = UNIT // 64
    words = row.to(tl.pointer_type(tl.uint32)) + unit * (PAIRS * 17)
    quad = tl.arange(0, 2 * PAIRS)
    first = load_quads(words, quad // 2 * 17 + quad % 2 * 4, tl.full([R], 1, tl.int1), mask)
    word = tl.arange(0, 8 * PAIRS)
    second = tl.load(words[:, None] + (word // 8 * 17 + 9 + word % 8)[None, :], mask=mask[:, None], other=0)
    both = tl.join(tl.reshape(first, [R, PAIRS, 8]), tl.reshape(second, [R, PAIRS, 8]))
    return tl.reshape(tl.permute(both, [0, 1, 3, 2]), [R, UNIT // 4])


@triton.jit
def decode_q8_0(row, unit, mask, table, UNIT: tl.constexpr):
    """Q8_0, 34 bytes: d[2] qs[32], signed. w = d q. Where a UNIT is pairs of blocks, rows have to begin with a word."""
    if UNIT % 64 == 0:
        codes = _load_pairs(row, unit, mask, UNIT)
    else:
        block, word = locate(unit, UNIT, 4, 32)
        codes = load_u32(row, block, word, mask, 2, 34)
    block, _ = locate(unit, UNIT, 32, 32)
    return repeat(load_f16(row, block, mask, 0, 34), 32) * unpack_signed(codes)
