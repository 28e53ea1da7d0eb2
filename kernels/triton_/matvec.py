"""Matvec: single rows of x against packed weights, which are read once and never written out."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = 4
"""Rows of W a program takes: with one warp, which needs no barriers, 32 weights a thread."""

WARPS = 1

UNIT = 256
"""Weights of a row taken at a time, at most."""


@triton.jit(do_not_specialize=["n", "rank"], do_not_specialize_on_alignment=["data"])
def matvec_kernel(
    x, data, table, out, bias, t, up, n, k, rank,
    DECODE: tl.constexpr, QK: tl.constexpr, TYPE_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``out = x Wᵀ + bias + t upᵀ``, ROWS rows of W and one row of x a program.

    Args:
        x: ``[m, k]``, contiguous; m is the grid's second dimension.
        data: W, u8 ``[n, row_bytes]``, its address a multiple of ALIGN.
        table: the code book, or None.
        out: ``[m, n]``, contiguous.
        bias: ``[n]``, or None.
        t, up: ``[m, rank]`` and ``[n, rank]``, contiguous, or None.
        UNIT: weights of a row taken at a time, a divisor of k.
        RANK: ranks taken at a time.
    """
    first = tl.program_id(0) * ROWS
    lane = tl.arange(0, ROWS)
    mask = lane < n - first
    row_bytes = k // QK * TYPE_SIZE
    base = tl.multiple_of(data + first.to(tl.int64) * row_bytes, ALIGN)
    row = base + lane * row_bytes
    token = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, UNIT)
    acc = tl.zeros([ROWS, UNIT], tl.float32)
    for unit in range(k // UNIT):
        part = tl.load(x + token * k + unit * UNIT + column).to(tl.float32)
        acc += DECODE(row, unit, mask, table, UNIT) * part[None, :]
    y = tl.sum(acc, 1)
    if up is not None:
        ups = up + first.to(tl.int64) * rank + lane * rank
        for start in range(0, rank, RANK):
            ranks = start + tl.arange(0, RANK)
            part = tl.load(t + token * rank + ranks, mask=ranks < rank, other=0).to(tl.float32)
            inside = mask[:, None] & (ranks < rank)[None, :]
            y += tl.sum(tl.load(ups[:, None] + ranks[None, :], mask=inside, other=0).to(tl.float32) * part[None, :], 1)
    if bias is not None:
        y += tl.load(bias + first + lane, mask=mask, other=0).to(tl.float32)
    tl.store(out + token * n + first + lane, y.to(out.dtype.element_ty), mask=mask)
