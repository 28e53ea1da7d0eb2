"""The Triton kernels on this GPU: `make bench-gpu`. Runs the GPU tests first, and measures nothing if they fail.

    python benchmarks/bench_gpu.py                     # tests, everything, CSV and plot in benchmarks/results/
    python benchmarks/bench_gpu.py --types Q4_K --only linear
    python benchmarks/bench_gpu.py --tune tiles.json   # which tile and which M for `kernels/triton_/plan.py`
    TRITON_INTERPRET=1 python benchmarks/bench_gpu.py --toy --device cpu   # that the script itself runs

Against bf16 `F.linear` on the decoded weight, a decode in torch before every `F.linear`, and, given its folder in
COMFYUI_GGUF (and that of a second version in COMFYUI_GGUF_TRITON), city96/ComfyUI-GGUF's decode before every
`F.linear`. Times are medians with their 20 and 80 % quantiles, each run from a cold L2 cache.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
if "graft" not in sys.modules:  # the checkout, whatever its folder is called
    sys.modules["graft"] = types.ModuleType("graft")
    sys.modules["graft"].__path__ = [str(ROOT)]

from graft.kernels import dispatch  # noqa: E402
from graft.kernels.formats import Format, by_name  # noqa: E402

TYPES = ("Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S")
ROWS = (1, 2, 16, 77, 256, 512, 1024, 4608, 8192)
# N and K of Flux's layers: modulation, qkv with the MLP, attention's and the MLP's way back
SHAPES = ((18432, 3072), (21504, 3072), (3072, 3072), (3072, 15360))
RANK = 32
TUNED_ROWS = (2, 8, 16, 32, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `toy` is for a check of the script, in the interpreter."""

    types: tuple[str, ...] = TYPES
    rows: tuple[int, ...] = ROWS
    shapes: tuple[tuple[int, int], ...] = SHAPES
    width: int = 3072
    heads: int = 24
    image_tokens: int = 4096
    text_tokens: int = 512
    loras: tuple[int, ...] = (0, 1, 4)
    seconds: float = 0.3


