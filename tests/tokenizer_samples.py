"""Small tokenizers of the kinds that text encoders use, in GGUF files as llama.cpp's converter writes them.

Needs sentencepiece, tokenizers and gguf, which every ComfyUI with GGUF models has; no protobuf.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, while 42 cats sleep in 1977.",
    "A photograph of an old lighthouse at sunset, cinematic lighting, highly detailed, 8k.",
    "a painting of a red house with a white door; two small dogs play in front of the house",
    "She said: \"It's only a model!\" and they didn't believe her.",
    "Der schnelle braune Fuchs springt über den faulen Hund. Größe, Straße, Mädchen.",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "いろはにほへと ちりぬるを 東京の夜、雨の中を歩く猫。",
    "白い家の前に赤い花が咲いている。天地玄黃 宇宙洪荒",
    "def add(a, b):\n    return a + b  # two  spaces\n\n\nprint(add(1, 2))",
    "<table><tr><td>1</td></tr></table> and <b>bold</b> [text] {json: 3.14}",
    "🙂 🎨 emoji and café, naïve, ﬁne, ½ cup, № 5, x² + y² = z²",
    "the house in the sunset, the lighthouse in the rain, the cat in the house, the dog at the door",
]

# what normalization, spaces, unknown characters and special tokens can do to a text
TEXTS = [
    *CORPUS,
    "",
    " ",
    "   ",
    "  two leading, two  within, two trailing  ",
    "tab\tand\nnewlines\n\n\nand\r\nmore",
    "ＦＵＬＬ－ｗｉｄｔｈ　ｌｅｔｔｅｒｓ　１２３",
    "cafe\u0301 A\u030angstro\u0308m, composed: café Ångström",
    "ﬁ ﬂ Ⅷ ㎏ ① ｶﾞ",
    "👩‍🎨 👍🏽 🇪🇺 🫩",
    "ᚠᛇᚻ ⠓⠑⠇⠇⠕ 𐍈 \u200b \ufeff \u00a0 \u2028 \u2581 \u2581\u2581",
    "control \x01\x02\x7f characters and \ufffd",
    "<pad><unk></s><s><bos><eos><0x41>",
    "<start_of_turn>user\nHello  <mask>there<end_of_turn>\n<start_of_turn>model\n",
    "<extra_id_0> of <extra_id_1> ＜extra_id_0＞ x<extra_id_0>y",
    "<table>  <table>\n\n\n\n[PAD300] <unused0><unused1> [PAD1]",
    "[INST]a[/INST] [SYSTEM_PROMPT]b <SPECIAL_5>",
    "supercalifragilistic" * 20,
    "a" * 300 + " " * 100 + "\n" * 30,
]


def train_umt5(byte_fallback: bool) -> bytes:
    """A sentencepiece model with what makes UMT5's: Unigram, NFKC with rules for spaces, no bos."""
    return _train(
        model_type="unigram", vocab_size=500, normalization_rule_name="nmt_nfkc", byte_fallback=byte_fallback,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, user_defined_symbols=["<extra_id_0>", "<extra_id_1>"],
    )  # fmt: skip


def train_gemma() -> bytes:
    """A sentencepiece model with what makes Gemma's: BPE, bytes, texts left as they are, many user-defined symbols."""
    turns = ["<start_of_turn>", "<end_of_turn>", "<unused0>", "<unused1>", "<mask>", "<table>"]
    blanks = ["\n\n", "\n\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "\u2581\u2581\u2581\u2581"]
    return _train(
        model_type="bpe", vocab_size=640, normalization_rule_name="identity", byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=turns + blanks,
    )  # fmt: skip


def _train(**options: object) -> bytes:
    model = io.BytesIO()
    # each text as one sentence: newlines in it are no end
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=model, pad_piece="<pad>", character_coverage=0.98,
        hard_vocab_limit=False, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


def processor(model: bytes, **options: object) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model, **options)


def stored(model: bytes) -> torch.Tensor:
    """A tokenizer as it lies in a state dict."""
    return torch.frombuffer(bytearray(model), dtype=torch.uint8)


def write_t5(path: str | os.PathLike[str], model: bytes, vocab_size: int) -> Path:
    """A GGUF file of nothing but a T5's tokenizer."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    add_t5(writer, model, vocab_size)
    return _finish(writer, path)


def add_t5(writer: gguf.GGUFWriter, model: bytes, vocab_size: int) -> None:
    """What llama.cpp's T5Model.set_vocab writes for a Unigram model: user-defined pieces become normal ones."""
    _write_vocabulary(writer, "t5", *_vocabulary(model, vocab_size))
    normalizer = message_fields(message_fields(model)[3][0])
    writer.add_add_space_prefix(bool(normalizer.get(3, [1])[0]))
    writer.add_remove_extra_whitespaces(bool(normalizer.get(4, [1])[0]))
    if charsmap := normalizer.get(2, [b""])[0]:
        writer.add_precompiled_charsmap(charsmap)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(0)


def write_gemma(path: str | os.PathLike[str], model: bytes, vocab_size: int, eos: str = "<eos>") -> Path:
    """A GGUF file of nothing but a Gemma's tokenizer."""
    writer = gguf.GGUFWriter(path, "gemma3")
    add_gemma(writer, model, vocab_size, eos)
    return _finish(writer, path)


