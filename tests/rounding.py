"""What rounding can do to a sum of products: the tolerance of tests that compare with fp64."""

from __future__ import annotations

import torch

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_rounded(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor, terms: int, added: object = 0.0) -> None:
    """Hold `got` to sums of `terms` products that accumulate in fp32.

    Such a sum errs by at most ``terms · 2⁻²⁴`` of the sum of its magnitudes; a result in a narrower dtype is rounded
    to it for the product, and again for each of the (at most two) things that are added behind.

    Args:
        got: in fp32, fp16 or bf16.
        want: the same in fp64.
        size: the same sums with every product and summand positive, in fp64.
        added: the magnitude of what is added behind, in fp64; it may cancel, but its rounding stays.
    """
    assert got.isfinite().all() and got.shape == want.shape
    error = (got.double() - want).abs()
    bound = (terms + 8) * 2.0**-24 * (size + added) + 4 * UNIT[got.dtype] * (want.abs() + added)
    assert (error <= bound).all(), f"off by {(error / bound).nan_to_num().max():.2f} times what rounding can do"
