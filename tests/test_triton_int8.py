"""The Triton kernels that write rotated int8 rows, against comfy-kitchen's convention in fp32."""

from __future__ import annotations

import oracle
import pytest
import torch
from graft.kernels import codebooks, triton_
from triton_testing import DEVICE, watched


def rotated(rows: torch.Tensor) -> torch.Tensor:
    """By H₂₅₆ as comfy-kitchen builds it (`_build_hadamard`): ``[N, K]`` in fp32."""
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
    h = h4
    while len(h) < 256:
        h = torch.kron(h, h4)
    return (rows.view(len(rows), -1, 256) @ (h / 16)).view(rows.shape)


@pytest.mark.parametrize("fmt", oracle.QUANTIZED, ids=str)
@pytest.mark.parametrize("rows, columns", [(5, 768), (1, 256)])
def test_codes_of_every_type(fmt, rows, columns):
    data = oracle.random_blocks(fmt, rows * columns // fmt.block_size, seed=2).view(rows, -1)
    want = rotated(oracle.oracle(data, fmt))
    largest = want.abs().amax(1, keepdim=True) / 127
    source = data.to(DEVICE)
    scales = triton_.int8_scales(source, fmt, columns)
    torch.testing.assert_close(scales.cpu(), largest, rtol=1e-5, atol=0)

    # guarded by what no code is
    buffer = torch.full((rows + 2, columns), -128, dtype=torch.int8, device=DEVICE)
    out = buffer[1:-1]
    table = codebooks.table(fmt.book, DEVICE) if fmt.book else None
    with watched([source, table, scales], out):
        triton_.encode_int8(source, fmt, scales, out)
    assert (buffer[[0, -1]] == -128).all()
    difference = (out.cpu().float() - (want / largest).round()).abs()
    assert difference.max() <= 1
    # those that lie between two codes; of a single block of ternary weights they are many
    assert rows == 1 or (difference > 0).float().mean() <= 0.01
    assert (out.cpu().abs().amax(1) == 127).all()
