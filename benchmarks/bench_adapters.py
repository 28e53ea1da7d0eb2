"""What each kind of adapter costs beside its layer: `make bench-adapters`. Runs the adapters' tests first.

    python benchmarks/bench_adapters.py                       # tests, table, CSV in benchmarks/results/
    python benchmarks/bench_adapters.py --kinds "LoKr, factor 8" --layers proj --rows 384
    python benchmarks/bench_adapters.py --toy                 # that the script itself runs

Times are those of one call with the adapter over one without it, on Flux's largest layer and on an attention
projection. Beside them stand the ideal share, the adapter's own multiply-adds over the layer's, and the way that
rebuilds the weight on every call: decode, merge, matmul. Calls with and without the adapter alternate, so that a
machine that slows down slows both; each figure is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import checkout
import torch

from graft.kernels import by_name  # isort: skip  # `graft` exists once checkout is imported
from graft.ops import layers  # isort: skip
from graft.ops.adapters import Patch, from_host  # isort: skip
from graft.ops.packed import PackedTensor  # isort: skip
from graft.ops.factors import FactorCache  # isort: skip
from graft.ops.residual import ResidualStack  # isort: skip

LAYERS = {"linear1": (21504, 3072), "proj": (3072, 3072)}
ROWS = (384, 4096)
TESTS = ("tests/test_adapters.py", "tests/test_residual.py")
LEAST_PAIRS = 8
RESIDUAL_LIMIT = (2.0, 3.0)
"""A residual kind may cost twice its ideal share, and 3 % of the layer on top."""


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 0.02


def lora(rank: int) -> Callable[[int, int], tuple]:
    return lambda n, k: ("lora", (noise(n, rank), noise(rank, k), float(rank), None, None, None))


def loha(rank: int) -> Callable[[int, int], tuple]:
    def make(n: int, k: int) -> tuple:
        w1, w2 = (noise(n, rank), noise(rank, k)), (noise(n, rank), noise(rank, k))
        return ("loha", (*w1, 1.0, *w2, None, None, None))

    return make


def lokr(factor: int, rank: int | None = None) -> Callable[[int, int], tuple]:
    def make(n: int, k: int) -> tuple:
        b, d = n // factor, k // factor
        whole = noise(b, d) if rank is None else None
        a, c = (None, None) if rank is None else (noise(b, rank), noise(rank, d))
        return ("lokr", (noise(factor, factor), whole, 1.0, None, None, a, c, None, None))

    return make


def glora(rank: int) -> Callable[[int, int], tuple]:
    return lambda n, k: ("glora", (noise(k, rank), noise(rank, k), noise(n, rank), noise(rank, k), 1.0, None))


def dora(rank: int, axis: int) -> Callable[[int, int], tuple]:
    def make(n: int, k: int) -> tuple:
        kind, (up, down, alpha, mid, _, reshape) = lora(rank)(n, k)
        magnitude = torch.ones(n, 1) if axis == 0 else torch.ones(1, k)
        return (kind, (up, down, alpha, mid, magnitude, reshape))

    return make


def boft_shape(n: int, most: int) -> tuple[int, int]:
    """Stages and block size that LyCORIS takes for n outputs: an even size up to `most`, 2ᵖ blocks; 0, 0 if none."""
    size = max((b for b in range(2, most + 1, 2) if n % b == 0 and (n // b).bit_count() == 1), default=0)
    return ((n // size).bit_length(), size) if size else (0, 0)


def boft(most: int) -> Kind:
    def make(n: int, k: int) -> tuple:
        stages, size = boft_shape(n, most)
        return ("boft", (noise(stages, n // size, size, size), None, 0.0, None))

    return Kind(make, lambda n, k: math.prod(boft_shape(n, most)) * n)


@dataclass(frozen=True)
class Kind:
    """An adapter for a weight ``[n, k]``, and its multiply-adds for a row of input; 0 if there is none for n and k."""

    make: Callable[[int, int], tuple]
    macs: Callable[[int, int], float]
    count: int = 1


KINDS = {
    "LoRA, rank 32": Kind(lora(32), lambda n, k: 32 * (n + k)),
    "4 LoRAs, rank 32": Kind(lora(32), lambda n, k: 128 * (n + k), 4),
    "LoHa, rank 8": Kind(loha(8), lambda n, k: 64 * (n + k)),
    "LoKr, factor 8": Kind(lokr(8), lambda n, k: n * k / 8 + 8 * n),
    "LoKr, factor 8, rank 16": Kind(lokr(8, 16), lambda n, k: 16 * (n + k) + 8 * 8 * 16),
    "GLoRA, rank 32": Kind(glora(32), lambda n, k: 32 * (n + 3 * k)),
    "OFT, blocks of 64": Kind(lambda n, k: ("oft", (noise(n // 64, 64, 64), None, None, None)), lambda n, k: 64 * n),
    "BOFT, blocks up to 64": boft(64),
    "BOFT, blocks up to 8": boft(8),
    "DoRA, output axis, rank 32": Kind(dora(32, 0), lambda n, k: 32 * (n + k) + n),
    "DoRA, input axis, rank 32": Kind(dora(32, 1), lambda n, k: 32 * (n + k) + k),
    "full difference": Kind(lambda n, k: ("diff", (noise(n, k),)), lambda n, k: n * k),
}


@dataclass(frozen=True)
class Row:
    """A line of the CSV: ms of the layer alone; what the ways cost on top of it, in percent."""

    kind: str
    layer: str
    rows: int
    type: str
    dtype: str
    device: str
    layer_ms: float
    ideal_percent: float
    percent: float
    percent_p20: float
    percent_p80: float
    merge_percent: float


class Bench:
    """One layer, one number of rows."""

    def __init__(self, shape: tuple[int, int], rows: int, fmt_name: str, dtype: torch.dtype, seconds: float) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fmt = by_name(fmt_name)
        self.shape, self.seconds, self.device, self.dtype = shape, seconds, device, dtype
        self.layer = layers.Linear(shape[1], shape[0], bias=True)
        self.layer.load_weight(PackedTensor(random_weight(fmt_name, *shape), fmt, shape))
        self.layer.to(device)
        self.x = torch.randn(rows, shape[1], device=device, dtype=dtype)

    def stack(self, kind: Kind) -> ResidualStack:
        patches = [Patch(0.7, from_host(kind.make(*self.shape), self.shape)) for _ in range(kind.count)]
        return ResidualStack({"layer.weight": patches})

    def ratios(self, kind: Kind) -> tuple[float, list[float], list[float]]:
        """ms of the layer alone, and the ratios of both ways to it."""
        stack, named = self.stack(kind), {"layer": self.layer}
        stack.build(named, FactorCache(), self.dtype).to(self.device)
        beside = stack.running(named, self.device)["layer"]
        merging = [p.adapter for p in stack.patches["layer.weight"]]

        def alone() -> None:
            self.layer(self.x)

        def with_residual() -> None:
            self.layer.residual = beside
            self.layer(self.x)
            self.layer.residual = None

        def with_merge() -> None:
            weight = self.layer.dequantized(dtype=torch.float32)
            for adapter in merging:
                weight = adapter.merged(weight, 0.7)
            self.layer.compute_dense(self.x, weight.to(self.x.dtype), self.layer.bias)

        base, residual = self.pairs(alone, with_residual)
        merged_base, merged = self.pairs(alone, with_merge, fewer=4)
        return (
            statistics.median(base), [b / a for a, b in zip(base, residual, strict=True)],
            [b / a for a, b in zip(merged_base, merged, strict=True)],
        )  # fmt: skip

    def pairs(
        self, first: Callable[[], None], second: Callable[[], None], fewer: int = 1
    ) -> tuple[list[float], list[float]]:
        """Times of both in ms, taken by turns."""
        for call in (first, second):
            self.time(call)
        found: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + self.seconds / fewer
        while len(found[0]) < LEAST_PAIRS // fewer or time.perf_counter() < end:
            for times, call in zip(found, (first, second), strict=True):
                times.append(self.time(call))
        return found

    def time(self, call: Callable[[], None]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1000
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def random_weight(fmt_name: str, rows: int, columns: int) -> torch.Tensor:
    """Bytes of a normal random matrix; its first rows repeat, which is quick to make and costs the same to run."""
    import libgguf

    few = torch.randn(min(rows, 64), columns)
    packed = torch.from_numpy(libgguf.quantize_rows(few.numpy(), by_name(fmt_name).ggml_type)).view(torch.uint8)
    return packed.reshape(len(few), -1).repeat(math.ceil(rows / len(few)), 1)[:rows].contiguous()


def measure(args: argparse.Namespace) -> list[Row]:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    found = []
    for name, shape in ({"toy": (512, 512)} if args.toy else {name: LAYERS[name] for name in args.layers}).items():
        for rows in (8,) if args.toy else args.rows:
            bench = Bench(shape, rows, args.type, dtype, 0.0 if args.toy else args.seconds)
            for label in args.kinds:
                macs = KINDS[label].macs(*shape)
                if not macs:
                    continue
                ms, beside, merged = bench.ratios(KINDS[label])
                low, _, _, high = statistics.quantiles(beside, n=5)
                ideal = 100 * macs / math.prod(shape)
                found.append(Row(
                    label, name, rows, args.type, args.dtype, device_name(), ms, ideal,
                    percent(statistics.median(beside)), percent(low), percent(high), percent(statistics.median(merged)),
                ))  # fmt: skip
                print(line(found[-1]), flush=True)
    return found


def device_name() -> str:
    """Of the GPU, or of the processor with what it can and how many threads are used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def line(row: Row) -> str:
    factor, slack = RESIDUAL_LIMIT
    verdict = "" if row.percent <= factor * row.ideal_percent + slack else "  over its limit"
    return (
        f"{row.kind:28}{row.layer:>9}{row.rows:6}{row.layer_ms:10.2f} ms {row.ideal_percent:7.1f} %"
        f"{row.percent:8.1f} % [{row.percent_p20:.1f}, {row.percent_p80:.1f}]{row.merge_percent:9.0f} %{verdict}"
    )


