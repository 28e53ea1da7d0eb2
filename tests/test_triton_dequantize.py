"""The Triton decode of every type against gguf-py, bit for bit."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from graft.kernels import codebooks, triton_
from graft.kernels.formats import BY_NAME, Format
from graft.kernels.triton_ import launch
from graft.ops.quantize import needs_importance
from triton.runtime.errors import InterpreterError
from triton_testing import DEVICE, INTERPRETED, poisoned, rounded, watched

every_type = pytest.mark.parametrize("fmt", oracle.DECODABLE, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def dequantize(data: torch.Tensor, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """Decode u8 [rows, row_bytes] into a poisoned output, with every access watched."""
    data = data.to(DEVICE)
    table = codebooks.table(fmt.book, DEVICE) if fmt.book else None
    with poisoned(len(data), data.shape[1] // fmt.type_size * fmt.block_size, dtype) as out:
        with watched([data, table], out):
            triton_.dequantize(data, fmt, out)
        return out.cpu()


def check(data: torch.Tensor, fmt: Format, dtype: torch.dtype) -> None:
    want = rounded(oracle.oracle(data, fmt), dtype)
    got = dequantize(data, fmt, dtype)
    assert oracle.same_bits(got, want) if dtype == torch.float32 else torch.equal(got, want)


@every_type
@every_dtype
def test_one_block_at_the_end_of_its_buffer(fmt, dtype):
    """Whose bytes are all there is: nothing before or behind may be read."""
    check(oracle.random_blocks(fmt, 1), fmt, dtype)


@every_type
def test_odd_number_of_blocks_over_several_programs(fmt):
    programs = 4096 // fmt.block_size * 2
    data = oracle.random_blocks(fmt, programs + 5, seed=1)
    check(data.view(1, -1), fmt, torch.float32)


@pytest.mark.parametrize("fmt", [fmt for fmt in oracle.DECODABLE if not needs_importance(fmt)], ids=str)
@every_dtype
def test_quantized_rows(fmt, dtype):
    """The others take libgguf many seconds, and random bytes say as much of them."""
    check(oracle.quantized(fmt, 3, 256), fmt, dtype)


@every_type
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy notices them
def test_any_bytes(fmt):
    """Infinite, NaN, subnormal and zero scales, too."""
    rng = np.random.default_rng(fmt.ggml_type)
    data = torch.from_numpy(rng.integers(0, 256, (40, fmt.type_size), dtype=np.uint8))
    data[0], data[1] = 0, 255
    check(data, fmt, torch.float32)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_microscaling_scale(name):
    fmt = BY_NAME[name]
    data = oracle.random_blocks(fmt, 256)
    data[:, : 1 if name == "MXFP4" else 4] = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    check(data, fmt, torch.float32)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_1", "MXFP4"])
def test_bytes_at_an_odd_address(name, caplog):
    fmt = BY_NAME[name]
    data = oracle.random_blocks(fmt, 3)
    buffer = torch.zeros(data.numel() + 1, dtype=torch.uint8, device=DEVICE)
    view = buffer[1:].view(data.shape)
    view.copy_(data)
    with poisoned(3, fmt.block_size, torch.float32) as out:
        triton_.dequantize(view, fmt, out)
        assert oracle.same_bits(out.cpu(), oracle.oracle(data, fmt))
    # said once for each alignment, and MXFP4's blocks may lie anywhere
    launch._warn_of_copies.cache_clear()
    triton_.dequantize(view, fmt, torch.empty(3, fmt.block_size, device=DEVICE))
    assert ("copied before each use" in caplog.text) == (name != "MXFP4")


@pytest.mark.parametrize("rows", [(0, 2), (1, 3), (3, 7)])
def test_rows_of_a_larger_tensor(rows):
    """As dispatch passes them through its scratch: 210 bytes a block, so that rows begin between words."""
    fmt = BY_NAME["Q6_K"]
    data = oracle.quantized(fmt, 7, 256)
    part = data[slice(*rows)]
    with poisoned(len(part), 256, torch.float32) as out:
        triton_.dequantize(part.to(DEVICE), fmt, out)
        assert oracle.same_bits(out.cpu(), oracle.oracle(part, fmt))


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter shows addresses")
@pytest.mark.parametrize("missing", [1, 18])
def test_watched_notices_what_lies_outside(missing):
    fmt = BY_NAME["Q4_0"]
    data = oracle.random_blocks(fmt, 4).view(1, -1)
    out = torch.empty(1, 128)
    with pytest.raises(InterpreterError, match="read outside"), watched([data[:, :-missing]], out):
        triton_.dequantize(data, fmt, out)
    with pytest.raises(InterpreterError, match="written outside"), watched([data], out[:, 1:]):
        triton_.dequantize(data, fmt, out)
