"""int8 products against the usual ones on this processor: time and errors of layers, and pictures of the demo model.

    .venv/bin/python benchmarks/bench_int8.py            # --types, --rows, --turns, --only

time        Flux's linear1 cut to a quarter of its rows and all of linear2, with 0, 1 and 4 LoRAs of rank 32; medians of
            turns in which both ways take a call each, and in brackets where the middle three fifths of the turns lie.
            With --cpu-time that of this process, where others use the machine, too: with OMP_NUM_THREADS=1
errors      of a layer's output against fp32 on the decoded weights, for five kinds of activations; own: the type's
pictures    of 20 steps: how far they are from those in fp32, and the share of a LoRA's effect that is kept in one call
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import checkout  # noqa: F401, binds the checkout
import libgguf
import numpy as np
import torch
import torch.nn.functional as F
from graft.demo import pictures
from graft.demo.grafted import Grafted, load_model, shipped
from graft.kernels import LowRank, by_name, dequantize, has_fast_bf16, int8, linear
from graft.ops.int8 import Rule, use_int8
from graft.ops.layers import packed_layers
from graft.tests import activations

PARTS = ("time", "errors", "pictures")
SHAPES = {"linear1": (5376, 3072), "linear2": (3072, 15360)}
LORAS = (0, 1, 4)
RANK = 32
STYLES = ("neon", "blueprint", "linocut")
PROMPTS = ("a red star and a blue ring on mint", "a pink heart on cream", "a yellow star on sky")
# the demo's layers are 256 wide
SMALL = Rule(columns=256, rows=256, finer=frozenset())


def packed(weights: np.ndarray, type_name: str) -> torch.Tensor:
    return torch.from_numpy(libgguf.quantize_rows(weights, by_name(type_name).ggml_type).view(np.uint8))


def matrix(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)


def low_rank(rows: int, columns: int, count: int) -> LowRank | None:
    ranks = RANK * count
    down, up = torch.randn(ranks, columns), torch.randn(rows, ranks)
    return LowRank(down, torch.ones(ranks), ((0, 0, up),)) if count else None


def milliseconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    call()
    return 1000 * (clock() - begin)


def times(options: argparse.Namespace) -> None:
    dtype = torch.bfloat16 if has_fast_bf16() else torch.float32
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"\n{'CPU time' if options.cpu_time else 'time'}, x in {str(dtype).removeprefix('torch.')}\n")
    print("| type | layer | rows of x | LoRAs | usual | int8 | its share of the time |\n|---|---|---|---|---|---|---|")
    for type_name in options.types:
        for name, (n, k) in SHAPES.items():
            data = packed(matrix(n, k), type_name)
            scales, _ = int8.prepare(data, type_name, (n, k))
            for m in options.rows:
                x = torch.randn(m, k).to(dtype)
                for count in LORAS:
                    terms = low_rank(n, k, count)
                    ways = (
                        partial(linear, x, data, type_name, None, terms, n),
                        partial(int8.linear, x, data, type_name, scales, None, terms),
                    )
                    turns = [[milliseconds(way, clock) for way in ways] for _ in range(options.turns + 1)][1:]
                    usual, ours = (statistics.median(column) for column in zip(*turns, strict=True))
                    shares = sorted(b / a for a, b in turns)
                    fifth = len(shares) // 5
                    spread = f"{shares[fifth]:.2f} to {shares[-1 - fifth]:.2f}"
                    cells = (type_name, name, m, count, f"{usual:.0f} ms", f"{ours:.0f} ms", statistics.median(shares))
                    print("| {} | {} | {} | {} | {} | {} | {:.2f} ({}) |".format(*cells, spread), flush=True)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def errors(options: argparse.Namespace) -> None:
    n, k, m = 256, 3072, 256
    print("\n| type | activations | int8 | bf16 | own |\n|---|---|---|---|---|")
    for type_name in options.types:
        weights = matrix(n, k)
        data = packed(weights, type_name)
        scales, _ = int8.prepare(data, type_name, (n, k))
        decoded = dequantize(data, type_name, (n, k))
        for kind, make in activations.KINDS.items():
            x = make(m, k)
            want = F.linear(x, decoded)
            narrow = F.linear(x.bfloat16(), decoded.bfloat16())
            found = (int8.linear(x, data, type_name, scales), narrow, F.linear(x, torch.from_numpy(weights)))
            cells = " | ".join(f"{relative(y, want):.2%}" for y in found)
            print(f"| {type_name} | {kind} | {cells} |", flush=True)


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * (a - b).square().mean().log10().item()


def drawn(text: str) -> None:
    """Pictures of one of the demo's files, without a LoRA and with each of its own."""
    plain, quick = load_model(shipped(text)), load_model(shipped(text))
    use_int8(packed_layers(quick), rule=SMALL)
    inputs = (
        pictures.beside_places(pictures.noise(7, 2)),
        torch.full((2,), 750.0),
        pictures.prompts([PROMPTS[0], ""]),
    )
    both = [pictures.sample(model, PROMPTS, seed=7) for model in (quick, plain)]
    print(f"| {text} | none | {decibels(*both):.1f} dB |  |", flush=True)
    base, exact = quick(*inputs), plain(*inputs)
    for style in STYLES:
        models = [Grafted(model, {style: 1.0}) for model in (quick, plain)]
        effect, true = models[0](*inputs) - base, models[1](*inputs) - exact
        kept = ((effect * true).sum() / true.square().sum()).item()
        both = [pictures.sample(model, PROMPTS, seed=7) for model in models]
        print(f"| {text} | {style} | {decibels(*both):.1f} dB | {kept:.4f} |", flush=True)
    if not torch.equal(quick(*inputs), base):
        raise SystemExit("the base changed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["Q4_K", "Q6_K", "Q8_0"])
    parser.add_argument("--rows", nargs="+", type=int, default=[128, 256, 384, 1152, 4608])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    options = parser.parse_args()
    if reason := int8.unavailable(torch.device("cpu")):
        raise SystemExit(reason)
    int8.LEAST_ROWS = int8.LEAST_ROWS_BF16 = 1  # also where it does not pay
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "errors" in options.only:
        errors(options)
    if "pictures" in options.only:
        print("\n| file | LoRA | pictures | effect kept |\n|---|---|---|---|")
        for name in ("Q4_K_M.gguf", "Q8_0.gguf"):
            drawn(name)
    if "time" in options.only:
        times(options)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
