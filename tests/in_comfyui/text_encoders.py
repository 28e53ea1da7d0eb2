"""Small text encoders of ComfyUI's own classes, written as llama.cpp's converter writes them."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_vl
import comfy.text_encoders.t5
import gguf
import numpy as np
import pytest
import torch
from generation import WITHOUT_DYNAMIC, distance
from gguf_samples import encode

LLAMA = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
T5 = {"num_layers": 4, "d_model": 256, "d_ff": 512, "d_kv": 64, "num_heads": 4}
CLIP_G = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
FEW = 2048  # rows of a weight that are really drawn and quantized
VISION = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "num_heads": 4}


ORIGINALS = {
    cls: cls.__init__
    for cls in (
        comfy.text_encoders.llama.Llama2_, comfy.text_encoders.t5.T5, comfy.clip_model.CLIPTextModel,
        comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer,
    )
}  # fmt: skip


detect_te_model = comfy.sd.detect_te_model
"""The host's own, whatever a test puts in its place."""


def detect_small(state: Mapping[str, torch.Tensor]) -> Any:
    """The host knows T5 XXL, UMT5 and others by layers and widths that small ones do not have."""
    known = {
        "encoder.block.1.layer.1.DenseReluDense.wi_1.weight": "T5_XXL", "model.layers.0.layer_scalar": "GEMMA_4_E4B",
        "model.visual.deepstack_merger_list.0.norm.weight": "QWEN3VL_4B",
    }  # fmt: skip
    found = next((name for key, name in known.items() if hasattr(comfy.sd.TEModel, name) and key in state), None)
    return detect_te_model(state) if found is None else comfy.sd.TEModel[found]


@contextmanager
def small(clip_layers: int = 2, clip_width: int = 0, **sizes: int) -> Iterator[None]:
    """Within this, the host's text encoders are a few million weights large; their code is the host's own.

    Args:
        clip_layers: of CLIP-L; CLIP-G is known by its 32, and is narrow instead.
        clip_width: of both, with as many layers; 0 for their own.
        sizes: of Llama and its like others than those above; the vocabulary's is that of T5, too.
    """
    init_llama, init_t5, init_clip, init_vision = ORIGINALS.values()
    vocabulary = {name: size for name, size in sizes.items() if name == "vocab_size"}

    def small_llama(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in (LLAMA | sizes).items():
            setattr(config, name, value)
        init_llama(self, config, *args, **kwargs)

    def small_t5(self: Any, config: dict, *args: Any, **kwargs: Any) -> None:
        init_t5(self, config | T5 | vocabulary, *args, **kwargs)

    def small_clip(self: Any, config: dict, *args: Any, **kwargs: Any) -> None:
        narrow = {"hidden_size": clip_width, "intermediate_size": 2 * clip_width, "num_attention_heads": 2}
        is_g = config["num_hidden_layers"] == 32 and not clip_width
        sizes = CLIP_G if is_g else {"num_hidden_layers": clip_layers} | (narrow if clip_width else {})
        init_clip(self, config | sizes, *args, **kwargs)

    def small_vision(self: Any, *args: Any, **kwargs: Any) -> None:
        init_vision(self, *args, **kwargs | VISION)

    detect = comfy.sd.detect_te_model
    before = [cls.__init__ for cls in ORIGINALS]
    for cls, init in zip(ORIGINALS, (small_llama, small_t5, small_clip, small_vision), strict=True):
        cls.__init__ = init
    comfy.sd.detect_te_model = detect_small
    try:
        yield
    finally:
        comfy.sd.detect_te_model = detect
        for cls, init in zip(ORIGINALS, before, strict=True):
            cls.__init__ = init


@contextmanager
def known_as_large(build: Callable[..., torch.nn.Module]) -> Iterator[list[Any]]:
    """Within this the host's own `detect_te_model` sees a small text encoder as deep and as wide as the large one.

    By these it tells kinds apart. The names are those that it was given, of all layers that the large one has.

    Args:
        build: makes the host's class, without `small`.

    Yields:
        what the host has taken the text encoders for.
    """
    with large():
        real, taken_for = shapes_of(build), []

    def detect(state: Mapping[str, torch.Tensor]) -> Any:
        names = {_of_any_layer(name) for name in state}
        wide = {
            name: torch.empty(shape, device="meta")
            for name, shape in real.items()
            if _of_any_layer(name) in names
        }
        of_large = {_of_any_layer(name) for name in real}
        others = {name: weight for name, weight in state.items() if _of_any_layer(name) not in of_large}
        taken_for.append(detect_te_model(wide | others))
        return taken_for[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.sd, "detect_te_model", detect)
        yield taken_for


def _of_any_layer(name: str) -> str:
    return re.sub(r"\.(layers|block)\.\d+\.", r".\1.N.", name)


@contextmanager
def large() -> Iterator[None]:
    """Within this, and within `small`, the host's text encoders are as large as they are."""
    before = [cls.__init__ for cls in ORIGINALS]
    for cls, init in ORIGINALS.items():
        cls.__init__ = init
    try:
        yield
    finally:
        for cls, init in zip(ORIGINALS, before, strict=True):
            cls.__init__ = init


def small_newer(patch: Any, rows: int = 2048) -> None:
    """Let the classes that only newer hosts have be small for as long as `patch`, pytest's, lasts.

    Krea 2's and gpt-oss's are read at other layers than the large ones.

    Args:
        rows: of Gemma's vocabulary.
    """
    from comfy.text_encoders import gemma4, gpt_oss, krea2, qwen3vl, qwen35

    patch.setattr(krea2, "KREA2_TAP_LAYERS", [1, 2])
    seeing = {"hidden_size": 64, "intermediate_size": 128, "depth": 3, "num_heads": 4, "num_position_embeddings": 64}
    patch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_4b", seeing | {"deepstack_visual_indexes": [0, 2]})
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 151936}
    sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32}
    sizes |= {"linear_value_head_dim": 64, "mrope_section": [3, 3, 2], "vision": seeing}
    patch.setitem(qwen35.QWEN35_MODELS, "qwen35_2b", sizes)
    gemma = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4}
    gemma |= {"head_dim": 64, "global_head_dim": 128, "hidden_size_per_layer_input": 64, "num_kv_shared_layers": 2}
    few = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "head_dim": 32}
    gemma |= {"vocab_size": rows, "vision_config": gemma4.GEMMA4_VISION_CONFIG | few | {"position_embedding_size": 64}}
    gemma |= {"audio_config": gemma4.GEMMA4_AUDIO_CONFIG | few | {"output_proj_dims": 64}}
    init_model = gemma4.Gemma4Base._init_model

    def small_gemma(self: Any, config: Any, *args: Any) -> None:
        for name, value in gemma.items():
            setattr(config, name, value)
        init_model(self, config, *args)

    patch.setattr(gemma4.Gemma4Base, "_init_model", small_gemma)
    experts = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 201088}
    patch.setattr(gpt_oss, "GptOss20BConfig", partial(gpt_oss.GptOss20BConfig, **experts))
    patch.setattr(gpt_oss, "LENS_SELECTED_LAYERS", (0, 1))


