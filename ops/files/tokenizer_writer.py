"""A sentencepiece tokenizer as metadata of a GGUF file, under the names that llama.cpp's converter writes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ...kernels.errors import CorruptFile

if TYPE_CHECKING:
    from .writer import Value

_PREFIX = "tokenizer.ggml."
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of sentencepiece's ModelProto
_UNUSED = 5
_UNUSED_SCORE = -10000.0
_NOT_THERE = (1 << 64) - 1  # -1 in 64 bits
_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, _NOT_THERE)}
"""Fields of the TrainerSpec, and what they are where it does not say."""


def unigram_entries(model: bytes, rows: int) -> dict[str, Value]:
    """What a file of a T5 says of its tokenizer.

    Args:
        model: a sentencepiece ModelProto of the Unigram kind, as UMT5 comes with.
        rows: of the text encoder's vocabulary; what the tokenizer lacks is filled up, as the converter does.

    Raises:
        CorruptFile: it is none.
    """
    try:
        return _entries(model, rows)
    except (LookupError, TypeError, AttributeError, ValueError, struct.error) as error:
        raise CorruptFile("the text encoder's tokenizer is damaged: get the text encoder again") from error


def _entries(model: bytes, rows: int) -> dict[str, Value]:
    fields = _fields(model)
    pieces = [_fields(piece) for piece in fields[_PIECES]]
    missing = max(0, rows - len(pieces))
    tokens = [piece[1][0].decode() for piece in pieces] + [f"[PAD{len(pieces) + i}]" for i in range(missing)]
    scores = [struct.unpack("<f", piece.get(2, [bytes(4)])[0])[0] for piece in pieces] + [_UNUSED_SCORE] * missing
    types = [piece.get(3, [1])[0] for piece in pieces] + [_UNUSED] * missing
    trainer, normalizer = (_fields(fields.get(part, [b""])[0]) for part in (_TRAINER, _NORMALIZER))
    found: dict[str, Value] = {"model": "t5", "tokens": tokens, "scores": scores, "token_type": types}
    found["add_space_prefix"] = bool(normalizer.get(3, [1])[0])
    found["remove_extra_whitespaces"] = bool(normalizer.get(4, [1])[0])
    if rules := normalizer.get(2, [b""])[0]:
        found["precompiled_charsmap"] = list(rules)
    for name, (field, default) in _IDS.items():
        number = trainer.get(field, [default])[0]
        if number < len(pieces):
            found[f"{name}_token_id"] = number
    return {_PREFIX + key: value for key, value in found.items()}


def _fields(data: bytes) -> dict[int, list]:
    """The fields of a protobuf message by their numbers: bytes, bytes of a float, or numbers."""
    found: dict[int, list] = {}
    place = 0
    value: int | bytes
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
        else:
            size, place = (8, place) if kind == 1 else (4, place) if kind == 5 else _varint(data, place)
            if kind not in (1, 2, 5) or place + size > len(data):
                raise ValueError("a field has no such type, or ends behind its message")
            value, place = data[place : place + size], place + size
        found.setdefault(key >> 3, []).append(value)
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number, and where what follows it begins."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


__all__ = ["unigram_entries"]
