"""Vocabularies from metadata: what is rebuilt from them sentencepiece loads, and gives the same tokens."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sentencepiece
from graft.kernels import GraftError
from graft.ops.files.tokenizers import sentencepiece_model, tekken_model

from .bounds import bounded, sentence
from .choices import NUMBERS, Choices, damaged

_PREFIX = "tokenizer.ggml."
_VALUES: tuple[Any, ...] = (
    None, 0, 1, -1, 2**63, 1e308, float("nan"), float("inf"), True, "", "a", "\0", [], [1], ["a"], [[1]], [True], {},
)  # fmt: skip
_TOKENS = ("<pad>", "<eos>", "<unk>", "<bos>", "\u2581a", "b", "ab", " ", "\u2581", "é", "\0", "", "x" * 300, "<0x0A>",
           "\U0001f642")  # fmt: skip


def _charsmap(choices: Choices) -> bytes:
    """Rules of one block: byte 1 becomes a text; or with units that lead anywhere."""
    units = [0, 3 << 10 | 0x100 | 1, 1 << 31, *(255 - place for place in range(3, 256))]
    for _ in range(choices.below(4)):
        where, what = choices.pick(NUMBERS) & 0x3FFFFF, choices.pick((0, 0x100, 0x200, 0x301, 1 << 31))
        units[choices.below(4)] = (where << 10 | what) & 0xFFFFFFFF
    size = 1020 if choices.odd() else 1024
    return damaged(choices, struct.pack("<257I", size, *units) + choices.pick((b"a\0", b"a\0bc\0", b"a", b"")))


def make(choices: Choices) -> dict[str, Any]:
    tokens = list(dict.fromkeys(choices.pick(_TOKENS[:10]) for _ in range(choices.below(9) + 1)))
    if "<unk>" not in tokens and not choices.once_in(8):
        tokens.append("<unk>")
    kinds = {"<unk>": 2, "<pad>": 3, "<eos>": 3, "<bos>": 3}
    metadata: dict[str, Any] = {
        "model": choices.pick(("t5", "llama", "gpt2")),
        "tokens": tokens,
        "scores": [-float(i) for i in range(len(tokens))],
        "token_type": [kinds.get(token, 1) for token in tokens],
        "unknown_token_id": tokens.index("<unk>") if "<unk>" in tokens else 0,
    }
    if choices.once_in(3):
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        metadata |= {"tokens": tokens + bytes_, "scores": metadata["scores"] + [0.0] * 256}
        metadata["token_type"] = metadata["token_type"] + [6] * 256
    if choices.once_in(4):
        metadata["precompiled_charsmap"] = list(_charsmap(choices))
    for key in ("bos_token_id", "eos_token_id", "padding_token_id"):
        if choices.once_in(4):
            metadata[key] = choices.below(len(tokens))
    if choices.once_in(4):
        metadata["add_space_prefix"] = bool(choices.below(2))
    for key in tuple(metadata):
        if choices.odd():
            metadata[key] = choices.pick(_VALUES)
        elif choices.odd() and isinstance(metadata[key], list) and metadata[key]:
            place = choices.below(len(metadata[key]))
            metadata[key][place] = choices.pick((*_VALUES, *_TOKENS))
    return {_PREFIX + key: value for key, value in metadata.items()}


def check(metadata: dict[str, Any]) -> None:
    file: Any = SimpleNamespace(metadata=metadata, path=Path("a.gguf"))
    with bounded(len(str(metadata))):
        for rebuild in (sentencepiece_model, tekken_model):
            try:
                model = rebuild(file)
            except GraftError as error:
                sentence(error)
                continue
            if rebuild is tekken_model:
                json.loads(model)
                continue
            try:
                loaded = sentencepiece.SentencePieceProcessor(model_proto=model)
            except RuntimeError as error:
                # rules that go round in a circle do no harm, and its newest versions refuse them
                assert "precompiled_charsmap is invalid" in str(error)
                continue
            assert loaded.vocab_size() == len(metadata[_PREFIX + "tokens"])
            loaded.encode("a fox\nin the snow")
