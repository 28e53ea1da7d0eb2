"""The tokenizer files that ComfyUI's text encoders expect in a state dict, rebuilt from a GGUF file's metadata.

llama.cpp's converter keeps a vocabulary under ``tokenizer.ggml.``: `model` names the algorithm, `tokens`, `scores` and
`token_type` have an item for each id, and ``bos_token_id`` and its like name ids. Types are sentencepiece's: 1 normal,
2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
"""

from __future__ import annotations

import base64
import json
import reprlib
import struct
from itertools import takewhile
from typing import Any, TypeVar

import torch

from ...kernels.errors import CorruptFile, UnsupportedFormat
from .gguf import GGUFFile

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_ANOTHER = "get the model from another source"
_UNIGRAM, _BPE = 1, 2  # sentencepiece's TrainerSpec.ModelType
_MODEL_TYPES = {"t5": _UNIGRAM, "llama": _BPE}  # of each `tokenizer.ggml.model`
_LARGEST = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]  # finite number of 32 bits
_TRIE_BLOCK = 1024  # bytes: a trie grows by units for all 256 labels
_BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(256)}

# how tekken splits a text into words, after the `pattern` of Mistral's tekken.json
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# how o200k, which gpt-oss has, splits a text into words, after openai/tiktoken's tiktoken_ext/openai_public.py
_O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

T = TypeVar("T", int, float, str)


def sentencepiece_model(file: GGUFFile) -> bytes:
    """A sentencepiece ModelProto, as UMT5 (``t5``, Unigram) and Gemma 2 and 3 (``llama``, BPE) come with.

    Ids and texts come out as with the file that the converter read. Field numbers are those of sentencepiece's
    src/sentencepiece_model.proto; what the file leaves out gets llama.cpp's default.

    Raises:
        UnsupportedFormat: the file has a tokenizer of another kind, or none.
        CorruptFile: its fields are missing, of another type, or contradict each other.
    """
    model_type = _MODEL_TYPES[_model(file, tuple(_MODEL_TYPES))]
    tokens = _array(file, "tokens", str)
    scores = _array(file, "scores", float, len(tokens))
    types = _array(file, "token_type", int, len(tokens))
    ids = {name: _token_id(file, name, tokens) for name in ("unknown", "bos", "eos", "padding")}
    if _UNKNOWN in types:
        ids["unknown"] = types.index(_UNKNOWN)
    if model_type == _BPE and "<eos>" in tokens:
        ids["eos"] = tokens.index("<eos>")  # Gemma's own: files of instruct models may name <end_of_turn> here
    types = _piece_types(types, scores, ids, model_type)
    pieces = [_piece_text(text, kind) for text, kind in zip(tokens, types, strict=True)]
    _check_pieces(file, pieces, types)
    normalizer = _message(2, _charsmap(file))
    normalizer += _message(3, _flag(file, "add_space_prefix", True))
    normalizer += _message(4, _flag(file, "remove_extra_whitespaces", False))
    body = b"".join(map(_piece, pieces, scores, types))
    return body + _message(2, _trainer(model_type, pieces, types, ids)) + _message(3, normalizer)


def tekken_model(file: GGUFFile) -> bytes:
    """Mistral's tekken.json, for Mistral 3 and Ministral (``gpt2``: byte-level BPE).

    Tekken numbers its special tokens first and then the others by rank, which is the order of merging. Tokens that only
    fill the vocabulary up are left out at its end.

    Raises:
        UnsupportedFormat: the file has a tokenizer of another kind, or none, or special tokens behind others.
        CorruptFile: its fields are missing, of another type, or contradict each other.
    """
    _model(file, ("gpt2",))
    tokens = _array(file, "tokens", str)
    types = _array(file, "token_type", int, len(tokens))
    while types and types[-1] == _UNUSED:
        types.pop()
    del tokens[len(types) :]
    first = sum(1 for _ in takewhile(lambda kind: kind != _NORMAL, types))
    for index in range(first, len(types)):
        if types[index] != _NORMAL:
            problem = f"the special token {reprlib.repr(tokens[index])} has the id {index}, behind ordinary ones"
            raise UnsupportedFormat(f"{problem}, unlike Mistral's: get a GGUF of the Mistral model ({file.path})")
    if len(set(tokens)) < len(tokens):
        raise _corrupt(file, "the tokenizer has a token twice")
    if not _BYTES.keys() <= set(tokens[first:]):
        raise _corrupt(file, "the tokenizer has no tokens for some bytes")
    config = {
        "pattern": _TEKKEN_PATTERN,
        "default_vocab_size": len(tokens),
        "default_num_special_tokens": first,
    }
    special = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(tokens[:first])]
    vocab = [{"rank": rank, "token_bytes": _base64(file, text)} for rank, text in enumerate(tokens[first:])]
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": special}).encode()


