"""Matvec and the fused matmul of every type against fp64, with bias and low-rank term."""

from __future__ import annotations

import functools
import itertools

import oracle
import pytest
import torch
from graft.kernels import LowRank, codebooks, linear, triton_
from graft.kernels.formats import BY_NAME, Format
from triton_testing import DEVICE, INTERPRETED, poisoned, watched

RANKS = (0, 1, 16, 48)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# relative error of one rounding: half a unit in the last place, a whole one where the interpreter cuts bf16 off
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}
# of one addition: tensor cores cut off what falls below the accumulator
SUM = 2.0**-23

every_type = pytest.mark.parametrize("fmt", oracle.DECODABLE, ids=str)


@functools.cache
def weights(fmt: Format, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks on the device, u8 [n, row_bytes], and what they decode to in fp64."""
    data = oracle.random_blocks(fmt, n * k // fmt.block_size).view(n, -1)
    return data.to(DEVICE), oracle.oracle(data, fmt).double()


def check(kernel: str, fmt: Format, m: int, n: int, k: int, rank: int, dtype: torch.dtype, bias: bool = True) -> None:
    """Run a kernel with every access watched, and hold each output to a bound on its rounding errors."""
    data, exact = weights(fmt, n, k)
    generator = torch.Generator().manual_seed(m * n + rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, b = normal(m, k), normal(n) if bias else None
    t, up = (normal(m, rank), normal(n, rank)) if rank else (None, None)
    args = [None if tensor is None else tensor.to(DEVICE) for tensor in (x, b, t, up)]
    residual = (args[2], args[3]) if rank else None
    table = codebooks.table(fmt.book, DEVICE) if fmt.book else None
    with poisoned(m, n, dtype) as out:
        with watched([*args, data, table], out):
            getattr(triton_, kernel)(args[0], data, fmt, out, args[1], residual)
        got = out.cpu().double()

    want, size = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    if t is not None and up is not None:
        want, size = want + t.double() @ up.double().T, size + t.double().abs() @ up.double().abs().T
    if b is not None:
        want, size = want + b.double(), size + b.double().abs()
    # matvec multiplies fp32 weights, matmul weights rounded to x's dtype; sums in fp32, the result rounded once
    rounding = ROUNDING[dtype] if kernel == "matmul" else 0.0
    bound = (rounding + (k + rank + 2) * SUM) * size + ROUNDING[dtype] * want.abs()
    assert ((got - want).abs() <= bound).all(), ((got - want).abs() / bound).max()


def columns(fmt: Format) -> int:
    """The narrowest row that takes several turns of the loop: two blocks, or two odd units."""
    return 2 * fmt.block_size if fmt.block_size == 256 else 192


@every_type
@pytest.mark.parametrize(
    ("kernel", "m"), [("matvec", 1), ("matvec", 2), ("matvec", 7), *(("matmul", m) for m in (1, 2, 7, 33))]
)
def test_every_type(fmt, kernel, m):
    """Odd N. Rank and dtype change with type and M, so that they all meet."""
    turn = oracle.DECODABLE.index(fmt) + (1, 2, 7, 33).index(m)
    check(kernel, fmt, m, 5, columns(fmt), RANKS[turn % 4], DTYPES[turn % 3])


@pytest.mark.parametrize("kernel", ["matvec", "matmul"])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ3_S"])
@pytest.mark.parametrize(("rank", "dtype"), list(itertools.product(RANKS, DTYPES)), ids=str)
def test_every_rank_and_dtype(kernel, name, rank, dtype):
    check(kernel, BY_NAME[name], 3, 7, columns(BY_NAME[name]), rank, dtype)


@pytest.mark.parametrize("kernel", ["matvec", "matmul"])
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "NVFP4", "MXFP4"])
@pytest.mark.parametrize("n", [1, 3, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_weights_that_fill_no_tile(kernel, name, n, bias):
    fmt = BY_NAME[name]
    check(kernel, fmt, 1, n, max(64, fmt.block_size), 0, torch.float32, bias)


@pytest.mark.parametrize("kernel", ["matvec", "matmul"])
@pytest.mark.parametrize("k", [32, 96, 320])
def test_columns_that_fill_no_unit(kernel, k):
    """One block of 32; three; and SDXL's 320."""
    check(kernel, BY_NAME["Q5_0"], 2, 5, k, 16, torch.float32)


@pytest.mark.parametrize("m", [16, 17, 64, 65, 128, 129])
def test_every_tile_of_the_plan(m):
    check("matmul", BY_NAME["Q8_0"], m, 9, 64, 16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k", "by_row"), [(1, 64, False), (1, 1024, True), (3, 1120, False), (3, 2080, True)])
def test_project(m, k, by_row, stored, dtype):
    """x to the ranks, with a strength for all rows or one for each; also where k fills no unit."""
    rank, generator = 48, torch.Generator().manual_seed(k)
    x, down = torch.randn(m, k, generator=generator).to(dtype), torch.randn(rank, k, generator=generator).to(stored)
    scale = torch.randn(*((m, rank) if by_row else (rank,)), generator=generator)
    args = [tensor.to(DEVICE) for tensor in (x, down, scale)]
    with poisoned(m, rank, dtype) as out:
        with watched(args, out):
            triton_.project(*args, out)
        got = out.cpu().double()
    want = (x.double() @ down.double().T) * scale.double()
    size = (x.double().abs() @ down.double().abs().T) * scale.double().abs()
    # one rounding more than the sums, of the product by S
    assert ((got - want).abs() <= (k + 2) * SUM * size + ROUNDING[dtype] * want.abs()).all()


def test_low_rank_may_be_a_slice():
    """As dispatch cuts t for adapters on parts of a layer."""
    fmt = BY_NAME["Q8_0"]
    data, exact = weights(fmt, 6, 64)
    generator = torch.Generator().manual_seed(0)
    x, t, up = (torch.randn(*shape, generator=generator) for shape in ((2, 64), (2, 24), (24, 6)))
    out = torch.empty(2, 6, device=DEVICE)
    triton_.matmul(x.to(DEVICE), data, fmt, out, None, (t.to(DEVICE)[:, 8:], up.to(DEVICE).T[:, 8:]))
    want = x.double() @ exact.T + t[:, 8:].double() @ up[8:].double()
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", ["matvec", "matmul"])
@pytest.mark.parametrize(("first", "rank"), [(0, 16), (16, 16), (8, 20), (0, 32)])
def test_a_term_may_read_some_of_the_ranks(kernel, first, rank, monkeypatch):
    """As one range of rows that spans the layer, and so rides in the kernel."""
    monkeypatch.setattr(triton_, "choose", lambda *args: kernel)
    fmt, n, k = BY_NAME["Q8_0"], 6, 64
    data, exact = weights(fmt, n, k)
    generator = torch.Generator().manual_seed(rank)
    x, down, up = (torch.randn(*shape, generator=generator) for shape in ((2, k), (32, k), (n, rank)))
    low_rank = LowRank(down.to(DEVICE), torch.full((32,), 0.5, device=DEVICE), ((0, first, up.to(DEVICE)),))
    got = linear(x.to(DEVICE), data, fmt, None, low_rank, n, "triton")
    t = 0.5 * x.double() @ down[first : first + rank].double().T
    torch.testing.assert_close(got.cpu().double(), x.double() @ exact.T + t @ up.double().T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kernel", ["matvec", "matmul"])
@pytest.mark.parametrize("scales", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scale_beside_the_weight_comes_before_bias_and_adapters(kernel, scales, dtype, monkeypatch):
    """In fp16, too, of which what has not been scaled yet is beyond the range."""
    monkeypatch.setattr(triton_, "choose", lambda *args: kernel)
    fmt, n, k = BY_NAME["NVFP4"], 6, 128
    data, exact = weights(fmt, n, k)
    generator = torch.Generator().manual_seed(scales)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    scale = torch.rand(scales, generator=generator) * 1e-3 + 1e-4
    x, bias, down, up = 400 * normal(2, k), normal(n), normal(16, k), normal(n, 16)
    low_rank = LowRank(down.to(DEVICE), torch.full((16,), 1e-3, device=DEVICE), ((0, 0, up.to(DEVICE)),))
    got = linear(x.to(DEVICE), data, fmt, bias.to(DEVICE), low_rank, n, "triton", scale.to(DEVICE))
    unscaled = x.double() @ exact.T
    assert unscaled.abs().max() > torch.finfo(torch.float16).max
    want = unscaled * scale + bias.double() + 1e-3 * x.double() @ down.double().T @ up.double().T
    error = (got.cpu().double() - want).norm() / want.norm()
    assert got.dtype == dtype and error < (1e-5 if dtype == torch.float32 else 2e-3)
