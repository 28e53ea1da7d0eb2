"""dequantize, linear, embedding: every backend the same bits, in chunks and whole, beside low-rank terms."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from graft import kernels
from graft.kernels import (
    FORMATS,
    CorruptFile,
    GraftError,
    LowRank,
    NoBackend,
    OutOfMemory,
    UnsupportedFormat,
    backends,
    by_name,
    cpu,
    decoded_rows,
    dequantize,
    dispatch,
    embedding,
    linear,
    scratch,
)  # fmt: skip
from rounding import assert_rounded

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

every_type = pytest.mark.parametrize("fmt", oracle.QUANTIZED, ids=str)
some_types = pytest.mark.parametrize("fmt", [by_name(n) for n in ("Q8_0", "Q4_K", "IQ3_S", "NVFP4")], ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
host_backends = pytest.mark.parametrize("backend", ["torch", "cpu"])


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is handed out holds NaN: what nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 3 * 512 * 4, 1 << 30], ids=["one row", "few rows", "whole"])
def budget(request, monkeypatch):
    """How many bytes of weights pass through the scratch at a time."""
    scratch.release()
    monkeypatch.setattr(scratch, "CPU_BYTES", request.param)
    yield request.param
    scratch.release()


def rows_of(fmt, rows, columns, seed=0):
    """Packed rows uint8 [rows, row_bytes], and their weights in fp32."""
    data = oracle.random_blocks(fmt, rows * columns // fmt.block_size, seed).reshape(rows, -1)
    return data, oracle.oracle(data, fmt)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got, x, weight, extra=0.0, extra_size=0.0):
    """Hold ``got [M, N]`` to ``x · weightᵀ + extra``; `extra_size` is the sum of the magnitudes in `extra`."""
    x, weight = x.double(), weight.double()
    assert_rounded(got, x @ weight.t() + extra, x.abs() @ weight.abs().t(), weight.shape[1], extra_size)


# dequantize


@every_type
@every_dtype
@host_backends
def test_backends_agree_with_gguf_on_every_bit(fmt, dtype, backend):
    data, weights = rows_of(fmt, 7, 512)
    got = dequantize(data, fmt, (7, 512), dtype, backend)
    assert got.dtype == dtype and got.is_contiguous()
    if dtype == torch.float32:
        assert oracle.same_bits(got, weights)
    else:
        assert torch.equal(got.view(torch.int16), weights.to(dtype).view(torch.int16))


@some_types
@every_dtype
@host_backends
def test_chunks_change_no_bit(fmt, dtype, backend, budget):
    data, weights = rows_of(fmt, 11, 512)
    assert torch.equal(dequantize(data, fmt, (11, 512), dtype, backend), weights.to(dtype))


@some_types
@host_backends
@pytest.mark.parametrize(
    "shape", [(512,), (1, 256), (4, 3, 64), (2, 2, 3, 64), (8, 96), (1, 1, 256), (3, 1280), (0, 256), (256, 1), (2, 0)]
)
def test_any_shape(fmt, backend, shape, budget):
    """Also rows that end inside a block, as converters write tensors that they had to fold; and no rows at all."""
    count = torch.Size(shape).numel()
    data = oracle.random_blocks(fmt, count // fmt.block_size)
    want = oracle.oracle(data, fmt).reshape(shape) if count else torch.empty(shape)
    assert oracle.same_bits(dequantize(data, fmt, shape, backend=backend), want)


@some_types
@host_backends
def test_bytes_may_lie_anywhere(fmt, backend):
    data, weights = rows_of(fmt, 6, 512)
    shifted = torch.empty(data.numel() + 1, dtype=torch.uint8)[1:].copy_(data.flatten())
    gaps = torch.full((6, data.shape[1] + 5), 255, dtype=torch.uint8)
    gaps[:, 2:-3] = data
    for place in (shifted, shifted.view_as(data), gaps[:, 2:-3], data.t().contiguous().t()):
        assert torch.equal(dequantize(place, fmt, (6, 512), backend=backend), weights)
    assert torch.equal(dequantize(gaps[1:3, 2:-3], fmt, (2, 512), backend=backend), weights[1:3])


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.dtype], ids=str)
@every_dtype
def test_plain_types_are_cast(fmt, dtype):
    numbers = torch.tensor([[1, -2, 3], [4, 100, -6]]).to(fmt.dtype)
    for data in (numbers, numbers.view(torch.uint8), numbers.view(torch.uint8).flatten()):
        got = dequantize(data, fmt.name, (3, 2), dtype)
        assert torch.equal(got, numbers.to(dtype).view(3, 2))


@every_type
@host_backends
def test_bytes_are_only_read(fmt, backend):
    data, _ = rows_of(fmt, 5, 512)
    before = hashlib.sha256(data.numpy()).digest()
    dequantize(data, fmt, (5, 512), torch.float16, backend).fill_(1)
    linear(normal(2, 512), data, fmt, backend=backend)
    embedding(torch.tensor([1, 2]), data, fmt, (5, 512), torch.float32, backend).fill_(1)
    assert hashlib.sha256(data.numpy()).digest() == before


def test_wrong_sizes_are_named():
    data, _ = rows_of(by_name("Q4_K"), 4, 256)
    with pytest.raises(CorruptFile, match=r"^\(5, 256\) weights of Q4_K take 720 bytes, but there are 576"):
        dequantize(data, "Q4_K", (5, 256))
    with pytest.raises(CorruptFile, match="weights of F16 take 20 bytes, but there are 16"):
        dequantize(torch.zeros(8, dtype=torch.float16), "F16", (10,))
    with pytest.raises(UnsupportedFormat, match="no GGUF type 'Q4_Z'"):
        dequantize(data, "Q4_Z", (4, 256))


# linear


@every_type
@every_dtype
@host_backends
def test_linear(fmt, dtype, backend):
    data, weights = rows_of(fmt, 9, 512)
    x, bias = normal(5, 512, dtype=dtype), normal(9, seed=1)
    got = linear(x, data, fmt, bias, backend=backend)
    assert got.dtype == dtype and got.shape == (5, 9)
    low = bias.to(dtype).double()
    assert_close(got, x, weights.to(dtype), low, low.abs())


@every_type
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_few_rows_on_the_cpu_are_multiplied_in_fp32(fmt, dtype):
    """The weight is not rounded to the narrow dtype, so only the result is."""
    data, weights = rows_of(fmt, 9, 512)
    x, bias = normal(2, 512, dtype=dtype), normal(9, seed=1)
    got = linear(x, data, fmt, bias, backend="cpu")
    assert got.dtype == dtype
    assert_close(got, x, weights, bias.double(), bias.double().abs())


@every_type
@host_backends
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_what_the_processor_has_no_products_of_is_multiplied_in_fp32(fmt, backend, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "SLOW_DTYPES", frozenset([dtype]))
    data, weights = rows_of(fmt, 9, 512)
    x, low_rank = normal(5, 512, dtype=dtype), low_rank_of(9, 512, dtype)
    got = linear(x, data, fmt, residual=low_rank, backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got, linear(x.float(), data, fmt, residual=low_rank, backend=backend).to(dtype))
    assert_close(linear(x, data, fmt, backend=backend), x, weights)


def low_rank_of(rows, columns, dtype):
    down, up = normal(16, columns, seed=2, dtype=dtype), normal(rows, 16, seed=3, dtype=dtype)
    return LowRank(down, torch.full((16,), 0.5), ((0, 0, up),))


@pytest.mark.parametrize("rows", [0, 5, 1 << 60])
def test_both_products_of_the_cpu_agree(rows, monkeypatch):
    """MKL's and oneDNN's, of which one or the other is taken by processor and rows."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu, "onednn_rows", lambda: rows)
    data, weights = rows_of(by_name("Q4_K"), 9, 512)
    for m in (1, 5, 6):
        x, bias = normal(m, 512), normal(9, seed=1)
        assert_close(linear(x, data, "Q4_K", bias, backend="cpu"), x, weights, bias.double(), bias.double().abs())