def byte_level_tokenizer(file: GGUFFile) -> bytes:
    """The tokenizer.json of gpt-oss (``gpt2``: byte-level BPE, with o200k's way of splitting words).

    Raises:
        UnsupportedFormat: the file has a tokenizer of another kind, or none, or splits words in another way.
        CorruptFile: its fields are missing, of another type, or contradict each other.
    """
    _model(file, ("gpt2",))
    splits = file.metadata.get(_PREFIX + "pre")
    if splits != "gpt-4o":
        raise UnsupportedFormat(
            f"the file splits words like {reprlib.repr(splits)} and not like gpt-4o: get a GGUF that llama.cpp's "
            f"converter made from the original model ({file.path})"
        )
    split = {"type": "Split", "pattern": {"Regex": _O200K_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _tokenizer_json(
        file,
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "decoder": level},
        {"unk_token": None, "fuse_unk": False, "byte_fallback": False},
    )


def gemma4_tokenizer(file: GGUFFile) -> bytes:
    """The tokenizer.json of Gemma 4 (``gemma4``: BPE over whole texts, U+2581 for spaces, bytes for what has no token).

    Raises:
        UnsupportedFormat: the file has a tokenizer of another kind, or none.
        CorruptFile: its fields are missing, of another type, or contradict each other.
    """
    _model(file, ("gemma4",))
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return _tokenizer_json(
        file,
        {
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        },
        {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    )


def _tokenizer_json(file: GGUFFile, around: dict[str, Any], model: dict[str, Any]) -> bytes:
    """A file as the tokenizers library reads it.

    Args:
        around: what is done to a text before, and to tokens behind, the merging.
        model: settings of the merging.
    """
    tokens = _array(file, "tokens", str)
    types = _array(file, "token_type", int, len(tokens))
    vocab = {text: index for index, text in enumerate(tokens) if types[index] != _UNUSED}
    if len(vocab) < len(tokens) - types.count(_UNUSED):
        raise _corrupt(file, "the tokenizer has a token twice")
    if "" in vocab:
        raise _corrupt(file, "the tokenizer has an empty token")
    if model["unk_token"] not in (None, *vocab):
        raise _corrupt(file, f"the tokenizer has no {model['unk_token']}")
    merges = [merge.partition(" ")[::2] for merge in _array(file, "merges", str)]
    wrong = next((pair for pair in merges if not {*pair, "".join(pair)} <= vocab.keys()), None)
    if wrong is not None:
        raise _corrupt(file, f"the tokenizer merges {reprlib.repr(' '.join(wrong))}, of which some are no tokens")
    # what no merge makes is found in a text as a whole, as user-defined tokens are; the converter calls some normal
    made = {"".join(pair) for pair in merges}
    added = [
        {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": types[index] in (_CONTROL, _UNKNOWN)}
        for text, index in vocab.items()
        if types[index] in (_CONTROL, _UNKNOWN, _USER_DEFINED)
        or (types[index] == _NORMAL and len(text) > 1 and text not in made)
    ]  # fmt: skip
    bpe = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    whole = {"version": "1.0", **empty, "added_tokens": added, **around}
    return json.dumps(whole | {"model": {**bpe, **model, "vocab": vocab, "merges": merges}}).encode()


def _piece_types(types: list[int], scores: list[float], ids: dict[str, int | None], model_type: int) -> list[int]:
    """Types as sentencepiece had them, before the converter changed them.

    In a BPE model it calls control whatever tokenizer_config.json calls special, `<unk>` and Gemma's `<start_of_turn>`
    among them; but sentencepiece finds only user-defined pieces in a text, and Gemma, ComfyUI's only model of the kind,
    has no control pieces beside bos, eos and padding. In a Unigram model it calls user-defined pieces normal; but they
    alone score 0, since a normal piece's score is the logarithm of a probability.
    """
    kinds = list(types)
    for index, (kind, score) in enumerate(zip(types, scores, strict=True)):
        if (model_type == _BPE and kind == _CONTROL) or (model_type == _UNIGRAM and kind == _NORMAL and score == 0):
            kinds[index] = _USER_DEFINED
    for name in ("padding", "eos", "bos", "unknown"):
        if (place := ids[name]) is not None:
            kinds[place] = _UNKNOWN if name == "unknown" else _CONTROL
    return kinds


def _piece_text(text: str, kind: int) -> str:
    """Sentencepiece has U+2581 for a space everywhere; in user-defined pieces the converter writes the space."""
    return text.replace(" ", "\u2581") if kind == _USER_DEFINED else text


def _check_pieces(file: GGUFFile, pieces: list[str], types: list[int]) -> None:
    """What sentencepiece would refuse with an error of its own."""
    if not set(types) <= set(range(_NORMAL, _BYTE + 1)):
        raise _corrupt(file, f"{_PREFIX}token_type has values beside {_NORMAL} to {_BYTE}")
    if types.count(_UNKNOWN) != 1:
        raise _corrupt(file, f"the tokenizer has {types.count(_UNKNOWN)} unknown tokens, not one")
    if not {_NORMAL, _USER_DEFINED, _UNUSED} & set(types):
        raise _corrupt(file, "the tokenizer has special tokens and no others")
    if any(not piece or "\0" in piece for piece in pieces):
        raise _corrupt(file, "the tokenizer has an empty token or one with a null character")
    if len(set(pieces)) < len(pieces):
        raise _corrupt(file, "the tokenizer has a token twice")
    in_bytes = {piece for piece, kind in zip(pieces, types, strict=True) if kind == _BYTE}
    if in_bytes not in (set(), _BYTE_PIECES):
        raise _corrupt(file, "the tokenizer has tokens for some bytes and not for all")


def _trainer(model_type: int, pieces: list[str], types: list[int], ids: dict[str, int | None]) -> bytes:
    """TrainerSpec of model_type (3), vocab_size (4), byte_fallback (35), and the special pieces' ids and texts.

    Sentencepiece goes by the texts (45 to 48); the ids (40 to 43) are for others who read the model.
    """
    spec = _message(3, model_type) + _message(4, len(pieces)) + _message(35, _BYTE in types)
    for place, index in enumerate(ids.values()):
        spec += _message(40 + place, -1 if index is None else index)
        if index is not None:
            spec += _message(45 + place, pieces[index].encode())
    return spec


# protobuf's wire format: a key of field number and type, then the value


def _varint(value: int) -> bytes:
    """Groups of seven bits, lowest first; all but the last have the high bit set. Negative numbers count as 64 bits."""
    value &= (1 << 64) - 1
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*groups, value))


def _message(number: int, value: bytes | int) -> bytes:
    """A field: length-delimited (type 2) for bytes, else a varint (type 0)."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _piece(text: str, score: float, kind: int) -> bytes:
    """ModelProto.pieces (1), a SentencePiece of piece (1), score (2, a float, of type 5) and type (3)."""
    return _message(1, _message(1, text.encode()) + struct.pack("<BfBB", 2 << 3 | 5, score, 3 << 3, kind))


# fields of the metadata


def _corrupt(file: GGUFFile, problem: str) -> CorruptFile:
    return CorruptFile(f"{problem}: {_ANOTHER} ({file.path})")


def _model(file: GGUFFile, known: tuple[str, ...]) -> str:
    """`tokenizer.ggml.model`, one of `known`."""
    model = file.metadata.get(_PREFIX + "model")
    if isinstance(model, str) and model in known:
        return model
    what = "no tokenizer" if model is None else f"a tokenizer of the kind {reprlib.repr(model)}"
    remedy = "get a GGUF that llama.cpp's converter made from the original model"
    raise UnsupportedFormat(f"the file has {what}: {remedy}, with {' or '.join(known)} ({file.path})")


def _array(file: GGUFFile, name: str, kind: type[T], length: int | None = None) -> list[T]:
    """An array of finite numbers or strings, of `length` items where given; a list of its own."""
    items = file.metadata.get(_PREFIX + name)
    if not isinstance(items, list) or not items:
        raise _corrupt(file, f"the tokenizer has no {_PREFIX}{name}")
    found = [item for item in items if type(item) is kind and (not isinstance(item, float) or abs(item) <= _LARGEST)]
    if len(found) < len(items):
        raise _corrupt(file, f"{_PREFIX}{name} has items that are no {kind.__name__}")
    if length is not None and len(found) != length:
        raise _corrupt(file, f"{_PREFIX}{name} has {len(found)} items for {length} tokens")
    return found


def _flag(file: GGUFFile, name: str, default: bool) -> bool:
    value = file.metadata.get(_PREFIX + name, default)
    if not isinstance(value, bool):
        raise _corrupt(file, f"{_PREFIX}{name} is {reprlib.repr(value)}, neither true nor false")
    return value


def _token_id(file: GGUFFile, name: str, tokens: list[str]) -> int | None:
    key = f"{_PREFIX}{name}_token_id"
    value = file.metadata.get(key)
    if value is None or (type(value) is int and 0 <= value < len(tokens)):
        return value
    raise _corrupt(file, f"{key} is {reprlib.repr(value)}, not one of {len(tokens)} ids")


def _charsmap(file: GGUFFile) -> bytes:
    """Rules by which a text is normalized: an array of bytes, signed or not; none mean that it stays as it is."""
    if _PREFIX + "precompiled_charsmap" not in file.metadata:
        return b""
    numbers = _array(file, "precompiled_charsmap", int)
    if not -128 <= min(numbers) <= max(numbers) < 256:
        raise _corrupt(file, f"{_PREFIX}precompiled_charsmap has items that are no bytes")
    rules = bytes(number & 0xFF for number in numbers)
    if not _is_charsmap(rules):
        raise _corrupt(file, f"{_PREFIX}precompiled_charsmap is damaged")
    return rules


def _is_charsmap(rules: bytes) -> bool:
    """Whether sentencepiece, which follows these rules without looking where they lead, stays within them.

    A u32 size of a double-array trie in bytes, the trie, then texts that each end with a null character. A unit of the
    trie is 32 bits: 0 to 7 the label, 8 whether a match ends here, 9 and 10 to 30 where its children are, relative to
    its own place; or, with bit 31 set, the place of a text.
    """
    size = int.from_bytes(rules[:4], "little")
    trie, texts = rules[4 : 4 + size], rules[4 + size :]
    if not size or size % _TRIE_BLOCK or not texts or texts[-1]:
        return False
    units = torch.frombuffer(bytearray(trie), dtype=torch.int32).long() & 0xFFFFFFFF
    children = torch.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    followed = units < 1 << 31
    followed[0] = True
    if not bool(((children | 0xFF) < len(units))[followed].all()):
        return False
    places = units[children[followed & (units & 0x100 != 0)]] & 0x7FFFFFFF
    return bool((places < len(texts)).all())


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it is printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTES = _byte_alphabet()


def _base64(file: GGUFFile, text: str) -> str:
    """A token in GPT-2's alphabet as the base64 of its bytes."""
    try:
        return base64.b64encode(bytes(_BYTES[character] for character in text)).decode()
    except KeyError:
        raise _corrupt(file, f"the token {reprlib.repr(text)} has characters outside of GPT-2's alphabet") from None
