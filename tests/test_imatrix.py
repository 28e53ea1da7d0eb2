"""Importance matrices on disk: llama.cpp's GGUF, its older form, and files that are neither."""

from __future__ import annotations

import struct

import gguf
import libgguf
import numpy as np
import pytest
import torch
from gguf_samples import write_gguf
from graft.kernels import CorruptFile, GraftError, UnsupportedFormat
from graft.ops.files.imatrix import Importance, read_imatrix, write_imatrix


def sample(seed: int = 0, calls: int = 4) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    sums = {name: 100 * torch.rand(columns, generator=generator) for name, columns in (("b.weight", 32), ("a", 7))}
    return Importance.of(sums, {"b.weight": 100, "a": 64}, calls, ["two prompts"])


def dat(*entries: tuple[bytes, int, list[float]], count: int | None = None, tail: bytes = b"") -> bytes:
    head = struct.pack("<i", len(entries) if count is None else count)
    for name, calls, values in entries:
        head += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        head += struct.pack(f"<{len(values)}f", *values)
    return head + tail


def test_a_file_is_read_back(tmp_path):
    path, written = tmp_path / "a.gguf", sample()
    write_imatrix(path, written)
    read = read_imatrix(path)
    assert sorted(read) == sorted(written) and read.datasets == ("two prompts",) and read.calls == 4
    for name in written:
        torch.testing.assert_close(read[name], written[name], rtol=2**-22, atol=0)
        assert read.rows(name) == written.rows(name)
    assert list(tmp_path.iterdir()) == [path]


def test_others_read_what_we_write(tmp_path):
    """gguf-py as the file that llama.cpp means, libgguf as the means that its quantizers take."""
    path, written = tmp_path / "a.gguf", sample()
    write_imatrix(path, written)
    file = gguf.GGUFReader(path)
    assert file.get_field("general.type").contents() == "imatrix"
    assert file.get_field("imatrix.datasets").contents() == ["two prompts"]
    assert (file.get_field("imatrix.chunk_count").contents(), file.get_field("imatrix.chunk_size").contents()) == (
        4,
        25,
    )
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert tensors["b.weight.in_sum2"].data.shape == (1, 32) and tensors["b.weight.counts"].data.tolist() == [[100.0]]
    np.testing.assert_allclose(libgguf.load_imatrix(path)["b.weight"], written["b.weight"].numpy(), rtol=1e-6)


def test_a_file_of_llama_cpp_with_experts(tmp_path):
    sums = np.arange(12, dtype=np.float32).reshape(3, 4)
    counts = np.array([[2], [0], [4]], np.float32)
    tensors = {"blk.0.ffn.weight.in_sum2": (sums, "F32"), "blk.0.ffn.weight.counts": (counts, "F32"),
               "blk.0.ffn.weight.in_sum": (sums, "F32")}  # fmt: skip
    read = read_imatrix(write_gguf(tmp_path / "a.gguf", tensors, metadata={"general.type": "imatrix"}))
    assert list(read) == ["blk.0.ffn.weight"] and read.rows("blk.0.ffn.weight") == 6
    # of an expert that was not used nothing is known
    assert read["blk.0.ffn.weight"].tolist() == [[0, 0.5, 1, 1.5], [1, 1, 1, 1], [2, 2.25, 2.5, 2.75]]


def test_the_older_form(tmp_path):
    path = tmp_path / "a.dat"
    path.write_bytes(dat((b"x.weight", 2, [2.0, 4.0]), (b"y", 0, [3.0]), tail=struct.pack("<ii", 9, 4) + b"wiki"))
    read = read_imatrix(path)
    assert read["x.weight"].tolist() == [1.0, 2.0] and read["y"].tolist() == [3.0]
    assert read.datasets == ("wiki",) and read.calls == 9
    np.testing.assert_array_equal(libgguf.load_imatrix(path)["x.weight"], read["x.weight"].numpy())
    path.write_bytes(dat((b"x.weight", 2, [2.0, 4.0])))
    assert read_imatrix(path).datasets == ()


WRONG_DAT = {
    "no end": (dat((b"x", 1, [1.0]), count=2), "ends before"),
    "a long name": (struct.pack("<ii", 1, 60000), "ends before"),
    "a name of no length": (struct.pack("<ii", 1, -1), "length or count"),
    "two billion columns": (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 2**31 - 1), "ends before"),
    "no columns": (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 0), "length or count"),
    "no text": (dat((b"\xff\xfe", 1, [1.0])), "UTF-8"),
    "NaN": (dat((b"x", 1, [float("nan")])), "no squares"),
    "negative": (dat((b"x", 1, [-1.0])), "no squares"),
    "infinite": (dat((b"x", 1, [float("inf")])), "no squares"),
}


@pytest.mark.parametrize("what", WRONG_DAT)
def test_damaged_files_of_the_older_form(tmp_path, what):
    data, message = WRONG_DAT[what]
    path = tmp_path / "a.dat"
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match=message):
        read_imatrix(path)


ONES = np.ones((1, 4), np.float32)
WRONG_GGUF = {
    "a model": ({"x.weight": (ONES, "F32")}, UnsupportedFormat, "no importance matrix but a model"),
    "empty": ({}, UnsupportedFormat, "but empty"),
    "no counts": ({"x.in_sum2": (ONES, "F32")}, CorruptFile, "no counts of x"),
    "counts that do not fit": (
        {"x.in_sum2": (ONES, "F32"), "x.counts": (np.ones((3, 1), np.float32), "F32")}, CorruptFile, "do not fit",
    ),
    "of halves": (
        {"x.in_sum2": (ONES, "F16"), "x.counts": (np.ones((1, 1), np.float32), "F32")}, CorruptFile, "F16, not F32",
    ),
    "NaN": (
        {"x.in_sum2": (ONES * np.nan, "F32"), "x.counts": (np.ones((1, 1), np.float32), "F32")}, CorruptFile,
        "no squares",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_GGUF)
def test_gguf_files_that_are_none(tmp_path, what):
    tensors, kind, message = WRONG_GGUF[what]
    with pytest.raises(kind, match=message):
        read_imatrix(write_gguf(tmp_path / "a.gguf", tensors))


def test_other_files(tmp_path):
    for data in (b"", b"<!DOCTYPE html>", b"PK\x03\x04 and more", b"version https://git-lfs.github.com/spec/v1"):
        (tmp_path / "a.dat").write_bytes(data)
        with pytest.raises(CorruptFile):
            read_imatrix(tmp_path / "a.dat")
    for path in (tmp_path, tmp_path / "gone.dat"):
        with pytest.raises(CorruptFile):
            read_imatrix(path)


def test_two_are_added():
    one, two = sample(0), sample(1)
    both = one + two
    wanted = (one.sums["a"] + two.sums["a"]) / 128
    torch.testing.assert_close(both["a"], wanted[0].float())
    assert both.rows("a") == 128 and both.calls == 8 and both.datasets == ("two prompts",)
    other = Importance.of({"a": torch.ones(3), "c": torch.ones(2)}, {"a": 1, "c": 1})
    with pytest.raises(GraftError, match="those of one model"):
        one + other


def test_a_place_that_is_taken(tmp_path):
    path = tmp_path / "a.gguf"
    assert write_imatrix(path, sample()) == path.stat().st_size
    with pytest.raises(GraftError, match="already"):
        write_imatrix(path, sample())
