"""GGUF files: sound ones read as gguf-py reads them, without a copy; every other one is refused in a sentence."""

import copy
import hashlib
import math
import os
import struct
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from graft.kernels.errors import CorruptFile, GraftError, UnsupportedFormat, plain
from graft.kernels.formats import FORMATS
from graft.ops.files import gguf as reader
from graft.ops.files.gguf import describe, diffusion_tensors, open_gguf
from graft.tests.gguf_samples import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

GIB = 1 << 30
# value types of the file format, for headers written by hand
UINT8, UINT32, INT32, STRING, ARRAY = 0, 4, 5, 8, 9
F32, Q4_K, Q8_1, Q8_K, Q1_0 = 0, 12, 9, 15, 41


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


# Headers by hand, for what no writer writes


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def numbers(*values: int) -> bytes:
    """The value of an array of INT32."""
    return struct.pack(f"<IQ{len(values)}i", INT32, len(values), *values)


def info(name: str | bytes, dims: tuple[int, ...] = (8,), kind: int = F32, offset: int = 0) -> bytes:
    """A tensor as it stands in the header, dimensions fastest first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(
    *entries: bytes,
    tensors: tuple[bytes, ...] = (),
    version: int = 3,
    tensor_count: int | None = None,
    entry_count: int | None = None,
) -> bytes:
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)


def padded(head: bytes, data: int, alignment: int = 32) -> bytes:
    return head + bytes(-len(head) % alignment + data)


def nested(depth: int) -> bytes:
    """The value of an array of arrays ... of nothing."""
    return struct.pack("<IQ", ARRAY, 1) * (depth - 1) + struct.pack("<IQ", INT32, 0)


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Fails when Python allocates more bytes than this at any one time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def refusal(path: Path) -> GraftError:
    """The error of a file that cannot be opened, whose message ends with the path in parentheses."""
    with pytest.raises(GraftError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert message.endswith(f"{plain(str(path))})")
    assert "\n" not in message and ": " in message
    return caught.value


# Sound files


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.refusal], ids=str)
def test_every_type_reads_as_gguf_py_reads_it(fmt, tmp_path):
    path, qtype = tmp_path / "a.gguf", gguf.GGMLQuantizationType[fmt.name]
    writer = gguf.GGUFWriter(path, "flux")
    for name, rows in (("a", (3,)), ("b", (2, 4)), ("c", ())):
        noise = np.random.default_rng(0).integers(0, 256, (*rows, fmt.row_bytes(512)), dtype=np.uint8)
        writer.add_tensor(name, noise, raw_dtype=qtype)
    finish(writer)
    reader = gguf.GGUFReader(path)
    file = open_gguf(path)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors] == ["a", "b", "c"]
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert ours.fmt is fmt and theirs.tensor_type == fmt.ggml_type
        assert ours.shape == ours.stored_shape == tuple(theirs.shape.tolist()[::-1])
        assert (ours.offset, ours.nbytes, ours.parameters) == (theirs.data_offset, theirs.n_bytes, theirs.n_elements)
        assert ours.data.dtype == torch.uint8 and ours.data.shape == (theirs.n_bytes,)
        assert ours.data.numpy().tobytes() == theirs.data.tobytes()


@pytest.mark.parametrize("name", ["F64", "F16", "I8"])
def test_samples_store_plain_types_as_they_are(name, tmp_path):
    array = np.arange(-100, 100, dtype=np.float32).reshape(4, 50)  # exact in each of them
    tensor = open_gguf(write_gguf(tmp_path / "a.gguf", {"a": (array, name)})).tensors["a"]
    assert tensor.fmt.dtype is not None
    assert torch.equal(tensor.data.view(tensor.fmt.dtype).view(4, 50).float(), torch.from_numpy(array))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 1, 3)])
def test_samples_store_bf16(shape, tmp_path):
    array = np.asarray(normal(*shape))
    tensor = open_gguf(write_gguf(tmp_path / "a.gguf", {"a": (array, "BF16")})).tensors["a"]
    assert (tensor.fmt.name, tensor.shape) == ("BF16", shape)
    assert torch.equal(tensor.data.view(torch.bfloat16).view(shape), torch.from_numpy(array).bfloat16())


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ4_XS", "IQ3_XXS", "MXFP4"])
def test_samples_quantize_as_libgguf(name, tmp_path):
    array = normal(4, 512)
    tensor = open_gguf(write_gguf(tmp_path / "a.gguf", {"a": (array, name)})).tensors["a"]
    expected = libgguf.quantize_rows(array, gguf.GGMLQuantizationType[name])
    assert tensor.data.numpy().tobytes() == expected.tobytes()


def test_ranks_from_scalar_to_five(tmp_path):
    arrays = {f"rank{rank}": normal(*(2, 3, 4, 5, 32)[-rank:] if rank else ()) for rank in range(6)}
    path = write_gguf(tmp_path / "a.gguf", {name: (np.asarray(array), "F32") for name, array in arrays.items()})
    tensors = open_gguf(path).tensors
    for name, array in arrays.items():
        assert tensors[name].shape == np.shape(array)
        assert tensors[name].data.view(torch.float32).numpy().tobytes() == np.asarray(array).tobytes()


def test_quantized_five_dimensions(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"patch": (normal(2, 3, 1, 2, 256), "Q4_K")})
    patch = open_gguf(path).tensors["patch"]
    assert (patch.shape, patch.nbytes) == ((2, 3, 1, 2, 256), 12 * 144)


def test_folded_tensors_get_their_shape_back(tmp_path):
    convolution, video = normal(8, 64, 3, 3), normal(16, 16, 1, 2, 2)
    path = write_gguf(tmp_path / "a.gguf", {"c": (convolution, "Q4_K"), "v": (video, "Q8_0")})
    tensors = open_gguf(path).tensors
    assert (tensors["c"].shape, tensors["c"].stored_shape) == ((8, 64, 3, 3), (18, 256))
    assert (tensors["v"].shape, tensors["v"].stored_shape) == ((16, 16, 1, 2, 2), (4, 256))
    decoded = gguf.quants.dequantize(tensors["v"].data.numpy(), gguf.GGMLQuantizationType.Q8_0).reshape(video.shape)
    # Q8_0 rounds to steps of max|x|/127, whose scale is rounded to fp16 (2**-11)
    assert np.abs(decoded - video).max() <= np.abs(video).max() * (0.5 / 127 + 2**-11)


def test_samples_fall_back_where_rows_cannot_fill_blocks(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf",
        {"odd": (normal(5, 7), "Q4_K"), "bias": (normal(7), "Q8_0"), "foldable": (normal(8, 96), "Q4_K")},
        orig_shapes=False,
    )
    file = open_gguf(path)
    assert {name: tensor.fmt.name for name, tensor in file.tensors.items()} == {
        "odd": "F16",
        "bias": "F32",
        "foldable": "F16",
    }
    assert not any(key.startswith("comfy.gguf.orig_shape") for key in file.metadata)


def test_version_2_and_alignment(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf", {"a": (normal(3), "F32"), "b": (normal(5), "F16")}, metadata={"general.alignment": 64}
    )
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", 2)
    path.write_bytes(raw)
    file = open_gguf(str(path))
    assert (file.version, file.alignment, file.size, file.path) == (2, 64, len(raw), path)
    assert [tensor.offset % 64 for tensor in file.tensors.values()] == [0, 0]
    assert file.tensors["b"].data.numpy().tobytes() == normal(5).astype(np.float16).tobytes()


def test_metadata_of_every_value_type(tmp_path):
    expected = {
        "u8": (200, GGUFValueType.UINT8),
        "i8": (-3, GGUFValueType.INT8),
        "u16": (60000, GGUFValueType.UINT16),
        "i16": (-30000, GGUFValueType.INT16),
        "u32": (1 << 31, GGUFValueType.UINT32),
        "i32": (-(1 << 31), GGUFValueType.INT32),
        "u64": (1 << 63, GGUFValueType.UINT64),
        "i64": (-(1 << 63), GGUFValueType.INT64),
        "f32": (0.5, GGUFValueType.FLOAT32),
        "f64": (0.1, GGUFValueType.FLOAT64),
        "yes": (True, GGUFValueType.BOOL),
        "no": (False, GGUFValueType.BOOL),
        "text": ("größer · 大", GGUFValueType.STRING),
        "ints": ([1, -2, 3], GGUFValueType.ARRAY),
        "floats": ([0.5, -0.25], GGUFValueType.ARRAY),
        "flags": ([True, False], GGUFValueType.ARRAY),
        "texts": (["a", "", "größer"], GGUFValueType.ARRAY),
        "nested": ([[1, 2], [3]], GGUFValueType.ARRAY),
    }
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    for key, (value, kind) in expected.items():
        writer.add_key_value(key, value, kind)
    finish(writer)
    file = open_gguf(path)
    assert dict(file.metadata) == {"general.architecture": "wan"} | {key: value for key, (value, _) in expected.items()}
    assert len(file.metadata) == len(expected) + 1 and "nowhere" not in file.metadata
    assert type(file.metadata["yes"]) is bool and file.metadata["ints"] is file.metadata["ints"]
    assert file.architecture == "wan" and not file.tensors


def test_metadata_in_another_encoding_does_not_stop_the_model(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(padded(header(entry("general.license", STRING, text("größer".encode("latin-1")))), 0))
    file = open_gguf(path)
    assert file.metadata["general.license"] == "gr\ufffd\ufffder"
    assert file.architecture is None


def test_empty_tensors_are_sound(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(padded(header(tensors=(info("none", (0, 4)), info("some", (8,)))), 32))
    tensors = open_gguf(path).tensors
    assert (tensors["none"].shape, tensors["none"].nbytes, tensors["none"].data.numel()) == ((4, 0), 0, 0)
    assert tensors["some"].nbytes == 32


# Memory and time


def test_tensors_are_views_of_one_mapping(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"a": (normal(4, 256), "Q4_K"), "b": (normal(4, 256), "F16")})
    tensors = list(open_gguf(path).tensors.values())
    bases = {tensor.data.data_ptr() - tensor.offset for tensor in tensors}
    assert len(bases) == 1


def test_a_copy_of_a_tensor_does_not_take_the_file_along(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"a": (normal(4, 256), "Q4_K"), "b": (normal(64, 256), "F16")})
    data = open_gguf(path).tensors["a"].data
    assert data.untyped_storage().nbytes() == copy.deepcopy(data).untyped_storage().nbytes() == 4 * 144


def test_writing_to_a_view_leaves_the_file(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"a": (normal(64, 256), "Q4_K"), "b": (normal(4, 256), "F16")})
    before = hashlib.sha256(path.read_bytes()).digest()
    file = open_gguf(path)
    for tensor in file.tensors.values():
        tensor.data.fill_(0x5A)
        tensor.data.untyped_storage().fill_(0x5A)
    assert all((tensor.data == 0x5A).all() for tensor in file.tensors.values())
    del file, tensor
    assert hashlib.sha256(path.read_bytes()).digest() == before


def test_data_outlives_the_file_object(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"a": (normal(4, 256), "F32")})
    data = open_gguf(path).tensors["a"].data
    assert data.numpy().tobytes() == normal(4, 256).tobytes()


def sparse_model(path: Path, size: int) -> None:
    """A file of `size` bytes with tensors of 64 MiB, none of which takes room on the disk."""
    count = size // (64 << 20) - 1
    head = header(tensors=tuple(info(f"blocks.{i}.weight", (4096, 4096), F32, i << 26) for i in range(count)))
    path.write_bytes(head)
    os.truncate(path, size)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and needs sparse files")
def test_a_file_of_8_gib_opens_at_once_and_takes_no_memory(tmp_path):
    path = tmp_path / "a.gguf"
    sparse_model(path, 8 * GIB)
    before = resident_bytes()
    start = time.process_time()
    file = open_gguf(path)
    elapsed = time.process_time() - start
    assert resident_bytes() - before < 16 << 20
    assert elapsed < 0.5
    assert len(file.tensors) == 127 and file.tensors["blocks.126.weight"].data[-1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_file_larger_than_memory_opens(tmp_path):
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this machine counts every private page")
    kib = [int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "Total:" in line[:10]]
    path = tmp_path / "a.gguf"
    sparse_model(path, (2 * sum(kib) * 1024 + GIB) // GIB * GIB)
    assert open_gguf(path).nbytes > sum(kib) * 1024


def test_a_header_with_250000_strings_opens_in_half_a_second(tmp_path):
    vocabulary = [f"token {i}" for i in range(250_000)]
    path = write_gguf(
        tmp_path / "a.gguf",
        {"a": (normal(8), "F32")},
        metadata={"tokenizer.ggml.tokens": vocabulary, "tokenizer.ggml.scores": [float(i) for i in range(250_000)]},
    )

    def seconds() -> float:
        start = time.process_time()
        open_gguf(path)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 0.5
    metadata = open_gguf(path).metadata
    assert metadata["tokenizer.ggml.tokens"] == vocabulary
    assert metadata["tokenizer.ggml.scores"][-1] == 249_999.0


HOSTILE = {
    "strings": header(entry("k", ARRAY, struct.pack("<IQ", STRING, 1 << 29))),
    "numbers": header(entry("k", ARRAY, struct.pack("<IQ", UINT8, 1 << 32))),
    "nested": header(entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1 << 29))),
    "empty arrays": header(
        entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1 << 22) + struct.pack("<IQ", UINT8, 0) * (1 << 22))
    ),
    "text": header(entry("k", STRING, struct.pack("<Q", 1 << 32))),
    "name": header(tensors=(struct.pack("<Q", 1 << 32),)),
    "tensors": header(tensor_count=1 << 24),
    "entries": header(entry_count=1 << 24),
}


@pytest.mark.parametrize("head", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.skipif(sys.platform == "win32", reason="needs sparse files")
def test_counts_that_a_huge_file_could_hold_cost_nothing(head, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(head)
    os.truncate(path, 8 * GIB)
    start = time.process_time()
    with memory_below(1 << 20):
        assert isinstance(refusal(path), CorruptFile)
    assert time.process_time() - start < 1


# Unsound files


def original_shape(*dims: int) -> bytes:
    return entry("comfy.gguf.orig_shape.a", ARRAY, numbers(*dims))


CORRUPT = {
    "magic": (b"GGML" + bytes(60), "begins with b'GGML"),
    "one byte": (b"G", "begins with b'G'"),
    "magic only": (b"GGUF", "past the end"),
    "version 0": (padded(header(version=0), 0), "no GGUF version 0"),
    "version of noise": (padded(header(version=0x12345678), 0), "no GGUF version"),
    "no counts": (header()[:20], "past the end"),
    "tensors overflow": (header(tensor_count=(1 << 64) - 1), f"claims {(1 << 64) - 1} tensors"),
    "entries overflow": (header(entry_count=1 << 63), "metadata entries"),
    "more tensors than bytes": (header(tensors=(info("a"),), tensor_count=9), "claims 9 tensors"),
    "header cut in a key": (header(entry("general.architecture", STRING, text("flux")))[:40], "past the end"),
    "header cut in a value": (header(entry("k", UINT32, b"\1\0")), "past the end"),
    "header cut in strings": (
        header(entry("k", ARRAY, struct.pack("<IQ", STRING, 3) + text("ab") + text("c") + b"\1")),
        "past the end",
    ),
    "string length overflows": (header(entry("k", STRING, struct.pack("<Q", (1 << 64) - 1))), "claims a text of"),
    "string in an array overflows": (
        header(entry("k", ARRAY, struct.pack("<IQQ", STRING, 2, (1 << 64) - 1)) + bytes(64)),
        "past the end",
    ),
    "array overflows": (header(entry("k", ARRAY, struct.pack("<IQ", INT32, 1 << 62))), "claims an array of"),
    "array past the end": (header(entry("k", ARRAY, struct.pack("<IQ", INT32, 1000))), "past the end"),
    "unknown value type": (header(entry("k", 13, bytes(8))), "unknown type 13"),
    "unknown item type": (header(entry("k", ARRAY, struct.pack("<IQ", 99, 1) + bytes(8))), "unknown type 99"),
    "nested too deep": (header(entry("k", ARRAY, nested(5))), "nests more than 4 arrays"),
    "nested far too deep": (header(entry("k", ARRAY, nested(100_000))), "nests more than 4 arrays"),
    "key twice": (header(entry("k", UINT8, b"\1"), entry("k", UINT8, b"\2")), "key 'k' twice"),
    "key not UTF-8": (header(entry(b"\xff\xfe", UINT8, b"\1")), "metadata key at byte 32 is not UTF-8"),
    "key length overflows": (header(struct.pack("<Q", 1 << 40) + bytes(32)), "claims a metadata key of"),
    "name not UTF-8": (padded(header(tensors=(info(b"\xc3("),)), 32), "tensor name at byte 32 is not UTF-8"),
    "name twice": (padded(header(tensors=(info("a"), info("a", offset=32))), 64), "tensor 'a' twice"),
    "nine dimensions": (padded(header(tensors=(info("a", (1,) * 9),)), 32), "9 dimensions of at most 8"),
    "dimensions without end": (header(tensors=(text("a") + struct.pack("<I", 0xFFFFFFFF) + bytes(32),)), "dimensions"),
    "dimensions overflow": (padded(header(tensors=(info("a", (1 << 32, 1 << 32)),)), 32), "impossible shape"),
    "empty and overflowing": (padded(header(tensors=(info("a", (0, 1 << 63)),)), 32), "impossible shape"),
    "empty and wide": (padded(header(tensors=(info("a", (0, 1 << 29)),)), 256), "impossible shape"),
    "empty and of a wide shape": (
        padded(header(original_shape(1 << 29, 0), tensors=(info("a", (0,)),)), 256), "does not fit",
    ),
    "empty and of an overflowing shape": (
        padded(header(original_shape(*[1 << 30] * 3, 0), tensors=(info("a", (0,)),)), 256), "does not fit",
    ),
    "row is no whole block": (padded(header(tensors=(info("a", (300, 2), Q4_K),)), 999), "300 weights does not fill"),
    "scalar of blocks": (padded(header(tensors=(info("a", (), Q4_K),)), 999), "1 weights does not fill"),
    "misaligned": (padded(header(tensors=(info("a", offset=16),)), 99), "not aligned to 32 bytes"),
    "offset past the end": (padded(header(tensors=(info("a", offset=1 << 20),)), 32), "and the file at byte"),
    "offset overflows": (padded(header(tensors=(info("a", offset=(1 << 64) - 32),)), 32), "and the file at byte"),
    "data cut": (padded(header(tensors=(info("a"), info("b", offset=32))), 63), "tensor 'b' ends at byte"),
    "no data": (header(tensors=(info("a"),)), "tensor 'a' ends at byte"),
    "overlap": (padded(header(tensors=(info("b", offset=32), info("a", (16,)))), 64), "'a' and 'b' overlap"),
    "same place": (padded(header(tensors=(info("b"), info("a"))), 64), "overlap"),
    "alignment 0": (padded(header(entry("general.alignment", UINT32, bytes(4))), 0), "is 0, not a power"),
    "alignment 48": (padded(header(entry("general.alignment", UINT32, b"\x30\0\0\0")), 0), "is 48, not a power"),
    "alignment 4": (padded(header(entry("general.alignment", UINT32, b"\4\0\0\0")), 0), "is 4, not a power"),
    "alignment 2 GiB": (padded(header(entry("general.alignment", UINT32, b"\0\0\0\x80")), 0), "not a power"),
    "alignment is a text": (padded(header(entry("general.alignment", STRING, text("32"))), 0), "is '32', not a power"),
    "shape of other size": (padded(header(original_shape(3, 3), tensors=(info("a"),)), 32), "does not fit"),
    "negative shape": (padded(header(original_shape(-2, -4), tensors=(info("a"),)), 32), "does not fit"),
    "shape too long": (padded(header(original_shape(8, *[1] * 8), tensors=(info("a"),)), 32), "does not fit"),
    "shape is a number": (
        padded(header(entry("comfy.gguf.orig_shape.a", INT32, b"\x08\0\0\0"), tensors=(info("a"),)), 32),
        "does not fit",
    ),
    "empty": (b"", "the file is empty"),
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 6874\n",
        "File is 129 bytes, a Git LFS pointer: download the model itself",
    ),
    "HTML": (b"\n<!DOCTYPE html><html><head><title>Sign in</title>", "a web page: download the model itself"),
    "safetensors": (struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}}   ', "a safetensors file: name it .safetensors"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive or PyTorch checkpoint"),
    "pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "pickled PyTorch checkpoint"),
    "GGML": (b"tjgg\3\0\0\0" + bytes(60), "from before GGUF"),
    "zeros": (bytes(4096), "file of zeros"),
}

UNSUPPORTED = {
    "version 1": (padded(header(version=1), 0), "version 1 is outdated"),
    "version 4": (padded(header(version=4), 0), "version 4 is newer than Graft"),
    "big-endian": (padded(header(version=3 << 24), 0), "big-endian: convert it"),
    "unknown type": (padded(header(tensors=(info("a", kind=99),)), 32), "GGUF type number 99 is unknown"),
    "Q8_1": (padded(header(tensors=(info("a", (256,), Q8_1),)), 999), "Q8_1 is a format of activations"),
    "Q8_K": (padded(header(tensors=(info("a", (256,), Q8_K),)), 999), "Q8_K is a format of activations"),
    "Q1_0": (padded(header(tensors=(info("a", (256,), Q1_0),)), 999), "Q1_0"),
}


@pytest.mark.parametrize(("raw", "message"), CORRUPT.values(), ids=CORRUPT.keys())
def test_corrupt_files_are_named(raw, message, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    error = refusal(path)
    assert isinstance(error, CorruptFile) and message in str(error)


@pytest.mark.parametrize(("raw", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_files_are_named(raw, message, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    error = refusal(path)
    assert isinstance(error, UnsupportedFormat) and message in str(error)


def test_what_is_no_file_is_named(tmp_path):
    assert "this is a folder" in str(refusal(tmp_path))
    assert "there is no such file" in str(refusal(tmp_path / "nowhere.gguf"))
    assert "cannot be read" in str(refusal(tmp_path / "nul\0.gguf"))


def test_a_page_file_that_is_too_small_is_named(tmp_path, monkeypatch):
    """Stands for Windows, which maps copies of pages only as far as it has memory for all of them."""
    path = tmp_path / "a.gguf"
    path.write_bytes(SEED)

    def refuse(*args, **kwargs):
        error = OSError(22, "The paging file is too small for this operation to complete")
        error.winerror = 1455
        raise error

    monkeypatch.setattr(reader.sys, "platform", "win32")
    assert open_gguf(path).tensors["a"].shape == (2, 64, 2)
    monkeypatch.setattr(reader.mmap, "mmap", refuse)
    assert f"the page file is too small to open {len(SEED)} bytes: let Windows manage" in str(refusal(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in str(refusal(tmp_path / "pipe.gguf"))


def test_big_endian_file_of_a_real_writer(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "flux", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", normal(8))
    finish(writer)
    assert "big-endian" in str(refusal(path))


def test_split_file_of_a_real_writer(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux", split_max_tensors=1)
    for name in "abc":
        writer.add_tensor(name, normal(8))
    finish(writer)
    error = refusal(tmp_path / "a-00002-of-00003.gguf")
    assert isinstance(error, UnsupportedFormat)
    assert "part 2 of 3 of a split model: merge the parts with `llama-gguf-split --merge`" in str(error)


def test_long_names_are_cut_in_messages(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(padded(header(tensors=(info("x" * 60_000, offset=1),)), 99))
    assert len(str(refusal(path))) < 500


# Any other file

SEED = padded(
    header(
        entry("general.architecture", STRING, text("flux")),
        entry("general.alignment", UINT32, struct.pack("<I", 32)),
        entry("comfy.gguf.orig_shape.a", ARRAY, numbers(2, 64, 2)),
        entry("tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("") + text("größer")),
        entry("nested", ARRAY, nested(3)),
        entry("split.count", UINT8, b"\1"),
        tensors=(info("a", (256,), Q4_K), info("b", (4, 2), F32, 160), info("c", (), F32, 192)),
    ),
    224,
)
EDGES = st.sampled_from([0, 1, 7, 8, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The seed file with bytes and lengths overwritten, cut off or grown."""
    raw = bytearray(SEED)
    for position, value in draw(st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255)), max_size=6)):
        raw[position] = value
    for position, value in draw(st.lists(st.tuples(st.integers(4, len(SEED) - 8), EDGES), max_size=3)):
        raw[position : position + 8] = struct.pack("<Q", value)
    return bytes(raw[: draw(st.integers(0, len(raw)) | st.just(len(raw)))])