@dataclass
class Encoder:
    """A text encoder in both forms.

    Attributes:
        path: the GGUF file.
        dense: the same weights under the host's names, fp32.
    """

    path: Path
    dense: dict[str, torch.Tensor] = field(default_factory=dict)


def shapes_of(build: Callable[..., torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    model = build(dtype=torch.float32, device="meta", operations=comfy.ops.disable_weight_init)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def llama_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Of a class of comfy.text_encoders.llama, without a head that no text encoder is asked for."""
    shapes = shapes_of(partial(getattr(comfy.text_encoders.llama, name), {}))
    return {key: shape for key, shape in shapes.items() if "lm_head" not in key}


def t5_shapes(config: str) -> dict[str, tuple[int, ...]]:
    folder = Path(comfy.text_encoders.t5.__file__).parent
    return shapes_of(partial(comfy.text_encoders.t5.T5, json.loads((folder / config).read_text())))


def clip_weights(config: str, seed: int) -> dict[str, torch.Tensor]:
    """A CLIP of which the host has this file."""
    sizes = json.loads((Path(comfy.sd1_clip.__file__).parent / config).read_text())
    rng = np.random.default_rng(seed)
    shapes = shapes_of(partial(comfy.clip_model.CLIPTextModel, sizes))
    return {name: torch.from_numpy(_weight(name, shape, rng)) for name, shape in shapes.items()}


def clip_l_weights(seed: int = 5) -> dict[str, torch.Tensor]:
    """Without the projection, as the file that comes with Flux."""
    weights = clip_weights("sd1_clip_config.json", seed)
    return {name: weight for name, weight in weights.items() if "text_projection" not in name}


def write(
    path: Path, arch: gguf.MODEL_ARCH, shapes: Mapping[str, tuple[int, ...]], type_name: str = "Q8_0",
    metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None, seed: int = 0, called: str | None = None,
    host_names: bool = False, scaled: bool = False, below: int = 1 << 14,
) -> Encoder:  # fmt: skip
    """Write seeded weights under gguf-py's names for them, in llama.cpp's layout.

    Args:
        called: what the file calls its architecture, if not as llama.cpp does.
        host_names: the names of transformers, for what is laid out as there.
        below: so many numbers and fewer of a weight are not quantized.
        scaled: weights have scales in tensors beside them, as llama.cpp has NVFP4's.
    """
    names = gguf.get_tensor_name_map(arch, 48)
    usual = gguf.MODEL_ARCH_NAMES[arch] if arch != gguf.MODEL_ARCH.MMPROJ else "clip"
    writer = gguf.GGUFWriter(str(path), usual if called is None else called)
    encoder, rng = Encoder(path), np.random.default_rng(seed)
    apart = any("merger.mlp" in name for name in shapes)  # queries, keys and values: of Qwen2-VL's projector
    interleaved = arch in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.MISTRAL3)
    for name, shape in shapes.items():
        weight = _weight(name, shape, rng)
        if arch == gguf.MODEL_ARCH.GEMMA4 and name.endswith("q_norm.weight"):
            weight /= math.sqrt(shape[0])  # its attention scales nothing, and a saturated one enlarges rounding
        for part, rows in [(name, ...)] if host_names else _parts(name, weight, names, apart):
            array = weight[rows]
            if interleaved and (heads := _heads(name)):
                # from transformers' order of a head's rows to that of Meta's own files, as `LlamaModel.permute` does
                array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            shift = 1 if arch in _SHIFTED and name.endswith("norm.weight") and "linear_attn" not in name else 0
            if name.endswith("A_log"):
                array = -np.exp(array)
            quantized = (array.ndim == 2 or "experts" in name) and array.size > below and array.shape[-1] % 32 == 0
            qtype = gguf.GGMLQuantizationType[type_name if quantized else "F32"]
            # a vocabulary repeats some rows, which is quick
            order = np.arange(len(array)) if len(array) <= FEW else rng.integers(0, FEW, len(array))
            scale = np.float32(1 + len(encoder.dense) % 3 if scaled and quantized else 1)
            data = encode(np.ascontiguousarray(array[:FEW] / scale + shift), qtype)
            writer.add_tensor(part, data[order], raw_dtype=qtype)
            if scaled and quantized:
                writer.add_tensor(f"{part.removesuffix('.weight')}.scale", np.array([scale]))
            read = scale * gguf.dequantize(data, qtype).reshape(array[:FEW].shape)[order] - shift
            if interleaved and heads:
                read = read.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            weight[rows] = np.log(-read) if name.endswith("A_log") else read
        encoder.dense[name] = torch.from_numpy(weight)
    metadata(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return encoder


def _weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = np.zeros(shape, dtype=np.float32)
    values[:FEW] = rng.standard_normal((min(FEW, shape[0]), *shape[1:]), dtype=np.float32)
    if name.endswith("norm.weight") or "norm" in name.rsplit(".", 2)[-2]:
        return 1 + values / 8
    if ".SelfAttention.q." in name:
        values /= math.sqrt(T5["d_kv"])  # T5's queries come divided by it
    return values / math.sqrt(math.prod(shape[1:]) or 1)


def _heads(name: str) -> int:
    return {"q_proj": LLAMA["num_attention_heads"], "k_proj": LLAMA["num_key_value_heads"]}.get(name.split(".")[-2], 0)


_SHIFTED = (gguf.MODEL_ARCH.GEMMA2, gguf.MODEL_ARCH.GEMMA3, gguf.MODEL_ARCH.QWEN35)
_MERGERS = {"merger.norm": "v.post_ln", "merger.linear_fc1": "mm.0", "merger.linear_fc2": "mm.2"}


def _parts(name: str, weight: np.ndarray, names: gguf.TensorNameMap, apart: bool) -> Iterator[tuple[str, Any]]:
    """Name in the file, and what of `weight` it holds; what is one layer in the model may lie in parts."""
    rows: Any = ...
    if name == "visual.patch_embed.proj.weight":
        for frame in range(2):
            yield "v.patch_embd.weight" + ".1" * frame, (slice(None), slice(None), frame)
        return
    if ".attn.qkv." in name and apart:
        third = weight.shape[0] // 3
        for i, part in enumerate("qkv"):
            yield (
                re.sub(r".*blocks\.(\d+)\.attn\.qkv", rf"v.blk.\1.attn_{part}", name),
                slice(i * third, (i + 1) * third),
            )
        return
    if ".gate_up_proj." in name:
        for i, part in enumerate(("gate", "up")):
            yield names.get_name(name.replace("gate_up", part), (".weight", ".bias")), (slice(None), slice(i, None, 2))
        return
    deepstack = re.match(r"visual\.deepstack_merger_list\.(\d)\.(?:linear_)?(.+)", name)
    if deepstack:
        yield f"v.deepstack.{(0, 2)[int(deepstack[1])]}.{deepstack[2]}", rows
        return
    if ".linear_attn." in name:
        rows, name = _sorted_heads(name, weight), name.replace("dt_bias", "dt_proj.bias")
    merger = next((stored for part, stored in _MERGERS.items() if name.startswith(f"visual.{part}.")), None)
    plain = name.endswith((".sinks", ".layer_scalar"))
    name = f"{name}.weight" if plain else name
    stored = f"{merger}.{name.rpartition('.')[2]}" if merger else names.get_name(name, (".weight", ".bias"))
    assert stored is not None, f"llama.cpp has no name for {name}"
    yield stored, rows


def _sorted_heads(name: str, weight: np.ndarray) -> Any:
    """llama.cpp has the value heads of Qwen3.5 by turns of their key heads, of which there are two here."""
    keys, heads, width = 2, 4, 64
    order = np.arange(heads).reshape(keys, -1).T.flatten()
    wide = (order[:, None] * width + np.arange(width)).flatten()
    before = weight.shape[0] - heads * width
    if "out_proj" in name:
        return slice(None), wide
    if "in_proj_qkv" in name or "conv1d" in name:
        rows = np.concatenate([np.arange(before), before + wide])
        return (rows, 0) if "conv1d" in name else rows
    if name.endswith(("linear_attn.norm.weight",)):
        return ...
    return wide if "in_proj_z" in name else order


def dense_clip(states: list[dict[str, torch.Tensor]], kind: str) -> Any:
    """ComfyUI's own text encoders on the same weights, computing in fp32."""
    return comfy.sd.load_text_encoder_state_dicts(
        [dict(state) for state in states],
        clip_type=getattr(comfy.sd.CLIPType, kind.upper()),
        model_options={"dtype": torch.float32},
        **WITHOUT_DYNAMIC,
    )


def heads(arch: str, **sizes: int):
    def add(writer: gguf.GGUFWriter) -> None:
        known = LLAMA | sizes
        writer.add_uint32(f"{arch}.attention.head_count", known["num_attention_heads"])
        writer.add_uint32(f"{arch}.attention.head_count_kv", known["num_key_value_heads"])
        writer.add_uint32(f"{arch}.embedding_length", known["hidden_size"])

    return add


def with_vocabulary(shapes: dict[str, tuple], key: str, rows: int) -> dict[str, tuple]:
    """As many rows as the tokenizer has tokens, which are other than the host declares."""
    return shapes | {key: (rows, shapes[key][1])}


def read_tokenizer_by_file(monkeypatch: Any, path: Path) -> None:
    """Hosts hand Mistral's vocabulary to transformers, of which newer ones want the name of a file."""
    mistral = pytest.importorskip("transformers.integrations.mistral", reason="this transformers has no Mistral 3")

    def converted(data: torch.Tensor) -> dict:
        path.write_bytes(data.numpy().tobytes())
        return {"tokenizer_object": mistral.MistralConverter(vocab_file=str(path)).converted(), "legacy": False}

    if "vocab" not in inspect.signature(mistral.MistralConverter).parameters:
        monkeypatch.setattr("comfy.text_encoders.flux.load_mistral_tokenizer", converted)


WORDS = "a (red:1.3) fox in the snow, oil on canvas"


def encoded(clip: Any, text: str = WORDS, **tokenizer: Any) -> dict:
    return clip.encode_from_tokens(clip.tokenize(text, **tokenizer), return_dict=True)


def furthest(got: dict, want: dict) -> float:
    """The largest distance of all that was encoded; what is zero for the host (a pooled output) has to be zero."""
    assert got.keys() == want.keys() and "cond" in got
    tensors = {key: value for key, value in want.items() if torch.is_tensor(value)}
    return max(distance(got[key], value) if value.any() else float(got[key].any()) for key, value in tensors.items())


def lora_error(clips: tuple[Any, Any], encode: Any = lambda clip: encoded(clip)["cond"]) -> float:
    """How far the effect of a LoRA on all matrices of a Graft CLIP is from what the host's merge has on its own."""
    g, state, found = torch.Generator().manual_seed(11), {}, []
    weights = clips[1].cond_stage_model.state_dict()
    names = comfy.lora.model_lora_keys_clip(clips[1].cond_stage_model, {})
    for name, key in names.items():
        sees = any(part in key for part in ("visual.", "vision_model.", "multi_modal_projector."))
        if name.startswith("text_encoders.") and weights[key].dim() == 2 and not sees:
            rows, columns = weights[key].shape
            state[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=g) / columns**0.5
            state[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=g) / 8
    assert len(state) > 20
    with torch.no_grad():
        for clip in clips:
            branch = comfy.sd.load_lora_for_models(None, clip, state, 0, 0.7)[1]
            comfy.model_management.load_models_gpu([branch.patcher])
            changed = encode(branch)
            comfy.model_management.load_models_gpu([clip.patcher])
            found.append((changed, encode(clip)))
    (got, base), (want, plain) = found
    assert distance(want, plain) > 0.01, "the LoRA does nothing"
    return distance(got - base, want - plain)
