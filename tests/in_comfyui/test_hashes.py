"""Files by their SHA-256: read in the background, kept, and found by it where a workflow calls them otherwise."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
from gguf_samples import write_gguf

URL = "https://huggingface.co/someone/model/resolve/main/a.gguf"

NO_URL = URL.replace("https", "ipfs:")  # as long


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Read:
    """A library of its own, and how to wait until it has read a file."""

    def __init__(self, pack: Any, folder: Path) -> None:
        self.busy, self.done = threading.Event(), threading.Event()
        self.paths: list[str] = []
        self.looks = 0
        self.library = pack("nodes.hashes").Library(folder / "kept" / "sha256.json", self.is_busy, self.tell)

    def is_busy(self) -> bool:
        self.looks += 1
        return self.busy.is_set()

    def tell(self, path: str, known: Any) -> None:
        self.paths.append(path)
        self.done.set()

    def wait_for(self, *paths: Path) -> None:
        for _ in range(100):
            if {str(path) for path in paths} <= set(self.paths):
                return
            self.done.wait(10)
            self.done.clear()
        raise AssertionError(f"{paths} were not read")


@pytest.fixture
def read(pack, tmp_path, monkeypatch):
    found = Read(pack, tmp_path)
    hashes = pack("nodes.hashes")
    monkeypatch.setattr(hashes, "_library", found.library)
    monkeypatch.setattr(hashes, "_expected", {})
    monkeypatch.setattr(hashes, "_shown", (-1, {}))
    monkeypatch.setattr(hashes, "_folders", {"diffusion_models": ("graft_hash_test",)})
    return found


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two models and a file that is neither, in a folder that the host lists."""
    root = tmp_path / "models"
    for name, value in (("sub/one.gguf", 1), ("two.gguf", 2)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tensors = {"double_blocks.0.a.weight": (np.full((8, 8), value, np.float32), "F16")}
        write_gguf(root / name, tensors, "flux", {"general.source.url": URL if value == 1 else NO_URL})
    (root / "long.gguf").write_bytes(bytes(10_000))
    known = {**folder_paths.folder_names_and_paths, "graft_hash_test": ([str(root)], {".gguf"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    return root


def test_a_file_is_read_once_and_again_when_it_changes(read, files, pack):
    one, two = files / "sub" / "one.gguf", files / "two.gguf"
    assert read.library.known(str(one)) is None
    read.library.want(str(one))
    read.wait_for(one)
    known = read.library.known(str(one))
    assert (known.sha256, known.size, known.url) == (digest(one), one.stat().st_size, URL)
    read.library.want(str(one))
    read.library.want(str(two))
    read.wait_for(two)
    assert read.paths == [str(one), str(two)] and read.library.known(str(two)).url == ""
    kept = read.library._place
    again = pack("nodes.hashes").Library(kept, lambda: False, lambda path, known: None)
    assert again.known(str(one)) == known and again._thread is None
    os.utime(one, ns=(1, 1))
    assert again.known(str(one)) is None
    kept.write_text("{")  # by a computer that went off
    assert pack("nodes.hashes").Library(kept, lambda: False, print).items() == []
    assert json.loads(json.dumps(pack("nodes.hashes").shown()))["diffusion_models"].keys() == {
        os.path.join("sub", "one.gguf"), "two.gguf",
    }  # fmt: skip


@pytest.mark.parametrize("full", [False, True], ids=["no folder", "full disk"])
def test_where_nothing_can_be_kept_files_are_known_all_the_same(read, files, monkeypatch, caplog, full):
    one, place = files / "sub" / "one.gguf", read.library._place
    if full:

        def write_text(path: Path, text: str, **options: Any) -> None:
            with open(path, "w") as file:
                file.write(text[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", write_text)
    else:
        place.parent.write_text("a file in the folder's place")
    read.library._look_at(str(one))
    assert read.paths == [str(one)] and read.library.known(str(one)).sha256 == digest(one)
    assert f"SHA-256 of model files cannot be kept in {place}: " in caplog.text
    assert not place.exists() and not list(place.parent.parent.rglob("*.tmp"))


def test_two_processes_keep_what_both_have_read(read, files, pack):
    one, two, place = files / "sub" / "one.gguf", files / "two.gguf", read.library._place
    # the other has begun before this one has read anything
    other = pack("nodes.hashes").Library(place, lambda: False, lambda path, known: None)
    read.library._look_at(str(one))
    other._look_at(str(two))
    kept = pack("nodes.hashes").Library(place, lambda: False, lambda path, known: None)
    assert {path for path, _ in kept.items()} == {str(one), str(two)} and not list(place.parent.glob("*.tmp"))


def test_nothing_is_read_while_prompts_run(read, files, pack, monkeypatch):
    hashes = pack("nodes.hashes")
    paused, go_on = threading.Event(), threading.Event()

    def pause(seconds: float) -> None:
        paused.set()
        assert go_on.wait(30)

    monkeypatch.setattr(hashes.time, "sleep", pause)
    read.busy.set()
    read.library.want(str(files / "two.gguf"))
    assert paused.wait(30) and read.library.known(str(files / "two.gguf")) is None
    read.busy.clear()
    go_on.set()
    read.wait_for(files / "two.gguf")


def workflow(name: str, sha256: str, **more: Any) -> dict:
    """A request whose workflow says what a file is, in a subgraph."""
    node = {"id": 1, "type": "GraftUNETLoader", "properties": {more.pop("under", "graft_files"): [
        {"name": name, "hash": sha256, "hash_type": "SHA256", **more}
    ]}}  # fmt: skip
    drawn = {"nodes": [], "definitions": {"subgraphs": [{"nodes": [node]}]}}
    return {"prompt": {}, "extra_data": {"extra_pnginfo": {"workflow": drawn}}}


def find(pack: Any, name: str) -> Any:
    return pack("nodes.model_files").find(name, "graft_hash_test")


def test_a_file_with_another_name_is_found(read, files, pack):
    one = files / "sub" / "one.gguf"
    request = workflow("Flux\\theirs.gguf", digest(one), size=one.stat().st_size)
    assert pack("nodes.hashes").expect(request) is request
    first = find(pack, "Flux\\theirs.gguf")
    # both files have this size; the third is not read
    assert first.path is None and first.reading == 2
    assert first.missing("the folder") == (
        f"Flux\\theirs.gguf (SHA-256 {digest(one)[:12]}) is not there: put it into the folder, or choose another file "
        "(2 files here are being compared with it: try again soon)"
    )
    read.wait_for(one, files / "two.gguf")
    found = find(pack, "flux/theirs.gguf")
    assert (found.path, found.name) == (str(one), os.path.join("sub", "one.gguf"))
    assert found.note == f"{found.name} is here for flux/theirs.gguf, the same file by its SHA-256"
    assert str(files / "long.gguf") not in read.paths
    gone = workflow("gone.gguf", "0" * 64, size=one.stat().st_size)
    pack("nodes.hashes").expect(gone)
    assert find(pack, "gone.gguf").missing("x").endswith("(SHA-256 000000000000) is not there: put it into x, or "
                                                         "choose another file")  # fmt: skip


def test_a_prefix_is_enough_and_can_be_the_name(read, files, pack, monkeypatch):
    """Where it fits one file alone; a name that is here counts more than what the workflow says."""
    one, two = files / "sub" / "one.gguf", files / "two.gguf"
    for path in (one, two):
        read.library.want(str(path))
    read.wait_for(one, two)
    assert find(pack, f"SHA256:{digest(two)[:10].upper()}").path == str(two)
    assert find(pack, f"sha256:{digest(two)[:7]}").path is None
    pack("nodes.hashes").expect(workflow("model.gguf", digest(one)[:10].upper(), under="models"))
    assert find(pack, "model.gguf").path == str(one)
    pack("nodes.hashes").expect(workflow("two.gguf", digest(one)))
    assert find(pack, "TWO.gguf").path == find(pack, "two.gguf").path == str(two)
    # in another folder the same name may be another model
    pack("nodes.hashes").expect(workflow("elsewhere/two.gguf", digest(one)))
    assert find(pack, "elsewhere/two.gguf").path == str(one)
    known = {path: pack("nodes.hashes").Known(1, 1, f"{'a' * 10}{index:054}") for index, path in enumerate("xy")}
    monkeypatch.setattr(read.library, "known", known.get)
    assert pack("nodes.hashes").same(pack("nodes.hashes").Wanted("a" * 10), ["x", "y"]) == ([], 0)


@pytest.mark.parametrize("under", ["models", "graft_files"])
@pytest.mark.parametrize("bad", [None, 3, "g" * 64, "ab" * 40, "ab"])
def test_what_is_no_hash_is_left_alone(read, pack, under, bad):
    request = workflow("a.gguf", bad, under=under)
    assert pack("nodes.hashes").expect(request) is request and pack("nodes.hashes").wanted("a.gguf") is None
    assert pack("nodes.hashes").expect({"prompt": {}}) == {"prompt": {}}
