"""Tokenizers rebuilt from GGUF metadata: the ids and texts of the original, and a sentence for every bad file."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from google.protobuf.unknown_fields import UnknownFieldSet
from graft.kernels.errors import CorruptFile, GraftError, UnsupportedFormat
from graft.ops.gguf_file import GGUFFile, open_gguf
from graft.ops.tokenizers import sentencepiece_model, tekken_model
from graft.tests import tokenizer_samples as samples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers.integrations.mistral import MistralConverter

Pair = tuple[sentencepiece.SentencePieceProcessor, sentencepiece.SentencePieceProcessor]

WRITERS = {
    "umt5": (lambda: samples.train_umt5(byte_fallback=False), samples.write_t5),
    "umt5 with bytes": (lambda: samples.train_umt5(byte_fallback=True), samples.write_t5),
    "gemma": (samples.train_gemma, samples.write_gemma),
}
FILLED = 12  # tokens that fill the vocabulary up, as converters add for rows of the embedding that have no token


def rebuilt(path: Path) -> bytes:
    return sentencepiece_model(open_gguf(path))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[bytes, bytes]]:
    """Each sentencepiece model and what becomes of it by way of a GGUF file."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name, (train, write) in WRITERS.items():
        original = train()
        size = samples.processor(original).vocab_size() + FILLED
        made[name] = original, rebuilt(write(folder / f"{name}.gguf", original, size))
    return made


@pytest.fixture(scope="module")
def pairs(models) -> dict[str, Pair]:
    return {name: (samples.processor(theirs), samples.processor(ours)) for name, (theirs, ours) in models.items()}


def check(pair: Pair, text: str) -> None:
    theirs, ours = pair
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("text", samples.TEXTS)
def test_texts(name, text, pairs):
    check(pairs[name], text)


# pieces of which most texts that matter are made, and any character between them
PARTS = ["<start_of_turn>", "<extra_id_0>", "<table>", "  ", "\n", " ", "house", "▁", "ｈｏｕｓｅ", "é", "e\u0301"]
MIXED = st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=12).map("".join)


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(text=MIXED)
@example(text="\ufeff<start_of_turn>  \u3000")
def test_any_text(text, pairs):
    for pair in pairs.values():
        check(pair, text)


@pytest.mark.parametrize("name", WRITERS)
def test_special_pieces(name, pairs):
    theirs, ours = pairs[name]
    for attribute in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(ours, attribute)() == getattr(theirs, attribute)()
    for options in ({"add_eos": True}, {"add_bos": True, "reverse": True}):
        if theirs.bos_id() >= 0 or "add_bos" not in options:
            assert ours.encode("a house", **options) == theirs.encode("a house", **options)
    every = list(range(theirs.vocab_size()))
    assert [ours.decode([index]) for index in every] == [theirs.decode([index]) for index in every]


