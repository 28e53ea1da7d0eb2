"""Every text encoder of comfy.text_encoders.llama and .t5 that llama.cpp converts, small, against the host's own.

As narrow as they may be and as deep as the layers lie that a model reads; what tells the host which one it is, are the
widths and layers of the large one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.text_encoders.llama
import comfy.text_encoders.t5
import gguf
import pytest
import text_encoders
import tokenizer_samples as samples
import torch
from gguf import MODEL_ARCH
from safetensors.torch import save_file
from text_encoders import (
    Encoder,
    clip_l_weights,
    dense_clip,
    encoded,
    furthest,
    heads,
    known_as_large,
    llama_shapes,
    lora_error,
    read_tokenizer_by_file,
    small,
    t5_shapes,
    write,
)

WORDS = 'a red fox in the snow, with a sign "oil on canvas"'
"""In quotes what the letters of a sign are read by; no weights, of which ComfyUI 0.3.64 makes NaN for Omnigen 2."""

NARROW = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
KLEIN, IDEOGRAM = {"num_hidden_layers": 28}, {"num_hidden_layers": 36}
"""How deep the layers lie that these read."""

SEES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 128}
"""Qwen2.5-VL's positions have three parts of a head, which is 128 wide."""


@dataclass(frozen=True)
class Family:
    """A class of the host's, and how its files come.

    Attributes:
        cls: of comfy.text_encoders.llama.
        arch: by which gguf-py names its tensors.
        known_as: the host's name for it.
        types: what it is used for; after a plus, what else that type reads with.
        tokenizer: of those that are in the file; of others the host has a copy.
    """

    cls: str
    arch: MODEL_ARCH
    known_as: str
    types: tuple[str, ...]
    tokenizer: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)


FAMILIES = {
    "Qwen3 0.6B": Family("Qwen3_06B", MODEL_ARCH.QWEN3, "QWEN3_06B", ("stable_diffusion",)),
    "Qwen3 1.7B": Family("Ovis25_2B", MODEL_ARCH.QWEN3, "QWEN3_2B", ("ovis",)),
    "Qwen3 4B": Family("Qwen3_4B", MODEL_ARCH.QWEN3, "QWEN3_4B", ("lumina2", "flux2"), sizes=KLEIN),
    "Qwen3 8B": Family("Qwen3_8B", MODEL_ARCH.QWEN3, "QWEN3_8B", ("flux2", "ideogram4"), sizes=IDEOGRAM),
    "Qwen2.5-VL 3B": Family("Qwen25_3B", MODEL_ARCH.QWEN2VL, "QWEN25_3B", ("omnigen2",)),
    "Qwen2.5-VL 7B": Family(
        "Qwen25_7BVLI", MODEL_ARCH.QWEN2VL, "QWEN25_7B",
        ("hunyuan_image", "longcat_image", "hunyuan_video_15+byt5", "kandinsky5+clip_l"), sizes=SEES,
    ),
    "Llama 3": Family(
        "Llama2", MODEL_ARCH.LLAMA, "LLAMA3_8", ("hunyuan_video+clip_l",), sizes={"num_hidden_layers": 4}
    ),
    "Mistral Small 3": Family(
        "Mistral3Small24B", MODEL_ARCH.LLAMA, "MISTRAL3_24B", ("flux2",), "tekken", {"num_hidden_layers": 31}
    ),
    "Ministral 3": Family("Ministral3_3B", MODEL_ARCH.MISTRAL3, "MINISTRAL_3_3B", ("stable_diffusion",), "tekken"),
    "Gemma 2 2B": Family("Gemma2_2B", MODEL_ARCH.GEMMA2, "GEMMA_2_2B", ("pixeldit",), "gemma"),
    "Gemma 3 4B": Family("Gemma3_4B", MODEL_ARCH.GEMMA3, "GEMMA_3_4B", ("lumina2",), "gemma"),
    "Gemma 3 12B": Family("Gemma3_12B", MODEL_ARCH.GEMMA3, "GEMMA_3_12B", ("ltxv",), "gemma"),
}  # fmt: skip
USES = [(name, use) for name, family in FAMILIES.items() for use in family.types]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def written(folder, pack) -> Callable[[str], tuple[Encoder, dict]]:
    """A family's file and its weights, tokenizer included, and the sizes that it is as small as."""
    made: dict[str, tuple[Encoder, dict]] = {}

    def family(name: str) -> tuple[Encoder, dict]:
        if name not in made:
            made[name] = _write(FAMILIES[name], folder / f"{name}.gguf", pack)
        return made[name]

    return family