@some_types
@host_backends
def test_backends_multiply_alike(fmt, backend, budget):
    """The decoded weights are the same bits, so that in one chunking the product is, too."""
    data, weights = rows_of(fmt, 20, 512)
    x = normal(3, 512)
    assert torch.equal(linear(x, data, fmt, backend=backend), linear(x, data, fmt, backend="torch"))
    assert_close(linear(x, data, fmt, backend=backend), x, weights)


@some_types
@pytest.mark.parametrize("shape", [(512,), (1, 512), (2, 3, 512), (2, 1, 2, 512), (0, 512), (2, 0, 512)])
def test_any_number_of_rows(fmt, shape, budget):
    data, weights = rows_of(fmt, 7, 512)
    x = normal(*shape)
    got = linear(x, data, fmt, normal(7))
    assert got.shape == (*shape[:-1], 7)
    if x.numel():
        assert_close(got.view(-1, 7), x.view(-1, 512), weights, normal(7).double(), normal(7).abs().double())


@some_types
@every_dtype
def test_x_may_be_strided(fmt, dtype):
    data, weights = rows_of(fmt, 6, 512)
    wide = normal(4, 2, 1024, dtype=dtype)
    for x in (wide[:, 0, ::2], wide[:, 1, :512], wide.transpose(0, 1)[:, :, 512:], normal(512, 4, dtype=dtype).t()):
        got = linear(x, data, fmt)
        assert_close(got.reshape(-1, 6), x.reshape(-1, 512), weights.to(dtype))


