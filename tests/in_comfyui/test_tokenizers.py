"""Rebuilt tokenizers behind ComfyUI's own classes: the ids are those of the original file in the same class."""

from __future__ import annotations

import comfy.text_encoders.ace
import comfy.text_encoders.flux
import comfy.text_encoders.lt
import comfy.text_encoders.lumina2
import comfy.text_encoders.wan
import pytest
import tokenizer_samples as samples
import torch

UMT5 = {"wan": comfy.text_encoders.wan.UMT5XXlTokenizer, "ace": comfy.text_encoders.ace.UMT5BaseTokenizer}
GEMMA = {
    "gemma 2": comfy.text_encoders.lumina2.Gemma2BTokenizer,
    "gemma 3 4B": getattr(comfy.text_encoders.lumina2, "Gemma3_4BTokenizer", None),
    "gemma 3 12B": getattr(comfy.text_encoders.lt, "Gemma3_12BTokenizer", None),
}


def rebuilt(pack, path, build: str) -> torch.Tensor:
    return samples.stored(getattr(pack("ops.files.tokenizers"), build)(pack("ops.files.gguf").open_gguf(path)))


def ids(tokenizer, text: str) -> list[list[int]]:
    return [[token for token, *_ in batch] for batch in tokenizer.tokenize_with_weights(text)]


@pytest.mark.parametrize("name", [*UMT5, *GEMMA])
def test_sentencepiece(name, pack, tmp_path):
    kind = (UMT5 | GEMMA)[name]
    if kind is None:
        pytest.skip("this ComfyUI does not have it")
    original = samples.train_umt5(byte_fallback=True) if name in UMT5 else samples.train_gemma()
    write = samples.write_t5 if name in UMT5 else samples.write_gemma
    path = write(tmp_path / "a.gguf", original, samples.processor(original).vocab_size() + 5)
    theirs = kind(tokenizer_data={"spiece_model": samples.stored(original)})
    ours = kind(tokenizer_data={"spiece_model": rebuilt(pack, path, "sentencepiece_model")})
    for text in samples.TEXTS:
        assert ids(ours, text) == ids(theirs, text), text
    # what a saved checkpoint would carry along
    again = kind(tokenizer_data={"spiece_model": ours.state_dict()["spiece_model"]})
    assert ids(again, samples.TEXTS[1]) == ids(theirs, samples.TEXTS[1])


def test_tekken(pack, tmp_path):
    flux = comfy.text_encoders.flux
    if not hasattr(flux, "Mistral3Tokenizer"):
        pytest.skip("this ComfyUI does not have Mistral 3")
    original = samples.train_tekken(samples.DEFAULT_PATTERN)
    model = rebuilt(pack, samples.write_tekken(tmp_path / "a.gguf", original, 5), "tekken_model")
    try:
        tokenizer = flux.Mistral3Tokenizer(tokenizer_data={"tekken_model": model})
    except TypeError as error:
        if "MistralConverter" not in str(error):
            raise
        pytest.skip(f"this ComfyUI cannot load Mistral's tokenizer with this transformers: {error}")
    for text in samples.TEXTS:
        assert ids(tokenizer, text) == [[1, *original.encode(text).ids]], text