@pytest.mark.parametrize("name", WRITERS)
def test_messages_say_what_the_originals_say(name, models):
    """As protobuf reads them, but for scores that the converter overwrites and nothing reads."""
    theirs, ours = (sentencepiece_model_pb2.ModelProto.FromString(model) for model in models[name])
    for message in (ours, ours.trainer_spec, ours.normalizer_spec, *ours.pieces):
        assert not len(UnknownFieldSet(message))
    size = len(theirs.pieces)
    assert [(p.piece, p.type) for p in ours.pieces[:size]] == [(p.piece, p.type) for p in theirs.pieces]
    pairs = zip(ours.pieces, theirs.pieces, strict=False)
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
    assert all(ours.score == theirs.score for ours, theirs in pairs if theirs.type == normal)
    filled = [(f"[PAD{index}]", 5, -10000) for index in range(size, size + FILLED)]
    assert [(p.piece, p.type, p.score) for p in ours.pieces[size:]] == filled
    for field in ("precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert getattr(ours.normalizer_spec, field) == getattr(theirs.normalizer_spec, field)
    pieces = [f"{name}_{what}" for name in ("unk", "bos", "eos", "pad") for what in ("id", "piece")]
    for field in (*pieces, "unk_surface", "model_type", "byte_fallback", "treat_whitespace_as_suffix"):
        assert getattr(ours.trainer_spec, field) == getattr(theirs.trainer_spec, field), field
    assert ours.trainer_spec.vocab_size == size + FILLED


def test_instruct_models_keep_their_own_eos(models, tmp_path):
    """Some files of Gemma name <end_of_turn> as the end of a text."""
    theirs = samples.processor(models["gemma"][0])
    path = samples.write_gemma(tmp_path / "a.gguf", models["gemma"][0], theirs.vocab_size(), eos="<end_of_turn>")
    pair = theirs, samples.processor(rebuilt(path))
    assert pair[1].eos_id() == 1
    for text in samples.TEXTS:
        check(pair, text)


# Tekken


@pytest.fixture(scope="module")
def tekken(tmp_path_factory) -> tuple[Tokenizer, GGUFFile]:
    tokenizer = samples.train_tekken(samples.TEKKEN_PATTERN)
    return tokenizer, open_gguf(samples.write_tekken(tmp_path_factory.mktemp("tekken") / "a.gguf", tokenizer, FILLED))


@pytest.fixture(scope="module")
def tekken_pair(tekken, tmp_path_factory) -> tuple[Tokenizer, Tokenizer]:
    """The original and what transformers makes of the tekken.json, which it knows as Mistral's own format."""
    path = tmp_path_factory.mktemp("json") / "tekken.json"
    path.write_bytes(tekken_model(tekken[1]))
    return tekken[0], MistralConverter(vocab_file=str(path)).converted()


def check_tekken(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    theirs, ours = pair
    ids = theirs.encode(text).ids
    assert ours.encode(text).ids == ids
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", samples.TEXTS)
def test_tekken_texts(text, tekken_pair):
    check_tekken(tekken_pair, text)


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(text=MIXED)
@example(text="[INST]house[/INST]<SPECIAL_7> <s>")
def test_tekken_any_text(text, tekken_pair):
    check_tekken(tekken_pair, text)


def test_tekken_vocabulary(tekken, tekken_pair):
    """Every id has its token; special tokens come first, and those that fill up are gone."""
    original, file = tekken
    assert tekken_pair[1].get_vocab() == original.get_vocab()
    model = json.loads(tekken_model(file))
    assert [entry["rank"] for entry in model["vocab"]] == list(range(original.get_vocab_size() - len(samples.SPECIALS)))
    assert [(entry["rank"], entry["token_str"]) for entry in model["special_tokens"]] == [*enumerate(samples.SPECIALS)]
    assert {base64.b64decode(entry["token_bytes"]) for entry in model["vocab"]} >= {bytes([b]) for b in range(256)}


# Files that say too little, or something else


def file_of(**fields: Any) -> GGUFFile:
    """A file with these fields under ``tokenizer.ggml.``."""
    metadata = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    return GGUFFile(Path("models/a.gguf"), 3, 32, 0, metadata, {})  # type: ignore[arg-type]


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA: dict[str, Any] = {
    "model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a", "▁a", *BYTES], "scores": [0.0] * 4 + [-1.0] + [0.0] * 256,
    "token_type": [3, 3, 3, 1, 1] + [6] * 256, "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "model": "t5", "tokens": ["<pad>", "</s>", "<unk>", "a", "▁", "b c"], "scores": [0.0, 0.0, 0.0, -2.0, -3.0, 0.0],
    "token_type": [3, 3, 2, 1, 1, 1],
}  # fmt: skip
ALPHABET = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
GPT2: dict[str, Any] = {"model": "gpt2", "tokens": ["<unk>", "<s>", *ALPHABET], "token_type": [3, 3] + [1] * 256}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def changed(fields: dict[str, Any], name: str, index: int, value: Any) -> dict[str, Any]:
    """The fields with another item in one of their arrays."""
    return fields | {name: [*fields[name][:index], value, *fields[name][index + 1 :]]}


def test_what_a_file_leaves_out_is_as_in_llama_cpp():
    """A space before the text, no space removed, special pieces by their types and usual names."""
    pieces = samples.processor(sentencepiece_model(file_of(**T5)))
    assert pieces.encode("a  a", out_type=str) == ["▁", "a", "▁", "▁", "a"]
    assert (pieces.unk_id(), pieces.eos_id(), pieces.pad_id(), pieces.bos_id()) == (2, 1, 0, -1)
    assert pieces.encode("b c") == [4, 5]  # scored 0 by the trainer: user-defined


def test_the_type_says_what_is_unknown():
    """It is sentencepiece's own, where the id is transformers'."""
    assert samples.processor(sentencepiece_model(file_of(**T5, unknown_token_id=3))).unk_id() == 2


def test_charsmap_of_signed_bytes(models):
    charsmap = sentencepiece_model_pb2.ModelProto.FromString(models["umt5"][0]).normalizer_spec.precompiled_charsmap
    signed = [byte - 256 if byte > 127 else byte for byte in charsmap]
    model = sentencepiece_model(file_of(**T5, precompiled_charsmap=signed))
    assert sentencepiece_model_pb2.ModelProto.FromString(model).normalizer_spec.precompiled_charsmap == charsmap


BAD_PIECES = {
    "no tokens": without(LLAMA, "tokens"),
    "empty tokens": LLAMA | {"tokens": []},
    "tokens are a string": LLAMA | {"tokens": "abc"},
    "a token is a number": changed(LLAMA, "tokens", 3, 7),
    "an empty token": changed(LLAMA, "tokens", 3, ""),
    "a null in a token": changed(LLAMA, "tokens", 3, "a\0"),
    "a token twice": changed(LLAMA, "tokens", 3, "▁a"),
    "a byte missing": changed(LLAMA, "tokens", 9, "<0x05>"),
    "no scores": without(LLAMA, "scores"),
    "scores are whole": LLAMA | {"scores": [0] * 261},
    "a score is no number": changed(LLAMA, "scores", 0, float("nan")),
    "a score is infinite": changed(LLAMA, "scores", 0, float("-inf")),
    "a score of 64 bits": changed(LLAMA, "scores", 0, 1e300),
    "a score too few": LLAMA | {"scores": [0.0] * 260},
    "no types": without(LLAMA, "token_type"),
    "a type too many": LLAMA | {"token_type": [1] * 262},
    "a type is true": changed(LLAMA, "token_type", 3, True),
    "a type of its own": changed(LLAMA, "token_type", 3, 0),
    "nothing unknown": without(LLAMA, "unknown_token_id"),
    "two unknown": changed(T5, "token_type", 3, 2),
    "an id out of range": LLAMA | {"bos_token_id": 261},
    "a negative id": LLAMA | {"eos_token_id": -1},
    "an id is a string": LLAMA | {"padding_token_id": "0"},
    "an id is true": LLAMA | {"padding_token_id": True},
    "a flag is a number": LLAMA | {"add_space_prefix": 1},
    "a charsmap of text": T5 | {"precompiled_charsmap": "abc"},
    "a charsmap of words": T5 | {"precompiled_charsmap": [1, 256]},
}
BAD_TEKKEN = {
    "no tokens": without(GPT2, "tokens"),
    "no types": without(GPT2, "token_type"),
    "types too few": GPT2 | {"token_type": [3, 3, 1]},
    "only filled up": GPT2 | {"token_type": [5] * 258},
    "a token twice": GPT2 | {"tokens": [*GPT2["tokens"], "a"], "token_type": [*GPT2["token_type"], 1]},
    "no token of byte 0": GPT2 | {"tokens": ["ab" if token == "Ā" else token for token in GPT2["tokens"]]},
    "no such character": GPT2 | {"tokens": [*GPT2["tokens"], "a b"], "token_type": [*GPT2["token_type"], 1]},
}


def refusal(build: Any, fields: dict[str, Any]) -> GraftError:
    with pytest.raises(GraftError) as caught:
        build(file_of(**fields))
    message = str(caught.value)
    assert message.endswith("(models/a.gguf)") and ": " in message and "\n" not in message and len(message) < 300
    return caught.value


@pytest.mark.parametrize("name", BAD_PIECES)
def test_bad_pieces(name):
    assert isinstance(refusal(sentencepiece_model, BAD_PIECES[name]), CorruptFile)


@pytest.mark.parametrize("name", BAD_TEKKEN)
def test_bad_tekken(name):
    assert isinstance(refusal(tekken_model, BAD_TEKKEN[name]), CorruptFile)


OTHERS = [(sentencepiece_model, "gpt2"), (sentencepiece_model, 7), (tekken_model, "llama")]


@pytest.mark.parametrize("build, model", OTHERS)
def test_tokenizers_of_another_kind(build, model):
    for fields, said in (({"model": model}, repr(model)), ({}, "no tokenizer")):
        error = refusal(build, fields)
        assert isinstance(error, UnsupportedFormat) and said in str(error)


def test_special_tokens_behind_others_are_not_tekken():
    """As in GPT-2, Llama 3 and Qwen: ids would shift."""
    fields = GPT2 | {"tokens": [*GPT2["tokens"], "<|end|>"], "token_type": [*GPT2["token_type"], 3]}
    error = refusal(tekken_model, fields)
    assert isinstance(error, UnsupportedFormat) and "'<|end|>' has the id 258" in str(error)


ITEMS = st.integers(-3, 300) | st.floats() | st.booleans() | st.sampled_from(["", "a", "▁a", " ", "<0x00>", "<eos>"])


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(data=st.data(), base=st.sampled_from([LLAMA, T5, GPT2]))
def test_damage_is_refused_or_harmless(data, base):
    """Whatever stands in the fields: an error of ours, or a model that loads."""
    fields = dict(base)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(fields.keys() - {"model"} | {"bos_token_id"})))
        if isinstance(fields.get(name), list) and fields[name] and data.draw(st.booleans()):
            fields = changed(fields, name, data.draw(st.integers(0, len(fields[name]) - 1)), data.draw(ITEMS))
        else:
            fields[name] = data.draw(ITEMS | st.lists(ITEMS, max_size=6))
    try:
        if base is GPT2:
            json.loads(tekken_model(file_of(**fields)))
        else:
            samples.processor(sentencepiece_model(file_of(**fields))).encode("a <eos>b")
    except GraftError:
        pass