def test_flat_bytes_need_the_number_of_rows():
    fmt = by_name("Q4_K")
    data, _ = rows_of(fmt, 6, 512)
    x = normal(3, 512)
    assert torch.equal(linear(x, data.flatten(), fmt, rows=6), linear(x, data, fmt))


@some_types
@every_dtype
def test_rows_that_end_inside_a_block(fmt, dtype):
    """A folded weight: its rows cannot be decoded one by one."""
    data = oracle.random_blocks(fmt, 8 * 96 // fmt.block_size if fmt.block_size <= 96 else 3)
    weights = oracle.oracle(data, fmt).reshape(8, 96)
    x = normal(5, 96, dtype=dtype)
    got = linear(x, data.flatten(), fmt, normal(8), rows=8)
    low = normal(8).to(dtype).double()
    assert_close(got, x, weights.to(dtype), low, low.abs())


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "F64"])
@every_dtype
def test_plain_weights(name, dtype, budget):
    """In x's dtype they are used as they lie, else cast chunk by chunk."""
    fmt = by_name(name)
    weights = normal(9, 64).to(fmt.dtype)
    x, bias = normal(5, 64, dtype=dtype), normal(9, dtype=torch.float16)
    got = linear(x, weights, fmt, bias)
    low = bias.to(dtype).double()
    assert got.dtype == dtype
    assert_close(got, x, weights.to(dtype), low, low.abs())


def test_a_plain_weight_in_the_right_dtype_is_not_copied():
    weights = normal(9, 64)
    ((rows, weight),) = decoded_rows(weights, "F32", 9, 64, torch.float32)
    assert rows == slice(0, 9) and weight.data_ptr() == weights.data_ptr()


# low-rank terms


def low_rank(columns, parts, tokens=None, dtype=torch.float32, padding=0, seed=5):
    """A LowRank of `parts` (first output row, output rows, rank), with `padding` unused ranks at its end."""
    rank = sum(r for _, _, r in parts)
    down = torch.cat([normal(rank, columns, seed=seed), torch.zeros(padding, columns)]).to(dtype)
    shape = (rank + padding,) if tokens is None else (tokens, rank + padding)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    ups, first = [], 0
    for start, rows, r in parts:
        ups.append((start, first, normal(rows, r, seed=seed + first + 1).to(dtype)))
        first += r
    return LowRank(down, scale, tuple(ups))


