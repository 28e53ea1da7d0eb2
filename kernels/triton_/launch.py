"""Launches: which kernel, with which constants, on which grid; and whether Triton can run on a device at all."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from .. import codebooks
from ..formats import Format
from . import dequant, plan
from . import int8 as rotated
from . import project as projection
from .matmul import matmul_kernel
from .matvec import ROWS, UNIT, WARPS, matvec_kernel

logger = logging.getLogger(__name__)

RANK = 16
"""Ranks of a low-rank term taken at a time; the callers pad ranks to it."""

_PAIRED = frozenset({"Q8_0"})
"""Types whose blocks are taken two at a time, where rows hold whole pairs: these begin with a word."""

# whether launches keep what they have compiled: an earlier Triton wants other arguments then, one for AMD looks at
# sizes, too, and what a later one does shows in a trial (`_probe`)
_keeps = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3) and not torch.version.hip

_IN_WORDS = frozenset({"Q6_K"})
"""Types of which words are loaded wherever a block begins: all of it has to begin with a word."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with everything that is compiled into it.

    Attributes:
        align: bytes of which the address of the packed weights has to be a multiple.
        kept: what was compiled, by the kind of its arguments.
    """

    kernel: Any
    constants: dict[str, Any]
    warps: int
    align: int
    stages: int = 1

    kept: dict[tuple, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Fusing multiply and add changes no result (see `bits`) and saves an instruction."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch, by Triton's own way the first time: it takes longer to find a kernel again than all else here."""
        kind = _kind(args) if _keeps else None
        known = self.kept.get(kind) if kind is not None else None
        if known is not None:
            known[grid](*args, *self.constants.values())
            return
        compiled = self.kernel[grid](*args, **self.constants, **self.options)
        if kind is not None and compiled is not None:  # the interpreter compiles nothing
            self.kept[kind] = compiled

    def compile(self, *args: Any) -> None:
        """Compile without running; a dtype stands for a pointer to it."""
        self.kernel.warmup(*args, grid=(1,), **self.constants, **self.options)


def _kind(args: tuple[Any, ...]) -> tuple | None:
    """What Triton compiles for of these arguments, and maybe more; None where that is something unusual."""
    addresses = 0
    kind: list[Any] = []
    for arg in args:
        if type(arg) is int:
            if arg == 1 or arg >> 31:
                return None
            kind.append(arg & 15)
        elif arg is None:
            kind.append(None)
        else:
            addresses |= arg.data_ptr()
            kind.append(arg.dtype)
    # the first one is packed weights or x: never None
    return None if addresses & 15 else (args[0].device, *kind)


def block_of(fmt: Format, weights: int) -> int:
    """Weights that a kernel takes as a block of rows that hold so many, or a multiple of it."""
    if fmt.block_size == 1:
        return math.gcd(weights, 256)
    return 2 * fmt.block_size if fmt.name in _PAIRED and weights % (2 * fmt.block_size) == 0 else fmt.block_size


def _format_constants(fmt: Format, qk: int) -> dict[str, Any]:
    """What a kernel has to know of blocks of `qk` weights."""
    assert fmt.triton is not None
    module, name = fmt.triton.split(".")
    decode = getattr(importlib.import_module(f".{module}", __package__), name)
    size = qk // fmt.block_size * fmt.type_size
    # blocks are aligned as their size is; GPUs load 16 bytes at most
    return {"DECODE": decode, "QK": qk, "TYPE_SIZE": size, "ALIGN": min(16, size & -size)}


def _launch(fmt: Format, kernel: Any, constants: dict[str, Any], warps: int, stages: int = 1) -> Launch:
    align = max(constants["ALIGN"], 4 if fmt.name in _IN_WORDS else 1)
    return Launch(kernel, constants, warps, align, stages)


