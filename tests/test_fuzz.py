"""A seeded part of `make fuzz`, what it has found, and what was published of other readers of these formats."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
from fuzz import __main__ as fuzz
from fuzz.bounds import bounded, sentence, written
from fuzz.choices import Choices
from graft.kernels import AdapterError, GraftError
from graft.ops.files.gguf import open_gguf
from graft.ops.files.imatrix import read_imatrix
from graft.ops.files.lora import load_adapters

INPUTS = {
    "gguf_reader": 10_000, "decodes": 3_000, "adapters": 3_000, "kinds": 2_000, "dialects": 2_000,
    "text_encoders": 2_000, "tokenizers": 3_000, "inspection": 2_000, "imatrix": 1_000,
    "workflows": 3_000,
}  # fmt: skip
FOUND = sorted((Path(fuzz.__file__).parent / "findings").iterdir())
F32, STRING, ARRAY, INT32 = 0, 8, 9, 5


def test_every_target_is_tried() -> None:
    assert set(INPUTS) == set(fuzz.TARGETS)


@pytest.mark.parametrize("name", INPUTS)
def test_hostile_inputs_are_read_or_refused(name) -> None:
    count, found = fuzz.campaign(name, INPUTS[name])
    assert count == INPUTS[name]
    assert not found, "\n".join(f"number {number}:\n{error}" for number, error in found.values())


READERS = {
    "gguf_reader": open_gguf, "text_encoders": open_gguf, "adapters": load_adapters, "imatrix": read_imatrix,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_inputs_get_beyond_the_first_check(name) -> None:
    """Or fuzzing would try what is refused at once and nothing else."""
    target, opened = fuzz.load(name), 0
    for number in range(200):
        with contextlib.suppress(GraftError):
            READERS[name](written(target.make(Choices(fuzz.choices_of(name, 0, number))), target.SUFFIX))
            opened += 1
    assert 60 < opened < 200


def test_what_is_wrong_is_found(monkeypatch) -> None:
    """Errors of Python's own, what never ends, and what takes gigabytes."""
    reader = fuzz.load("gguf_reader")
    for wrong in (KeyError("x"), RecursionError(), MemoryError(), CorruptAndLong("x" * 2000), CorruptAndLong()):

        def failing(path, wrong=wrong):
            raise wrong

        monkeypatch.setattr(reader, "open_gguf", failing)
        assert fuzz.campaign("gguf_reader", 3)[1], repr(wrong)
    monkeypatch.setattr(reader, "open_gguf", lambda path: bytearray(1 << 32))
    assert "MemoryError" in next(iter(fuzz.campaign("gguf_reader", 1)[1]))


class CorruptAndLong(GraftError):
    """Of any length."""


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_what_was_found_once(path) -> None:
    fuzz.load(path.name.partition("-")[0]).check(path.read_bytes())


# What was published of others


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(*tensors: bytes, entries: tuple[bytes, ...] = (), data: int = 64, count: int | None = None) -> bytes:
    count = len(tensors) if count is None else count
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(entries)) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32 + data)


def tensor(name: str, *dims: int, kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", ARRAY, 1) * (depth - 1) + struct.pack("<IQ", INT32, 0)


PUBLISHED_GGUF = {
    # Ollama: an offset and a size that are believed, and what lies behind the file is read
    "CVE-2026-7482, more rows than the file has": (gguf(tensor("a", 16, 1 << 20)), "ends at byte"),
    "CVE-2026-7482, an offset behind the file": (gguf(tensor("a", 16, offset=1 << 30)), "ends at byte"),
    "CVE-2026-7482, an offset at the end of 64 bits": (gguf(tensor("a", 16, offset=2**64 - 32)), "ends at byte"),
    # llama.cpp: the sum of all sizes passes 64 bits, and little is allocated for much
    "CVE-2025-53630, sizes that add up to 64 bits": (
        gguf(*(tensor(f"t{i}", 2**60, offset=i * 32) for i in range(5))), "ends at byte",
    ),
    "CVE-2025-53630, the product of dimensions is 2^64": (gguf(tensor("a", 2**32, 2**32)), "impossible shape"),
    "CVE-2025-53630, bytes and not weights pass 64 bits": (gguf(tensor("a", 2**62, 1)), "ends at byte"),
    "CVE-2025-53630, padding passes 64 bits": (gguf(tensor("a", 2**62 - 1)), "ends at byte"),
    # llama.cpp again: so does what the tensors' descriptions take
    "CVE-2026-27940, as many tensors as 64 bits count": (gguf(tensor("a", 8), count=2**64 - 1), "claims"),
    "CVE-2026-27940, tensors whose descriptions pass 64 bits": (gguf(tensor("a", 8), count=2**64 // 368), "claims"),
    "nested arrays": (gguf(entries=(text("a") + struct.pack("<I", ARRAY) + nested(10_000),)), "nests more than"),
    "a text of 2^64 bytes": (
        gguf(entries=(text("a") + struct.pack("<IQ", STRING, 2**64 - 1),)), "claims a text of",
    ),
    "an array of 2^62 numbers of four bytes": (
        gguf(entries=(text("a") + struct.pack("<IIQ", ARRAY, INT32, 2**62),)), "claims an array",
    ),
    "an alignment that passes 32 bits": (
        gguf(tensor("a", 8), entries=(text("general.alignment") + struct.pack("<II", 4, 1 << 31),)), "power of two",
    ),
    "overlapping tensors": (gguf(tensor("a", 16), tensor("b", 16, offset=32), data=128), "overlap"),
}  # fmt: skip


@pytest.mark.parametrize("what", PUBLISHED_GGUF)
def test_what_was_published_of_gguf(what) -> None:
    data, message = PUBLISHED_GGUF[what]
    path = written(data, ".gguf")
    with bounded(len(data)), pytest.raises(GraftError, match=message) as caught:
        open_gguf(path)
    sentence(caught.value)


def safetensors(header: object, data: int = 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def part(start: int, end: int, *shape: int) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


DOWN, UP = "lora_unet_img_in.lora_down.weight", "lora_unet_img_in.lora_up.weight"
PUBLISHED_SAFETENSORS = {
    "overlapping tensors": safetensors({DOWN: part(0, 64, 16), UP: part(32, 96, 16)}, 96),
    "the same bytes twice": safetensors({DOWN: part(0, 64, 16), UP: part(0, 64, 16)}),
    "a hole between tensors": safetensors({DOWN: part(0, 16, 4), UP: part(32, 64, 8)}),
    "bytes behind the last": safetensors({DOWN: part(0, 32, 8)}),
    "an end before the start": safetensors({DOWN: part(64, 0, 16)}),
    "a shape of other bytes": safetensors({DOWN: part(0, 64, 17)}),
    "a shape whose product passes 64 bits": safetensors({DOWN: part(0, 64, 2**32, 2**32)}),
    "a header longer than the file": safetensors({DOWN: part(0, 64, 16)}, length=1 << 40),
    "a header of 2^64 bytes": safetensors({DOWN: part(0, 64, 16)}, length=2**64 - 1),
    "nested lists": safetensors(b'{"a":' + b"[" * 100_000),
}


@pytest.mark.parametrize("what", PUBLISHED_SAFETENSORS)
def test_what_was_published_of_safetensors(what) -> None:
    data = PUBLISHED_SAFETENSORS[what]
    path = written(data, ".safetensors")
    with bounded(len(data)), pytest.raises(AdapterError) as caught:
        load_adapters(path)
    sentence(caught.value)
