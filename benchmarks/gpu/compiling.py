"""The first stage: every kernel that the others launch is compiled, by many processes, into Triton's cache on disk."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from graft.kernels.formats import by_name

from .carried import stand_in_for
from .setting import Setting


@dataclass(frozen=True)
class Compiled:
    """A line of the CSV: a type's kernels and the seconds that they took; a note of those that did not compile."""

    type: str
    kernels: int
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.type:8} {self.kernels} kernels in {self.seconds:5.1f} s {self.note}"


def compile_type(name: str, device: torch.device) -> Compiled:
    """Decoding to each dtype and to int8, the matvec, the fused kernel in all tiles of this card, also with a LoRA;
    one row of x to the ranks of one."""
    from graft.kernels.triton_ import launch, plan

    fmt, start, done, failed = by_name(name), time.perf_counter(), 0, []
    book, bf16 = (torch.int32 if fmt.book else None), torch.bfloat16
    decoding = launch.dequantize_launch(fmt, launch.block_of(fmt, 4096))
    jobs = [
        (decoding, (torch.uint8, book, dtype, 4096)) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]  # fmt: skip
    if fmt.is_quantized:
        jobs.append((launch.int8_launch(fmt), (torch.uint8, book, torch.float32, torch.int8, 4096, 16)))
        jobs.append((launch.int8_largest_launch(fmt), (torch.uint8, book, torch.float32, 4096)))
    jobs.append((launch.project_launch(), (bf16, bf16, torch.float32, bf16, 4096, launch.RANK, 0)))
    for extra in (None, bf16):
        sizes = (4096, 4096, launch.RANK)
        matvec = launch.matvec_launch(fmt, launch.UNIT)
        jobs.append((matvec, (bf16, torch.uint8, book, bf16, extra, extra, extra, *sizes)))
        for tile in plan.tiles(plan.architecture(device)):
            matmul = launch.matmul_launch(fmt, tile)
            jobs.append((matmul, (bf16, torch.uint8, book, bf16, extra, extra, extra, tile.m, *sizes)))
    for job, arguments in jobs:
        try:
            job.compile(*arguments)
            done += 1
        except Exception as error:  # whatever a compiler may raise: the others may still run
            failed.append(f"{job.kernel.__name__}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return Compiled(name, done, time.perf_counter() - start, "; ".join(failed))


def compiling_for(architecture: str, setting: Setting) -> Iterator[Compiled]:
    """Without a GPU, for a card that is elsewhere: in processes with Triton's driver in its place."""
    with multiprocessing.get_context("spawn").Pool(setting.sizes.compilers, stand_in_for, (architecture,)) as pool:
        names = setting.sizes.checked_types
        yield from pool.imap_unordered(_compile_type, zip(names, itertools.repeat(setting.device)))


def compiling(setting: Setting) -> Iterator[Compiled]:
    """In as many processes as the sizes say; in the interpreter there is nothing to do."""
    from graft.kernels.triton_ import launch

    names = setting.sizes.checked_types
    if launch.interpreted():
        yield from (Compiled(name, 0, 0.0, "interpreted") for name in names)
        return
    with multiprocessing.get_context("spawn").Pool(setting.sizes.compilers, _bind) as pool:
        yield from pool.imap_unordered(_compile_type, zip(names, itertools.repeat(setting.device)))


def _bind() -> None:
    import checkout  # noqa: F401


def _compile_type(job: tuple[str, torch.device]) -> Compiled:
    return compile_type(*job)
