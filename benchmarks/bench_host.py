"""What the host does in one call of a layer with one row of x, with a GPU that takes no time.

    .venv/bin/python benchmarks/bench_host.py
    .venv/bin/python benchmarks/bench_host.py --against CHECKOUT    # of an earlier version, in turn with it

Triton's driver is a stand-in whose launches return at once, on tensors in main memory; everything else runs as it does
with a GPU: torch, Triton's own launch, and what lies between. x is in fp16, in which torch's own small products take
about as long on a processor as launching them does. Operations are torch's, those that only make a view, too.
Microseconds of processor time, the least of several rounds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import checkout
import torch
from gpu.standin import stand_in
from graft.kernels import backends, by_name, cpu
from graft.ops.kinds import LoRA, Patch, Region
from graft.ops.layers import Linear
from graft.ops.packed import PackedTensor
from graft.ops.residual import FactorCache, ResidualStack
from torch.utils._python_dispatch import TorchDispatchMode

N, K, RANK = 768, 512, 16
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CASES = {"no LoRA": 0, "a LoRA": 1, "a LoRA for each of three parts": 3}
"""How many parts have a LoRA."""
ROUNDS, CALLS = 25, 500


class Counting(TorchDispatchMode):
    """Counts the operations within."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """Of one call."""
    start = time.process_time()
    for _ in range(calls):
        call()
    return 1e6 * (time.process_time() - start) / calls


def layer() -> Linear:
    """One with a Q4_K weight, and a bias in fp32 as GGUF files hold them."""
    fmt, found = by_name("Q4_K"), Linear(K, N)
    data = torch.zeros(N * fmt.row_bytes(K), dtype=torch.uint8)
    found.load_weight(PackedTensor(data, fmt, torch.Size((N, K)), torch.float32))
    found.bias = torch.nn.Parameter(torch.randn(N), requires_grad=False)
    found.backend = "triton"
    return found


def patches(parts: int) -> list[Patch]:
    """A LoRA for each of so many parts of the rows, or for all rows at once."""
    rows = N // max(1, parts)
    regions = [None] if parts <= 1 else [Region(0, part * rows, rows) for part in range(parts)]
    return [Patch(1.0, LoRA(torch.randn(rows, RANK), torch.randn(RANK, K)), region=region) for region in regions]


@contextmanager
def calling(parts: int, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """A call of a layer with so many LoRAs, that has run once."""
    own, x = layer(), torch.randn(1, K).to(dtype)
    layers = {"layer": own}
    stack = ResidualStack({"layer.weight": patches(parts)} if parts else {})
    stack.build(layers, FactorCache(), x.dtype)
    with stack.active(layers, x.device):
        own(x)
        yield lambda: own(x)


def answer(dtype: torch.dtype) -> None:
    """For each case that is asked for, a line: the operations of a call, and microseconds of one in a round."""
    stand_in("sm_86")
    backends.choose.cache_clear()
    cpu.SLOW_DTYPES = frozenset()  # as a GPU has none
    torch.set_num_threads(1)
    for case in sys.stdin:
        with calling(CASES[case.strip()], dtype) as call:
            with Counting() as counting:
                call()
            print(counting.count, microseconds(call), flush=True)


def process(root: Path) -> subprocess.Popen[str]:
    """One that answers, of a checkout."""
    command = [sys.executable, __file__, "--answer", *sys.argv[1:]]
    environment = os.environ | {"GRAFT_CHECKOUT": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(which: subprocess.Popen[str], case: str) -> tuple[int, float]:
    assert which.stdin is not None and which.stdout is not None
    which.stdin.write(f"{case}\n")
    which.stdin.flush()
    count, taken = which.stdout.readline().split()
    return int(count), float(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, an earlier version")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of x (default: fp16)")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        with torch.inference_mode():
            answer(DTYPES[options.dtype])
        return
    roots = [root.absolute() for root in (options.against, checkout.ROOT) if root]
    processes = [process(root) for root in roots]
    columns = ["before", "now", "its share"] if options.against else ["now"]
    print(f"torch {torch.__version__}, x in {options.dtype}\n")
    print(f"| M = 1: operations, host time | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for case in CASES:
        turns = [[ask(which, case) for which in processes] for _ in range(ROUNDS)]
        found = [min(answers) for answers in zip(*turns, strict=True)]
        cells = [f"{count}, {taken:.1f} µs" for count, taken in found]
        cells += [f"{found[1][1] / found[0][1]:.2f}"] if options.against else []
        print(f"| {case} | {' | '.join(cells)} |", flush=True)
    for which in processes:
        which.communicate()


if __name__ == "__main__":
    main()
