"""`dequantize` and `linear`: what the layers call.

    y = x · dequant(W)ᵀ + b + Σ ((x · Aᵀ) ∘ S) · Bᵀ          W: [N, K], x: [..., K], A: [R, K], B: [n, R]

Three ways, by shape, type and device: a matvec kernel or a fused kernel where Triton has one that wins
(`triton_.choose`), and otherwise chunks of rows decoded into a scratch for the vendor's GEMM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import backends, cpu, scratch
from .errors import CorruptFile, WrongInput
from .formats import Format, by_name

FEW_ROWS = 2
"""Rows of x up to which the `cpu` backend multiplies in fp32 whatever x is in: modulations, of one picture or two."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """Low-rank terms beside a linear layer, rank-concatenated: ``y[..., start:start+n] += ((x Aᵀ) ∘ S) Bᵀ``.

    Attributes:
        down: A, ``[R, K]``: all adapters' down projections.
        scale: S, ``fp32 [R]`` or ``[tokens, R]``: strength times alpha / rank of each rank.
        ups: for each range of output rows ``(start, first, B)``, with B ``[n, r]`` reading ranks
            ``first : first + r``. Adapters on the whole layer share one entry.
    """

    down: torch.Tensor
    scale: torch.Tensor
    ups: tuple[tuple[int, int, torch.Tensor], ...]

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """``t = (x Aᵀ) ∘ S``: x ``[M, K]`` to ``[M, R]`` in x's dtype."""
        return F.linear(x, _in(self.down, x.dtype)).mul_(self.scale)