def dense_term(x, term, rows):
    """What `term` adds, and the sum of the magnitudes in it: fp64 [M, rows] each."""
    x, total = x.double(), torch.zeros(x.shape[0], rows, dtype=torch.float64)
    size = total.clone()
    down, scale = term.down.double(), term.scale.double().expand(x.shape[0], -1)
    for start, first, up in term.ups:
        up, ranks = up.double(), slice(first, first + up.shape[1])
        total[:, start : start + len(up)] += (x @ down[ranks].t() * scale[:, ranks]) @ up.t()
        size[:, start : start + len(up)] += (x.abs() @ down[ranks].abs().t() * scale[:, ranks].abs()) @ up.abs().t()
    return total, size


PARTS = {
    "whole": [(0, 24, 16)],
    "rank 1": [(0, 24, 1)],
    "two on the whole": [(0, 24, 4), (0, 24, 7)],
    "slices": [(0, 8, 4), (8, 8, 5), (16, 8, 6)],
    "a slice": [(5, 9, 4)],
    "overlapping": [(0, 24, 3), (7, 10, 4), (9, 2, 2)],
    "one row": [(23, 1, 2)],
}


@some_types
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("tokens", [None, 6], ids=["constant", "per token"])
def test_low_rank_terms(fmt, parts, tokens, budget):
    data, weights = rows_of(fmt, 24, 512)
    x, bias = normal(6, 512), normal(24, seed=2)
    term = low_rank(512, PARTS[parts], tokens, padding=3)
    got = linear(x, data, fmt, bias, term)
    extra, size = dense_term(x, term, 24)
    # the term is a product of products: its own sums err as the base's does
    bound = size * (512 + 64) * 2.0**-24
    assert_close(got, x, weights, extra + bias.double(), bias.abs().double() + size)
    effect = got.double() - linear(x, data, fmt, bias).double()
    noise = 2.0**-23 * (got.abs() + size) + bound
    assert ((effect - extra).abs() <= noise.double()).all()


@every_dtype
@pytest.mark.parametrize("factors", DTYPES, ids=lambda d: f"factors in {str(d).removeprefix('torch.')}")
def test_factors_of_any_dtype(dtype, factors):
    """Factors, scales and biases are used in x's dtype; what is outside of a slice keeps the base's own bits."""
    fmt = by_name("Q4_K")
    data, weights = rows_of(fmt, 24, 512)
    x = normal(6, 512, dtype=dtype)
    term = low_rank(512, [(4, 12, 8)], dtype=factors)
    base, got = linear(x, data, fmt), linear(x, data, fmt, residual=term)
    assert got.dtype == dtype
    assert torch.equal(got[:, :4], base[:, :4]) and torch.equal(got[:, 16:], base[:, 16:])
    cast = replace(term, down=term.down.to(dtype), ups=tuple((s, f, u.to(dtype)) for s, f, u in term.ups))
    extra, size = dense_term(x, cast, 24)
    # t = x Aᵀ ∘ S is kept in x's dtype
    assert_close(got, x, weights.to(dtype), extra, size)


def test_zero_strength_adds_nothing():
    fmt = by_name("Q4_K")
    data, _ = rows_of(fmt, 24, 512)
    x = normal(6, 512)
    term = low_rank(512, PARTS["slices"])
    term = replace(term, scale=torch.zeros_like(term.scale))
    assert torch.equal(linear(x, data, fmt, residual=term), linear(x, data, fmt))


# embedding


@every_type
@every_dtype
def test_embedding_decodes_the_rows_that_are_looked_up(fmt, dtype, monkeypatch):
    data, weights = rows_of(fmt, 12, 512)
    indices = torch.tensor([[3, 3, 11], [0, 7, 3]])
    got = embedding(indices, data, fmt, (12, 512), dtype)
    assert got.dtype == dtype and torch.equal(got, F.embedding(indices, weights).to(dtype))
    for shape in ((0,), (), (2, 0)):
        few = torch.full(shape, 4)
        assert torch.equal(embedding(few, data.flatten(), fmt, (12, 512), dtype), F.embedding(few, weights).to(dtype))


