"""The `cpu` backend: libgguf's native row decoders, and the GEMM to multiply what they decode; its quantizers, too.

libgguf decodes 5 to 15 times faster than torch code does, on all cores (it starts its own threads and
releases the GIL), but only to fp32 and into memory that it is handed. It quantizes on one core.
Threads of its own cost it a tenth of a millisecond a call, and compete with torch's, which wait for their next work by
looking for it: what one core decodes in that time is handed over in pieces for which it starts none.
"""

from __future__ import annotations

import functools
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from .formats import Format

# a core decodes a weight of these in 0.14 to 0.22 ns, of others in 0.25 to 4 ns (benchmarks/bench_cpu_decode.py)
QUICK = frozenset(["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "TQ2_0"])
# weights that one core decodes of these in the time that threads would save
_ALONE = 1 << 20
# and for which libgguf starts no threads
PIECE = (1 << 17) - 1


@functools.cache
def _libgguf() -> ModuleType | str:
    """The library, or why there is none."""
    if find_spec("libgguf") is None:
        return "libgguf is not installed (pip install libgguf)"
    try:
        import libgguf
    except ImportError as error:
        return f"libgguf does not load: {error}"
    return libgguf


def unavailable(device: torch.device, fmt: Format | None = None) -> str | None:
    """None if this backend can decode `fmt` on `device`, else the reason in words."""
    if device.type != "cpu":
        return f"it decodes in main memory, the model is on {device.type}"
    library = _libgguf()
    if isinstance(library, str):
        return library
    if fmt is not None and fmt.is_quantized and library.row_size(fmt.ggml_type, fmt.block_size) != fmt.type_size:
        return f"this libgguf does not know {fmt.name}"
    return None


def decode(data: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """Decode whole rows.

    Args:
        data: ``uint8 [rows, row_bytes]`` on the CPU, contiguous.
        fmt: a quantized format.
        out: ``fp32 [rows, columns]``, contiguous; overwritten.
    """
    if fmt.name not in QUICK or not PIECE < out.numel() <= _ALONE:
        return decode_rows(data, fmt, out)
    step = max(1, PIECE // out.shape[1])
    for part, wide in zip(data.split(step), out.split(step), strict=True):
        decode_rows(part, fmt, wide)


def decode_rows(data: torch.Tensor, fmt: Format, out: torch.Tensor) -> None:
    """`decode` in one call of libgguf, on its threads if there are more than `PIECE` weights."""
    library = _libgguf()
    assert isinstance(library, ModuleType)
    library.dequantize_rows_into_raw(fmt.ggml_type, data.numpy(), out.numpy(), *out.shape)


def cannot_encode(fmt: Format) -> str | None:
    """None if libgguf can quantize to `fmt` here, else the reason in words."""
    library = _libgguf()
    if isinstance(library, str):
        return library
    if not fmt.is_quantized or library.row_size(fmt.ggml_type, fmt.block_size) != fmt.type_size:
        return f"libgguf has no quantizer for {fmt.name}"
    return None


def encode(weights: torch.Tensor, fmt: Format, importance: torch.Tensor | None, out: torch.Tensor) -> None:
    """Quantize whole rows, on one core and without the GIL.

    Args:
        weights: ``fp32 [rows, columns]`` on the CPU, contiguous and finite: of others some quantizers end the process.
        fmt: a quantized format.
        importance: ``fp32 [columns]``, how much the error of each column counts; None where all count alike.
        out: ``uint8 [rows, row_bytes]``, contiguous; overwritten.
    """
    library = _libgguf()
    assert isinstance(library, ModuleType)
    rows, columns = weights.shape
    weigh = None if importance is None else importance.numpy()
    library.quantize_rows_into_raw(fmt.ggml_type, weights.numpy(), out.numpy(), rows, columns, weigh)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x · weightᵀ + bias`` by oneDNN: x ``[M, K]``, weight ``[N, K]``, bias ``[N]``, all fp32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def onednn_rows() -> int:
    """Rows of x up to which fp32 products go to oneDNN rather than to torch's own choice, which is MKL.

    On AMD's processors MKL leaves speed unused, with AVX512 for any number of rows, with AVX2 for a few only
    (`benchmarks/bench_cpu_gemm.py`). Both round alike.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _is_amd()):
        return 0
    try:
        probe = torch.ones(2, 2)
        if not torch.equal(onednn_linear(probe, probe, None), probe @ probe):
            return 0
        return sys.maxsize if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 32
    except (AttributeError, RuntimeError):  # the operator that torch.compile calls; not every build has it
        return 0


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "AuthenticAMD" in platform.processor()


@functools.cache
def _features() -> frozenset[str]:
    """What this processor has, by torch's names (``avx512_bf16``); empty where nobody tells."""
    if hasattr(torch.cpu, "get_capabilities"):
        return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\nflags")[2]
    except OSError:
        return frozenset()
    # Linux writes avx512f where torch writes avx512_f
    return frozenset(flags.partition("\n")[0].replace("avx512f", "avx512_f").split())


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16 natively (AVX512-BF16 or AMX): a GEMM is then ~2.5 times an fp32 one."""
    return not _features().isdisjoint(("avx512_bf16", "amx_bf16"))


def has_tiles() -> bool:
    """Whether this processor multiplies matrices of bf16 in tiles (AMX), several times as fast as in vectors."""
    return "amx_bf16" in _features()


def has_int8() -> bool:
    """Whether this processor adds up products of bytes in one instruction, four at a time (VNNI, AMX)."""
    return not _features().isdisjoint(("avx512_vnni", "avx_vnni", "amx_int8"))


def _slow_dtypes() -> frozenset[torch.dtype]:
    features, slow = _features(), set()
    if "avx2" in features:
        # with AVX512 of another generation oneDNN puts bf16 together from other instructions
        slow |= set() if has_fast_bf16() else {torch.bfloat16}
        slow |= {torch.float16} if features.isdisjoint(("avx512_fp16", "amx_fp16")) else set()
    return frozenset(slow)


SLOW_DTYPES = _slow_dtypes()
"""What there are no products of here, as far as one can tell: torch takes five or six times as long as in fp32."""