TOY = Sizes(
    ("Q8_0",), (1, 2), ((8, 256),), width=32, heads=2, image_tokens=3, text_tokens=2,
    loras=(0, 1), seconds=0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the CSV: times in ms; rates in GB/s; share of the measured copy bandwidth; memory in MiB."""

    what: str
    variant: str
    type: str
    n: int
    k: int
    m: int
    loras: int
    p20: float
    p50: float
    p80: float
    rate: float | None = None
    share: float | None = None
    peak: float | None = None


class Clock:
    """Times a call on one device, from a cold L2 cache on a GPU."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.gpu = device.type == "cuda"
        self.flush = torch.empty(256 << 20 if self.gpu else 1, dtype=torch.uint8, device=device)

    def once(self, run: Callable[[], object]) -> float:
        """One run, in ms."""
        self.flush.zero_()
        if not self.gpu:
            start = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end)

    def __call__(self, run: Callable[[], object]) -> tuple[float, float, float]:
        """The 20, 50 and 80 % quantiles of many runs, in ms."""
        run()  # compiles
        first = self.once(run)
        count = max(1, min(200, int(1000 * self.seconds / max(first, 1e-3))))
        times = torch.tensor([self.once(run) for _ in range(count)])
        p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        return p20, p50, p80

    def peak(self, run: Callable[[], object]) -> float | None:
        """MiB allocated at most while running, beyond what was before."""
        if not self.gpu:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def packed(fmt: Format, n: int, k: int, device: torch.device) -> torch.Tensor:
    """Random bytes with small scales: u8 [n, row_bytes]."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (n, fmt.row_bytes(k)), dtype=torch.uint8, generator=generator)
    # the high byte of fp16 scales, wherever they are: exponents of about 2^-8. Times do not depend on the rest
    data.view(-1, fmt.type_size)[:, 1::2] &= 0x9F
    return data.to(device)


def low_rank(n: int, k: int, loras: int, device: torch.device, dtype: torch.dtype) -> dispatch.LowRank | None:
    """`loras` adapters of rank 32 on a layer, concatenated."""
    if not loras:
        return None
    rank = loras * RANK
    down, up = (torch.randn(*shape, device=device, dtype=dtype) * 0.02 for shape in ((rank, k), (n, rank)))
    return dispatch.LowRank(down, torch.ones(rank, device=device), ((0, 0, up),))


Linear = Callable[[torch.Tensor, torch.Tensor, Format, "dispatch.LowRank | None"], torch.Tensor]


def graft_linear(backend: str) -> Linear:
    def run(x, data, fmt, residual):
        return dispatch.linear(x, data, fmt, None, residual, backend=backend)

    return run


def torch_linear(x: torch.Tensor, data: torch.Tensor, fmt: Format, residual: dispatch.LowRank | None) -> torch.Tensor:
    """A decode in torch into fresh memory, LoRAs patched into the weight as a host does it."""
    shape = (data.shape[0], x.shape[-1])
    return F.linear(x, patched(dispatch.dequantize(data, fmt, shape, x.dtype, backend="torch"), residual))


def patched(weight: torch.Tensor, residual: dispatch.LowRank | None) -> torch.Tensor:
    for start in range(0, residual.down.shape[0] if residual else 0, RANK):
        part = slice(start, start + RANK)
        weight = weight + residual.ups[0][2][:, part] @ residual.down[part]
    return weight


@cache
def city96_decode(folder: str) -> ModuleType:
    """`dequant.py` of a checkout of ComfyUI-GGUF."""
    spec = importlib.util.spec_from_file_location(f"city96_{abs(hash(folder))}", Path(folder) / "dequant.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def others(fmt: Format) -> dict[str, Linear]:
    """What to compare with besides `F.linear`: those that have a decode of `fmt` on the GPU."""
    found: dict[str, Linear] = {"torch decode": torch_linear}
    for name, variable in (("city96", "COMFYUI_GGUF"), ("city96 triton", "COMFYUI_GGUF_TRITON")):
        if not os.environ.get(variable):
            continue
        from gguf import GGMLQuantizationType

        module, kind = city96_decode(os.environ[variable]), GGMLQuantizationType[fmt.name]
        if kind not in module.dequantize_functions:
            continue

        def run(x, data, fmt, residual, module=module, kind=kind):
            weight = module.dequantize(data, kind, (data.shape[0], x.shape[-1]), dtype=None).to(x.dtype)
            return F.linear(x, patched(weight, residual))

        found[name] = run
    return found


def copy_rate(clock: Clock, device: torch.device) -> float:
    """GB/s that a device-to-device copy reads and writes: what `share` is a share of."""
    source = torch.empty(512 << 20 if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock(lambda: target.copy_(source))[1] / 1e6


def bench_dequantize(sizes: Sizes, clock: Clock, device: torch.device, backend: str) -> Iterator[Row]:
    """Decoding to bf16, for the first shape; rate and share count the bytes read and written."""
    copy = copy_rate(clock, device)
    n, k = sizes.shapes[0]
    for name in sizes.types:
        fmt = by_name(name)
        data = packed(fmt, n, k, device)
        for variant in (backend, "torch"):
            times = clock(lambda v=variant: dispatch.dequantize(data, fmt, (n, k), torch.bfloat16, backend=v))  # noqa: B023
            rate = (data.numel() + 2 * n * k) / times[1] / 1e6
            label = "graft" if variant == backend else "torch decode"
            yield Row("dequantize", label, name, n, k, 0, 0, *times, rate=rate, share=rate / copy)


def bench_matvec(sizes: Sizes, clock: Clock, device: torch.device, backend: str) -> Iterator[Row]:
    """One row of x; rate and share count the packed bytes."""
    copy = copy_rate(clock, device)
    n, k = sizes.shapes[0]
    x = torch.randn(1, k, device=device, dtype=torch.bfloat16)
    for name in sizes.types:
        fmt = by_name(name)
        data = packed(fmt, n, k, device)
        times = clock(lambda: dispatch.linear(x, data, fmt, backend=backend))  # noqa: B023
        rate = data.numel() / times[1] / 1e6
        yield Row("matvec", "graft", name, n, k, 1, 0, *times, rate=rate, share=rate / copy)


def bench_linear(sizes: Sizes, clock: Clock, device: torch.device, backend: str) -> Iterator[Row]:
    """Every M, shape and type, with 0, 1 and 4 LoRAs."""
    for n, k in sizes.shapes:
        dense = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        for m in sizes.rows:
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            yield Row("linear", "F.linear", "BF16", n, k, m, 0, *clock(lambda: F.linear(x, dense)))  # noqa: B023
            for name in sizes.types:
                fmt = by_name(name)
                data = packed(fmt, n, k, device)
                for loras in sizes.loras:
                    term = low_rank(n, k, loras, device, x.dtype)
                    for variant, run in ({"graft": graft_linear(backend)} | others(fmt)).items():
                        def call(run=run, x=x, data=data, fmt=fmt, term=term):
                            return run(x, data, fmt, term)

                        yield Row("linear", variant, name, n, k, m, loras, *clock(call), peak=clock.peak(call))


class Block:
    """A double and a single block of Flux: its linear layers, attention and modulation, norms left out."""

    def __init__(self, sizes: Sizes, fmt: Format | None, loras: int, device: torch.device) -> None:
        d, self.heads = sizes.width, sizes.heads
        self.image = torch.randn(sizes.image_tokens, d, device=device, dtype=torch.bfloat16)
        self.text = torch.randn(sizes.text_tokens, d, device=device, dtype=torch.bfloat16)
        self.vector = torch.randn(1, d, device=device, dtype=torch.bfloat16)
        shapes = {"single.modulation": (3 * d, d), "single.linear1": (7 * d, d), "single.linear2": (d, 5 * d)}
        for stream in ("image", "text"):
            shapes |= {
                f"{stream}.modulation": (6 * d, d), f"{stream}.qkv": (3 * d, d), f"{stream}.proj": (d, d),
                f"{stream}.up": (4 * d, d), f"{stream}.down": (d, 4 * d),
            }  # fmt: skip
        self.fmt = fmt
        self.weights = {name: self._weight(n, k, device) for name, (n, k) in shapes.items()}
        self.terms = {name: low_rank(n, k, loras, device, torch.bfloat16) for name, (n, k) in shapes.items()}

    def _weight(self, n: int, k: int, device: torch.device) -> torch.Tensor:
        if self.fmt is not None:
            return packed(self.fmt, n, k, device)
        return 0.02 * torch.randn(n, k, device=device, dtype=torch.bfloat16)

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)

    def step(self, linear: Linear) -> torch.Tensor:
        def layer(name: str, x: torch.Tensor) -> torch.Tensor:
            return linear(x, self.weights[name], self.fmt, self.terms[name])  # type: ignore[arg-type]

        streams = {"image": self.image, "text": self.text}
        shift = {name: layer(f"{name}.modulation", self.vector).chunk(6, 1) for name in streams}
        qkv = torch.cat([layer(f"{name}.qkv", x + shift[name][0]) for name, x in streams.items()])
        mixed = dict(zip(streams, self.attend(qkv).split([len(self.image), len(self.text)]), strict=True))
        for name in streams:
            x = streams[name] + shift[name][1] * layer(f"{name}.proj", mixed[name])
            streams[name] = x + shift[name][2] * layer(f"{name}.down", F.gelu(layer(f"{name}.up", x + shift[name][3])))
        x = torch.cat(list(streams.values()))
        scale = layer("single.modulation", self.vector).chunk(3, 1)
        wide = layer("single.linear1", x + scale[0])
        qkv, mlp = wide.split([3 * x.shape[1], 4 * x.shape[1]], 1)
        return x + scale[1] * layer("single.linear2", torch.cat((self.attend(qkv), F.gelu(mlp)), 1))


def bench_step(sizes: Sizes, clock: Clock, device: torch.device, backend: str) -> Iterator[Row]:
    """Two Flux blocks on 4096 image and 512 text tokens."""
    m = sizes.image_tokens + sizes.text_tokens

    def dense(x, weight, fmt, term):
        return F.linear(x, weight)

    block = Block(sizes, None, 0, device)
    yield Row("step", "F.linear", "BF16", 0, sizes.width, m, 0, *clock(lambda: block.step(dense)))
    for name in sizes.types:
        for loras in sizes.loras:
            quantized = Block(sizes, by_name(name), loras, device)
            for variant, run in ({"graft": graft_linear(backend)} | others(by_name(name))).items():
                def call(block=quantized, run=run):
                    return block.step(run)

                yield Row("step", variant, name, 0, sizes.width, m, loras, *clock(call), peak=clock.peak(call))


BENCHES = {"dequantize": bench_dequantize, "matvec": bench_matvec, "linear": bench_linear, "step": bench_step}


def tune(sizes: Sizes, clock: Clock, device: torch.device) -> dict[str, object]:
    """For each M the fastest tile over types and shapes, and its gain over decoding and the vendor's GEMM.

    The fused kernel is worth shipping up to the largest M with a gain of 1.05 or more (`plan.FUSED`).
    """
    from graft.kernels.triton_ import launch, plan

    found = {}
    for m in [m for m in TUNED_ROWS if m <= max(sizes.rows) or device.type == "cuda"]:
        least = max(16, 1 << (m - 1).bit_length())
        candidates = [
            plan.Tile(min(least, 128), n, warps=warps, stages=stages)
            for n in (32, 64, 128) for warps in (4, 8) for stages in (2, 3, 4)
        ]  # fmt: skip
        totals = dict.fromkeys(candidates[: 2 if device.type == "cpu" else None], 0.0)
        unfused = 0.0
        for (n, k), name in ((shape, name) for shape in sizes.shapes for name in sizes.types):
            fmt = by_name(name)
            data = packed(fmt, n, k, device)
            x, out = (torch.zeros(m, size, device=device, dtype=torch.bfloat16) for size in (k, n))
            for tile in list(totals):
                try:
                    totals[tile] += clock(lambda: launch.matmul(x, data, fmt, out, tile=tile))[1]  # noqa: B023
                except Exception as error:  # a tile that needs more than this card has
                    print(f"  {tile} left out: {str(error).splitlines()[0]}", file=sys.stderr)
                    del totals[tile]
            unfused += clock(lambda: F.linear(x, dispatch.dequantize(data, fmt, (n, k), x.dtype)))[1]  # noqa: B023
        best = min(totals, key=totals.__getitem__)
        found[str(m)] = {"tile": asdict(best), "gain": unfused / totals[best]}
        print(f"M {m:4}: {best}, {unfused / totals[best]:.2f} of decode and GEMM")
    return {"architecture": plan.architecture(device), "rows": found}


def machine(device: torch.device) -> dict[str, str]:
    """What the figures belong to."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"gpu": gpu, "torch": torch.__version__, "triton": version, "commit": commit.strip() or "unknown"}


