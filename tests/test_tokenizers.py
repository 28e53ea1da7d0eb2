"""Tokenizers rebuilt from GGUF metadata: the ids and texts of the original, and a sentence for every bad file."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from google.protobuf.unknown_fields import UnknownFieldSet
from graft.kernels.errors import CorruptFile, GraftError, UnsupportedFormat
from graft.ops.files.gguf import GGUFFile, open_gguf
from graft.ops.files.tokenizer_writer import unigram_entries
from graft.ops.files.tokenizers import byte_level_tokenizer, gemma4_tokenizer, sentencepiece_model, tekken_model
from graft.ops.files.writer import write_gguf
from graft.tests import tokenizer_samples as samples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers.integrations.mistral import MistralConverter

Pair = tuple[sentencepiece.SentencePieceProcessor, sentencepiece.SentencePieceProcessor]


def write_ours(path: Path, model: bytes, vocab_size: int) -> Path:
    """As Graft writes a UMT5 that it saves."""
    write_gguf(path, {"general.architecture": "t5encoder", **unigram_entries(model, vocab_size)}, [])
    return path


WRITERS = {
    "umt5, saved": (lambda: samples.train_umt5(byte_fallback=True), write_ours),
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


def test_a_damaged_tokenizer_is_not_written(models):
    whole = models["umt5"][0]
    for damaged in (b"", b"\x00", whole[:-20], b"\xff" * 20, whole[:100] + b"\x0a\xff\xff\x7f"):
        with pytest.raises(CorruptFile, match="the text encoder's tokenizer is damaged"):
            unigram_entries(damaged, 600)


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


BPE = {
    "gemma4": (gemma4_tokenizer, samples.train_gemma4, ("gemma4",)),
    "gpt-oss": (byte_level_tokenizer, samples.train_harmony, ("gpt2", "gpt-4o")),
}


@pytest.fixture(scope="module")
def bpe_pairs(tmp_path_factory) -> dict[str, tuple[Tokenizer, Tokenizer]]:
    """Each original, and what becomes of it by way of a GGUF file."""
    folder, made = tmp_path_factory.mktemp("bpe"), {}
    for name, (build, train, kinds) in BPE.items():
        original = train()
        file = open_gguf(samples.write_bpe(folder / f"{name}.gguf", original, *kinds))
        made[name] = original, Tokenizer.from_str(build(file).decode())
    return made


def check_bpe(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    theirs, ours = pair
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=False).ids == ids
    for skipped in (True, False):
        assert ours.decode(ids, skip_special_tokens=skipped) == theirs.decode(ids, skip_special_tokens=skipped)


@pytest.mark.parametrize("name", BPE)
@pytest.mark.parametrize("text", [*samples.TEXTS, "<|turn>user\nHi<turn|> <|start|>system<|message|>a<|end|> <bos>"])
def test_bpe_texts(name, text, bpe_pairs):
    check_bpe(bpe_pairs[name], text)


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(text=MIXED)
def test_bpe_any_text(text, bpe_pairs):
    for pair in bpe_pairs.values():
        check_bpe(pair, text)
        assert pair[0].get_vocab() == pair[1].get_vocab()


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


def charsmap(*units: int, texts: bytes = b"a\0", size: int = 1024) -> dict[str, Any]:
    """A T5's fields with rules whose trie begins with these units."""
    # all others have labels under which nothing looks for them
    trie = struct.pack("<256I", *units, *[255 - place for place in range(len(units), 256)])
    return T5 | {"precompiled_charsmap": list(struct.pack("<I", size) + trie + texts)}


def test_a_charsmap_is_followed_before_sentencepiece_follows_it(models):
    """Its versions before 0.2.1 read wherever one leads."""
    rules = sentencepiece_model_pb2.ModelProto.FromString(models["umt5"][0]).normalizer_spec.precompiled_charsmap
    assert sentencepiece_model(file_of(**charsmap(0, 3 << 10 | 0x100 | 1, 1 << 31)))
    for place in (0, 1, 70, 200):
        units = bytearray(rules)
        struct.pack_into("<I", units, 4 + 4 * place, 0x1FFFFF << 10 | 0x200 | place)
        with pytest.raises(CorruptFile, match="charsmap is damaged"):
            sentencepiece_model(file_of(**T5, precompiled_charsmap=list(units)))


BAD_PIECES = {
    "special tokens alone": T5 | {"token_type": [3, 3, 2, 3, 3, 3]},
    "a charsmap without texts": charsmap(texts=b""),
    "a charsmap whose last text has no end": charsmap(texts=b"a"),
    "a charsmap of a size that is none": charsmap(size=1020),
    "a charsmap shorter than its size": charsmap(size=4096),
    "a charsmap that leads behind its end": charsmap(256 << 10),
    "a charsmap that leads far behind its end": charsmap(0x1FFFFF << 10 | 0x200),
    "a charsmap with a text behind its end": charsmap(0, 3 << 10 | 0x100 | 1, 1 << 31 | 2),
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


GEMMA4: dict[str, Any] = {
    "model": "gemma4", "tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "ab", "<table>", "<0x00>"],
    "token_type": [3, 3, 3, 3, 1, 1, 1, 1, 6], "merges": ["a b"],
}  # fmt: skip
HARMONY: dict[str, Any] = GPT2 | {"pre": "gpt-4o", "tokens": [*GPT2["tokens"], "ab"], "merges": ["a b"]}
HARMONY["token_type"] = [*GPT2["token_type"], 1]
BAD_BPE = {
    "no merges": without(GEMMA4, "merges"),
    "a merge of one": GEMMA4 | {"merges": ["ab"]},
    "a merge of what is no token": GEMMA4 | {"merges": ["a c"]},
    "a merge to what is no token": GEMMA4 | {"merges": ["b a"]},
    "merges are numbers": GEMMA4 | {"merges": [1]},
    "a token twice": changed(GEMMA4, "tokens", 4, "b"),
    "an empty token": changed(GEMMA4, "tokens", 7, ""),
    "nothing unknown": changed(GEMMA4, "tokens", 3, "c"),
    "types too few": GEMMA4 | {"token_type": [3]},
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


@pytest.mark.parametrize("name", BAD_BPE)
def test_bad_bpe(name):
    assert isinstance(refusal(gemma4_tokenizer, BAD_BPE[name]), CorruptFile)


def test_words_split_in_another_way():
    for pre in (None, "qwen2", 7):
        assert isinstance(refusal(byte_level_tokenizer, HARMONY | {"pre": pre}), UnsupportedFormat)


OTHERS = [(sentencepiece_model, "gpt2"), (sentencepiece_model, 7), (tekken_model, "llama"), (gemma4_tokenizer, "llama"),
          (byte_level_tokenizer, "gemma4")]  # fmt: skip


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
@given(data=st.data(), base=st.sampled_from([LLAMA, T5, GPT2, GEMMA4, HARMONY]))
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
        elif base is GEMMA4 or base is HARMONY:
            build = gemma4_tokenizer if base is GEMMA4 else byte_level_tokenizer
            Tokenizer.from_str(build(file_of(**fields)).decode()).encode("a <eos>b")
        else:
            samples.processor(sentencepiece_model(file_of(**fields))).encode("a <eos>b")
    except GraftError:
        pass