def test_embedding_of_a_folded_and_of_a_plain_table():
    data = oracle.random_blocks(by_name("Q4_K"), 3)
    indices = torch.tensor([7, 0, 2])
    want = oracle.oracle(data, by_name("Q4_K")).reshape(8, 96)[indices]
    assert torch.equal(embedding(indices, data.flatten(), "Q4_K", (8, 96), torch.float32), want)
    table = normal(8, 96, dtype=torch.float16)
    assert torch.equal(embedding(indices, table, "F16", (8, 96), torch.float32), table[indices].float())


# scratch


@some_types
@every_dtype
@host_backends
def test_decoded_rows_cover_every_row_once(fmt, dtype, backend, budget):
    data, weights = rows_of(fmt, 10, 512)
    seen, rows_a_time = [], scratch.rows_per_chunk(CPU, 512, dtype)
    for rows, weight in decoded_rows(data, fmt, 10, 512, dtype, backend):
        assert weight.shape == (rows.stop - rows.start, 512) and weight.shape[0] <= rows_a_time
        assert torch.equal(weight, weights[rows].to(dtype))
        seen += range(rows.start, rows.stop)
    assert seen == list(range(10))


def test_the_scratch_is_bounded_and_reused(monkeypatch):
    scratch.release()
    monkeypatch.setattr(scratch, "CPU_BYTES", 4 * 512 * 4)
    fmt = by_name("Q4_K")
    data, _ = rows_of(fmt, 64, 512)
    places = {weight.data_ptr() for _, weight in decoded_rows(data, fmt, 64, 512, torch.float32)}
    assert len(places) == 1
    assert {weight.data_ptr() for _, weight in decoded_rows(data, fmt, 64, 512, torch.float32)} == places
    buffers = scratch._local.buffers
    assert sum(b.nbytes for b in buffers.values()) <= scratch.CPU_BYTES
    scratch.release()
    assert not hasattr(scratch._local, "buffers")


def test_slots_do_not_overlap():
    first = scratch.take(CPU, 4, 8, torch.float32, "a").fill_(1)
    second = scratch.take(CPU, 4, 8, torch.float32, "b").fill_(2)
    assert (first == 1).all() and (second == 2).all()
    assert scratch.take(CPU, 2, 8, torch.float32, "a").data_ptr() == first.data_ptr()


def test_a_row_larger_than_the_budget_still_passes(monkeypatch):
    monkeypatch.setattr(scratch, "CPU_BYTES", 16)
    assert scratch.rows_per_chunk(CPU, 1 << 20, torch.float32) == 1


@pytest.mark.parametrize(
    ("rows", "budget", "step"),
    [
        (21504, 128 << 20, 21824),  # Flux's largest weight in bf16, whole
        (21504, 64 << 20, 10752),
        (12288, 64 << 20, 6144),
        (100, 6144 * 80, 64),
        (100, 6144 * 40, 34),
        (40, 6144 * 40, 40),
        (1, 6144, 1),
    ],
)
def test_chunks_are_equally_large(monkeypatch, rows, budget, step):
    monkeypatch.setattr(scratch, "CPU_BYTES", budget)
    assert scratch.rows_per_chunk(CPU, 3072, torch.bfloat16, rows=rows) == step
    assert step <= scratch.rows_per_chunk(CPU, 3072, torch.bfloat16)


