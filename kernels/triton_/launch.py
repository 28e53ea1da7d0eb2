"""Launches: which kernel, with which constants, on which grid; and whether Triton can run on a device at all."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from .. import codebooks
from ..formats import Format
from . import dequant, plan
from .matmul import matmul_kernel
from .matvec import ROWS, UNIT, WARPS, matvec_kernel

logger = logging.getLogger(__name__)

RANK = 16
"""Ranks of a low-rank term taken at a time; the callers pad ranks to it."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with everything that is compiled into it."""

    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Fusing multiply and add changes no result (see `bits`) and saves an instruction."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        self.kernel[grid](*args, **self.constants, **self.options)

    def compile(self, *args: Any) -> None:
        """Compile without running; a dtype stands for a pointer to it."""
        self.kernel.warmup(*args, grid=(1,), **self.constants, **self.options)


def _format_constants(fmt: Format, qk: int, type_size: int) -> dict[str, Any]:
    assert fmt.triton is not None
    module, name = fmt.triton.split(".")
    decode = getattr(importlib.import_module(f".{module}", __package__), name)
    # blocks are aligned as their size is; GPUs load 16 bytes at most
    return {"DECODE": decode, "QK": qk, "TYPE_SIZE": type_size, "ALIGN": min(16, type_size & -type_size)}