def _write(family: Family, path: Path, pack: Any) -> tuple[Encoder, dict]:
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None  # noqa: E731
    tokenizer, sizes = {}, NARROW | dict(family.sizes)
    if family.tokenizer == "gemma":
        original = samples.train_gemma()
        sizes["vocab_size"] = samples.processor(original).vocab_size()
        tokenizer = {"spiece_model": samples.stored(original)}
        add = partial(samples.add_gemma, model=original, vocab_size=sizes["vocab_size"])
    elif family.tokenizer == "tekken":
        tekken = samples.train_tekken(samples.DEFAULT_PATTERN)
        sizes["vocab_size"] = tekken.get_vocab_size()
        add = partial(samples.add_tekken, tokenizer=tekken)

    def metadata(writer: gguf.GGUFWriter) -> None:
        heads(gguf.MODEL_ARCH_NAMES[family.arch], **sizes)(writer)
        add(writer)

    with small(**sizes):
        shapes = {name: shape for name, shape in llama_shapes(family.cls).items() if name.startswith("model.")}
        if family.cls == "Qwen3_8B":  # the one with a head of its own
            shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        file = write(path, family.arch, shapes, "Q8_0", metadata, below=2048)
    if family.tokenizer == "tekken":
        rebuilt = pack("ops.files.tokenizers").tekken_model(pack("ops.files.gguf").open_gguf(path))
        tokenizer = {"tekken_model": samples.stored(rebuilt)}
    file.dense |= tokenizer
    return file, sizes


