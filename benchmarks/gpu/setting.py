"""What every stage is given: the device, the sizes, a clock, weights of any type, and what the figures belong to."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from graft.kernels import dispatch
from graft.kernels.formats import FORMATS, Format

ROOT = Path(__file__).resolve().parent.parent.parent
RANK = 32
"""Of each LoRA."""
EVERY_TYPE = tuple(fmt.name for fmt in FORMATS if fmt.triton)


@dataclass(frozen=True)
class Sizes:
    """How much of everything. N and K of `shapes` are those of Flux's modulation and of its qkv with the MLP."""

    types: tuple[str, ...] = ("Q8_0", "Q4_K", "IQ4_XS")
    rows: tuple[int, ...] = (1, 16, 64, 256, 1024, 4608)
    shapes: tuple[tuple[int, int], ...] = ((18432, 3072), (3072, 15360))
    checked_types: tuple[str, ...] = EVERY_TYPE
    checked_rows: tuple[int, ...] = (1, 2, 16, 64, 128)
    checked_shape: tuple[int, int] = (512, 1024)
    repetitions: int = 50
    width: int = 3072
    heads: int = 24
    image_tokens: int = 4096
    text_tokens: int = 512
    loras: tuple[int, ...] = (0, 1, 4)
    copied: int = 512 << 20
    scratch: tuple[int, ...] = (16, 32, 64, 128, 256)
    int8_rows: int = 256
    tuned_rows: tuple[int, ...] = (2, 8, 16, 32, 64, 96, 128, 192, 256)
    seconds: float = 0.1
    compilers: int = 12


TOY = Sizes(
    types=("Q8_0",), rows=(1, 2), shapes=((16, 256),), checked_types=("Q8_0", "IQ2_XXS"), checked_rows=(1, 2),
    checked_shape=(16, 256), repetitions=2, width=32, heads=2, image_tokens=3, text_tokens=2, loras=(0, 1),
    copied=1 << 20, scratch=(1,), int8_rows=2, tuned_rows=(2,), seconds=0.0, compilers=0,
)  # fmt: skip
"""Sizes for a check of the stages themselves, in the interpreter."""


@dataclass(frozen=True)
class Times:
    """Of one call, in ms: quantiles of the device's own time, and the median of what the host takes to launch it."""

    p20: float
    p50: float
    p80: float
    host: float


class Clock:
    """Times calls on one device, on a GPU from a cold L2 cache and without what the host takes in between.

    The GPU is put to sleep while the host launches the work: what lies between two events is then the kernels' time
    alone, also of those that are shorter than their launches.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.gpu = device.type == "cuda"
        self.flush = torch.empty(256 << 20 if self.gpu else 1, dtype=torch.uint8, device=device)
        self.cycles = 1_000_000

    def once(self, run: Callable[[], object]) -> tuple[float, float]:
        """One run: the device's and the host's time, in ms."""
        self.flush.zero_()
        if not self.gpu:
            start = time.perf_counter()
            run()
            taken = 1000 * (time.perf_counter() - start)
            return taken, taken
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.cycles)
        begin.record()
        start = time.perf_counter()
        run()
        host = 1000 * (time.perf_counter() - start)
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end), host

    def __call__(self, run: Callable[[], object]) -> Times:
        """Quantiles of many runs; the first, which may compile, does not count."""
        run()
        first = device, host = self.once(run)
        # a GPU runs at one to two billion cycles a second: let it sleep twice as long as the host takes
        self.cycles = max(1_000_000, min(100_000_000, int(4_000_000 * host)))
        count = max(1, min(100, int(1000 * self.seconds / max(device + host, 1e-3))))
        times = torch.tensor([first, *(self.once(run) for _ in range(count - 1))])
        p20, p50, p80 = times[:, 0].quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        return Times(p20, p50, p80, times[:, 1].median().item())

    def peak(self, run: Callable[[], object]) -> float | None:
        """MiB allocated at most while running, beyond what was before; None where nobody counts."""
        if not self.gpu:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


@dataclass
class Setting:
    """What a stage works with.

    Attributes:
        wrong: types that a check found wrong on this device: no figures of theirs.
    """

    device: torch.device
    sizes: Sizes
    backend: str = "triton"
    wrong: frozenset[str] = frozenset()

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.device, self.sizes.seconds)

    @property
    def types(self) -> list[str]:
        """Those to measure."""
        return [name for name in self.sizes.types if name not in self.wrong]

    @cached_property
    def copy_rate(self) -> float:
        """GB/s that a copy on the device reads and writes: what shares are shares of."""
        source = torch.empty(self.sizes.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.clock(lambda: target.copy_(source)).p50 / 1e6

    def weight(self, fmt: Format, n: int, k: int, different: int = 4096) -> torch.Tensor:
        """Random packed weights of moderate size, ``u8 [n, row_bytes]``, made of so many different blocks."""
        count = n * k // fmt.block_size
        blocks = moderate_blocks(fmt, min(count, different)).to(self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        which = torch.randint(len(blocks), (count,), generator=generator, device=self.device)
        return blocks[which].view(n, -1)

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Normal random numbers, the same on every run."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

    def low_rank(self, n: int, k: int, loras: int) -> dispatch.LowRank | None:
        """LoRAs on a layer, concatenated; None for none."""
        if not loras:
            return None
        rank = loras * RANK
        down, up = self.random(rank, k, seed=1) * 0.02, self.random(n, rank, seed=2)
        return dispatch.LowRank(down, torch.ones(rank, device=self.device), ((0, 0, up),))


def moderate_blocks(fmt: Format, count: int) -> torch.Tensor:
    """Random bytes that decode to numbers of at most 100, ``u8 [count, type_size]``: others are drawn again."""
    generator = torch.Generator().manual_seed(fmt.ggml_type)
    found: list[torch.Tensor] = []
    while sum(map(len, found)) < count:
        blocks = torch.randint(0, 256, (4 * count + 64, fmt.type_size), dtype=torch.uint8, generator=generator)
        weights = dispatch.dequantize(blocks, fmt, (len(blocks), fmt.block_size), backend="torch")
        found.append(blocks[(weights.abs() <= 100).all(1)])  # NaN is not
    return torch.cat(found)[:count]


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


def surroundings(device: torch.device) -> dict[str, str]:
    """What else may matter to whoever reads the figures."""
    from graft.kernels.triton_ import plan

    found = {"python": platform.python_version(), "architecture": plan.architecture(device)}
    compiler = shutil.which("gcc") or shutil.which("cc")
    found["C compiler"] = compiler or "none: Triton cannot start without one"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "multiprocessors": str(properties.multi_processor_count),
            "memory, GiB": f"{properties.total_memory / 2**30:.1f}",
            "L2, MiB": f"{getattr(properties, 'L2_cache_size', 0) / 2**20:.0f}",
            "CUDA": str(torch.version.cuda or torch.version.hip),
        }
    return found