def read_everything(path: Path, raw: bytes) -> None:
    """Open these bytes and look at all that is in them; our own errors are fine."""
    path.write_bytes(raw)
    with memory_below(4 << 20):
        try:
            file = open_gguf(path)
            diffusion_tensors(file)
        except GraftError as error:
            assert str(error).endswith(f"{path})")
            return
        assert sum(tensor.nbytes for tensor in file.tensors.values()) <= file.size
        for tensor in file.tensors.values():
            assert tensor.data.numel() == tensor.nbytes and math.prod(tensor.shape) == math.prod(tensor.stored_shape)
        assert len(dict(file.metadata)) == len(file.metadata)
        assert isinstance(describe(file), str)


FUZZ = settings(
    max_examples=400, deadline=2000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_the_seed_of_the_fuzzers_is_sound(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(SEED)
    file = open_gguf(path)
    assert file.tensors["a"].shape == (2, 64, 2) and file.metadata["nested"] == [[[]]]


@FUZZ
@given(raw=damaged())
def test_damaged_files_raise_our_errors_only(raw, tmp_path):
    read_everything(tmp_path / "a.gguf", raw)


@FUZZ
@given(raw=st.binary(max_size=400))
def test_noise_raises_our_errors_only(raw, tmp_path):
    read_everything(tmp_path / "a.gguf", raw)
    read_everything(tmp_path / "a.gguf", b"GGUF\3\0\0\0" + raw)


def test_truncations_are_corrupt(tmp_path):
    path = tmp_path / "a.gguf"
    for length in range(0, len(SEED) - 28, 3):  # the last 28 bytes pad the last tensor
        path.write_bytes(SEED[:length])
        assert isinstance(refusal(path), CorruptFile)
    path.write_bytes(SEED[:-28])
    open_gguf(path)


# What is in the file


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_prefix_of_the_diffusion_model_is_cut_off(prefix, tmp_path):
    others = ["first_stage_model.x", "text_model.y"] if prefix else []
    names = [f"{prefix}img_in.weight", f"{prefix}final.bias", *others]
    path = write_gguf(tmp_path / "a.gguf", {name: (normal(8, 96), "Q4_K") for name in names})
    tensors = diffusion_tensors(open_gguf(path))
    assert list(tensors) == ["img_in.weight", "final.bias"]
    assert tensors["img_in.weight"].name == names[0] and tensors["img_in.weight"].shape == (8, 96)


OTHER_MODELS = [
    ("llama", "token_embd.weight", "llama is a text encoder, not a diffusion model: use a CLIP loader that reads GGUF"),
    ("qwen2vl", "blk.0.attn_q.weight", "qwen2vl is a text encoder, not a diffusion model: use a CLIP loader"),
    ("t5encoder", "enc.blk.0.attn_q.weight", "t5encoder is a text encoder"),
    ("gemma3", "anything", "gemma3 is a text encoder"),
    ("qwen35", "token_embd.weight", "this is a text encoder"),
    ("pig", "encoder.block.0.layer.0.SelfAttention.q.weight", "this is a text encoder"),
    ("pig", "text_model.encoder.layers.0.mlp.fc1.weight", "this is a text encoder"),
    ("clip", "v.blk.0.attn_q.weight", "clip is a vision projector (mmproj), not a diffusion model: put it beside"),
    ("pig", "mm.0.weight", "this is a vision projector"),
    ("pig", "first_stage_model.decoder.conv_in.weight", "this is a VAE, not a diffusion model: use a VAE loader"),
    ("pig", "decoder.conv_in.weight", "this is a VAE"),
    ("wan", "decoder.conv1.weight", "this is a VAE"),
    ("flux", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "this is a LoRA, not a diffusion model: "),
    ("wan", "diffusion_model.blocks.0.self_attn.q.lora_A.weight", "this is a LoRA"),
    ("llama", "blk.0.attn_q.weight.lora_a", "this is a LoRA"),
    ("flux", "controlnet_blocks.0.weight", "this is a ControlNet, not a diffusion model: put it into models/"),
    ("sd1", "control_model.zero_convs.0.0.weight", "this is a ControlNet"),
    ("lumina2", "control_layers.0.attention.qkv.weight", "this is a model patch"),
    ("wan", "vace_blocks.0.self_attn.q.weight", "this is a VACE module, a part of a Wan model, not a diffusion model"),
    ("ltxv", "model.diffusion_model.video_embeddings_connector.learnable_registers", "this is the text connectors of"),
    ("sd1", "image_proj.proj.weight", "this is an IP-Adapter"),
    ("flux", "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "this is an IP-Adapter"),
    ("pig", "vision_model.encoder.layers.0.mlp.fc1.weight", "this is a CLIP vision model"),
    ("pig", "multi_modal_projector.mm_input_projection_weight", "this is a vision projector"),
    ("pig", "body.0.rdb1.conv1.weight", "this is an upscaler"),
    ("ltxv", "post_upsample_res_blocks.0.conv1.weight", "this is an upscaler of latents"),
    ("whisper", "anything", "whisper is an audio encoder"),
    ("pig", "encoder.embed_positions.weight", "this is an audio encoder"),
    ("flux", "redux_up.weight", "this is a style model"),
]


@pytest.mark.parametrize(("architecture", "name", "message"), OTHER_MODELS)
def test_other_models_are_named(architecture, name, message, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"x": (normal(8), "F32"), name: (normal(8), "F32")}, architecture)
    with pytest.raises(UnsupportedFormat) as caught:
        diffusion_tensors(open_gguf(path))
    assert str(caught.value).startswith(message) and str(caught.value).endswith(f"({path})")


@pytest.mark.parametrize(
    "name",
    [
        "double_blocks.0.img_attn.qkv.weight",
        "encoder.lyric_encoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attn.q_proj.weight",
        "visual_transformer_blocks.0.cross_attention.key_norm.weight",
        "casual_audio_encoder.encoder.final_linear.weight",
        "control_adapter.conv.weight",
        "audio_proj.audio_proj_glob_1.layer.bias",
        "face_adapter.fuser_blocks.0.k_norm.weight",
    ],
)
def test_names_of_diffusion_models_of_any_architecture_pass(name, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {name: (normal(8), "F32")}, architecture="never heard of it")
    assert list(diffusion_tensors(open_gguf(path))) == [name]


@pytest.mark.parametrize(
    "names",
    [
        ("blocks.0.self_attn.q.weight", "vace_blocks.0.self_attn.q.weight", "vace_patch_embedding.weight"),
        ("transformer_blocks.0.attn1.to_q.weight", "video_embeddings_connector.learnable_registers"),
        ("layers.0.attention.qkv.weight", "control_layers.0.attention.qkv.weight"),
        ("blocks.0.self_attn.q.weight", "audio_proj.proj1.weight"),
    ],
)
def test_a_model_that_is_whole_may_have_such_parts(names, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {name: (normal(8), "F32") for name in names})
    assert tuple(diffusion_tensors(open_gguf(path))) == names


def test_an_xlabs_controlnet_is_no_small_flux(tmp_path):
    names = ("img_in.weight", "double_blocks.0.img_attn.norm.key_norm.scale", "controlnet_blocks.0.weight")
    path = write_gguf(tmp_path / "a.gguf", {name: (normal(8), "F32") for name in names})
    with pytest.raises(UnsupportedFormat, match="this is a ControlNet, not a diffusion model: put it into"):
        diffusion_tensors(open_gguf(path))


def test_metadata_alone_is_no_model(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {})
    with pytest.raises(UnsupportedFormat, match="metadata and no tensors"):
        diffusion_tensors(open_gguf(path))


def test_description(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf",
        {"a": (normal(64, 512), "Q4_K"), "b": (normal(16, 512), "Q6_K")} | {name: (normal(9), "F32") for name in "cd"},
    )
    file = open_gguf(path)
    assert file.type_counts == {"Q4_K": 1, "Q6_K": 1, "F32": 2}
    assert (file.parameters, file.nbytes) == (80 * 512 + 18, 64 * 288 + 16 * 420 + 72)
    assert describe(file) == "flux · 41.0K · Q4_K 1, Q6_K 1, F32 2 · 25.2 KB"
    sparse_model(path, 8 * GIB)
    assert describe(open_gguf(path)) == "unknown architecture · 2.1B · F32 127 · 8.5 GB"


def test_what_an_architecture_is_called_is_cut(tmp_path):
    path = tmp_path / "a.gguf"
    name = entry("general.architecture", STRING, text("flux " * (1 << 16)))
    path.write_bytes(padded(header(name, tensors=(info("a"),)), 32))
    file = open_gguf(path)
    assert file.architecture == ("flux " * 24)[:120]
    assert len(describe(file)) < 200
