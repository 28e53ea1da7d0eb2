"""GGUF files that we write: gguf-py reads what was meant, and there is a whole file or none."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from graft.kernels import GraftError, by_name
from graft.ops.files import writer
from graft.ops.files.gguf import open_gguf
from graft.ops.files.writer import NewTensor, Raw, write_gguf
from oracle import QUANTIZED, random_blocks

VALUES = {
    "a.text": "Ünïcode ✓", "a.flag": True, "a.count": 7, "a.negative": -7, "a.large": 1 << 40, "a.float": 0.5,
    "a.texts": ["x", "", "z"], "a.counts": [1, -2, 3], "a.floats": [0.5, 1.5], "a.large_counts": [1 << 40],
}  # fmt: skip


def _tensors() -> dict[str, tuple[str, tuple[int, ...], torch.Tensor]]:
    found = {}
    for fmt in (*QUANTIZED, by_name("F32"), by_name("BF16"), by_name("F16")):
        columns = 2 * max(fmt.block_size, 3)
        data = random_blocks(fmt, 3 * columns // fmt.block_size).reshape(3, -1)
        found[f"blocks.{fmt.name}.weight"] = (fmt.name, (3, columns), data)
    found["conv"] = ("F32", (2, 3, 1, 2, 2), torch.randn(24).view(torch.uint8))
    found["table"] = ("F32", (1, 3, 2), torch.randn(6).view(torch.uint8))
    return found


def _new(tensors: dict) -> list[NewTensor]:
    return [
        NewTensor(name, by_name(fmt), shape, lambda d=data: d.split(1)) for name, (fmt, shape, data) in tensors.items()
    ]


def test_gguf_py_reads_what_was_written(tmp_path):
    path, tensors = tmp_path / "new folder" / "model.gguf", _tensors()
    size = write_gguf(path, {"general.architecture": "flux", **VALUES}, _new(tensors))
    assert path.stat().st_size == size and [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    theirs = gguf.GGUFReader(path)
    assert {key: theirs.fields[key].contents() for key in VALUES} == VALUES
    assert theirs.get_field("a.counts").types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert theirs.get_field("a.count").types == [gguf.GGUFValueType.UINT32]
    assert [tensor.name for tensor in theirs.tensors] == list(tensors)
    for tensor in theirs.tensors:
        fmt, shape, data = tensors[tensor.name]
        assert (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist()))) == (fmt, shape)
        assert np.array_equal(tensor.data.view(np.uint8).ravel(), data.ravel().numpy()), tensor.name
    ours = open_gguf(path)
    assert all(torch.equal(ours.tensors[name].data, data.ravel()) for name, (_, _, data) in tensors.items())
    assert {key: ours.metadata[key] for key in VALUES} == VALUES


def test_entries_of_another_file_go_on_as_they_are(tmp_path):
    first = gguf.GGUFWriter(tmp_path / "a.gguf", "t5encoder")
    first.add_uint8("a.byte", 5)
    first.add_array("a.bytes", np.arange(4, dtype=np.uint8).tobytes())
    first.add_float64("a.double", 0.1)
    first.add_array("a.words", ["a", "b"])
    for step in (first.write_header_to_file, first.write_kv_data_to_file, first.write_tensors_to_file, first.close):
        step()
    metadata = open_gguf(tmp_path / "a.gguf").metadata
    write_gguf(tmp_path / "b.gguf", {key: Raw(*metadata.raw(key)) for key in metadata}, [])
    a, b = (gguf.GGUFReader(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    for key in metadata:
        assert (a.fields[key].types, a.fields[key].contents()) == (b.fields[key].types, b.fields[key].contents())


class Stopped(Exception):
    pass


def _failing(error: BaseException) -> list[NewTensor]:
    def data():
        yield torch.zeros(4, dtype=torch.uint8)
        raise error

    return [NewTensor("first", by_name("F32"), (1,), data)]


@pytest.mark.parametrize("error", [Stopped(), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")], ids=repr)
def test_no_half_file_whatever_happens(tmp_path, error):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"an old one")
    wanted = GraftError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted, match="the disk is full" if isinstance(error, OSError) else None):
        write_gguf(path, {}, _failing(error), overwrite=True)
    assert path.read_bytes() == b"an old one" and list(tmp_path.iterdir()) == [path]


def test_places_that_are_refused(tmp_path, monkeypatch):
    path, tensors = tmp_path / "model.gguf", _new(_tensors())
    write_gguf(path, {}, tensors)
    before = path.read_bytes()
    with pytest.raises(GraftError, match="already"):
        write_gguf(path, {}, tensors)
    loaded = open_gguf(path)
    with pytest.raises(GraftError, match="is loaded"):
        write_gguf(path, {}, tensors, overwrite=True)
    assert path.read_bytes() == before and loaded.tensors
    del loaded
    gc.collect()
    write_gguf(path, {"a": 1}, tensors, overwrite=True)
    assert open_gguf(path).metadata["a"] == 1
    with pytest.raises(GraftError, match="a folder"):
        write_gguf(tmp_path, {}, tensors)
    with pytest.raises(GraftError, match="cannot be written"):
        write_gguf(path / "below.gguf", {}, tensors)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: type("", (), {"free": 1000})())
    with pytest.raises(GraftError, match="the disk is too full"):
        write_gguf(tmp_path / "other.gguf", {}, tensors)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(GraftError, match="permissions"):
        write_gguf(tmp_path / "model.gguf", {}, [])
    tmp_path.chmod(0o700)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def denied(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", lambda self, **kwargs: denied())
    with pytest.raises(GraftError, match="permissions"):
        write_gguf(tmp_path / "model.gguf", {}, [])


def test_a_tensor_that_is_cut_short(tmp_path):
    short = NewTensor("a", by_name("F32"), (4,), lambda: [torch.zeros(3)])
    with pytest.raises(GraftError, match="a came as"):
        write_gguf(tmp_path / "model.gguf", {}, [short])
    with pytest.raises(GraftError, match="two tensors of this name"):
        write_gguf(tmp_path / "model.gguf", {}, [short, short])
    deep = NewTensor("a", by_name("F32"), (1,) * 9, lambda: [torch.zeros(1)])
    with pytest.raises(GraftError, match="has more than"):
        write_gguf(tmp_path / "model.gguf", {}, [deep])
    assert not list(tmp_path.iterdir())
