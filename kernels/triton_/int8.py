"""Packed bytes to rotated int8 rows, and the scales of these (`kernels/int8.py` says what they are for).

A block of 256 weights as a matrix X of 16 by 16 becomes H₁₆ X H₁₆: two products that are as wide as a tensor core, for
a program's blocks one below the other. No block crosses a row, so a program needs rows for their scales alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 256

BLOCKS = 16
"""Blocks a program takes: 32 weights a thread, as in `dequant`."""

WARPS = 4


@triton.jit
def _hadamard(dtype: tl.constexpr):
    """H₁₆ = H₄ ⊗ H₄, normalized, ``[16, 16]``; H₄ is ones, and -1 where row and column add up to 3."""
    row = tl.arange(0, 16)[:, None]
    column = tl.arange(0, 16)[None, :]
    negative = (row % 4 + column % 4 == 3) != (row // 4 + column // 4 == 3)
    return tl.where(negative, -0.25, 0.25).to(dtype)


@triton.jit
def _rotate(weights, R: tl.constexpr):
    """Every row of ``[R, 256]`` rotated, in fp32, from products in the dtype that comes in."""
    h = _hadamard(weights.dtype)
    right = tl.dot(tl.reshape(weights, [R * 16, 16]), h, input_precision="ieee").to(weights.dtype)
    turned = tl.permute(tl.reshape(right, [R, 16, 16]), [0, 2, 1])
    both = tl.dot(tl.reshape(turned, [R * 16, 16]), h, input_precision="ieee")
    return tl.reshape(tl.permute(tl.reshape(both, [R, 16, 16]), [0, 2, 1]), [R, 256])


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["data"])
def int8_largest_kernel(
    data, table, out, blocks,
    DECODE: tl.constexpr, TYPE_SIZE: tl.constexpr, ALIGN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of each rotated block: ``out``, fp32 ``[blocks]``.

    Args:
        data: u8, the packed weights, TYPE_SIZE bytes for 256 of them, its address a multiple of ALIGN.
        table: the code book, or None.
        blocks: how many blocks of 256 weights there are.
        DECODE: the format's decode function.
        BLOCKS: blocks a program takes.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    mask = block < tl.minimum(blocks - first, BLOCKS).to(tl.int32)
    base = tl.multiple_of(data + first * TYPE_SIZE, ALIGN)
    weights = DECODE(base + block * TYPE_SIZE, 0, mask, table, 256)
    largest = tl.max(tl.abs(_rotate(weights, BLOCKS)), 1)
    tl.store(out + first + block, largest, mask=mask)


@triton.jit(do_not_specialize=["blocks", "row_blocks"], do_not_specialize_on_alignment=["data"])
def int8_kernel(
    data, table, scales, out, blocks, row_blocks,
    DECODE: tl.constexpr, TYPE_SIZE: tl.constexpr, ALIGN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``out = round(rotated / scale of the row)``, int8 ``[blocks, 256]``.

    Args:
        scales: fp32 ``[n]``, the rows' largest magnitudes divided by 127.
        row_blocks: blocks of 256 weights in a row.
        others: as above.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    mask = block < tl.minimum(blocks - first, BLOCKS).to(tl.int32)
    base = tl.multiple_of(data + first * TYPE_SIZE, ALIGN)
    weights = DECODE(base + block * TYPE_SIZE, 0, mask, table, 256)
    scale = tl.load(scales + (first + block) // row_blocks, mask=mask, other=1)
    # divided first: codes, of at most 127 after the rotation and 2032 before it, have room and 11 bits in fp16
    codes = _rotate((weights / scale[:, None]).to(tl.float16), BLOCKS)
    # adding 1.5 · 2²³ rounds to the nearest integer, even ones where there are two
    codes = (tl.minimum(tl.maximum(codes, -127), 127) + 12582912.0) - 12582912.0
    offset = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    tl.store(out + first * 256 + offset, codes.to(tl.int8), mask=mask[:, None])
