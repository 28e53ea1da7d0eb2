"""Quantizing: libgguf's bytes, on any number of threads, and nothing that ends the process."""

from __future__ import annotations

import libgguf
import numpy as np
import pytest
import torch
from graft.kernels import CorruptFile, GraftError, UnsupportedFormat, by_name, cpu, dequantize
from graft.ops.quantize import cannot_write, needs_importance, quantize
from oracle import QUANTIZED


def _weight(rows: int = 3, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _importance(columns: int = 512, seed: int = 1) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.01


@pytest.mark.parametrize("fmt", QUANTIZED, ids=str)
@pytest.mark.parametrize("with_importance", [False, True], ids=["alike", "weighed"])
def test_bytes_are_those_of_libgguf(fmt, with_importance, monkeypatch):
    if needs_importance(fmt) and not with_importance:
        pytest.skip("not written without one")
    weight, importance = _weight(), _importance() if with_importance else None
    weighing = None if importance is None else importance.numpy()
    want = libgguf.quantize_rows(weight.numpy(), fmt.ggml_type, weighing)
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert np.array_equal(quantize(weight, fmt, importance).numpy(), want), threads


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_are_rounded_as_libgguf_rounds_them(name):
    fmt = by_name(name)
    weight = torch.cat([_weight(3), 1e-6 * _weight(1), 1e-41 * _weight(1), 6e4 * torch.ones(1, 512)])
    got = quantize(weight, fmt)
    assert np.array_equal(got.numpy(), libgguf.store_rows(weight.numpy(), fmt.ggml_type).view(np.uint8))
    assert torch.equal(got.flatten().view(fmt.dtype).reshape(weight.shape), weight.to(fmt.dtype))


def test_importance_moves_the_error():
    """To columns that count less."""
    weight, importance = _weight(64), torch.ones(512)
    importance[:256:2] = 100
    fmt, errors = by_name("Q3_K"), []
    for weighing in (None, importance):
        decoded = dequantize(quantize(weight, fmt, weighing).flatten(), fmt, weight.shape, torch.float32)
        errors.append((decoded - weight).square().mean(0))
    assert errors[1][:256:2].mean() < 0.9 * errors[0][:256:2].mean()


def test_columns_that_nothing_reaches_still_have_weights():
    weight, importance = _weight(8), torch.ones(512)
    importance[:256] = 0
    for name in ("Q4_K", "IQ3_XXS", "IQ4_XS", "Q3_K"):
        fmt = by_name(name)
        decoded = dequantize(quantize(weight, fmt, importance).flatten(), fmt, weight.shape, torch.float32)
        assert (decoded - weight)[:, :256].norm() < 0.3 * weight[:, :256].norm(), name
    assert torch.equal(quantize(weight, by_name("Q4_K"), torch.zeros(512)), quantize(weight, by_name("Q4_K")))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e5])
def test_numbers_that_quantizers_do_not_survive(value):
    weight = _weight()
    weight[2, 77] = value
    for name in ("Q4_K", "IQ3_S", "Q8_0", "F16"):
        with pytest.raises(GraftError, match=r"finite|larger than"):
            quantize(weight, by_name(name))
    if value == 1e5:
        assert quantize(weight, by_name("BF16")).shape == (3, 1024)


def test_what_is_refused():
    weight = _weight()
    for name in ("IQ1_S", "IQ2_XXS", "IQ2_S"):
        with pytest.raises(UnsupportedFormat, match="importance"):
            quantize(weight, by_name(name))
    for name in ("I8", "Q8_1", "I64"):
        with pytest.raises(UnsupportedFormat, match=name):
            quantize(weight, by_name(name))
    with pytest.raises(CorruptFile, match="blocks"):
        quantize(_weight(2, 96), by_name("Q4_K"))
    for wrong in (_importance(256), -_importance(), _importance() * float("nan")):
        with pytest.raises(GraftError, match="importance"):
            quantize(weight, by_name("Q4_K"), wrong)
    assert quantize(torch.empty(0, 256), by_name("Q4_K")).shape == (0, 144)


def test_where_libgguf_has_no_wheel(monkeypatch):
    monkeypatch.setattr(cpu, "_libgguf", lambda: "libgguf is not installed (pip install libgguf)")
    assert "no wheel for your platform" in cannot_write(by_name("Q4_K"))
    assert cannot_write(by_name("BF16")) is None
    with pytest.raises(UnsupportedFormat, match="pip install libgguf"):
        quantize(_weight(), by_name("Q4_K"))
    assert quantize(_weight(), by_name("F16")).shape == (3, 1024)
