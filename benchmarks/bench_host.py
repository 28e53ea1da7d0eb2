"""What the host does in one call of a layer with one row of x, with a GPU that takes no time.

    .venv/bin/python benchmarks/bench_host.py

Triton's driver is a stand-in whose launches return at once, on tensors in main memory; everything else runs as it does
with a GPU: torch, Triton's own launch, and what lies between. Operations are torch's, those that only make a view, too.
Microseconds of processor time, the least of several rounds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)

import checkout  # noqa: F401, binds the checkout
import torch
from gpu.standin import stand_in
from graft.kernels import backends, by_name
from graft.ops.factors import FactorCache
from graft.ops.kinds import LoRA, Patch, Region
from graft.ops.layers import Linear
from graft.ops.packed import PackedTensor
from graft.ops.residual import ResidualStack
from torch.utils._python_dispatch import TorchDispatchMode

N, K, RANK = 768, 512, 16


class Counting(TorchDispatchMode):
    """Counts the operations within."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def microseconds(call: Callable[[], object], rounds: int = 9, calls: int = 500) -> float:
    """Of one call, in the quickest round."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            call()
        found.append((time.process_time() - start) / calls)
    return 1e6 * min(found)


def layer() -> Linear:
    """One with a Q4_K weight, and a bias in fp32 as GGUF files hold them."""
    fmt, found = by_name("Q4_K"), Linear(K, N)
    data = torch.zeros(N * fmt.row_bytes(K), dtype=torch.uint8)
    found.load_weight(PackedTensor(data, fmt, torch.Size((N, K)), torch.float32))
    found.bias = torch.nn.Parameter(torch.randn(N), requires_grad=False)
    return found


def patches(parts: int) -> list[Patch]:
    """A LoRA for each of so many parts of the rows, or for all rows at once."""
    rows = N // max(1, parts)
    regions = [None] if parts <= 1 else [Region(0, part * rows, rows) for part in range(parts)]
    return [Patch(1.0, LoRA(torch.randn(rows, RANK), torch.randn(RANK, K)), region=region) for region in regions]


def main() -> None:
    stand_in("sm_86")
    backends.choose.cache_clear()
    torch.set_num_threads(1)
    own, x = layer(), torch.randn(1, K).bfloat16()
    own.backend = "triton"
    layers = {"layer": own}
    print(f"torch {torch.__version__}\n\n| M = 1 | operations | host time |\n|---|---|---|")
    for name, parts in (("no LoRA", 0), ("a LoRA", 1), ("a LoRA for each of three parts", 3)):
        stack = ResidualStack({"layer.weight": patches(parts)} if parts else {})
        stack.build(layers, FactorCache(), x.dtype)
        with stack.active(layers, x.device):
            own(x)
            with Counting() as counting:
                own(x)
            print(f"| {name} | {counting.count} | {microseconds(lambda: own(x)):.0f} µs |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
