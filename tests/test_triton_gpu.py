"""What only a GPU can show: tensors over 2^31 bytes, the vendor's GEMM as a yardstick, the default choices."""

from __future__ import annotations

import oracle
import pytest
import torch
from graft.kernels import dispatch, triton_
from graft.kernels.formats import BY_NAME
from graft.kernels.triton_ import plan

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def repeated(name: str, k: int, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of at least `nbytes` made of the same eight rows, u8 [N, row_bytes], and what those decode to."""
    fmt = BY_NAME[name]
    rows = oracle.random_blocks(fmt, 8 * k // fmt.block_size).view(8, -1)
    return rows.to(CUDA).repeat(-(-nbytes // rows.numel()), 1), oracle.oracle(rows, fmt).to(CUDA)


def need(nbytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < nbytes:
        pytest.skip(f"needs {nbytes >> 30} GiB of GPU memory")


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_dequantize_over_2_to_the_31_bytes(name):
    need(14 << 30)
    data, want = repeated(name, 4096, (1 << 31) + 12345)
    out = torch.full((len(data), 4096), float("nan"), dtype=torch.float16, device=CUDA)
    triton_.dequantize(data, BY_NAME[name], out)
    want = want.half()
    for part in out.view(-1, 8, 4096).split(4096):
        assert (part == want).all()


@pytest.mark.parametrize("kernel", ["matvec", "matmul"])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_linear_over_2_to_the_31_bytes(kernel, name):
    need(4 << 30)
    data, weight = repeated(name, 4096, (1 << 31) + 12345)
    x = torch.randn(2, 4096, device=CUDA, dtype=torch.float16)
    out = torch.full((2, len(data)), float("nan"), dtype=torch.float16, device=CUDA)
    getattr(triton_, kernel)(x, data, BY_NAME[name], out)
    assert (out.view(2, -1, 8) == out[:, None, :8]).all()
    want = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    assert ((out[:, :8].double() - want).abs() <= (2.0**-10 + 4096 * 2.0**-23) * size).all()


@pytest.mark.parametrize("fmt", oracle.QUANTIZED, ids=str)
@pytest.mark.parametrize("m", [1, 2, 77, 512])
def test_linear_of_every_type_at_a_real_size(fmt, m):
    """The way that is chosen, against the decoded weight in fp64; bf16, with a low-rank term and a bias."""
    n, k, rank = 3072, 3072, 32
    data = oracle.random_blocks(fmt, n * k // fmt.block_size).view(n, -1).to(CUDA)
    weight = dispatch.dequantize(data, fmt, (n, k), torch.float32, backend="torch").double()
    generator = torch.Generator(CUDA).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA).bfloat16()

    x, bias, down, up = normal(m, k), normal(n), normal(rank, k) * 0.02, normal(n, rank)
    term = dispatch.LowRank(down, torch.ones(rank, device=CUDA), ((0, 0, up),))
    got = dispatch.linear(x, data, fmt, bias, term).double()
    t = x.double() @ down.double().T
    want = x.double() @ weight.T + t @ up.double().T + bias.double()
    size = x.double().abs() @ weight.abs().T + t.abs() @ up.double().abs().T + bias.double().abs()
    # weights, t and the result are rounded to bf16, the latter once more where the term is added behind
    assert ((got - want).abs() <= 2.0**-7 * size).all()
    assert (got - want).norm() <= 2.0**-8 * want.norm()


def test_triton_is_what_auto_takes():
    assert triton_.unavailable(CUDA) is None
    assert dispatch.backends.choose(CUDA, BY_NAME["Q4_K"]).name == "triton"
    assert plan.architecture(CUDA).startswith(("sm_", "gfx"))


def test_decode_is_the_same_on_every_run():
    fmt = BY_NAME["Q6_K"]
    data = oracle.random_blocks(fmt, 5000).to(CUDA)
    outs = [torch.empty(5000, 256, device=CUDA) for _ in range(5)]
    for out in outs:
        triton_.dequantize(data, fmt, out)
    assert all(oracle.same_bits(out.cpu(), outs[0].cpu()) for out in outs)
