"""Small text encoders of ComfyUI's own classes, written as llama.cpp's converter writes them."""

from __future__ import annotations

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
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_vl
import comfy.text_encoders.t5
import gguf
import numpy as np
import torch
from gguf_samples import encode

LLAMA = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
T5 = {"num_layers": 4, "d_model": 256, "d_ff": 512, "d_kv": 64, "num_heads": 4}
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


def detect_small(state: Mapping[str, torch.Tensor]) -> Any:
    """The host knows T5 XXL by layers and widths that a small UMT5 does not have."""
    is_umt5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in state
    return comfy.sd.TEModel.T5_XXL if is_umt5 else detect_te_model(state)


@contextmanager
def small(**sizes: int) -> Iterator[None]:
    """Within this, the host's text encoders are a few million weights large; their code is the host's own.

    Args:
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
        init_clip(self, config | {"num_hidden_layers": 2}, *args, **kwargs)

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


def clip_l_weights(seed: int = 5) -> dict[str, torch.Tensor]:
    """Without the projection, as the file that comes with Flux."""
    config = json.loads((Path(comfy.sd1_clip.__file__).parent / "sd1_clip_config.json").read_text())
    rng = np.random.default_rng(seed)
    shapes = shapes_of(partial(comfy.clip_model.CLIPTextModel, config))
    return {k: torch.from_numpy(_weight(k, shape, rng)) for k, shape in shapes.items() if "text_projection" not in k}


def write(
    path: Path, arch: gguf.MODEL_ARCH, shapes: Mapping[str, tuple[int, ...]], type_name: str = "Q8_0",
    metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None, seed: int = 0,
) -> Encoder:  # fmt: skip
    """Write seeded weights under gguf-py's names for them, in llama.cpp's layout."""
    names = gguf.get_tensor_name_map(arch, 32)
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch] if arch != gguf.MODEL_ARCH.MMPROJ else "clip")
    encoder, rng = Encoder(path), np.random.default_rng(seed)
    llama = arch == gguf.MODEL_ARCH.LLAMA
    for name, shape in shapes.items():
        weight = _weight(name, shape, rng)
        for part, array, rows in _stored(name, weight, names):
            if llama and (heads := _heads(name)):
                # from transformers' order of a head's rows to that of Meta's own files, as `LlamaModel.permute` does
                array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            shift = 1 if "GEMMA" in arch.name and name.endswith("norm.weight") else 0
            quantized = array.ndim == 2 and array.size > 16384
            qtype = gguf.GGMLQuantizationType[type_name if quantized else "F32"]
            # a vocabulary repeats some rows, which is quick
            order = np.arange(len(array)) if len(array) <= FEW else rng.integers(0, FEW, len(array))
            data = encode(np.ascontiguousarray(array[:FEW] + shift), qtype)
            writer.add_tensor(part, data[order], raw_dtype=qtype)
            read = gguf.dequantize(data, qtype).reshape(array[:FEW].shape)[order] - shift
            if llama and heads:
                read = read.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            weight[rows] = read
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


def _stored(name: str, weight: np.ndarray, names: gguf.TensorNameMap) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Name in the file, array, and where it belongs in `weight`; the projector's parts are stored one by one."""
    if name == "visual.patch_embed.proj.weight":
        for frame in range(2):
            yield "v.patch_embd.weight" + ".1" * frame, weight[:, :, frame], (slice(None), slice(None), frame)
        return
    if ".attn.qkv." in name:
        third = weight.shape[0] // 3
        for i, part in enumerate("qkv"):
            rows = slice(i * third, (i + 1) * third)
            yield re.sub(r".*blocks\.(\d+)\.attn\.qkv", rf"v.blk.\1.attn_{part}", name), weight[rows], rows
        return
    stored = names.get_name(name, (".weight", ".bias"))
    assert stored is not None, f"llama.cpp has no name for {name}"
    yield stored, weight, ...


def dense_clip(states: list[dict[str, torch.Tensor]], kind: str) -> Any:
    """ComfyUI's own text encoders on the same weights, computing in fp32."""
    return comfy.sd.load_text_encoder_state_dicts(
        [dict(state) for state in states],
        clip_type=getattr(comfy.sd.CLIPType, kind.upper()),
        model_options={"dtype": torch.float32},
    )
