"""MKL against oneDNN for the fp32 product behind the decoder, on this processor.

    .venv/bin/python benchmarks/bench_cpu_gemm.py

Products of [M, 3072] with chunks of [1344, 3072], as `kernels.linear` makes them; medians of turns taken in pairs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import checkout  # noqa: F401, binds the checkout
import torch
from graft.kernels import cpu

ROWS, COLUMNS, CHUNKS, TURNS = 1344, 3072, 4, 15
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


def mkl(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(x, weight.t(), out=out)


def onednn(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(cpu.onednn_linear(x, weight, None))


def milliseconds(product: Product, x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> float:
    begin = time.perf_counter()
    for weight, part in zip(weights, out.split(ROWS, dim=1), strict=True):
        product(x, weight, part)
    return 1000 * (time.perf_counter() - begin)


def main() -> None:
    weights = torch.randn(CHUNKS, ROWS, COLUMNS)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| rows of x | MKL | oneDNN | its share of the time |\n|---|---|---|---|")
    for m in (1, 2, 8, 32, 128, 384, 1024):
        x, out = torch.randn(m, COLUMNS), torch.empty(m, CHUNKS * ROWS)
        turns = [[milliseconds(way, x, weights, out) for way in (mkl, onednn)] for _ in range(TURNS)][1:]
        slow, quick = (statistics.median(column) for column in zip(*turns, strict=True))
        share = statistics.median(b / a for a, b in turns)
        print(f"| {m} | {slow:.1f} ms | {quick:.1f} ms | {share:.2f} |")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
