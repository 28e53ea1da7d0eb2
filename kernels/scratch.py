"""Memory that decoded weights pass through on their way into a matmul.

A fresh allocation for every layer costs more than the decoding (page faults on a CPU, allocator
pressure on a GPU), so each thread and stream reuses one buffer of bounded size: larger weights pass
through it in chunks of rows, which is exact because rows are independent.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

# On a CPU a chunk should still be in the last-level cache when the matmul reads it; on a GPU it should
# be large enough for the vendor's GEMM to reach full speed.
CPU_BYTES = 16 << 20
GPU_BYTES = 64 << 20
# what a decoder that writes fp32 passes through on its way to another dtype
STAGING_BYTES = 6 << 20
# of activations that are changed before a layer reads them: those of 4096 tokens, 4096 wide, in fp32
LENT_BYTES = 64 << 20

_local = threading.local()


def rows_per_chunk(device: torch.device, columns: int, dtype: torch.dtype, limit: int | None = None) -> int:
    """How many rows of `columns` weights in `dtype` pass through the scratch at a time; at least one.

    `limit` is in bytes; by default the device's.
    """
    limit = limit or (CPU_BYTES if device.type == "cpu" else GPU_BYTES)
    rows = max(1, limit // (columns * dtype.itemsize))
    # whole tiles of the GEMM, where there are several
    return rows if rows < 64 else rows - rows % 64


def take(device: torch.device, rows: int, columns: int, dtype: torch.dtype, slot: str = "") -> torch.Tensor:
    """A ``[rows, columns]`` view of this thread's and stream's scratch; its contents are undefined.

    Two takes with different `slot` do not overlap; a later take with the same slot reuses the memory.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffers: dict[tuple, torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    key = (device, stream, dtype, slot)
    size = rows * columns
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < size:
        buffers.pop(key, None)
        # under inference_mode a cached tensor would be unusable outside of it
        with torch.inference_mode(False):
            buffer = buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(rows, columns)


def reuses(x: torch.Tensor) -> bool:
    """Whether what is made of x is to lie here: not on a GPU, whose allocator keeps memory, nor if autograd needs it
    later or a compiler plans it."""
    return x.device.type == "cpu" and not x.requires_grad and not torch.compiler.is_compiling()


@contextlib.contextmanager
def lent(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Memory for a changed copy of x as long as the block lasts; blocks inside of it get other memory."""
    depth = getattr(_local, "lent", 0)
    _local.lent = depth + 1
    try:
        yield take(x.device, 1, x.numel(), x.dtype, f"lent {depth}").view(x.shape)
    finally:
        _local.lent = depth


def release() -> None:
    """Give this thread's scratch back to the allocator."""
    _local.__dict__.pop("buffers", None)