def test_a_graph_that_is_captured_gets_memory_of_its_own(monkeypatch):
    scratch.release()
    monkeypatch.setattr(scratch, "_is_captured", lambda device: True)
    first, second = (scratch.take(CPU, 2, 4, torch.float32) for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and not hasattr(scratch._local, "buffers")


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch before 2.8 has no such tag")
def test_operators_stay_outside_of_cuda_graphs():
    for operator in (torch.ops.graft.linear, torch.ops.graft.dequantize):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags


def test_threads_do_not_share_a_scratch(monkeypatch):
    """Four at once, each with a weight of its own, chunk by chunk: as alone."""
    monkeypatch.setattr(scratch, "CPU_BYTES", 2 * 512 * 4)
    formats = [by_name(n) for n in ("Q4_K", "Q8_0", "Q6_K", "IQ4_XS")]
    weights = [rows_of(fmt, 33, 512, seed) for seed, fmt in enumerate(formats)]
    x = normal(3, 512, dtype=torch.bfloat16)
    alone = [linear(x, data, fmt) for fmt, (data, _) in zip(formats, weights, strict=True)]
    together = threading.Barrier(4)

    def work(index):
        together.wait()
        return [linear(x, weights[index][0], formats[index]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for want, results in zip(alone, pool.map(work, range(4)), strict=True):
            assert all(torch.equal(got, want) for got in results)


@pytest.mark.parametrize("first, then", [(True, False), (False, True)], ids=["inside first", "outside first"])
def test_inference_mode_leaves_a_usable_scratch(first, then):
    scratch.release()
    fmt = by_name("Q4_K")
    data, weights = rows_of(fmt, 8, 512)
    for mode in (first, then):
        with torch.inference_mode(mode):
            for dtype in DTYPES:
                x = normal(5, 512, dtype=dtype)
                assert_close(linear(x, data, fmt), x, weights.to(dtype))
                assert torch.equal(dequantize(data, fmt, (8, 512), dtype), weights.to(dtype))


# which backend


def test_the_best_backend_is_taken_and_the_reason_kept():
    for fmt in oracle.QUANTIZED:
        assert backends.choose(CPU, fmt) == backends.Choice("cpu", "")
    assert str(backends.choose(CPU)) == "cpu"
    assert str(backends.choose(CPU, requested="torch")) == "torch (as chosen)"


def test_without_libgguf_torch_serves(monkeypatch):
    monkeypatch.setattr(cpu, "_libgguf", lambda: "libgguf is not installed (pip install libgguf)")
    choose = backends.choose.__wrapped__
    choice = choose(CPU, by_name("Q4_K"))
    assert choice.name == "torch"
    assert str(choice) == "torch (cpu: libgguf is not installed (pip install libgguf))"
    with pytest.raises(NoBackend, match=r"backend 'cpu' cannot run here: libgguf is not installed .*choose 'auto'"):
        choose(CPU, by_name("Q4_K"), "cpu")


def test_an_older_libgguf_leaves_new_types_to_torch(monkeypatch):
    class Older:
        @staticmethod
        def row_size(number, columns):
            return 0 if number == 40 else by_name("Q4_K").type_size

    monkeypatch.setattr(cpu, "_libgguf", lambda: Older)
    assert cpu.unavailable(CPU, by_name("NVFP4")) == "this libgguf does not know NVFP4"
    assert cpu.unavailable(CPU, by_name("Q4_K")) is None


def test_the_cpu_backend_stays_on_the_cpu():
    assert "the model is on cuda" in cpu.unavailable(torch.device("cuda"), by_name("Q4_K"))
    with pytest.raises(NoBackend, match="the model is on meta"):
        backends.choose(torch.device("meta"), by_name("Q4_K"), "cpu")


def test_a_triton_that_is_too_old_is_a_reason(monkeypatch):
    """One that lacks what kernels are declared with fails while they are, and in ways of its own."""
    triton = pytest.importorskip("triton")

    def old_jit(**options):
        raise TypeError(f"jit() got an unexpected keyword argument {list(options)[-1]!r}")

    monkeypatch.setattr(triton, "jit", old_jit)
    monkeypatch.delattr(kernels, "triton_", raising=False)
    for name in [name for name in sys.modules if name.startswith(f"{kernels.__name__}.triton_")]:
        monkeypatch.delitem(sys.modules, name)
    reason = backends.triton_backend.__wrapped__()
    assert re.match(r"this Triton cannot build the kernels, update it \(TypeError: jit\(\) got an unexpected", reason)


def test_other_devices_fall_back_to_torch(monkeypatch):
    monkeypatch.setattr(backends, "triton_backend", lambda: "Triton is not installed (triton)")
    choice = backends.choose.__wrapped__(torch.device("mps"), by_name("Q4_K"))
    assert choice == backends.Choice("torch", "triton: Triton is not installed (triton)")


def test_unknown_backends_are_named():
    with pytest.raises(NoBackend, match="there is no backend 'cuda': choose one of auto, triton, cpu, torch"):
        backends.choose(CPU, None, "cuda")
    data, _ = rows_of(by_name("Q4_K"), 2, 256)
    for call in (
        lambda: dequantize(data, "Q4_K", (2, 256), backend="numpy"),
        lambda: linear(normal(1, 256), data, "Q4_K", backend="numpy"),
        lambda: embedding(torch.tensor([0]), data, "Q4_K", (2, 256), torch.float32, "numpy"),
    ):
        with pytest.raises(NoBackend, match="no backend 'numpy'"):
            call()


# where memory runs out

FULL = (
    getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)("CUDA out of memory. Tried to allocate 64.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.95 GB, other allocations: 160.84 MB"),
    RuntimeError("std::bad_alloc"),
    MemoryError("Unable to allocate 64.0 MiB for an array"),
)
out_of_memory = pytest.mark.parametrize("error", FULL, ids=["CUDA", "Linux", "Windows", "MPS", "C++", "Python"])


@pytest.fixture
def wide_chunks(monkeypatch):
    """Chunks of 64 rows of 512 weights in fp32, and a floor of 4 rows."""
    scratch.release()
    monkeypatch.setattr(scratch, "CPU_BYTES", 64 * 512 * 4)
    monkeypatch.setattr(scratch, "SMALLEST_BYTES", 4 * 512 * 4)
    yield
    scratch.release()


@out_of_memory
@host_backends
def test_a_chunk_that_memory_has_no_room_for_is_halved(error, backend, wide_chunks, monkeypatch):
    data, weights = rows_of(by_name("Q4_K"), 64, 512)
    x, bias = normal(8, 512), normal(64)
    low_rank = LowRank(normal(16, 512, seed=1), torch.ones(16), ((0, 0, normal(64, 16, seed=2)),))
    take, asked = scratch.take, []

    def small(device, rows, *args):
        asked.append(rows)
        if rows > 16:
            raise error
        return take(device, rows, *args)

    monkeypatch.setattr(scratch, "take", small)
    got = linear(x, data, "Q4_K", bias, low_rank, backend=backend)
    assert asked == [64, 32, 16, 16, 16, 16]
    residual = (x.double() @ low_rank.down.double().t()) @ low_rank.ups[0][2].double().t()
    assert_close(got, x, weights, bias.double() + residual, bias.abs() + residual.abs())
    # full memory is remembered, until what is there is given back
    asked.clear()
    linear(x, data, "Q4_K", backend=backend)
    assert asked == [16] * 4
    scratch.release()
    monkeypatch.setattr(scratch, "take", take)
    assert scratch.rows_per_chunk(CPU, 512, torch.float32) == 64


@out_of_memory
def test_a_product_that_memory_has_no_room_for_runs_again(error, wide_chunks, monkeypatch):
    data, _ = rows_of(by_name("Q6_K"), 64, 512)
    x = normal(8, 512)
    low_rank = LowRank(normal(16, 512, seed=1), torch.ones(16), ((0, 0, normal(64, 16, seed=2)),))
    want = linear(x, data, "Q6_K", None, low_rank)
    multiply, sizes = dispatch._multiply, []

    def full_at_the_second(x, weight, *args):
        sizes.append(weight.shape[0])
        if sizes == [64] or sizes == [64, 32, 32]:
            raise error
        multiply(x, weight, *args)

    monkeypatch.setattr(dispatch, "_multiply", full_at_the_second)
    got = linear(x, data, "Q6_K", None, low_rank)
    assert sizes == [64, 32, 32, *[16] * 4]
    # chunks of the same rows, added to once: the same sums in another order
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@out_of_memory
def test_full_memory_is_said_where_nothing_helps(error, wide_chunks, monkeypatch):
    data, _ = rows_of(by_name("Q4_0"), 64, 512)

    def full(*args):
        raise error

    monkeypatch.setattr(scratch, "take", full)
    with pytest.raises(OutOfMemory, match=r"the memory of cpu is full.*make the picture") as raised:
        linear(normal(8, 512), data, "Q4_0")
    # hosts unload their models where torch's own is raised
    assert isinstance(raised.value, GraftError) and isinstance(raised.value, type(FULL[0]))


def test_an_error_that_does_not_say_why_is_tried_again_and_raised_as_it_is(wide_chunks, monkeypatch):
    """oneDNN's, which multiplies bf16 on CPUs, are the same whether memory is full or something else is wrong."""
    data, _ = rows_of(by_name("Q6_K"), 64, 512)
    x = normal(8, 512)
    want, multiply, sizes = linear(x, data, "Q6_K"), dispatch._multiply, []

    def full(x, weight, *args):
        sizes.append(weight.shape[0])
        if weight.shape[0] > fits:
            raise RuntimeError("could not create a primitive")
        multiply(x, weight, *args)

    monkeypatch.setattr(dispatch, "_multiply", full)
    fits = 32
    torch.testing.assert_close(linear(x, data, "Q6_K"), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    assert sizes == [64, 32, 32]
    fits = 0
    with pytest.raises(RuntimeError, match="could not create a primitive") as raised:
        linear(x, data, "Q6_K")
    assert not isinstance(raised.value, OutOfMemory) and sizes[3:] == [32, 16, 8, 4]


def test_other_errors_are_not_tried_again(wide_chunks, monkeypatch):
    data, _ = rows_of(by_name("Q4_0"), 64, 512)
    calls = []

    def broken(*args):
        calls.append(args)
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    monkeypatch.setattr(dispatch, "_multiply", broken)
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(normal(8, 512), data, "Q4_0")
    assert len(calls) == 1


LITTLE_MEMORY = """
import resource, sys, types
package = types.ModuleType("graft")
package.__path__ = [sys.argv[1]]
sys.modules["graft"] = package
import torch
from graft.kernels import dequantize, linear
torch.set_num_threads(1)
torch.manual_seed(0)
data = torch.randint(0, 64, (2048, 8192 // 32 * 34), dtype=torch.uint8)
x = torch.ones(1, 8192, dtype=getattr(torch, sys.argv[2]))
want = linear(x, data, "Q8_0", backend="torch")
from graft.kernels import scratch
scratch.release()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), resource.RLIM_INFINITY))
got = linear(x, data, "Q8_0", backend="torch")
assert scratch._halvings()[x.device] > 0, "nothing ran out"
print((got - want).abs().max().item() <= max(1e-5, torch.finfo(x.dtype).eps) * want.abs().max().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit that Linux has")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_that_has_little_memory_left_decodes_less_at_a_time(dtype):
    """Chunks of 16 MiB and what decoding one takes do not fit into 20 MiB; halves or quarters of it do."""
    # glibc gives back at once what is freed: else it has an unknown amount left beside the limit
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(ROOT), dtype], env=env, text=True, capture_output=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert ran.stdout.strip() == "True", ran.stderr[-2000:]


@pytest.mark.parametrize(
    ("features", "slow"),
    [
        ({"avx2"}, {torch.bfloat16, torch.float16}),
        ({"avx2", "avx512_f", "avx512_vnni"}, {torch.bfloat16, torch.float16}),
        ({"avx2", "avx512_f", "avx512_bf16"}, {torch.float16}),
        ({"avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16"}, set()),
        (set(), set()),
    ],
)
def test_dtypes_without_instructions_are_slow(features, slow, monkeypatch):
    """Where nobody tells what a processor has, as on other kinds of it, nothing is."""
    monkeypatch.setattr(cpu, "_features", lambda: frozenset(features))
    assert cpu._slow_dtypes() == slow