def _in(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`, without asking torch where it is: with one row of x what counts is how much is asked."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _part(tensor: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    return tensor if tensor.shape[dim] == length else tensor.narrow(dim, start, length)


def _as_format(fmt: Format | str) -> Format:
    return by_name(fmt) if isinstance(fmt, str) else fmt


def _count(data: torch.Tensor, fmt: Format) -> int:
    """How many weights there are in `data`."""
    return data.numel() // fmt.type_size * fmt.block_size if fmt.is_quantized else data.numel()


def _byte_rows(data: torch.Tensor, fmt: Format, rows: int, columns: int) -> torch.Tensor | None:
    """`data` as ``uint8 [rows, row_bytes]``, or None if rows do not end where blocks end."""
    if columns % fmt.block_size:
        return None
    return data.reshape(rows, columns // fmt.block_size * fmt.type_size)


def _scale(weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Multiply ``weight [rows, ...]``, freshly decoded, by a scale ``[1]`` or ``[rows]`` from beside its bytes."""
    if scale is not None:
        weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))


def _of_rows(scale: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
    return scale if scale is None or scale.numel() == 1 else scale[start:stop]


def _decode(data: torch.Tensor, fmt: Format, out: torch.Tensor, backend: str) -> None:
    """Decode ``uint8 [rows, row_bytes]`` into ``out [rows, columns]`` of any float dtype, contiguous."""
    if backend == "triton":
        module = backends.triton_backend()
        module.dequantize(data, fmt, out)  # type: ignore[union-attr]
    elif backend == "cpu" and out.dtype == torch.float32:
        cpu.decode(data, fmt, out)
    elif backend == "cpu":
        # libgguf writes fp32 only: pass through a scratch small enough to stay in cache
        step = scratch.rows_per_chunk(out.device, out.shape[1], torch.float32, scratch.STAGING_BYTES)
        for start in range(0, out.shape[0], step):
            part = out[start : start + step]
            wide = scratch.take(out.device, part.shape[0], part.shape[1], torch.float32, "decode")
            cpu.decode(data[start : start + step], fmt, wide)
            part.copy_(wide)
    else:
        assert fmt.decode is not None
        blocks = data.reshape(-1, fmt.type_size)
        flat = out.view(-1, fmt.block_size)
        step = max(1, scratch.CPU_BYTES // (4 * fmt.block_size))
        for start in range(0, blocks.shape[0], step):
            flat[start : start + step].copy_(fmt.decode(blocks[start : start + step]))


@scratch.retried
def dequantize(
    data: torch.Tensor,
    fmt: Format | str,
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights that `data` stands for.

    Args:
        data: the file's bytes of one tensor, ``uint8``, any shape, or for a type that torch can hold as
            it is, a tensor of that dtype.
        fmt: their format, or its name.
        shape: the logical shape; the last dimension need not be a multiple of the block.
        dtype: fp32, fp16 or bf16.
        backend: ``auto``, ``triton``, ``cpu`` or ``torch``.
        scale: fp32 ``[1]`` or ``[rows]``, by which a quantized weight is multiplied (NVFP4's second scale).

    Returns:
        a new tensor of `shape` and `dtype` on `data`'s device.

    Raises:
        CorruptFile: the bytes are not as many as the shape needs.
        NoBackend: the backend asked for cannot run here.
    """
    fmt = _as_format(fmt)
    if torch.compiler.is_compiling() and fmt.is_quantized:
        return torch.ops.graft.dequantize(data, fmt.name, list(shape), dtype, backend, scale)
    count = math.prod(shape)
    if data.nbytes * fmt.block_size != count * fmt.type_size:
        raise CorruptFile(
            f"{tuple(shape)} weights of {fmt.name} take {count * fmt.type_size // fmt.block_size} bytes, "
            f"but there are {data.nbytes}: get the file again"
        )
    if not fmt.is_quantized:
        assert fmt.dtype is not None
        return data.reshape(-1).view(fmt.dtype).reshape(shape).to(dtype)
    if scale is not None and dtype != torch.float32:
        # rounded once, from the product
        return dequantize(data, fmt, shape, torch.float32, backend, scale).to(dtype)
    chosen = backends.choose(data.device, fmt, backend).name
    if not count:
        return torch.empty(shape, dtype=dtype, device=data.device)
    # whole rows where they end with a block, else one row of everything
    columns = shape[-1] if len(shape) and shape[-1] % fmt.block_size == 0 else count
    out = torch.empty(count // columns, columns, dtype=dtype, device=data.device)
    rows = _byte_rows(data, fmt, *out.shape)
    assert rows is not None
    _decode(rows.contiguous(), fmt, out, chosen)
    weight = out.view(shape)
    _scale(weight, scale)
    return weight


def decoded_rows(
    data: torch.Tensor, fmt: Format | str, rows: int, columns: int, dtype: torch.dtype, backend: str = "auto",
    scale: torch.Tensor | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:  # fmt: skip
    """Walk over a ``[rows, columns]`` weight in chunks: ``(which rows, weight [n, columns] in dtype)``.

    The chunk lies in the reused scratch and is gone with the next step.
    """
    fmt = _as_format(fmt)
    if torch.compiler.is_compiling():
        yield slice(0, rows), _whole(data, fmt, (rows, columns), dtype, backend, scale)
        return
    if fmt.is_quantized and columns % fmt.block_size:
        # rows of a reshaped tensor that start inside a block: nothing to walk along
        yield slice(0, rows), dequantize(data, fmt, (rows, columns), dtype, backend, scale)
        return
    if not fmt.is_quantized and data.dtype == dtype:
        yield slice(0, rows), data.reshape(rows, columns)
        return
    source = _byte_rows(data, fmt, rows, columns) if fmt.is_quantized else data.reshape(rows, columns)
    assert source is not None
    chosen = backends.choose(data.device, fmt, backend).name if fmt.is_quantized else ""
    step = scratch.rows_per_chunk(data.device, columns, dtype, rows=rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = scratch.take(data.device, stop - start, columns, dtype)
        if fmt.is_quantized:
            _decode(source[start:stop], fmt, weight, chosen)
            _scale(weight, _of_rows(scale, start, stop))
        else:
            weight.copy_(source[start:stop])
        yield slice(start, stop), weight


def _whole(
    data: torch.Tensor, fmt: Format, shape: tuple[int, int], dtype: torch.dtype, backend: str,
    scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The weight ``[N, K]`` in memory of its own, or as it lies if it needs no decoding."""
    return dequantize(data, fmt, shape, dtype, backend, scale) if fmt.is_quantized else data.reshape(shape).to(dtype)


def _add_low_rank(out: torch.Tensor, t: torch.Tensor, low_rank: LowRank, rows: slice) -> None:
    """Add those terms that fall into `rows` of the layer to ``out [M, rows]``."""
    for start, first, up in low_rank.ups:
        begin, end = max(start, rows.start), min(start + up.shape[0], rows.stop)
        if begin < end:
            part = _in(_part(up, 0, begin - start, end - begin), out.dtype)
            target, ranks = _part(out, 1, begin - rows.start, end - begin), _part(t, 1, first, up.shape[1])
            if _writes_strided(out):
                target.addmm_(ranks, part.t())
            else:
                target.add_(ranks @ part.t())


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """``out = x · weightᵀ + bias``, out a slice of columns."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] <= cpu.onednn_rows():
        out.copy_(cpu.onednn_linear(x, weight, bias))
    elif not _writes_strided(out):
        out.copy_(F.linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _writes_strided(out: torch.Tensor) -> bool:
    """Whether a product may be written into a slice: up to macOS 14 MPS loses it (pytorch#104832)."""
    return not out.is_mps


def _linear_by_chunks(
    x: torch.Tensor, data: torch.Tensor, fmt: Format, out: torch.Tensor, low_rank: LowRank | None,
    bias: torch.Tensor | None, backend: str, scale: torch.Tensor | None,
) -> None:  # fmt: skip
    t = None if low_rank is None else low_rank.project(x)
    bias = None if bias is None else _in(bias, x.dtype)
    for rows, weight in decoded_rows(data, fmt, out.shape[1], x.shape[1], x.dtype, backend, scale):
        part = out[:, rows]
        _multiply(x, weight, None if bias is None else bias[rows], part)
        if t is not None and low_rank is not None:
            # while this part of the output is still in cache
            _add_low_rank(part, t, low_rank, rows)


def _linear_with_gradient(
    x: torch.Tensor, data: torch.Tensor, fmt: Format, rows: int, low_rank: LowRank | None, bias: torch.Tensor | None,
    backend: str, scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    # on the way back autograd asks for the weight again: it must not lie in the scratch
    weight = _whole(data, fmt, (rows, x.shape[1]), x.dtype, backend, scale)
    out = F.linear(x, weight, None if bias is None else _in(bias, x.dtype))
    if low_rank is not None:
        _add_low_rank(out, low_rank.project(x), low_rank, slice(0, rows))
    return out


@scratch.retried
def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    fmt: Format | str,
    bias: torch.Tensor | None = None,
    residual: LowRank | None = None,
    rows: int | None = None,
    backend: str = "auto",
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x · dequant(data)ᵀ + bias``, with low-rank terms beside it.

    Args:
        x: ``[..., K]`` in fp32, fp16 or bf16: the dtype of the computation and of the result.
        data: the packed weight, ``uint8 [N, row_bytes]`` or flat, or a float tensor ``[N, K]``.
        fmt: its format, or its name.
        bias: ``[N]``.
        residual: low-rank terms.
        rows: N, where `data` is not shaped ``[N, ...]``.
        backend: ``auto``, ``triton``, ``cpu`` or ``torch``.
        scale: fp32 ``[1]`` or ``[N]``, by which a quantized weight is multiplied.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        WrongInput: x and the weight differ in K.
    """
    fmt = _as_format(fmt)
    n = data.shape[0] if rows is None else rows
    if torch.compiler.is_compiling():
        return _linear_in_graph(x, data, fmt, bias, residual, n, backend, scale)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    m, k = flat.shape
    if k * n != _count(data, fmt):
        columns = f"x has {k} columns, but the {fmt} weight has {_count(data, fmt) // max(n, 1)}"
        raise WrongInput(f"{columns}: is the text encoder that of this model?")
    chosen = backends.choose(x.device, fmt, backend).name if fmt.is_quantized else "torch"
    if torch.is_grad_enabled() and x.requires_grad:
        out = _linear_with_gradient(flat, data, fmt, n, residual, bias, backend, scale)
        return out.view(*x.shape[:-1], n)
    kernel = _kernel(chosen, m, n, k, fmt, x)
    if kernel is None and _is_widened(x, chosen):
        return linear(x.float(), data, fmt, bias, residual, n, backend, scale).to(x.dtype)
    out = flat.new_empty(m, n)
    if kernel is not None:
        _linear_in_triton(kernel, flat, data, fmt, out, residual, bias, scale)
    else:
        _linear_by_chunks(flat, data, fmt, out, residual, bias, backend, scale)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], n)


def is_slow(x: torch.Tensor) -> bool:
    """Whether x is better multiplied in fp32: it is narrower, and on a processor without products of its dtype."""
    return x.dtype in cpu.SLOW_DTYPES and x.device.type == "cpu"


def _is_widened(x: torch.Tensor, backend: str) -> bool:
    """Whether `linear` multiplies a narrower x in fp32: where it is slow, and where it has few rows.

    The `cpu` backend writes fp32: for a few rows the product costs less than casting the weight would.
    """
    if x.dtype == torch.float32:
        return False
    return (backend == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1]) or is_slow(x)


def _linear_in_graph(
    x: torch.Tensor, data: torch.Tensor, fmt: Format, bias: torch.Tensor | None, low_rank: LowRank | None, rows: int,
    backend: str, scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """`linear` as one node of a traced graph (`compiled.py`)."""
    return torch.ops.graft.linear(x, data, fmt.name, rows, bias, *_apart(low_rank), backend, scale)


def _apart(
    low_rank: LowRank | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor], list[int]]:
    """Low-rank terms as an operator takes them: A, S, all B, and of each its start and its first rank."""
    if low_rank is None:
        return None, None, [], []
    places = [number for start, first, _ in low_rank.ups for number in (start, first)]
    return low_rank.down, low_rank.scale, [up for _, _, up in low_rank.ups], places


def _kernel(backend: str, m: int, n: int, k: int, fmt: Format, x: torch.Tensor) -> str | None:
    """The kernel that multiplies packed bytes as they are, if there is one that wins; None where chunks do."""
    if backend != "triton" or k % fmt.block_size:
        return None
    kernel = backends.triton_backend().choose(m, n, k, fmt, x.device, x.dtype)  # type: ignore[union-attr]
    return None if kernel == "dequantize" else kernel


def _linear_in_triton(
    kernel: str, x: torch.Tensor, data: torch.Tensor, fmt: Format, out: torch.Tensor, low_rank: LowRank | None,
    bias: torch.Tensor | None, scale: torch.Tensor | None,
) -> None:  # fmt: skip
    """Run ``matvec`` or ``matmul``, which take a bias of any dtype."""
    triton = backends.triton_backend()
    assert not isinstance(triton, str)
    run, t = getattr(triton, kernel), None
    if low_rank is not None and kernel == "matvec":
        # torch would take two operations, of which the first is a GEMM made for many rows
        t = x.new_empty(x.shape[0], low_rank.down.shape[0])
        triton.project(x, low_rank.down, low_rank.scale, t)
    elif low_rank is not None:
        t = low_rank.project(x)
    if scale is not None:
        # in fp32: what has not been scaled yet may be more than fp16 holds
        wide = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        run(x, data, fmt, wide, None, None)
        out.copy_(wide.mul_(scale) if bias is None else wide.mul_(scale).add_(bias))
    elif low_rank is not None and t is not None and _spans(low_rank, out.shape[1]):
        _, first, up = low_rank.ups[0]
        run(x, data, fmt, out, bias, (_part(t, 1, first, up.shape[1]), up))
        return
    else:
        run(x, data, fmt, out, bias, None)
    if low_rank is not None and t is not None:
        _add_low_rank(out, t, low_rank, slice(0, out.shape[1]))


def _spans(low_rank: LowRank, rows: int) -> bool:
    """Whether it is one term on all rows of the layer, which a kernel adds itself; slices are added behind it."""
    return len(low_rank.ups) == 1 and low_rank.ups[0][2].shape[0] == rows


def embedding(
    indices: torch.Tensor, data: torch.Tensor, fmt: Format | str, shape: tuple[int, int], dtype: torch.dtype,
    backend: str = "auto", scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rows of a packed ``[count, width]`` table: only those that are looked up are decoded.

    Args:
        indices: integers of any shape ``[...]``.

    Returns:
        ``[..., width]`` in `dtype`.
    """
    fmt = _as_format(fmt)
    count, width = shape
    source = _byte_rows(data, fmt, count, width) if fmt.is_quantized else data.reshape(count, width)
    if source is None:
        return F.embedding(indices, dequantize(data, fmt, shape, dtype, backend, scale))
    flat = indices.reshape(-1)
    scales = scale if scale is None or scale.numel() == 1 else scale.index_select(0, flat)
    rows = dequantize(source.index_select(0, flat), fmt, (flat.numel(), width), dtype, backend, scales)
    return rows.view(*indices.shape, width)


__all__ = ["LowRank", "decoded_rows", "dequantize", "embedding", "is_slow", "linear"]
