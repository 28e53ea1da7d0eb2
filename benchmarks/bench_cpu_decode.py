"""libgguf's decoders on its own threads and on the caller's alone, for as many weights as become int8 at a time.

    .venv/bin/python benchmarks/bench_cpu_decode.py

`kernels.cpu` decodes the types that one core decodes quickly without threads. Medians, in nanoseconds a weight.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import checkout  # noqa: F401, binds the checkout
import torch
from graft.kernels import FORMATS, cpu

ROWS, COLUMNS, TURNS = 320, 3072, 21


def nanoseconds(decode: Callable[[], None]) -> float:
    """Of one weight."""
    taken = []
    for _ in range(TURNS):
        begin = time.perf_counter_ns()
        decode()
        taken.append((time.perf_counter_ns() - begin) / (ROWS * COLUMNS))
    return statistics.median(taken)


def main() -> None:
    out, step = torch.empty(ROWS, COLUMNS), cpu.PIECE // COLUMNS
    print("| type | threads | alone | in kernels.cpu |\n|---|---|---|---|")
    for fmt in (fmt for fmt in FORMATS if fmt.is_quantized):
        size = COLUMNS // fmt.block_size * fmt.type_size
        data = torch.randint(0, 256, (ROWS, size), dtype=torch.uint8)

        def whole(fmt=fmt, data=data) -> None:
            cpu.decode_rows(data, fmt, out)

        def pieces(fmt=fmt, data=data) -> None:
            for start in range(0, ROWS, step):
                cpu.decode_rows(data[start : start + step], fmt, out[start : start + step])

        chosen = "alone" if fmt.name in cpu.QUICK else "threads"
        print(f"| {fmt} | {nanoseconds(whole):.2f} | {nanoseconds(pieces):.2f} | {chosen} |")


if __name__ == "__main__":
    main()
