"""`linear` with int8 products, from the same packed bytes.

    y = (codes(x H) · codes(W H)ᵀ) ∘ (s_x s_Wᵀ) + b + Σ ((x · Aᵀ) ∘ S) · Bᵀ          codes: int8, one scale a row

H rotates every 256 channels: an outlier is spread over its block, so that one scale serves a row, and H Hᵀ = 1 takes
the rotation out of the product again. Rows are decoded, rotated and rounded in every call and live in the scratch; a
layer keeps the scales of its rows (`prepare`), and the file's bytes are what they were. Low-rank terms take x as it
came. The product is that of a library: `comfy_kitchen` on NVIDIA's GPUs, torch's own on processors with VNNI.

The rotation is ConvRot's (regular Hadamard matrices, H₂₅₆ = H₄ ⊗ H₄ ⊗ H₄ ⊗ H₄ = H₁₆ ⊗ H₁₆), in the convention of
comfy-kitchen, whose kernels rotate x on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import torch

from . import backends, cpu, scratch
from .dispatch import LowRank, _add_low_rank, _apart, _as_format, _byte_rows, _decode, is_slow
from .dispatch import linear as usual_linear
from .formats import Format

BLOCK = 256
"""Channels that are rotated together; a layer's K has to be a multiple of it."""

LEAST_ROWS = 384
"""Rows of x from which int8 is worth decoding to, on a CPU against fp32 products (`benchmarks/bench_int8.py`)."""

LEAST_ROWS_BF16 = 512
"""The same against native bf16 products (AVX512-BF16), which take half the time of fp32: encoding a thousand weights
takes as long there as what 350 rows of x save on them."""

# what a processor rotates at a time, in fp32, should stay close to it; a product may be larger, in int8, and is slow
# with few columns
_CHUNK_BYTES = 4 << 20
_PRODUCT_BYTES = 4 << 20
_PRODUCT_COLUMNS = 512
_SAMPLE = 64


@functools.cache
def _kitchen() -> ModuleType | str:
    """ComfyUI's library of kernels, which Forge Neo has, too, or why there is none."""
    try:
        import comfy_kitchen
    except Exception as error:  # one that was built for another torch fails in ways of its own
        return f"comfy_kitchen, whose int8 kernels are used, is not installed here ({type(error).__name__})"
    if not hasattr(comfy_kitchen, "int8_linear"):
        return "this comfy_kitchen has no int8 kernels: update ComfyUI or Forge Neo"
    return comfy_kitchen


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """None if int8 products are faster than others on `device`, else why they are not to be had, in words."""
    if device.type == "cpu":
        return _unavailable_on_cpu()
    if device.type != "cuda" or torch.version.hip:
        return f"there are no int8 kernels for {'AMD GPUs' if torch.version.hip else device.type}"
    kitchen = _kitchen()
    if isinstance(kitchen, str):
        return kitchen
    choice = backends.choose(device)
    if choice.name != "triton":
        return f"weights are not decoded on the GPU: {choice.reason}"
    backend = [name for name, state in kitchen.list_backends().items() if _multiplies(name, state)]
    if not backend:
        return "comfy_kitchen has no int8 kernel for this GPU"
    return _trial(kitchen, device)


def _multiplies(name: str, state: dict) -> bool:
    usable = state["available"] and not state["disabled"] and "int8_linear" in state["capabilities"]
    return usable and name != "eager"  # which is torch code, in many passes


def _unavailable_on_cpu() -> str | None:
    if cpu.has_tiles():
        # encoding a weight takes as long as on others, and bf16 products are too fast to win that back
        return "this processor is faster in bf16 (AMX): choose bf16"
    if not cpu.has_int8():
        return "this processor has no fast int8 products (VNNI)"
    a = torch.arange(-128, 128, dtype=torch.int8).repeat(4, 1)
    try:
        right = torch.equal(torch._int_mm(a, a.t()), a.int() @ a.int().t())
    except (AttributeError, RuntimeError):  # torch before 2.4 has none for CPUs
        return "this torch has no int8 products for CPUs: update it"
    return None if right else "this torch multiplies int8 wrongly on this processor"


