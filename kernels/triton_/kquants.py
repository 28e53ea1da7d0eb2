"""Decode functions of the k-quants: super-blocks of 256 weights, sub-scales of 16 or 32 (see `bits` for the arguments).

Layouts after ggml-common.h (`block_q2_K` ...) and formulas after `dequantize_row_*` of ggml-quants.c.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import as_f16, load_f16, load_quads, load_u8, load_u32, locate, repeat, unpack


@triton.jit
def load_twos(row, unit, mask, FIELD: tl.constexpr, TYPE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Two bits of each weight from 64 bytes at FIELD: packed u32 [R, UNIT / 4].

    Bits 2 j of bytes 32 n .. 32 n + 31 belong to weights 128 n + 32 j .. 128 n + 32 j + 31.
    """
    block, word = locate(unit, UNIT, 4, 256)
    packed = load_u32(row, block, word // 32 * 8 + word % 8, mask, FIELD, TYPE_SIZE)
    return (packed >> (word // 8 % 4 * 2)[None, :]) & 0x03030303


@triton.jit
def _load_bits(row, unit, mask, FIELD: tl.constexpr, TYPE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """One bit of each weight from 32 bytes at FIELD, bit g for weights 32 g ..: packed u32 [R, UNIT / 4]."""
    block, word = locate(unit, UNIT, 4, 256)
    packed = load_u32(row, block, word % 8, mask, FIELD, TYPE_SIZE)
    return (packed >> (word // 8)[None, :]) & 0x01010101


@triton.jit
def _load_nibbles(row, unit, mask, FIELD: tl.constexpr, TYPE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Four bits of each weight from 128 bytes at FIELD: packed u32 [R, UNIT / 4].

    The low nibbles of 32 bytes are 32 weights, their high nibbles the next 32.
    """
    block, word = locate(unit, UNIT, 4, 256)
    packed = load_u32(row, block, word // 16 * 8 + word % 8, mask, FIELD, TYPE_SIZE)
    return (packed >> (word // 8 % 2 * 4)[None, :]) & 0x0F0F0F0F


@triton.jit
def _load_scale_min(row, unit, mask, TYPE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Scales and minima of Q4_K and Q5_K, ``d[2] dmin[2] scales[12]``: two fp32 [R, UNIT / 32].

    Both have 6 bits. Groups 0..3: the scales are the low six bits of bytes 0..3, the minima those of bytes 4..7.
    Groups 4..7: the low and the high nibbles of bytes 8..11, and above them the two bits left over of bytes 0..3
    and of bytes 4..7.
    """
    block, group = locate(unit, UNIT, 32, 256)
    d = load_u32(row, block, 0, mask, 0, TYPE_SIZE)
    shift = (group % 4 * 8)[None, :]
    first = load_u32(row, block, 0, mask, 4, TYPE_SIZE) >> shift
    second = load_u32(row, block, 0, mask, 8, TYPE_SIZE) >> shift
    third = load_u32(row, block, 0, mask, 12, TYPE_SIZE) >> shift
    low = (group < 4)[None, :]
    scale = tl.where(low, first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30))
    minimum = tl.where(low, second & 0x3F, ((third >> 4) & 0x0F) | ((second >> 2) & 0x30))
    return as_f16(d) * scale.to(tl.float32), as_f16(d >> 16) * minimum.to(tl.float32)


@triton.jit
def decode_q2_k(row, unit, mask, table, UNIT: tl.constexpr):
    """Q2_K, 84 bytes: scales[16] qs[64] d[2] dmin[2]; nibbles of a scale: scale, minimum. w = d s q - dmin m."""
    block, group = locate(unit, UNIT, 16, 256)
    scales = load_u8(row, block, group, mask, 0, 84)
    scale = load_f16(row, block, mask, 80, 84) * (scales & 0x0F).to(tl.float32)
    minimum = load_f16(row, block, mask, 82, 84) * (scales >> 4).to(tl.float32)
    return repeat(scale, 16) * unpack(load_twos(row, unit, mask, 16, 84, UNIT)) - repeat(minimum, 16)


@triton.jit
def decode_q3_k(row, unit, mask, table, UNIT: tl.constexpr):
    """Q3_K, 110 bytes: hmask[32] qs[64] scales[12] d[2]. w = d (s - 32) (q - 4), bit 2 of q in hmask.

    Scales of the 16 groups of 16: low nibbles of bytes 0..7 then high nibbles; bits 4..5 from bytes 8..11, two by two.
    """
    block, group = locate(unit, UNIT, 16, 256)
    low = load_u8(row, block, group % 8, mask, 96, 110) >> (group // 8 * 4)[None, :]
    high = load_u8(row, block, group % 4, mask, 104, 110) >> (group // 4 * 2)[None, :]
    scale = (low & 0x0F) | ((high & 3) << 4)
    scale = load_f16(row, block, mask, 108, 110) * (scale.to(tl.float32) - 32)
    codes = load_twos(row, unit, mask, 32, 110, UNIT) | (_load_bits(row, unit, mask, 0, 110, UNIT) << 2)
    return repeat(scale, 16) * (unpack(codes) - 4)


@triton.jit
def decode_q4_k(row, unit, mask, table, UNIT: tl.constexpr):
    """Q4_K, 144 bytes: d[2] dmin[2] scales[12] qs[128]. w = d s q - dmin m."""
    scale, minimum = _load_scale_min(row, unit, mask, 144, UNIT)
    codes = _load_nibbles(row, unit, mask, 16, 144, UNIT)
    return repeat(scale, 32) * unpack(codes) - repeat(minimum, 32)


@triton.jit
def decode_q5_k(row, unit, mask, table, UNIT: tl.constexpr):
    """Q5_K, 176 bytes: d[2] dmin[2] scales[12] qh[32] qs[128]. w = d s q - dmin m, bit 4 of q in qh."""
    scale, minimum = _load_scale_min(row, unit, mask, 176, UNIT)
    codes = _load_nibbles(row, unit, mask, 48, 176, UNIT) | (_load_bits(row, unit, mask, 16, 176, UNIT) << 4)
    return repeat(scale, 32) * unpack(codes) - repeat(minimum, 32)


@triton.jit
def _load_sixes(row, unit, mask, UNIT: tl.constexpr):
    """Codes of Q6_K, low nibbles in ql[128] and bits 4..5 in qh[64] behind them: packed u32 [R, UNIT / 4].

    Of 128 weights the low nibbles of 64 bytes of ql are the first half, the high ones the second; bits 2 j of 32 bytes
    of qh belong to weights 32 j ... Whoever loads a word makes all weights of it that are in the UNIT.
    """
    R: tl.constexpr = row.shape[0]
    # blocks begin with a word or between two, rows too
    odd = (row.to(tl.int64) & 2).to(tl.int32)
    start = odd + unit * UNIT // 256 * 210
    words = (row - odd).to(tl.pointer_type(tl.uint32)) + (start >> 2)
    shifted = (start & 2) != 0
    if UNIT >= 128:
        HALVES: tl.constexpr = UNIT // 128
        half = unit * HALVES % 2
        low = load_quads(words + half * 16, 4 * tl.arange(0, 4 * HALVES), shifted, mask)
        low = tl.reshape(tl.join(low, low >> 4) & 0x0F0F0F0F, [R, HALVES, 16, 2])
        low = tl.reshape(tl.permute(low, [0, 1, 3, 2]), [R, UNIT // 4])
        high = load_quads(words + 32 + half * 8, 4 * tl.arange(0, 2 * HALVES), shifted, mask)
        high = tl.join(high, high >> 2)
        high = tl.reshape(tl.join(high << 4, high) & 0x30303030, [R, HALVES, 8, 2, 2])
        return low | tl.reshape(tl.permute(high, [0, 1, 4, 3, 2]), [R, UNIT // 4])
    else:
        half, shift = unit % 4 // 2, unit % 2 * 4
        low = load_quads(words + half * 16, 4 * tl.arange(0, 4), shifted, mask) >> shift
        high = load_quads(words + 32 + half * 8, 4 * tl.arange(0, 2), shifted, mask) >> shift
        high = tl.permute(tl.join(high, high >> 2) & 0x03030303, [0, 2, 1])
        return (low & 0x0F0F0F0F) | (tl.reshape(high, [R, 16]) << 4)


@triton.jit
def decode_q6_k(row, unit, mask, table, UNIT: tl.constexpr):
    """Q6_K, 210 bytes: ql[128] qh[64] scales[16] d[2], scales signed. w = d s (q - 32), bits 4..5 of q in qh.

    UNIT is 64 or more. The first row has to begin with a word, others need not.
    """
    block, group = locate(unit, UNIT, 16, 256)
    scale = load_u8(row, block, group, mask, 192, 210).to(tl.uint8).to(tl.int8, bitcast=True)
    scale = load_f16(row, block, mask, 208, 210) * scale.to(tl.float32)
    return repeat(scale, 16) * (unpack(_load_sixes(row, unit, mask, UNIT)) - 32)
