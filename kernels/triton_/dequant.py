"""Dequantize: a file's bytes to floats. Bound by memory: a tile of whole blocks a program, 16-byte stores."""

from __future__ import annotations

import triton
import triton.language as tl

TILE = 4096
"""Weights a program decodes: with four warps 32 a thread, among which the work on indices is shared."""

WARPS = 4


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["data"])
def dequantize_kernel(
    data, table, out, blocks,
    DECODE: tl.constexpr, QK: tl.constexpr, TYPE_SIZE: tl.constexpr, ALIGN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Decode blocks to ``out [blocks, QK]``; rows need no notice, because they hold whole blocks.

    Args:
        data: u8, the packed blocks, its address a multiple of ALIGN.
        table: the code book, or None.
        out: fp32, fp16 or bf16, contiguous.
        blocks: how many.
        DECODE: the format's decode function.
        QK, TYPE_SIZE: weights and bytes in a block.
        BLOCKS: blocks a program decodes.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    mask = block < tl.minimum(blocks - first, BLOCKS).to(tl.int32)
    base = tl.multiple_of(data + first * TYPE_SIZE, ALIGN)
    weights = DECODE(base + block * TYPE_SIZE, 0, mask, table, QK)
    offset = block[:, None] * QK + tl.arange(0, QK)[None, :]
    tl.store(out + first * QK + offset, weights.to(out.dtype.element_ty), mask=mask[:, None])