def save(rows: Iterable[Row], about: dict[str, str], path: Path) -> list[Row]:
    """Write the CSV line by line, so that an interrupted run keeps what it has."""
    kept = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)] + list(about))
        writer.writeheader()
        for row in rows:
            kept.append(row)
            numbers = {key: round(v, 5) if isinstance(v, float) else v for key, v in asdict(row).items()}
            writer.writerow(numbers | about)
            file.flush()
            share = f" {100 * row.share:3.0f} % of copy" if row.share is not None else ""
            shape = f"{row.n}x{row.k} M={row.m} LoRAs={row.loras}"
            print(f"{row.what:10} {row.variant:14} {row.type:7} {shape:30} {row.p50:9.3f} ms{share}", flush=True)
    return kept


def plot(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """Time against bf16 `F.linear` over M for every type, and shares of the copy bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    dense = {(row.n, row.k, row.m): row.p50 for row in rows if row.what == "linear" and row.variant == "F.linear"}
    largest = max(((n, k) for n, k, _ in dense), key=lambda shape: shape[0] * shape[1], default=None)
    kinds = sorted({(row.type, row.variant) for row in rows if row.what == "linear" and row.variant != "F.linear"})
    for name, variant in kinds:
        points = sorted(
            (row.m, row.p50 / dense[row.n, row.k, row.m])
            for row in rows
            if (row.what, row.type, row.variant, row.loras, (row.n, row.k)) == ("linear", name, variant, 0, largest)
        )
        left.plot(*zip(*points, strict=True), label=f"{name}, {variant}", linestyle="-" if variant == "graft" else ":")
    left.axhline(1, color="black", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="time / bf16 F.linear", title=f"N, K: {largest}")
    if kinds:
        left.legend(fontsize=6, ncols=2)
    shares = [row for row in rows if row.share is not None and row.variant == "graft"]
    right.barh([f"{row.what} {row.type}" for row in shares], [row.share or 0 for row in shares])
    right.set(xlabel="share of the copy bandwidth", title=f"{about['gpu']}, torch {about['torch']}")
    figure.savefig(path, dpi=120)


def gpu_tests_pass() -> bool:
    """Run the Triton tests on this GPU, those marked `gpu` among them."""
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_triton_*.py"))
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES))
    parser.add_argument("--types", nargs="+", help=f"default: {' '.join(TYPES)}")
    parser.add_argument("--rows", nargs="+", type=int, help="values of M")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.csv")
    parser.add_argument("--tune", type=Path, metavar="JSON", help="measure tiles instead, and write the best")
    parser.add_argument("--toy", action="store_true", help="tiny sizes and no tests before: does the script run")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: nothing to measure")
    if not args.toy and not gpu_tests_pass():
        raise SystemExit("the tests fail on this GPU: no figures before they pass")

    sizes = TOY if args.toy else Sizes()
    changed = {"types": args.types, "rows": args.rows}
    sizes = Sizes(**vars(sizes) | {key: tuple(value) for key, value in changed.items() if value})
    clock = Clock(device, sizes.seconds)
    about = machine(device)
    if args.tune:
        args.tune.write_text(json.dumps(tune(sizes, clock, device) | about, indent=1) + "\n")
        return
    rows = (row for name in args.only for row in BENCHES[name](sizes, clock, device, "triton"))
    kept = save(rows, about, args.out)
    plot(kept, about, args.out.with_suffix(".png"))
    print(f"{args.out} and {args.out.with_suffix('.png').name}: {len(kept)} rows")


if __name__ == "__main__":
    main()
