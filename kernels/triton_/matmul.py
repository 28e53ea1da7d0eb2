"""Fused dequantize and matmul: weights go from packed bytes to the tensor cores without passing through memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["m", "n", "rank"], do_not_specialize_on_alignment=["data"])
def matmul_kernel(
    x, data, table, out, bias, t, up, m, n, k, rank,
    DECODE: tl.constexpr, QK: tl.constexpr, TYPE_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``out = x Wᵀ + bias + t upᵀ``, a tile ``[BLOCK_M, BLOCK_N]`` a program.

    Args:
        x: ``[m, k]``, contiguous.
        data: W, u8 ``[n, row_bytes]``, its address a multiple of ALIGN.
        table: the code book, or None.
        out: ``[m, n]``, contiguous.
        bias: ``[n]``, or None.
        t, up: ``[m, rank]`` and ``[n, rank]`` in x's dtype, contiguous, or None.
        UNIT: weights of a row taken at a time, a divisor of k.
        RANK: ranks taken at a time.
    """
    first = tl.program_id(0) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    mask = lane < n - first
    row_bytes = k // QK * TYPE_SIZE
    base = tl.multiple_of(data + first.to(tl.int64) * row_bytes, ALIGN)
    row = base + lane * row_bytes
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (token < m)[:, None]
    column = tl.arange(0, UNIT)
    tokens = x + token.to(tl.int64)[:, None] * k
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for unit in range(k // UNIT):
        part = tl.load(tokens + (unit * UNIT + column)[None, :], mask=inside, other=0)
        weights = DECODE(row, unit, mask, table, UNIT).to(x.dtype.element_ty)
        acc = tl.dot(part, tl.trans(weights), acc, input_precision="ieee")
    if up is not None:
        for start in range(0, rank, RANK):
            ranks = start + tl.arange(0, RANK)
            valid = (ranks < rank)[None, :]
            part = tl.load(t + token.to(tl.int64)[:, None] * rank + ranks[None, :], mask=inside & valid, other=0)
            rows = up + first.to(tl.int64) * rank
            ups = tl.load(rows + lane[:, None] * rank + ranks[None, :], mask=mask[:, None] & valid, other=0)
            acc = tl.dot(part, tl.trans(ups), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + first + lane, mask=mask, other=0).to(tl.float32)[None, :]
    offset = token.to(tl.int64)[:, None] * n + (first + lane)[None, :]
    tl.store(out + offset, acc.to(out.dtype.element_ty), mask=inside & mask[None, :])