def write(path: Path, rows: list[Row]) -> None:
    """Rows that were measured before and not now stay in the file, if they are of the same machine."""
    names = [f.name for f in fields(Row)]
    table = {}
    if path.exists():
        with path.open(newline="") as file:
            table = {_place(row): row for row in csv.DictReader(file) if row.get("device") == rows[0].device}
    table |= {_place(row): row for row in map(asdict, rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(table.values())


def _place(row: dict) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("kind", "layer", "rows", "type", "dtype"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--type", default="Q4_K", help="the layer's format")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="bf16 on a GPU, fp32 without one")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--csv", type=Path, default=checkout.ROOT / "benchmarks" / "results" / "adapters.csv")
    parser.add_argument("--toy", action="store_true", help="a tiny layer, once: that the script runs")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    if not args.toy and subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=checkout.ROOT).returncode:
        sys.exit("the tests fail: nothing is measured")
    torch.manual_seed(0)
    print(f"{device_name()}, torch {torch.__version__}, {args.type}, {args.dtype}")
    print(f"{'kind':28}{'layer':>9}{'rows':>6}{'alone':>13} {'ideal':>9}{'beside':>10} [p20, p80]{'merged':>8}")
    with torch.inference_mode():
        rows = measure(args)
    if not args.toy:
        write(args.csv, rows)
        print(f"wrote {args.csv}")


if __name__ == "__main__":
    main()
