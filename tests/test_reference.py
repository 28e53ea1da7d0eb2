"""The formats table, the code books and the reference decode, against gguf-py and ggml's own C code (libgguf)."""

from __future__ import annotations

import gguf
import libgguf
import numpy as np
import oracle
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from graft.kernels import codebooks, formats
from graft.kernels.errors import CorruptFile, GraftError, UnsupportedFormat
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")

every_type = pytest.mark.parametrize("fmt", oracle.DECODABLE, ids=str)
every_quantized_type = pytest.mark.parametrize("fmt", oracle.QUANTIZED, ids=str)


@every_type
@pytest.mark.parametrize("blocks", [1, 7, 500])
def test_random_blocks_decode_as_in_gguf(fmt, blocks):
    data = oracle.random_blocks(fmt, blocks, seed=blocks)
    want = oracle.oracle(data, fmt)
    assert want.isfinite().all() and want.abs().max() < 3000
    assert oracle.same_bits(fmt.decode(data), want)


@every_type
def test_any_bytes_decode_as_in_gguf(fmt):
    """Infinite, NaN, subnormal and zero scales, too."""
    rng = np.random.default_rng(fmt.ggml_type)
    data = torch.from_numpy(rng.integers(0, 256, (1000, fmt.type_size), dtype=np.uint8))
    data[0], data[1] = 0, 255
    assert oracle.same_bits(fmt.decode(data), oracle.oracle(data, fmt))


@every_type
@pytest.mark.parametrize("size", [1.0, 1e-6, 0.0])
def test_quantized_rows_decode_as_in_gguf(fmt, size):
    weights = size * torch.from_numpy(np.random.default_rng(3).standard_normal((5, 768), dtype=np.float32))
    data = oracle.quantize(weights, fmt)
    assert data.shape == (5, fmt.row_bytes(768))
    want = oracle.oracle(data, fmt)
    assert oracle.same_bits(fmt.decode(data.view(-1, fmt.type_size)).view(5, 768), want)
    if size == 1.0:  # the data is what it claims to be: even the coarsest type keeps some of the signal
        assert (want - weights).norm() < 0.9 * weights.norm()


@every_quantized_type
def test_gguf_and_ggml_agree_on_every_bit(fmt):
    """So that there is one truth, also about the signs of zeros."""
    rng = np.random.default_rng(fmt.ggml_type)
    data = rng.integers(0, 256, (500, fmt.type_size), dtype=np.uint8)
    ggml = torch.from_numpy(libgguf.dequantize_rows(data, fmt.ggml_type))
    assert oracle.same_bits(ggml, oracle.oracle(torch.from_numpy(data), fmt))


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_microscaling_scale(name):
    fmt = formats.by_name(name)
    data = oracle.random_blocks(fmt, 256)
    data[:, : 1 if name == "MXFP4" else 4] = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    assert oracle.same_bits(fmt.decode(data), oracle.oracle(data, fmt))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "IQ4_NL"])
def test_every_half_precision_scale(name):
    fmt = formats.by_name(name)
    data = oracle.random_blocks(fmt, 1 << 16)
    data[:, :2] = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).unsqueeze(1).view(torch.uint8)
    assert oracle.same_bits(fmt.decode(data), oracle.oracle(data, fmt))


@every_type
def test_blocks_may_lie_anywhere(fmt):
    """At an odd address, in rows with gaps, in none."""
    data = oracle.random_blocks(fmt, 6)
    want = fmt.decode(data)
    shifted = torch.empty(data.numel() + 1, dtype=torch.uint8)[1:].view_as(data).copy_(data)
    assert oracle.same_bits(fmt.decode(shifted), want)
    assert oracle.same_bits(fmt.decode(shifted[3:4]), want[3:4])
    wide = torch.full((6, fmt.type_size + 3), 255, dtype=torch.uint8)
    wide[:, 1:-2] = data
    assert oracle.same_bits(fmt.decode(wide[:, 1:-2]), want)
    assert fmt.decode(data[:0]).shape == (0, fmt.block_size)


@every_type
def test_bytes_stay_as_they_are(fmt):
    data = oracle.random_blocks(fmt, 20)
    before = data.clone()
    decoded = fmt.decode(data)
    assert decoded.dtype == torch.float32 and decoded.is_contiguous()
    decoded.fill_(7)
    assert torch.equal(data, before)
    assert oracle.same_bits(fmt.decode(data), oracle.oracle(data, fmt))


@every_type
def test_host_settings_do_not_reach_the_decode(fmt):
    """A host builds models under another default dtype or device, and may decode in inference mode first."""
    for cached in (codebooks._entries, codebooks.values, codebooks.signs):
        cached.cache_clear()
    data = oracle.random_blocks(fmt, 9)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.inference_mode(), torch.device("meta"):
            first = fmt.decode(data)
    finally:
        torch.set_default_dtype(dtype)
    want = oracle.oracle(data, fmt)
    assert oracle.same_bits(first, want)
    x = torch.ones(fmt.block_size, requires_grad=True)
    (fmt.decode(data) @ x).sum().backward()
    assert torch.equal(x.grad, want.sum(0))


