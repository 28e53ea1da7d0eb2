"""What happens to files while they are read and used, and paths that are not what people expect."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_samples import write_gguf
from graft.kernels import AdapterError, CorruptFile
from graft.ops.files.gguf import GGUFFile, open_gguf
from graft.ops.files.lora import load_adapters
from hosts import ROOT
from safetensors.torch import save_file

LONG = "模型 – ünï, 🙂 " * 10
"""A folder's name of some 240 bytes."""


def write_model(path: Path, seed: int = 0, rows: int = 64) -> Path:
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed))
    return write_gguf(path, {"img_in.weight": (weight.numpy(), "Q8_0")})


def write_lora(path: Path, value: float = 1.0) -> Path:
    parts = {"lora_down.weight": (4, 256), "lora_up.weight": (64, 4)}
    save_file({f"lora_unet_img_in.{name}": torch.full(shape, value) for name, shape in parts.items()}, path)
    return path


def digest(file: GGUFFile) -> str:
    return hashlib.sha256(b"".join(tensor.data.numpy().tobytes() for tensor in file.tensors.values())).hexdigest()


# While a file is mapped


@pytest.fixture
def opened(tmp_path) -> GGUFFile:
    file = open_gguf(write_model(tmp_path / "a.gguf"))
    assert file.mapped is not None
    file.mapped.check()
    return file


def unchanged(file: GGUFFile) -> None:
    assert file.mapped is not None
    file.mapped.check()


def test_a_file_that_is_deleted_lives_on(opened) -> None:
    before = digest(opened)
    opened.path.unlink()
    unchanged(opened)
    assert digest(opened) == before


def test_a_file_that_is_replaced_lives_on(opened, tmp_path) -> None:
    """As programs do that download beside it and rename in the end."""
    before = digest(opened)
    os.replace(write_model(tmp_path / "b.gguf", seed=1), opened.path)
    unchanged(opened)
    assert digest(opened) == before != digest(open_gguf(opened.path))


WRITING = {
    "truncated": lambda path: os.truncate(path, 100),
    "longer": lambda path: os.truncate(path, 1 << 20),
    "begun anew": lambda path: write_model(path, rows=2),
    "a byte of it": lambda path: path.open("r+b").write(b"x"),
}


@pytest.mark.parametrize("how", WRITING)
def test_a_file_that_is_written_to_is_noticed(opened, how) -> None:
    past = opened.path.stat().st_mtime - 10
    os.utime(opened.path, (past, past))  # clocks of file systems are coarse
    file = open_gguf(opened.path)
    unchanged(file)
    WRITING[how](opened.path)
    with pytest.raises(CorruptFile, match="was written to after it was loaded") as caught:
        unchanged(file)
    assert str(caught.value).endswith(f"({opened.path})")


def test_no_descriptor_is_left(tmp_path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("this system does not list descriptors")
    path = write_model(tmp_path / "a.gguf")
    gc.collect()
    before = len(list(folder.iterdir()))
    kept = [open_gguf(path) for _ in range(20)]
    assert len(list(folder.iterdir())) > before
    kept.clear()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    for _ in range(20):
        with pytest.raises(CorruptFile):
            open_gguf(tmp_path / "bad.gguf")
    assert len(list(folder.iterdir())) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems forbid it or have another signal")
def test_what_reads_beyond_a_truncated_file_is_ended_by_the_system(tmp_path) -> None:
    """No program can catch this: the reason why a file is checked before it is run, and not a promise."""
    path = write_model(tmp_path / "a.gguf", rows=256)
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import conftest\n"
        "from graft.ops.files.gguf import open_gguf\n"
        "file = open_gguf(sys.argv[2]); os.truncate(sys.argv[2], 4096); file.tensors['img_in.weight'].data.sum()"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(ROOT / "tests"), str(path)], check=False)
    assert ran.returncode == -signal.SIGBUS


def test_a_lora_that_was_replaced_is_read_anew(tmp_path) -> None:
    """And the one that was read before stays what it was."""
    path = write_lora(tmp_path / "style.safetensors")
    first = load_adapters(path)
    os.replace(write_lora(tmp_path / "new.safetensors", 2.0), path)
    second = load_adapters(path)
    values = [{float(tensor.max()) for tensor in file.state.values()} for file in (first, second)]
    assert values == [{1.0}, {2.0}]


# Paths


def deep(folder: Path) -> Path:
    """A folder whose path has about 3,000 bytes."""
    while len(os.fsencode(folder)) < 2800:
        folder = folder / LONG
    folder.mkdir(parents=True)
    return folder


def test_unicode_and_paths_of_3000_bytes(tmp_path) -> None:
    folder = deep(tmp_path)
    assert len(os.fsencode(folder)) > 2800
    model, lora = write_model(folder / "modèle.gguf"), write_lora(folder / "стиль.safetensors")
    assert open_gguf(model).tensors["img_in.weight"].shape == (64, 256)
    assert len(load_adapters(lora).state) == 2
    os.truncate(model, 60)
    os.truncate(lora, 60)
    for read, path, kind in ((open_gguf, model, CorruptFile), (load_adapters, lora, AdapterError)):
        with pytest.raises(kind) as caught:
            read(path)
        assert str(caught.value).endswith(f"({path})") and "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode here")
def test_names_that_are_no_unicode(tmp_path) -> None:
    """They can be read, and a message about them can be written and sent."""
    folder = os.fsencode(tmp_path)
    model, lora = (Path(os.fsdecode(folder + b"/\xff\xfe." + suffix)) for suffix in (b"gguf", b"safetensors"))
    os.replace(write_model(tmp_path / "a.gguf"), model)
    os.replace(write_lora(tmp_path / "a.safetensors"), lora)
    assert open_gguf(model).tensors
    try:
        assert load_adapters(lora).state
    except AdapterError as error:
        str(error).encode()
    os.truncate(model, 60)
    with pytest.raises(CorruptFile) as caught:
        open_gguf(model)
    assert "\ufffd\ufffd.gguf" in str(caught.value).encode().decode()


@pytest.mark.parametrize("read", [open_gguf, load_adapters])
def test_links(read, tmp_path) -> None:
    """They are followed, as people put models on other disks; what leads nowhere is refused."""
    kind = CorruptFile if read is open_gguf else AdapterError
    target = write_model(tmp_path / "a.gguf") if read is open_gguf else write_lora(tmp_path / "a.safetensors")
    link = tmp_path / f"link{target.suffix}"
    link.symlink_to(target)
    read(link)
    for name, leads_to in (("broken", "nowhere"), ("circle", f"circle{target.suffix}"), ("folder", ".")):
        bad = tmp_path / f"{name}{target.suffix}"
        bad.symlink_to(leads_to)
        with pytest.raises(kind) as caught:
            read(bad)
        assert str(caught.value).endswith(f"({bad})")


@pytest.mark.parametrize("read", [open_gguf, load_adapters])
@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["too long", "with a null character"])
def test_names_that_no_system_takes(read, name, tmp_path) -> None:
    with pytest.raises(CorruptFile if read is open_gguf else AdapterError) as caught:
        read(tmp_path / name)
    assert "\0" not in str(caught.value)
