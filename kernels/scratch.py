"""Memory that decoded weights pass through on their way into a matmul.

A fresh allocation for every layer costs more than the decoding (page faults on a CPU, allocator
pressure on a GPU), so each thread and stream reuses one buffer of bounded size: larger weights pass
through it in chunks of rows, which is exact because rows are independent. Where memory runs out, what
lies here is given back and chunks are halved (`retried`).
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from .errors import OutOfMemory, TorchOutOfMemory

# On a CPU a chunk should still be in the last-level cache when the matmul reads it; on a GPU it should
# be large enough for the vendor's GEMM to reach full speed.
CPU_BYTES = 16 << 20
# and to hold Flux's largest weight whole (126 MiB in bf16): a chunk is written into a slice of the output, for which
# torch adds the bias in a pass of its own
GPU_BYTES = 128 << 20
# what a decoder that writes fp32 passes through on its way to another dtype
STAGING_BYTES = 6 << 20
# of activations that are changed before a layer reads them: those of 4096 tokens, 4096 wide, in fp32
LENT_BYTES = 64 << 20
# of a chunk, where memory is so full that it has to be halved again and again
SMALLEST_BYTES = 1 << 20

_local = threading.local()

_Function = TypeVar("_Function", bound=Callable)
# of CPUs, whose allocator raises a plain RuntimeError, on Linux and on Windows; of MPS; of what C++ allocates itself
_FULL = re.compile("can't allocate|not enough memory|out of memory|bad_alloc")
# of oneDNN, which multiplies bf16 and fp16 on CPUs: it never says why, which is full memory as a rule
_UNTOLD = re.compile("could not (create|execute) a ")


def rows_per_chunk(
    device: torch.device, columns: int, dtype: torch.dtype, limit: int | None = None, rows: int = 0
) -> int:
    """How many rows of `columns` weights in `dtype` pass through the scratch at a time; at least one.

    `limit` is in bytes; by default the device's. If there are `rows` in all, chunks are about equally large: the last
    one, too, keeps the GEMM busy.
    """
    limit = limit or _chunk_bytes(device)
    most = max(1, limit // (columns * dtype.itemsize))
    # whole tiles of the GEMM, where there are several
    tile = 64 if most >= 64 else 1
    most -= most % tile
    if rows <= most:
        return most
    even = -(-rows // -(-rows // most))
    return even + -even % tile


def _chunk_bytes(device: torch.device) -> int:
    usual = CPU_BYTES if device.type == "cpu" else GPU_BYTES
    if torch.compiler.is_compiling():  # which does not read what belongs to a thread
        return usual
    return min(usual, max(SMALLEST_BYTES, usual >> _halvings()[device]))


def _halvings() -> Counter[torch.device]:
    """How often chunks on a device have been halved since this thread's scratch was given back."""
    return _local.__dict__.setdefault("halvings", Counter())


def is_full(error: BaseException) -> bool:
    """Whether memory of some device ran out, by the words of torch's allocators where its class does not tell."""
    told = isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None
    return told or isinstance(error, (MemoryError, TorchOutOfMemory))


def retried(function: _Function) -> _Function:
    """Where memory runs out in `function`, let it run again with an empty scratch and chunks half as large.

    Its first tensor is on the device in question; what it returns it must write anew. So is done after an error that
    does not say whether memory ran out, which is raised itself if that does not help.

    Raises:
        OutOfMemory: chunks are as small as they get.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        while True:
            try:
                return function(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                full = is_full(error)
                if isinstance(error, OutOfMemory) or not (full or _UNTOLD.search(str(error))):
                    raise
                device = next(tensor.device for tensor in args if isinstance(tensor, torch.Tensor))
                if _chunk_bytes(device) <= SMALLEST_BYTES:
                    if not full:
                        raise
                    raise OutOfMemory(
                        f"the memory of {device} is full, even for {SMALLEST_BYTES >> 20} MiB of decoded weights at a "
                        "time: make the picture or the batch smaller, or take a file with fewer bits"
                    ) from error
            # only here, where the error no longer holds what the function had in memory
            _shrink(device)

    return run  # type: ignore[return-value]


def _shrink(device: torch.device) -> None:
    _local.__dict__.pop("buffers", None)
    _halvings()[device] += 1
    # torch.cuda, torch.mps, torch.xpu: what their allocators keep is of sizes that nobody asks for now
    getattr(getattr(torch, device.type, None), "empty_cache", lambda: None)()


def take(device: torch.device, rows: int, columns: int, dtype: torch.dtype, slot: str = "") -> torch.Tensor:
    """A ``[rows, columns]`` view of this thread's and stream's scratch; its contents are undefined.

    Two takes with different `slot` do not overlap; a later take with the same slot reuses the memory.
    """
    if _is_captured(device):
        # what a graph is captured with belongs to the graph, which writes there whenever it is replayed
        return torch.empty(rows, columns, dtype=dtype, device=device)
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


def _is_captured(device: torch.device) -> bool:
    """Whether what runs now on `device` becomes a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
    """Give this thread's scratch back to the allocator; chunks are as large again as they usually are."""
    _local.__dict__.pop("buffers", None)
    _local.__dict__.pop("halvings", None)