@pytest.fixture(scope="module")
def beside(folder) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """What some types read with besides, as safetensors."""
    with small():
        drawn = {"clip_l": clip_l_weights()}
        g = torch.Generator().manual_seed(8)
        shapes = t5_shapes("byt5_config_small_glyph.json")
        drawn["byt5"] = {name: torch.randn(shape, generator=g) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    for name, state in drawn.items():
        save_file(state, folder / f"{name}.safetensors")
    return {name: (folder / f"{name}.safetensors", state) for name, state in drawn.items()}


@pytest.mark.parametrize(("name", "use"), USES, ids=[f"{name}-{use}" for name, use in USES])
def test_it_encodes_as_the_hosts_own(name, use, pack, written, beside, monkeypatch, tmp_path):
    family, (kind, _, other) = FAMILIES[name], use.partition("+")
    load, types = (getattr(pack("nodes.text_encoder"), it) for it in ("load_text_encoders", "types"))
    if not (hasattr(comfy.text_encoders.llama, family.cls) and kind in types()):
        pytest.skip("this ComfyUI does not have it")
    if family.tokenizer == "tekken":
        read_tokenizer_by_file(monkeypatch, tmp_path / "tekken.json")
    file, sizes = written(name)
    paths, states = [str(file.path)], [file.dense]
    if other:
        paths.append(str(beside[other][0]))
        states.append(beside[other][1])
    with small(**sizes), known_as_large(partial(getattr(comfy.text_encoders.llama, family.cls), {})) as taken_for:
        got, want = load(paths, kind), dense_clip(states, kind)
    assert set(taken_for) <= {comfy.sd.TEModel[family.known_as]} and (taken_for or other)
    assert type(got.cond_stage_model).__name__ == type(want.cond_stage_model).__name__
    assert furthest(encoded(got, WORDS), encoded(want, WORDS)) < 1e-5
    packed = {p: layer.fmt.name for p, layer in got.cond_stage_model.graft.layers.items() if ".model.layers." in p}
    assert set(packed.values()) == {"Q8_0"} and len(packed) == 7 * sizes.get("num_hidden_layers", 2)
    if use == family.types[0]:
        assert lora_error((got, want), lambda clip: encoded(clip, WORDS)["cond"]) < 1e-4


T5 = {
    "Cosmos": ("t5_old_config_xxl.json", "T5_XXL_OLD", "cosmos"),
    "Stable Audio": ("t5_config_base.json", "T5_BASE", "stable_audio"),
    "ACE-Step": ("umt5_config_base.json", "T5_BASE", "ace"),
    "AuraFlow": ("t5_pile_config_xl.json", "T5_XL", "stable_diffusion"),
}


@pytest.mark.parametrize("name", T5)
def test_other_t5(name, pack, folder, monkeypatch):
    """Without gates, without a table of distances in each block, or with a tokenizer in the file."""
    (config, known_as, kind), sizes, add, tokenizer = T5[name], {}, lambda writer: None, {}
    load = pack("nodes.text_encoder").load_text_encoders
    if name == "ACE-Step":
        original = samples.train_umt5(byte_fallback=True)
        sizes = {"vocab_size": samples.processor(original).vocab_size() + 28}
        add = partial(samples.add_t5, model=original, **sizes)
        tokenizer = {"spiece_model": samples.stored(original)}
    if name == "AuraFlow":  # a UMT5 that is known by its width
        for size, value in {"d_model": 2048, "d_ff": 64, "num_layers": 2}.items():
            monkeypatch.setitem(text_encoders.T5, size, value)
    values = json.loads((Path(comfy.text_encoders.t5.__file__).parent / config).read_text())
    with small(**sizes), known_as_large(partial(comfy.text_encoders.t5.T5, values)) as taken_for:
        file = write(folder / f"{name}.gguf", MODEL_ARCH.T5ENCODER, t5_shapes(config), "Q8_0", add, below=2048)
        got, want = load([str(file.path)], kind), dense_clip([file.dense | tokenizer], kind)
    assert set(taken_for) == {comfy.sd.TEModel[known_as]}
    assert furthest(encoded(got), encoded(want)) < 1e-5
    layers = got.cond_stage_model.graft.layers
    assert {layer.fmt.name for path, layer in layers.items() if ".block." in path and "_bias" not in path} == {"Q8_0"}
    assert lora_error((got, want)) < 1e-4


ODD = {
    "NVFP4 with scales": ("Qwen2.5-VL 3B", "NVFP4", {"scaled": True}),
    "pig": ("Qwen3 4B", "Q8_0", {"called": "pig"}),
    "pig with the names of transformers": ("Qwen3 4B", "Q8_0", {"called": "pig", "host_names": True}),
    "no architecture": ("Qwen2.5-VL 3B", "Q8_0", {"called": ""}),
    "pig's T5": ("T5", "Q8_0", {"called": "pig"}),
    "pig's T5 with the names of transformers": ("T5", "Q8_0", {"called": "pig", "host_names": True}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files(name, pack, tmp_path):
    """With scales in tensors beside the weights, and as some converters call an architecture."""
    (of, quant, form), load = ODD[name], pack("nodes.text_encoder").load_text_encoders
    if of == "T5":
        config = "t5_config_xxl.json"
        values = json.loads((Path(comfy.text_encoders.t5.__file__).parent / config).read_text())
        build, arch = partial(comfy.text_encoders.t5.T5, values), MODEL_ARCH.T5ENCODER
        kind, known_as = "mochi", "T5_XXL"
    else:
        family = FAMILIES[of]
        if not hasattr(comfy.text_encoders.llama, family.cls):
            pytest.skip("this ComfyUI does not have it")
        build, arch = partial(getattr(comfy.text_encoders.llama, family.cls), {}), family.arch
        kind, known_as = family.types[0], family.known_as
    with small(**NARROW), known_as_large(build) as taken_for:
        shapes = t5_shapes(config) if of == "T5" else llama_shapes(family.cls)
        file = write(tmp_path / "odd.gguf", arch, shapes, quant, below=2048, **form)
        got, want = load([str(file.path)], kind), dense_clip([file.dense], kind)
    assert set(taken_for) == {comfy.sd.TEModel[known_as]}
    assert furthest(encoded(got, WORDS), encoded(want, WORDS)) < 1e-5
    layers = got.cond_stage_model.graft.layers
    matrices = [path for path in layers if ".model.layers." in path or (".block." in path and "_bias" not in path)]
    assert {layers[path].fmt.name for path in matrices} == {quant}
    assert lora_error((got, want), lambda clip: encoded(clip, WORDS)["cond"]) < 1e-4