@cache
def dequantize_launch(fmt: Format, qk: int) -> Launch:
    """Decode blocks of `qk` weights: the format's own, or for a type without blocks any power of two."""
    constants = _format_constants(fmt, qk, qk // fmt.block_size * fmt.type_size)
    return Launch(dequant.dequantize_kernel, constants | {"BLOCKS": dequant.TILE // qk}, dequant.WARPS)


@cache
def matvec_launch(fmt: Format, unit: int) -> Launch:
    """Single rows of x, `unit` weights at a time."""
    constants = _format_constants(fmt, *_row_block(fmt))
    return Launch(matvec_kernel, constants | {"ROWS": ROWS, "UNIT": unit, "RANK": RANK}, WARPS)


@cache
def matmul_launch(fmt: Format, tile: plan.Tile) -> Launch:
    """The fused kernel with a tile of `plan`."""
    constants = _format_constants(fmt, *_row_block(fmt)) | {
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "UNIT": tile.unit, "RANK": RANK,
    }  # fmt: skip
    return Launch(matmul_kernel, constants, tile.warps, tile.stages)


def _row_block(fmt: Format) -> tuple[int, int]:
    """Weights and bytes that a row is made of: a block, or 32 weights of a type without blocks."""
    return (fmt.block_size, fmt.type_size) if fmt.block_size > 1 else (32, 32 * fmt.type_size)


def _unit(k: int, most: int) -> int:
    """Weights of a row taken at a time: the largest power of two up to `most` that divides k."""
    return math.gcd(k, most)


def _book(fmt: Format, device: torch.device) -> torch.Tensor | None:
    return codebooks.table(fmt.book, device) if fmt.book else None


def _aligned(data: torch.Tensor, launch: Launch) -> torch.Tensor:
    """`data`, or a copy if it does not begin where a block may: only a view into a foreign buffer can do that."""
    align = launch.constants["ALIGN"]
    if data.data_ptr() % align == 0:
        return data
    _warn_of_copies(align)
    return data.clone()


@cache
def _warn_of_copies(align: int) -> None:
    logger.warning("packed weights do not begin at a multiple of %d bytes: they are copied before each use", align)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever its arguments lie on."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).device(device)
    return contextlib.nullcontext()


def dequantize(data: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """Decode `data` into `out`.

    Args:
        data: u8 ``[rows, row_bytes]``, contiguous.
        fmt: its format.
        out: ``[rows, columns]`` in fp32, fp16 or bf16, contiguous. fp32 is exact, the others rounded to nearest even.
    """
    qk = fmt.block_size if fmt.block_size > 1 else math.gcd(out.numel(), 256)
    launch = dequantize_launch(fmt, qk)
    blocks = out.numel() // qk
    grid = (triton.cdiv(blocks, launch.constants["BLOCKS"]),)
    with _on(data.device):
        launch(grid, _aligned(data, launch), _book(fmt, data.device), out, blocks)


def _low_rank(
    residual: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    if residual is None:
        return None, None, 0
    t, up = residual
    return t.contiguous(), up.to(t.dtype).contiguous(), t.shape[1]


def matvec(
    x: torch.Tensor,
    data: torch.Tensor,
    fmt: Format,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """``out = x Wᵀ + bias + t upᵀ`` for few rows of x, accumulated in fp32.

    Args:
        x: ``[M, K]`` in fp32, fp16 or bf16; K is whole blocks and a multiple of 32.
        data: W, u8 ``[N, row_bytes]``, contiguous.
        fmt: its format.
        out: ``[M, N]``, contiguous.
        bias: ``[N]``.
        residual: ``(t, up)``: ``[M, R]``, already scaled by the strengths, and ``[N, R]``.
    """
    (m, k), n = x.shape, out.shape[1]
    launch = matvec_launch(fmt, _unit(k, UNIT))
    t, up, rank = _low_rank(residual)
    with _on(x.device):
        launch(
            (triton.cdiv(n, ROWS), m),
            x.contiguous(), _aligned(data, launch), _book(fmt, x.device), out, bias, t, up, n, k, rank,
        )  # fmt: skip


def matmul(
    x: torch.Tensor,
    data: torch.Tensor,
    fmt: Format,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: tuple[torch.Tensor, torch.Tensor] | None = None,
    tile: plan.Tile | None = None,
) -> None:
    """``out = x Wᵀ + bias + t upᵀ`` on the tensor cores: weights are rounded to x's dtype, sums are fp32.

    Arguments are those of `matvec`, with t in x's dtype; `tile` is another than the plan's.
    """
    (m, k), n = x.shape, out.shape[1]
    tile = tile or plan.tile(plan.architecture(x.device), m)
    launch = matmul_launch(fmt, replace(tile, unit=_unit(k, tile.unit)))
    t, up, rank = _low_rank(residual)
    with _on(x.device):
        launch(
            (triton.cdiv(n, tile.n), triton.cdiv(m, tile.m)),
            x.contiguous(), _aligned(data, launch), _book(fmt, x.device), out, bias, t, up, m, n, k, rank,
        )  # fmt: skip


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when they were imported)."""
    return isinstance(dequant.dequantize_kernel, InterpretedFunction)


_failed: dict[tuple[torch.device, str], str] = {}


def unavailable(device: torch.device, fmt: Format | None = None) -> str | None:
    """None if these kernels can decode `fmt` on `device`, else why not."""
    if fmt is not None and (device, fmt.name) in _failed:
        return _failed[device, fmt.name]
    if fmt is not None and fmt.triton is None:
        return f"there is no kernel for {fmt}"
    if interpreted():
        return None
    if device.type == "cpu":
        return "Triton does not compile for the CPU"
    if device.type not in ("cuda", "xpu"):
        return f"Triton does not know {device.type!r} devices"
    return _probe(device)


@cache
def _probe(device: torch.device) -> str | None:
    """Decode one block and look at the result: whatever is missing, driver or compiler, shows here and not later."""
    if device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        # an older Triton does not raise there, it aborts the process
        if major >= 10 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
            return f"Triton {triton.__version__} does not know sm_{major}{minor}: update it to 3.3 or later"
    from ..formats import BY_NAME

    block = torch.tensor([0, 0x3C, *range(32)], dtype=torch.uint8, device=device)  # a scale of 1.0 and 32 codes
    out = torch.empty(1, 32, device=device)
    try:
        dequantize(block, BY_NAME["Q8_0"], out)
    except Exception as error:
        return f"a trial launch failed with {_brief(error)}"
    return None if out.flatten().tolist() == list(range(32)) else "a trial launch gave a wrong result"


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def warm(
    fmts: Iterable[Format],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str], None] | None = None,
    rows: Iterable[int] = (1, 2),
) -> None:
    """Compile what a model in these formats will launch, so that its first step does not.

    Triton keeps what it compiled on disk: after the first time this takes no more than a moment. A format that
    does not compile is `unavailable` from then on.

    Args:
        fmts: the formats in the file; those without a kernel are skipped.
        device: where it will run.
        dtype: of x and of the decoded weights.
        progress: called with a line per format.
        rows: the small numbers of rows of x to expect: modulation has one or two.
    """
    if interpreted():
        return
    for fmt in dict.fromkeys(fmts):
        if fmt.triton is None or not fmt.is_quantized:
            continue
        if progress is not None:
            progress(f"compiling kernels for {fmt}")
        try:
            with _on(device):
                dequantize_launch(fmt, fmt.block_size).compile(torch.uint8, _book_type(fmt), dtype, 4096)
                for m in rows:
                    _warm_linear(fmt, device, dtype, m)
        except Exception as error:  # whatever a compiler or driver may raise: sampling has another way
            _failed[device, fmt.name] = f"its kernels for {fmt} do not compile: {_brief(error)}"
            logger.warning("%s", _failed[device, fmt.name])


def _warm_linear(fmt: Format, device: torch.device, dtype: torch.dtype, m: int) -> None:
    """Compile what M = `m` will launch on rows of 256 weights and more, with and without bias and low-rank term."""
    kernel = plan.choose(m, 4096, 4096, fmt, device, dtype)
    if kernel == "dequantize":
        return
    sizes: tuple[int, ...] = (4096, 4096, RANK)
    if kernel == "matvec":
        launch = matvec_launch(fmt, UNIT)
    else:
        launch, sizes = matmul_launch(fmt, plan.tile(plan.architecture(device), m)), (m, *sizes)
    for bias, low in itertools.product((None, dtype), repeat=2):
        launch.compile(dtype, torch.uint8, _book_type(fmt), dtype, bias, low, low, *sizes)


def _book_type(fmt: Format) -> torch.dtype | None:
    return torch.int32 if fmt.book else None