def _trial(kitchen: ModuleType, device: torch.device) -> str | None:
    """Multiply by the unit matrix and look at the result: what is missing shows here and not later."""
    x = torch.eye(BLOCK, device=device, dtype=torch.bfloat16)
    codes, scales = quantize(x)
    try:
        y = kitchen.int8_linear(x, codes, scales, None, x.dtype, True, BLOCK)
    except Exception as error:
        return f"comfy_kitchen's int8 kernel failed with {type(error).__name__}: {error}"
    return None if torch.allclose(y, x, atol=0.02) else "comfy_kitchen's int8 kernel gave a wrong result"


@functools.cache
def hadamard(device: torch.device) -> torch.Tensor:
    """H₁₆ = H₄ ⊗ H₄, normalized and symmetric: fp32 ``[16, 16]``."""
    with torch.inference_mode(False):
        h = torch.ones(4, 4, device=device) - 2 * torch.eye(4, device=device).flip(0)
        return torch.kron(h, h) / 4


def rotate_(rows: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Rotate ``rows [n, K]``, fp32 and contiguous, where they lie; `spare` is memory as large.

    A block as a matrix X of 16 by 16 becomes H₁₆ X H₁₆: sixteen times fewer multiplications than by H₂₅₆.
    """
    h, blocks = hadamard(rows.device), rows.numel() // BLOCK
    torch.mm(rows.view(-1, 16), h, out=spare.view(-1, 16))
    torch.bmm(h.expand(blocks, 16, 16), spare.view(-1, 16, 16), out=rows.view(-1, 16, 16))
    return rows


def _scales_of(rotated: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """One scale a row, fp32 ``[n, 1]``: the largest number becomes 127."""
    return torch.abs(rotated, out=spare).amax(1, keepdim=True).div_(127).clamp_(min=1e-30)


def _round(rotated: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> None:
    """``codes = round(rotated / scales)``; `rotated` is overwritten."""
    codes.copy_(torch.div(rotated, scales, out=rotated).round_())


def _step(device: torch.device, columns: int) -> int:
    """Rows that are rotated at a time: whole tiles of the GEMM."""
    rows = scratch.rows_per_chunk(device, columns, torch.float32, _CHUNK_BYTES)
    return rows if rows < 16 else rows - rows % 16


def _wide(device: torch.device, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for rows in fp32, and as much to spare."""
    return (
        scratch.take(device, rows, columns, torch.float32, "int8 rows"),
        scratch.take(device, rows, columns, torch.float32, "int8 spare"),
    )


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x, rotated and rounded.

    Args:
        x: ``[M, K]`` of any float dtype.

    Returns:
        codes, int8 ``[M, K]`` in the scratch, gone with the next call; their scales, fp32 ``[M, 1]``.
    """
    m, k = x.shape
    codes = scratch.take(x.device, m, k, torch.int8, "int8 x")
    scales = torch.empty(m, 1, device=x.device)
    step = _step(x.device, k)
    for start in range(0, m, step):
        part = slice(start, min(start + step, m))
        rows, spare = _wide(x.device, part.stop - start, k)
        rotate_(rows.copy_(x[part]), spare)
        scales[part] = _scales_of(rows, spare)
        _round(rows, scales[part], codes[part])
    return codes, scales


def _rotated_rows(data: torch.Tensor, fmt: Format, columns: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Few rows of packed bytes as rotated numbers, fp32 ``[n, columns]`` in the scratch, and memory to spare."""
    rows, spare = _wide(data.device, data.shape[0], columns)
    _decode(data, fmt, rows, backend)
    return rotate_(rows, spare), spare


def encode(data: torch.Tensor, fmt: Format, scales: torch.Tensor, codes: torch.Tensor, backend: str) -> None:
    """Packed rows to rotated int8 ones.

    Args:
        data: ``uint8 [n, row_bytes]``, contiguous.
        scales: fp32 ``[n, 1]``, those of `prepare`.
        codes: int8 ``[n, K]``, contiguous; overwritten.
        backend: that decodes.
    """
    if backend == "triton":
        module = backends.triton_backend()
        module.encode_int8(data, fmt, scales, codes)  # type: ignore[union-attr]
        return
    step = _step(data.device, codes.shape[1])
    for start in range(0, data.shape[0], step):
        part = slice(start, start + step)
        rows, _ = _rotated_rows(data[part], fmt, codes.shape[1], backend)
        _round(rows, scales[part], codes[part])


@torch.no_grad()
@torch.inference_mode(False)
def prepare(
    data: torch.Tensor, fmt: Format | str, shape: tuple[int, int] | torch.Size, backend: str = "auto"
) -> tuple[torch.Tensor, float]:
    """What a layer needs for int8: worked out once, in one walk over its weight.

    Args:
        data: the packed weight ``[N, K]``, flat or by rows; K is a multiple of `BLOCK` and of the format's block.
        fmt: its format.
        shape: N and K.
        backend: that decodes.

    Returns:
        the scales of its rows, fp32 ``[N, 1]`` on data's device, and how far int8 is off the decoded weights on a
        sample of rows: ``|Ŵ - W| / |W|``.
    """
    fmt, (n, k) = _as_format(fmt), shape
    chosen = backends.choose(data.device, fmt, backend).name
    source = _byte_rows(data, fmt, n, k)
    assert source is not None and k % BLOCK == 0
    source = source.contiguous()
    if chosen == "triton":
        module = backends.triton_backend()
        scales = module.int8_scales(source, fmt, k)  # type: ignore[union-attr]
    else:
        scales = torch.empty(n, 1, device=data.device)
        step = _step(data.device, k)
        for start in range(0, n, step):
            part = slice(start, start + step)
            scales[part] = _scales_of(*_rotated_rows(source[part], fmt, k, chosen))
    return scales, _error(source[:: max(1, n // _SAMPLE)].contiguous(), scales[:: max(1, n // _SAMPLE)], fmt, k, chosen)


def _error(source: torch.Tensor, scales: torch.Tensor, fmt: Format, columns: int, backend: str) -> float:
    """``|Ŵ - W| / |W|`` of these rows."""
    rows, _ = _rotated_rows(source, fmt, columns, backend)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    encode(source, fmt, scales, codes, backend)
    rows, _ = _rotated_rows(source, fmt, columns, backend)
    size = rows.norm()
    return float((codes * scales).sub_(rows).norm() / size) if size else 0.0


def pays(x: torch.Tensor, n: int, fmt: Format, backend: str = "auto") -> bool:
    """Whether int8 is the faster way for ``x [..., K]`` times a weight ``[n, K]``: from some rows of x on.

    Never where a gradient is wanted, which rounded numbers have none of.
    """
    if unavailable(x.device) is not None or x.dtype == torch.float64:
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    k = x.shape[-1]
    m = x.numel() // k
    if x.device.type == "cpu":
        return m >= (LEAST_ROWS if x.dtype == torch.float32 or is_slow(x) else LEAST_ROWS_BF16)
    if backends.choose(x.device, fmt, backend).name != "triton":
        return False
    module = backends.triton_backend()
    return module.choose(m, n, k, fmt, x.device, x.dtype) == "dequantize"  # type: ignore[union-attr]


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    fmt: Format | str,
    row_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: LowRank | None = None,
    backend: str = "auto",
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`dispatch.linear` with int8 products; it is that itself for few rows of x, and where a gradient is wanted.

    Args:
        x: ``[..., K]`` in fp32, fp16 or bf16.
        data, fmt: the packed weight ``[N, K]``.
        row_scales: fp32 ``[N, 1]``, those of `prepare`.
        bias, residual, backend, scale: as there.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    fmt, n = _as_format(fmt), row_scales.shape[0]
    if torch.compiler.is_compiling():
        terms = _apart(residual)
        return torch.ops.graft.int8_linear(x, data, fmt.name, row_scales, bias, *terms, backend, scale)
    if not pays(x, n, fmt, backend):
        return usual_linear(x, data, fmt, bias, residual, n, backend, scale)
    flat = x.reshape(-1, x.shape[-1])
    wide = flat.float() if is_slow(x) else flat
    source = _byte_rows(data, fmt, n, wide.shape[1])
    assert source is not None
    if bias is not None:
        bias = bias.to(wide.dtype)
    product = _on_cpu if x.device.type == "cpu" else _by_kitchen
    out = product(wide, source, fmt, row_scales, bias, residual, backend, scale)
    return out.to(x.dtype).view(*x.shape[:-1], n)


def _encoded(
    source: torch.Tensor, fmt: Format, row_scales: torch.Tensor, columns: int, step: int, backend: str
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Walk over the weight: ``(which rows, codes int8 [n, columns])``; these are gone with the next step."""
    chosen = backends.choose(source.device, fmt, backend).name
    for start in range(0, source.shape[0], step):
        rows = slice(start, min(start + step, source.shape[0]))
        codes = scratch.take(source.device, rows.stop - start, columns, torch.int8, "int8 weight")
        encode(source[rows], fmt, row_scales[rows], codes, chosen)
        yield rows, codes


@scratch.retried
def _on_cpu(
    x: torch.Tensor, source: torch.Tensor, fmt: Format, row_scales: torch.Tensor, bias: torch.Tensor | None,
    residual: LowRank | None, backend: str, scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """By torch's own int8 GEMM; what it adds up is scaled while it is in cache."""
    (m, k), n = x.shape, source.shape[0]
    t = None if residual is None else residual.project(x)
    out = torch.empty(m, n, dtype=x.dtype)
    codes, x_scales = quantize(x)
    scales = (row_scales if scale is None else row_scales * scale.view(-1, 1)).view(-1)
    step = max(_PRODUCT_COLUMNS, scratch.rows_per_chunk(x.device, k, torch.int8, _PRODUCT_BYTES))
    for rows, weight in _encoded(source, fmt, row_scales, k, step, backend):
        part, count = out[:, rows], weight.shape[0]
        sums = scratch.take(x.device, m, count, torch.int32, "int8 sums")
        torch._int_mm(codes, weight.t(), out=sums)
        wide = scratch.take(x.device, m, count, torch.float32, "int8 product").copy_(sums).mul_(x_scales)
        if bias is None:
            torch.mul(wide, scales[rows], out=part)
        else:
            torch.addcmul(bias[rows], wide, scales[rows], out=part)
        if t is not None and residual is not None:
            _add_low_rank(part, t, residual, rows)
    return out


@scratch.retried
def _by_kitchen(
    x: torch.Tensor, source: torch.Tensor, fmt: Format, row_scales: torch.Tensor, bias: torch.Tensor | None,
    residual: LowRank | None, backend: str, scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """By comfy_kitchen, which rotates and rounds x itself and scales what it adds up."""
    kitchen, k = _kitchen(), x.shape[1]
    assert isinstance(kitchen, ModuleType)
    t = None if residual is None else residual.project(x)
    scales = row_scales if scale is None else row_scales * scale.view(-1, 1)
    parts = []
    step = scratch.rows_per_chunk(x.device, k, torch.int8)
    for rows, weight in _encoded(source, fmt, row_scales, k, step, backend):
        added = None if bias is None else bias[rows]
        part = kitchen.int8_linear(x, weight, scales[rows], added, x.dtype, convrot=True, convrot_groupsize=BLOCK)
        if t is not None and residual is not None:
            _add_low_rank(part, t, residual, rows)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


__all__ = ["BLOCK", "encode", "linear", "pays", "prepare", "quantize", "unavailable"]
