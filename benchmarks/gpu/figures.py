"""Stages that measure: rates of decoding and matvec, linear layers, sizes of the scratch, two Flux blocks, tiles."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from graft.kernels import dispatch, int8, scratch
from graft.kernels.formats import Format, by_name

from .peers import Linear, graft_linear, int8_linear, others
from .setting import Setting, Times


@dataclass(frozen=True)
class Figure:
    """A line of the CSV: times in ms; rates in GB/s; share of the measured copy bandwidth; memory in MiB.

    Attributes:
        host: what the host takes to launch it, apart from the device's own time.
        scratch: MiB that a chunk of decoded weights takes at most.
    """

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
    host: float
    rate: float | None = None
    share: float | None = None
    peak: float | None = None
    scratch: int | None = None

    def __str__(self) -> str:
        share = f" {100 * self.share:3.0f} % of copy" if self.share is not None else ""
        shape = f"{self.n}x{self.k} M={self.m} LoRAs={self.loras}"
        times = f"{self.p50:9.4f} ms, host {self.host:7.4f} ms"
        size = f" scratch {self.scratch} MiB" if self.scratch is not None else ""
        return f"{self.variant:14} {self.type:7} {shape:30} {times}{share}{size}"


def _figure(
    what: str, variant: str, fmt: str, shape: tuple[int, int], m: int, loras: int, times: Times, **more: Any
) -> Figure:
    return Figure(what, variant, fmt, *shape, m, loras, times.p20, times.p50, times.p80, times.host, **more)


def rates(setting: Setting) -> Iterator[Figure]:
    """Decoding to bf16, bytes read and written; then one row of x, packed bytes read. The first shape, each type."""
    copy, shape = setting.copy_rate, setting.sizes.shapes[0]
    n, k = shape
    yield Figure("copy", "torch", "U8", 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, rate=copy, share=1.0)
    x = setting.random(1, k)
    for name in setting.sizes.checked_types:
        fmt = by_name(name)
        if name in setting.wrong:
            continue
        data = setting.weight(fmt, n, k)
        for variant, backend in (("graft", setting.backend), ("torch decode", "torch")):
            if variant != "graft" and name not in setting.types:
                continue

            def decode(data=data, fmt=fmt, backend=backend):
                return dispatch.dequantize(data, fmt, shape, torch.bfloat16, backend=backend)

            times = setting.clock(decode)
            rate = (data.numel() + 2 * n * k) / times.p50 / 1e6
            yield _figure("dequantize", variant, name, shape, 0, 0, times, rate=rate, share=rate / copy)

        def matvec(data=data, fmt=fmt):
            return dispatch.linear(x, data, fmt, backend=setting.backend)

        times = setting.clock(matvec)
        rate = data.numel() / times.p50 / 1e6
        yield _figure("matvec", "graft", name, shape, 1, 0, times, rate=rate, share=rate / copy)


def linear(setting: Setting) -> Iterator[Figure]:
    """Every shape, M and type, without and with LoRAs, against bf16 `F.linear` on the unquantized weight."""
    for shape in setting.sizes.shapes:
        dense = setting.random(*shape)
        for m in setting.sizes.rows:
            x = setting.random(m, shape[1])
            yield _figure("linear", "F.linear", "BF16", shape, m, 0, setting.clock(lambda: F.linear(x, dense)))  # noqa: B023
            for name in setting.types:
                yield from _linear(setting, by_name(name), shape, x)


def _linear(setting: Setting, fmt: Format, shape: tuple[int, int], x: torch.Tensor) -> Iterator[Figure]:
    data = setting.weight(fmt, *shape)
    for loras in setting.sizes.loras:
        term = setting.low_rank(*shape, loras)
        for variant, run in ({"graft": graft_linear(setting.backend)} | others(fmt)).items():

            def call(run=run, term=term):
                return run(x, data, fmt, term)

            times = setting.clock(call)
            yield _figure("linear", variant, fmt.name, shape, len(x), loras, times, peak=setting.clock.peak(call))


def int8_products(setting: Setting) -> Iterator[Figure]:
    """Packed bytes to int8 rows; then each shape with many rows of x, where there is a library for the product.

    Where there is none, torch's own product alone says how fast one could be.
    """
    copy, reason = setting.copy_rate, int8.unavailable(setting.device)
    if reason is not None:
        print(f"int8: {reason}", file=sys.stderr)
    run = int8_linear(setting.backend)
    for name, (n, k) in itertools.product(setting.types, setting.sizes.shapes):
        fmt, shape = by_name(name), (n, k)
        data = setting.weight(fmt, n, k)
        scales, _ = int8.prepare(data, fmt, shape, setting.backend)
        codes = torch.empty(n, k, dtype=torch.int8, device=setting.device)

        def encode(data=data, fmt=fmt, scales=scales, codes=codes):
            int8.encode(data, fmt, scales, codes, setting.backend)

        times = setting.clock(encode)
        rate = (data.numel() + n * k) / times.p50 / 1e6
        yield _figure("encode", "graft", name, shape, 0, 0, times, rate=rate, share=rate / copy)
        for m in (m for m in setting.sizes.rows if m >= setting.sizes.int8_rows):
            x = setting.random(m, k)
            if reason is not None:
                yield _figure("int8", "torch._int_mm", name, shape, m, 0, setting.clock(_int_mm(x, codes)))
                continue
            for loras in setting.sizes.loras:
                term = setting.low_rank(n, k, loras)

                def call(x=x, data=data, fmt=fmt, term=term):
                    return run(x, data, fmt, term)

                times = setting.clock(call)
                yield _figure("int8", "graft int8", name, shape, m, loras, times, peak=setting.clock.peak(call))


def _int_mm(x: torch.Tensor, codes: torch.Tensor) -> Callable[[], torch.Tensor]:
    rows = torch.ones(len(x), codes.shape[1], dtype=torch.int8, device=x.device)
    return lambda: torch._int_mm(rows, codes.t())


def columns(setting: Setting) -> Iterator[Figure]:
    """LoRAs added to the output, as they are, against LoRAs as columns of the weight: what ARCHITECTURE.md models.

    The second copies x beside t and B beside the decoded weight, and reads no output.
    """
    for (n, k), m in itertools.product(setting.sizes.shapes, setting.sizes.rows):
        term = setting.low_rank(n, k, max(setting.sizes.loras))
        if term is None or m < setting.sizes.int8_rows:
            continue
        up, ranks, x = term.ups[0][2], len(term.down), setting.random(m, k)
        # the weight that was decoded lies in the wide one from the start
        wide, wide_x = setting.random(n, k + ranks), setting.random(m, k + ranks)
        dense = wide[:, :k].contiguous()

        def added(x=x, dense=dense, term=term, up=up):
            return F.linear(x, dense).addmm_(term.project(x), up.t())

        def beside(x=x, wide=wide, wide_x=wide_x, term=term, up=up, k=k):
            wide[:, k:] = up
            wide_x[:, :k] = x
            wide_x[:, k:] = term.project(x)
            return F.linear(wide_x, wide)

        for variant, run in (("added", added), ("columns", beside)):
            yield _figure("columns", variant, "BF16", (n, k), m, max(setting.sizes.loras), setting.clock(run))


def scratch_sizes(setting: Setting) -> Iterator[Figure]:
    """The largest M with scratches of several sizes: in how many chunks a weight is decoded."""
    usual, m = scratch.GPU_BYTES, max(setting.sizes.rows)
    try:
        for name in setting.types:
            for shape in setting.sizes.shapes:
                data, x, term = setting.weight(by_name(name), *shape), setting.random(m, shape[1]), None
                for size in setting.sizes.scratch:
                    scratch.release()
                    scratch.GPU_BYTES = size << 20
                    for loras in setting.sizes.loras[:2]:
                        term = setting.low_rank(*shape, loras)

                        def call(data=data, x=x, term=term, name=name):
                            return dispatch.linear(x, data, name, None, term, backend=setting.backend)

                        yield _figure("scratch", "graft", name, shape, m, loras, setting.clock(call), scratch=size)
    finally:
        scratch.GPU_BYTES = usual
        scratch.release()


class Block:
    """A double and a single block of Flux: its linear layers, attention and modulation, norms left out."""

    def __init__(self, setting: Setting, fmt: Format | None, loras: int) -> None:
        sizes, d = setting.sizes, setting.sizes.width
        self.heads = sizes.heads
        self.image = setting.random(sizes.image_tokens, d, seed=5)
        self.text = setting.random(sizes.text_tokens, d, seed=6)
        self.vector = setting.random(1, d, seed=7)
        shapes = {"single.modulation": (3 * d, d), "single.linear1": (7 * d, d), "single.linear2": (d, 5 * d)}
        for stream in ("image", "text"):
            shapes |= {
                f"{stream}.modulation": (6 * d, d), f"{stream}.qkv": (3 * d, d), f"{stream}.proj": (d, d),
                f"{stream}.up": (4 * d, d), f"{stream}.down": (d, 4 * d),
            }  # fmt: skip
        self.fmt = fmt
        self.weights = {
            name: setting.weight(fmt, n, k) if fmt is not None else 0.02 * setting.random(n, k)
            for name, (n, k) in shapes.items()
        }
        self.terms = {name: setting.low_rank(n, k, loras) for name, (n, k) in shapes.items()}

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


def step(setting: Setting) -> Iterator[Figure]:
    """Two Flux blocks on 4096 image and 512 text tokens."""
    sizes = setting.sizes
    shape, m = (0, sizes.width), sizes.image_tokens + sizes.text_tokens

    def dense(x, weight, fmt, term):
        return F.linear(x, weight)

    block = Block(setting, None, 0)
    yield _figure("step", "F.linear", "BF16", shape, m, 0, setting.clock(lambda: block.step(dense)))
    for name in setting.types:
        for loras in sizes.loras:
            quantized = Block(setting, by_name(name), loras)
            ways = {"graft": graft_linear(setting.backend)}
            if int8.unavailable(setting.device) is None:
                ways["graft int8"] = int8_linear(setting.backend)
            for variant, run in (ways | others(by_name(name))).items():

                def call(block=quantized, run=run):
                    return block.step(run)

                times = setting.clock(call)
                yield _figure("step", variant, name, shape, m, loras, times, peak=setting.clock.peak(call))


@dataclass(frozen=True)
class Tuned:
    """A line of the CSV: a tile of the fused kernel, its time summed over types and shapes in ms, and how many times
    faster than decoding and the vendor's GEMM. It is worth shipping up to the largest M whose best gain is 1.05 or
    more (`plan.FUSED`)."""

    m: int
    tile_m: int
    tile_n: int
    unit: int
    warps: int
    stages: int
    time: float
    gain: float

    def __str__(self) -> str:
        tile = f"[{self.tile_m}, {self.tile_n}] warps {self.warps} stages {self.stages}"
        return f"M={self.m:<4} {tile:32} {self.time:9.4f} ms, {self.gain:.2f} of decode and GEMM"


def tune(setting: Setting) -> Iterator[Tuned]:
    """Tiles of the fused kernel for each M. Compiles them all: minutes."""
    from graft.kernels.triton_ import launch, plan

    for m in setting.sizes.tuned_rows:
        least = max(16, 1 << (m - 1).bit_length())
        candidates = [
            plan.Tile(min(least, 128), n, warps=warps, stages=stages)
            for n in (32, 64, 128) for warps in (4, 8) for stages in (2, 3, 4)
        ]  # fmt: skip
        totals = dict.fromkeys(candidates[: None if setting.clock.gpu else 2], 0.0)
        unfused = 0.0
        for (n, k), name in ((shape, name) for shape in setting.sizes.shapes for name in setting.types):
            fmt = by_name(name)
            data, x = setting.weight(fmt, n, k), setting.random(m, k)
            out = torch.empty(m, n, device=setting.device, dtype=torch.bfloat16)
            for tile in list(totals):
                try:
                    totals[tile] += setting.clock(lambda: launch.matmul(x, data, fmt, out, tile=tile)).p50  # noqa: B023
                except Exception as error:  # a tile that needs more than this card has
                    print(f"  {tile} left out: {(str(error).splitlines() or [''])[0]}", file=sys.stderr)
                    del totals[tile]

            def plain(data=data, fmt=fmt, x=x, shape=(n, k)):
                return F.linear(x, dispatch.dequantize(data, fmt, shape, x.dtype, backend=setting.backend))

            unfused += setting.clock(plain).p50
        for tile, total in sorted(totals.items(), key=lambda item: item[1]):
            yield Tuned(m, tile.m, tile.n, tile.unit, tile.warps, tile.stages, total, unfused / total)
