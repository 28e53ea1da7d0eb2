"""Project: single rows of x to the ranks of low-rank terms, scaled, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

WARPS = 4

UNIT = 1024
"""Columns taken at a time: 16 bytes a thread in bf16. Flux's 3072 take three turns."""


@triton.jit(do_not_specialize=["rank", "step"])
def project_kernel(x, down, scale, t, k, rank, step, UNIT: tl.constexpr):
    """``t = (x downᵀ) ∘ scale``, one rank and one row of x a program, summed in fp32.

    Args:
        x: ``[m, k]``, contiguous; m is the grid's second dimension.
        down: ``[rank, k]``, contiguous; rank is the grid's first dimension.
        scale: ``[rank]``, or ``[m, rank]``, contiguous.
        t: ``[m, rank]``, contiguous.
        step: numbers of `scale` from one row of x to the next, 0 where all share them.
        UNIT: columns taken at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    acc = tl.zeros([UNIT], tl.float32)
    for start in range(0, k, UNIT):
        column = start + tl.arange(0, UNIT)
        inside = column < k
        part = tl.load(x + token * k + column, mask=inside, other=0).to(tl.float32)
        acc += part * tl.load(down + row * k + column, mask=inside, other=0).to(tl.float32)
    y = tl.sum(acc, 0) * tl.load(scale + token * step + row)
    tl.store(t + token * rank + row, y.to(t.dtype.element_ty))