class _Dtypes(TorchDispatchMode):
    """Collects the dtypes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.seen |= {t.dtype for t in tensors if isinstance(t, torch.Tensor)}
        return result


@every_type
def test_decode_asks_little_of_a_device(fmt):
    """No dtype that accelerators lack, no value read back: a meta tensor has none."""
    data = oracle.random_blocks(fmt, 3)
    fmt.decode(data)  # the code books, once, on the CPU
    with _Dtypes() as dtypes:
        fmt.decode(data)
    assert torch.float32 in dtypes.seen
    assert dtypes.seen <= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.float32, torch.bool}
    assert fmt.decode(data.to("meta")).shape == (3, fmt.block_size)


GRIDS = {
    "iq1s": quants.IQ1_S,
    "iq2xxs": quants.IQ2_XXS,
    "iq2xs": quants.IQ2_XS,
    "iq2s": quants.IQ2_S,
    "iq3xxs": quants.IQ3_XXS,
    "iq3s": quants.IQ3_S,
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_those_of_gguf(name):
    GRIDS[name].init_grid()
    want = torch.from_numpy(GRIDS[name].grid[0, 0])
    assert torch.equal(codebooks.values(name, CPU), want)
    words = codebooks.table(name, CPU)
    assert words.dtype == torch.int32 and words.shape == (want.numel() // 4,)
    for position in range(4):
        byte = words >> 8 * position & 255
        assert torch.equal(torch.where(byte > 127, byte - 256, byte), want.flatten()[position::4].int())


@pytest.mark.parametrize("name, source", [("iq4nl", quants.IQ4_NL), ("mxfp4", quants.MXFP4), ("mxfp4", quants.NVFP4)])
def test_kvalues_are_those_of_gguf(name, source):
    assert codebooks.table(name, CPU).tolist() == list(source.kvalues)
    assert codebooks.table(name, CPU).dtype == torch.int32
    assert codebooks.values(name, CPU).flatten().tolist() == list(source.kvalues)


def test_the_eighth_sign_is_the_parity_of_seven():
    want = np.unpackbits(np.frombuffer(quants.IQ2_XXS.ksigns, dtype=np.uint8), bitorder="little").reshape(128, 8)
    assert torch.equal(codebooks.signs(7, CPU), torch.from_numpy(1 - 2 * want.astype(np.float32)))
    every = np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little").reshape(256, 8)
    assert torch.equal(codebooks.signs(8, CPU), torch.from_numpy(1 - 2 * every.astype(np.float32)))


def test_books_are_read_once():
    assert {*codebooks.NAMES} == {*GRIDS, "iq4nl", "mxfp4"}
    for name in codebooks.NAMES:
        assert codebooks.table(name, CPU) is codebooks.table(name, CPU)
    with pytest.raises(KeyError):
        codebooks.table("iq5", CPU)


def test_damaged_books_are_named(monkeypatch, tmp_path):
    damaged = tmp_path / "codebooks.bin"
    damaged.write_bytes(codebooks.DATA.read_bytes()[:-1])
    monkeypatch.setattr(codebooks, "DATA", damaged)
    codebooks._file.cache_clear()
    with pytest.raises(CorruptFile, match=r"code books are damaged \(9215 bytes\): install Graft again \(.*\.bin\)$"):
        codebooks._file()


def test_the_table_lists_every_type_of_gguf():
    assert {f.name: f.ggml_type for f in formats.FORMATS} == {t.name: t.value for t in GGMLQuantizationType}
    assert len(formats.BY_NAME) == len(formats.BY_TYPE) == len(formats.FORMATS)
    sizes = {GGMLQuantizationType[f.name]: (f.block_size, f.type_size) for f in formats.FORMATS}
    assert sizes == gguf.constants.GGML_QUANT_SIZES


def test_every_type_that_gguf_decodes_has_a_decode():
    assert {f.name for f in oracle.DECODABLE} == {t.name for t in quants._type_traits}
    assert len(oracle.DECODABLE) == 24
    for fmt in formats.FORMATS:
        ways = (fmt.decode is not None, fmt.dtype is not None, fmt.refusal is not None)
        # torch can hold BF16, but a kernel can decode it, too
        assert sum(ways) == (2 if fmt.name == "BF16" else 1)
        assert (fmt.triton is not None) == (fmt.decode is not None)


@pytest.mark.parametrize("fmt", [f for f in formats.FORMATS if f.dtype], ids=str)
def test_plain_types_are_torch_dtypes(fmt):
    assert (fmt.block_size, fmt.type_size) == (1, fmt.dtype.itemsize)
    assert not fmt.is_quantized
    assert fmt.bits_per_weight == 8 * fmt.dtype.itemsize


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "Q1_0"])
def test_refused_types_name_the_remedy(name):
    fmt = formats.by_name(name)
    assert not fmt.is_quantized and fmt.decode is None
    with pytest.raises(UnsupportedFormat, match=rf"^{name} .*: convert the model to \w+.*\(blk\.0\.weight\)$"):
        formats.by_type(fmt.ggml_type, "blk.0.weight")


def test_every_accepted_type_is_found():
    for fmt in formats.FORMATS:
        assert formats.by_name(fmt.name) is fmt
        if not fmt.refusal:
            assert formats.by_type(fmt.ggml_type) is fmt


@pytest.mark.parametrize("number", [-1, 4, 5, 31, 36, 99])
def test_unknown_numbers_are_refused(number):
    with pytest.raises(UnsupportedFormat, match=rf"type number {number} is unknown: update Graft.*\(model\.gguf\)$"):
        formats.by_type(number, "model.gguf")


def test_unknown_names_are_refused():
    with pytest.raises(GraftError, match=r"no GGUF type 'Q9_K': the types are F32, F16, .*"):
        formats.by_name("Q9_K")


@every_quantized_type
def test_rows_fill_whole_blocks(fmt):
    assert fmt.row_bytes(3 * fmt.block_size) == 3 * fmt.type_size
    assert fmt.bits_per_weight == 8 * fmt.type_size / fmt.block_size
    for columns in (1, fmt.block_size - 1, fmt.block_size + 1):
        with pytest.raises(CorruptFile, match=rf"row of {columns} weights .* {fmt.name} blocks of {fmt.block_size}"):
            fmt.row_bytes(columns)
