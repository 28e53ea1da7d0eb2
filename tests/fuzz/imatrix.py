"""Importance matrices, in both of their forms."""

from __future__ import annotations

import struct

from graft.kernels import GraftError
from graft.ops.files.imatrix import read_imatrix

from .bounds import bounded, sentence, written
from .choices import Choices, damaged
from .gguf_files import ARRAY, STRING, UINT32, entry, number, strings, text
from .gguf_files import file as make_file

SUFFIX = ".gguf"
_NAMES = ("a.weight.in_sum2", "a.weight.counts", "a.weight.in_sum", "b.in_sum2", "b.counts", ".in_sum2", ".counts")


def make(choices: Choices) -> bytes:
    return older(choices) if choices.once_in(3) else newer(choices)


def newer(choices: Choices) -> bytes:
    entries = [
        entry(choices, "general.type", STRING, text(choices, "imatrix")),
        entry(choices, "imatrix.datasets", ARRAY, strings(choices, ("wiki", "code"))),
        entry(choices, "imatrix.chunk_count", UINT32),
    ]
    if choices.odd():
        return make_file(choices, _NAMES, entries, most=7)
    infos, values = [], b""
    for name in ("a.weight", "b")[: 1 + choices.below(2)]:
        experts, columns = choices.pick((1, 3)), choices.pick((1, 4, 8))
        for suffix, width in ((".in_sum2", columns), (".counts", 1)):
            dims = struct.pack("<QQ", number(choices, width), number(choices, experts))
            place = struct.pack("<IQ", number(choices, 0) & 0xFFFFFFFF, len(values))
            infos.append(text(choices, name + suffix) + struct.pack("<I", 2) + dims + place)
            count = width * experts
            data = choices.noise(4 * count) if choices.odd() else struct.pack(f"<{count}f", *range(count))
            values += data + bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join((*entries, *infos))
    return damaged(choices, head + bytes(-len(head) % 32) + values)


def older(choices: Choices) -> bytes:
    count = 1 + choices.below(4)
    data = _i32(choices, count)
    for index in range(count):
        name = choices.pick((f"blk.{index}.weight".encode(), b"\xff\xfe" if choices.odd() else b"x"))
        values = 1 + choices.below(5)
        data += _i32(choices, len(name)) + name + _i32(choices, 2) + _i32(choices, values)
        data += choices.noise(4 * values) if choices.odd() else struct.pack(f"<{values}f", *range(values))
    if choices.once_in(2):
        data += _i32(choices, 3) + _i32(choices, 4) + b"wiki"
    return damaged(choices, data)


def _i32(choices: Choices, sound: int) -> bytes:
    return struct.pack("<I", number(choices, sound) & 0xFFFFFFFF)


def check(data: bytes) -> None:
    path = written(data, SUFFIX)
    with bounded(len(data)):
        try:
            importance = read_imatrix(path)
            for name in importance:
                assert importance.rows(name) >= 0 and (importance[name] >= 0).all()
        except GraftError as error:
            sentence(error)
