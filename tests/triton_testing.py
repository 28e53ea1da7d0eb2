"""Where the Triton tests run, and what they watch. `import triton_testing` from any test.

On a machine with a GPU the kernels are compiled and run there; elsewhere, or with TRITON_INTERPRET=1, in Triton's
interpreter on the CPU. The tests are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from graft.kernels.triton_ import launch

INTERPRETED = launch.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def _repair_dot() -> None:
    """The interpreter multiplies bf16 matrices as the integers that it keeps them in: widen them first."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    _repair_dot()


def rounded(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 numbers as the kernels write them: to nearest even, but the interpreter cuts bf16 off."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return (weights.view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return weights.to(dtype)


@contextlib.contextmanager
def poisoned(rows: int, columns: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A ``[rows, columns]`` output full of NaN, which after the block still has NaN before and behind it."""
    guard = 64
    buffer = torch.full((rows * columns + 2 * guard,), float("nan"), dtype=dtype, device=DEVICE)
    yield buffer[guard:-guard].view(rows, columns)
    assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all(), "written outside of the output"


@contextlib.contextmanager
def watched(reads: Iterable[torch.Tensor | None], writes: torch.Tensor) -> Iterator[None]:
    """Fail on an access outside of these tensors; sees addresses in the interpreter only."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    readable = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in reads if t is not None]
    writable = [(writes.data_ptr(), writes.data_ptr() + writes.nbytes)]

    def check(pointers, mask, ranges, what: str) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        inside = np.zeros(at.shape, dtype=bool)
        for start, end in ranges:
            inside |= (at >= start) & (at + size <= end)
        assert inside.all(), f"{what} outside of the tensors"

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask, readable, "read")
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask, writable, "written")
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