def add_gemma(writer: gguf.GGUFWriter, model: bytes, vocab_size: int, eos: str = "<eos>") -> None:
    """What llama.cpp's Gemma3Model.set_vocab writes, with the tokenizer_config.json that transformers makes.

    There control pieces, `<unk>` and those for turns are special; other user-defined ones are added tokens of which
    the converter takes some for special by their look. It gives all of them a score of its own.
    """
    tokens, scores, types = _vocabulary(model, vocab_size)
    for index, piece in enumerate(message_fields(model)[1]):
        fields = message_fields(piece)
        text, kind = fields[1][0].decode(), fields.get(3, [1])[0]
        if kind not in (2, 3, 4):
            continue
        special = kind != 4 or "_of_turn>" in text or text.startswith("<unused") or text == "<mask>"
        types[index] = 3 if special else 4
        tokens[index] = (text if special else text.replace("\u2581", " ")).encode()
        scores[index] = -1000.0
    _write_vocabulary(writer, "llama", tokens, scores, types)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(tokens.index(eos.encode()))
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _vocabulary(model: bytes, vocab_size: int) -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and types as far as sentencepiece's Python tells them, filled up to `vocab_size`."""
    pieces = processor(model)
    tokens = [f"[PAD{index}]".encode() for index in range(vocab_size)]
    scores, types = [-10000.0] * vocab_size, [5] * vocab_size
    for index in range(pieces.vocab_size()):
        tokens[index], scores[index] = pieces.id_to_piece(index).encode(), pieces.get_score(index)
        is_kind = (pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_unused, 5), (pieces.is_byte, 6)
        types[index] = next((kind for test, kind in is_kind if test(index)), 1)
    return tokens, scores, types


def _write_vocabulary(
    writer: gguf.GGUFWriter, name: str, tokens: list[bytes], scores: list[float], types: list[int]
) -> None:
    writer.add_tokenizer_model(name)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)


def _finish(writer: gguf.GGUFWriter, path: str | os.PathLike[str]) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def message_fields(message: bytes) -> Mapping[int, list]:
    """A protobuf message as field number to values: ints, and bytes for all that is not a varint."""
    fields: dict[int, list] = {}
    stream = io.BytesIO(message)
    while start := stream.read(1):
        key = _varint(stream, start)
        kind = key & 7
        value = _varint(stream) if kind == 0 else stream.read(_varint(stream) if kind == 2 else {1: 8, 5: 4}[kind])
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _varint(stream: io.BytesIO, start: bytes = b"") -> int:
    groups = [start or stream.read(1)]
    while groups[-1][0] & 0x80:
        groups.append(stream.read(1))
    return sum((group[0] & 0x7F) << 7 * place for place, group in enumerate(groups))


# how words are split by Mistral's tekken.json, and by ComfyUI 0.19, which leaves that to a default of transformers
TEKKEN_PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
DEFAULT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
SPECIALS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<SPECIAL_7>"]
SPECIALS += [f"<SPECIAL_{index}>" for index in range(8, 11)] + ["<pad>"]


def train_tekken(pattern: str, vocab_size: int = 600) -> Tokenizer:
    """A byte-level BPE with Mistral's special tokens first, as its tokenizer.json says it; `pattern` splits words."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def write_tekken(path: str | os.PathLike[str], tokenizer: Tokenizer, padding: int = 0) -> Path:
    """A GGUF file of nothing but a Mistral's tokenizer."""
    writer = gguf.GGUFWriter(path, "mistral3")
    add_tekken(writer, tokenizer, padding)
    return _finish(writer, path)


def add_tekken(writer: gguf.GGUFWriter, tokenizer: Tokenizer, padding: int = 0) -> None:
    """What llama.cpp's _set_vocab_gpt2 writes for it."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    added = tokenizer.get_added_tokens_decoder()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    names = [f"[PAD{len(vocabulary) + index}]" for index in range(padding)]
    writer.add_token_list([text for text, _ in vocabulary] + names)
    writer.add_token_types([3 if index in added else 1 for _, index in vocabulary] + [5] * padding)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


# how words are split by gpt-oss's tokenizer.json
O200K_PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
HARMONY = ["<|startoftext|>", "<|endoftext|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>"]
GEMMA_4 = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|image|>"]


def train_harmony(vocab_size: int = 600) -> Tokenizer:
    """A byte-level BPE with gpt-oss's special tokens last, as its tokenizer.json says it."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(O200K_PATTERN), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in HARMONY])
    return tokenizer


def train_gemma4(vocab_size: int = 500) -> Tokenizer:
    """BPE over whole texts with U+2581 for spaces, bytes for what has no token, and some tokens found as a whole."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    back = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([back, decoders.ByteFallback(), decoders.Fuse()])
    counts = Counter("".join(CORPUS).replace(" ", "\u2581"))
    # of the characters that are as frequent, the trainer would keep others each time
    alphabet = sorted(counts, key=lambda character: (-counts[character], character))[:70]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, max_token_length=8, limit_alphabet=70, initial_alphabet=alphabet,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in GEMMA_4],
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    whole = json.loads(tokenizer.to_str())
    vocab = whole["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<table>", "</table>", "\n\n\n")])
    return tokenizer


def add_bpe(writer: gguf.GGUFWriter, tokenizer: Tokenizer, model: str, pre: str | None = None) -> None:
    """What llama.cpp's Gemma4Model.set_vocab and _set_vocab_gpt2 write: added tokens may become normal ones."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    added = tokenizer.get_added_tokens_decoder()
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _ in vocabulary])
    is_byte = [len(text) == 6 and text.startswith("<0x") for text, _ in vocabulary]
    special = [index in added and added[index].special for _, index in vocabulary]
    writer.add_token_types([3 if s else 6 if b else 1 for s, b in zip(special, is_byte, strict=True)])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])


def write_bpe(path: str | os.PathLike[str], *args: object) -> Path:
    """A GGUF file of nothing but such a tokenizer."""
    writer = gguf.GGUFWriter(path, "gemma4")
    add_bpe(writer, *args)
    return _finish(writer, path)