@cache
def dequantize_launch(fmt: Format, qk: int) -> Launch:
    """Decode blocks of `qk` weights, of which `block_of` knows."""
    constants = _format_constants(fmt, qk) | {"BLOCKS": dequant.TILE // qk}
    return _launch(fmt, dequant.dequantize_kernel, constants, dequant.WARPS)


@cache
def int8_launch(fmt: Format) -> Launch:
    """Decode blocks to rotated int8 codes."""
    return _launch(fmt, rotated.int8_kernel, _int8_constants(fmt), rotated.WARPS)


@cache
def int8_largest_launch(fmt: Format) -> Launch:
    """Find the largest magnitude of each rotated block."""
    return _launch(fmt, rotated.int8_largest_kernel, _int8_constants(fmt), rotated.WARPS)


def _int8_constants(fmt: Format) -> dict[str, Any]:
    constants = _format_constants(fmt, rotated.BLOCK) | {"BLOCKS": rotated.BLOCKS}
    constants.pop("QK")
    return constants


@cache
def matvec_launch(fmt: Format, unit: int) -> Launch:
    """Single rows of x, `unit` weights at a time."""
    constants = _format_constants(fmt, block_of(fmt, unit)) | {"ROWS": ROWS, "UNIT": unit, "RANK": RANK}
    return _launch(fmt, matvec_kernel, constants, WARPS)


@cache
def matmul_launch(fmt: Format, tile: plan.Tile) -> Launch:
    """The fused kernel with a tile of `plan`."""
    constants = _format_constants(fmt, block_of(fmt, tile.unit)) | {
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "UNIT": tile.unit, "RANK": RANK,
    }  # fmt: skip
    return _launch(fmt, matmul_kernel, constants, tile.warps, tile.stages)


@cache
def project_launch() -> Launch:
    """Single rows of x to ranks."""
    return Launch(projection.project_kernel, {"UNIT": projection.UNIT}, projection.WARPS, align=1)


def _unit(k: int, most: int) -> int:
    """Weights of a row taken at a time: the largest power of two up to `most` that divides k."""
    return math.gcd(k, most)


def _book(fmt: Format, device: torch.device) -> torch.Tensor | None:
    return codebooks.table(fmt.book, device) if fmt.book else None


def _aligned(data: torch.Tensor, launch: Launch) -> torch.Tensor:
    """`data`, or a copy if it does not begin where a block may: only a view into a foreign buffer can do that."""
    data = data.contiguous()
    if data.data_ptr() % launch.align == 0:
        return data
    _warn_of_copies(launch.align)
    return data.clone()


@cache
def _warn_of_copies(align: int) -> None:
    logger.warning("packed weights do not begin at a multiple of %d bytes: they are copied before each use", align)


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever its arguments lie on."""
    # asked of the tensor: a device takes as long to say its type as all of this
    if tensor.is_cuda:
        index = tensor.get_device()
        return _NOWHERE_ELSE if index == torch.cuda.current_device() else torch.cuda.device(index)
    return torch.xpu.device(tensor.get_device()) if tensor.is_xpu else _NOWHERE_ELSE


_NOWHERE_ELSE = contextlib.nullcontext()


def dequantize(data: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """Decode `data` into `out`.

    Args:
        data: u8 ``[rows, row_bytes]``, contiguous.
        fmt: its format.
        out: ``[rows, columns]`` in fp32, fp16 or bf16, contiguous. fp32 is exact, the others rounded to nearest even.
    """
    qk = block_of(fmt, out.numel())
    launch = dequantize_launch(fmt, qk)
    blocks = out.numel() // qk
    grid = (-(-blocks // launch.constants["BLOCKS"]), 1, 1)
    with _on(data):
        launch(grid, _aligned(data, launch), _book(fmt, data.device), out, blocks)


def int8_scales(data: torch.Tensor, fmt: Format, columns: int) -> torch.Tensor:
    """The scales of rotated rows: a row's largest magnitude divided by 127.

    Args:
        data: u8 ``[N, row_bytes]``, contiguous; a row is whole blocks of 256 weights.
        fmt: its format.
        columns: weights in a row.

    Returns:
        fp32 ``[N, 1]``.
    """
    launch, blocks = int8_largest_launch(fmt), data.shape[0] * (columns // rotated.BLOCK)
    largest = torch.empty(data.shape[0], columns // rotated.BLOCK, device=data.device)
    with _on(data):
        grid = (-(-blocks // rotated.BLOCKS), 1, 1)
        launch(grid, _aligned(data, launch), _book(fmt, data.device), largest, blocks)
    return largest.amax(1, keepdim=True).div_(127).clamp_(min=1e-30)


def encode_int8(data: torch.Tensor, fmt: Format, scales: torch.Tensor, codes: torch.Tensor) -> None:
    """Decode `data` to rotated int8 rows.

    Args:
        data: as in `int8_scales`.
        fmt: its format.
        scales: fp32 ``[N, 1]``, contiguous.
        codes: int8 ``[N, columns]``, contiguous; overwritten.
    """
    launch, row_blocks = int8_launch(fmt), codes.shape[1] // rotated.BLOCK
    blocks = codes.shape[0] * row_blocks
    with _on(data):
        grid = (-(-blocks // rotated.BLOCKS), 1, 1)
        launch(grid, _aligned(data, launch), _book(fmt, data.device), scales, codes, blocks, row_blocks)


def _low_rank(
    residual: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    if residual is None:
        return None, None, 0
    t, up = residual
    return t.contiguous(), _in(up, t.dtype).contiguous(), t.shape[1]


def _in(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


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
        data: W, u8 ``[N, row_bytes]`` or flat, contiguous.
        fmt: its format.
        out: ``[M, N]``, contiguous.
        bias: ``[N]``.
        residual: ``(t, up)``: ``[M, R]``, already scaled by the strengths, and ``[N, R]``.
    """
    (m, k), n = x.shape, out.shape[1]
    launch = matvec_launch(fmt, _unit(k, UNIT))
    t, up, rank = _low_rank(residual)
    with _on(x):
        launch(
            (-(-n // ROWS), m, 1),
            x.contiguous(), _aligned(data, launch), _book(fmt, x.device), out, bias, t, up, n, k, rank,
        )  # fmt: skip


def project(x: torch.Tensor, down: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """``out = (x downᵀ) ∘ scale`` for few rows of x, summed in fp32 and rounded once.

    Args:
        x: ``[M, K]`` in fp32, fp16 or bf16.
        down: ``[R, K]`` in any float dtype.
        scale: ``[R]`` or ``[M, R]``.
        out: ``[M, R]``, contiguous.
    """
    (m, k), rank = x.shape, down.shape[0]
    step = 0 if scale.dim() == 1 else rank
    with _on(x):
        project_launch()((rank, m, 1), x.contiguous(), down.contiguous(), scale.contiguous(), out, k, rank, step)


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
    with _on(x):
        launch(
            (-(-n // tile.n), -(-m // tile.m), 1),
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
    if out.flatten().tolist() != list(range(32)):
        return "a trial launch gave a wrong result"
    _try_again(block, out.zero_())
    return None


def _try_again(block: torch.Tensor, out: torch.Tensor) -> None:
    """A second launch, of what the first one has kept: where that does not work each goes Triton's own way."""
    global _keeps
    from ..formats import BY_NAME

    try:
        dequantize(block, BY_NAME["Q8_0"], out)
        _keeps = _keeps and out.flatten().tolist() == list(range(32))
    except Exception as error:
        logger.info("kernels are looked up anew for each launch: %s", _brief(error))
        _keeps = False


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def warm(
    fmts: Iterable[Format],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str], None] | None = None,
    rows: Iterable[int] = (1, 2),
    int8: bool = False,
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
        int8: whether layers multiply in int8.
    """
    if interpreted():
        return
    for fmt in dict.fromkeys(fmts):
        if fmt.triton is None or not fmt.is_quantized:
            continue
        if progress is not None:
            progress(f"compiling kernels for {fmt}")
        try:
            with _on(torch.empty(0, device=device)):
                dequantize_launch(fmt, block_of(fmt, 4096)).compile(torch.uint8, _book_type(fmt), dtype, 4096)
                for m in rows:
                    _warm_linear(fmt, device, dtype, m)
                if int8:
                    _warm_int8(fmt)
        except Exception as error:  # whatever a compiler or driver may raise: sampling has another way
            _failed[device, fmt.name] = f"its kernels for {fmt} do not compile: {_brief(error)}"
            logger.warning("%s", _failed[device, fmt.name])


def _warm_linear(fmt: Format, device: torch.device, dtype: torch.dtype, m: int) -> None:
    """Compile what M = `m` will launch on rows of 256 weights and more, with and without bias and low-rank term."""
    kernel = plan.choose(m, 1 << 16, 4096, fmt, device, dtype)  # so wide that it covers the card
    if kernel == "dequantize":
        return
    sizes: tuple[int, ...] = (4096, 4096, RANK)
    if kernel == "matvec":
        launch = matvec_launch(fmt, UNIT)
        project_launch().compile(dtype, dtype, torch.float32, dtype, 4096, RANK, 0)
    else:
        launch, sizes = matmul_launch(fmt, plan.tile(plan.architecture(device), m)), (m, *sizes)
    # files hold biases in fp32
    for bias, low in itertools.product((None, torch.float32), (None, dtype)):
        launch.compile(dtype, torch.uint8, _book_type(fmt), dtype, bias, low, low, *sizes)


def _warm_int8(fmt: Format) -> None:
    book = _book_type(fmt)
    int8_launch(fmt).compile(torch.uint8, book, torch.float32, torch.int8, 4096, 16)
    int8_largest_launch(fmt).compile(torch.uint8, book, torch.float32, 4096)


def _book_type(fmt: Format) -> torch.dtype | None:
    return torch.int32 if fmt.book else None
