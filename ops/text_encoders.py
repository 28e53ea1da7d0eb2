"""Text encoders in GGUF, with the names and layouts that hosts load.

llama.cpp's converter (convert_hf_to_gguf.py) renames tensors (gguf-py's tensor_mapping.py), interleaves the halves of
each head of Llama's queries and keys for its rotary embedding, adds 1 to Gemma's norm scales, and puts the part that
sees pictures into a file of its own, the projector (mmproj). All of that is undone here; packed weights stay packed.
Files with the names of transformers, as other converters write them, are taken as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..kernels.errors import CorruptFile, GraftError, UnsupportedFormat
from .gguf_file import PROJECTOR, TEXT_ENCODER, GGUFFile, open_gguf, other_kind
from .layers import format_of
from .packed import as_weight
from .tokenizers import sentencepiece_model, tekken_model

_T5 = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "enc.blk.N.attn_norm": "encoder.block.N.layer.0.layer_norm",
    "enc.blk.N.attn_q": "encoder.block.N.layer.0.SelfAttention.q",
    "enc.blk.N.attn_k": "encoder.block.N.layer.0.SelfAttention.k",
    "enc.blk.N.attn_v": "encoder.block.N.layer.0.SelfAttention.v",
    "enc.blk.N.attn_o": "encoder.block.N.layer.0.SelfAttention.o",
    "enc.blk.N.attn_rel_b": "encoder.block.N.layer.0.SelfAttention.relative_attention_bias",
    "enc.blk.N.ffn_norm": "encoder.block.N.layer.1.layer_norm",
    "enc.blk.N.ffn_gate": "encoder.block.N.layer.1.DenseReluDense.wi_0",
    "enc.blk.N.ffn_up": "encoder.block.N.layer.1.DenseReluDense.wi_1",
    "enc.blk.N.ffn_down": "encoder.block.N.layer.1.DenseReluDense.wo",
}
# the first T5 has no gate
_T5_UNGATED = _T5 | {"enc.blk.N.ffn_up": "encoder.block.N.layer.1.DenseReluDense.wi"}

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_q_norm": "model.layers.N.self_attn.q_norm",
    "blk.N.attn_k_norm": "model.layers.N.self_attn.k_norm",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}
_GEMMA = _LLAMA | {
    "blk.N.post_attention_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_norm": "model.layers.N.pre_feedforward_layernorm",
    "blk.N.post_ffw_norm": "model.layers.N.post_feedforward_layernorm",
}
_NAMES: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("t5", "t5encoder"), _T5),
    **dict.fromkeys(("llama", "mistral3", "qwen2", "qwen2vl", "qwen3", "qwen3vl"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), _GEMMA),
}
_VISION = {
    "mm.0": "visual.merger.mlp.0",
    "mm.2": "visual.merger.mlp.2",
    "v.patch_embd": "visual.patch_embed.proj",
    "v.post_ln": "visual.merger.ln_q",
    "v.blk.N.ln1": "visual.blocks.N.norm1",
    "v.blk.N.ln2": "visual.blocks.N.norm2",
    "v.blk.N.attn_qkv": "visual.blocks.N.attn.qkv",
    "v.blk.N.attn_out": "visual.blocks.N.attn.proj",
    "v.blk.N.ffn_gate": "visual.blocks.N.mlp.gate_proj",
    "v.blk.N.ffn_up": "visual.blocks.N.mlp.up_proj",
    "v.blk.N.ffn_down": "visual.blocks.N.mlp.down_proj",
}
"""Qwen2.5-VL's, the one projector that belongs to a text encoder of a picture model."""

_DROPPED = ("dec.", "rope_freqs.")
"""What text encoders do not have: T5's decoder, and factors that llama.cpp keeps for its rotary embedding."""

_UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
"""Other T5 have distances in their first block alone."""

_PILE_T5_WIDTH = 2048
"""AuraFlow's, which is a UMT5, too; hosts have a copy of its tokenizer."""

_TEKKEN_ROWS = 131072
"""Of Mistral's vocabulary, in all models with this tokenizer."""

_QUANT_SUFFIX = re.compile(r"[-_.]?(ud[-_])?(i?q\d\w*|tq\d\w*|b?f16|f32|mxfp4\w*)$", re.IGNORECASE)


def text_encoder_tensors(file: GGUFFile, projector: GGUFFile | None = None) -> dict[str, torch.Tensor]:
    """A text encoder's state dict under the names of transformers, as hosts load it.

    Where a host wants a tokenizer in the file (UMT5, Gemma, Mistral), it is rebuilt from the metadata, as uint8 bytes
    under ``spiece_model`` or ``tekken_model``.

    Args:
        file: the text encoder.
        projector: the part that sees pictures, where there is one (`projector_beside`).

    Raises:
        UnsupportedFormat: it is no text encoder, or one that no host has.
        CorruptFile: its tokenizer is damaged.
    """
    check_text_encoder(file)
    if not _has_llama_cpp_names(file):
        state = {name: as_weight(tensor) for name, tensor in file.tensors.items()}
        return state | _tokenizer(file, state)
    architecture = file.architecture or ""
    if architecture not in _NAMES:
        known = ", ".join(_NAMES)
        raise UnsupportedFormat(
            f"text encoders of the architecture {architecture or 'nothing'} cannot be read, only {known}: "
            f"get this one as safetensors ({file.path})"
        )
    names = _NAMES[architecture]
    if names is _T5 and "enc.blk.0.ffn_gate.weight" not in file.tensors:
        names = _T5_UNGATED
    state = _renamed(file, names)
    if architecture in ("llama", "mistral3"):
        _join_halves(state, file, architecture)
    if names is _GEMMA:
        _shift_norms(state)
    state |= _tokenizer(file, state)
    return state if projector is None else state | _vision_tensors(projector)


def check_text_encoder(file: GGUFFile) -> None:
    """Refuse what is something else, with what to do about it.

    Raises:
        UnsupportedFormat: it is no text encoder.
    """
    kind = other_kind(file)
    if kind is TEXT_ENCODER:
        return
    if kind is PROJECTOR:
        remedy = "choose its text encoder, the projector is found beside it"
    else:
        remedy = "use a loader for it" if kind is not None else "use a loader for diffusion models"
    subject = file.architecture or "this" if kind is None else kind.subject(file)
    what = "" if kind is None else f"{kind.what}, "
    raise UnsupportedFormat(f"{subject} is {what}not a text encoder: {remedy} ({file.path})")


def _has_llama_cpp_names(file: GGUFFile) -> bool:
    return "token_embd.weight" in file.tensors or any(name.startswith(("blk.", "enc.blk.")) for name in file.tensors)


def _renamed(file: GGUFFile, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in file.tensors.items():
        if not name.startswith(_DROPPED):
            state[_rename(name, names)] = as_weight(tensor)
    return state


def _rename(name: str, names: Mapping[str, str]) -> str:
    """``blk.7.attn_q.weight`` -> ``model.layers.7.self_attn.q_proj.weight``; a name that is not listed stays."""
    module, dot, parameter = name.rpartition(".")
    block = re.search(r"\.(\d+)\.", module)
    if block is None:
        return names.get(module, module) + dot + parameter
    template = module[: block.start(1)] + "N" + module[block.end(1) :]
    if template not in names:
        return name
    return names[template].replace(".N.", f".{block[1]}.") + dot + parameter


def _join_halves(state: dict[str, torch.Tensor], file: GGUFFile, architecture: str) -> None:
    """Put the rows of each head of queries and keys, ``[d/2, 2]`` in llama.cpp, into transformers' ``[2, d/2]``."""
    heads = _count(file, f"{architecture}.attention.head_count")
    kv_heads = _count(file, f"{architecture}.attention.head_count_kv", heads)
    for name, weight in state.items():
        count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        if count is None:
            continue
        rows = weight.shape[0]
        if rows % (2 * count):
            raise UnsupportedFormat(f"{name} has {rows} rows, which {count} heads do not divide ({file.path})")
        order = torch.arange(rows).view(count, -1, 2).transpose(1, 2).flatten()
        state[name] = weight.index_select(0, order)


def _count(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(key, default)
    if not isinstance(value, int) or value < 1:
        what = f"{key} is {value!r}, where a number of heads is needed"
        raise UnsupportedFormat(f"{what}: get the model from another source ({file.path})")
    return value


def _shift_norms(state: dict[str, torch.Tensor]) -> None:
    """Gemma multiplies by 1 + w; llama.cpp's files hold that sum."""
    for name, weight in state.items():
        if name.endswith("norm.weight"):
            state[name] = weight.to(torch.float32) - 1


def _tokenizer(file: GGUFFile, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tokenizers that hosts have no copy of, unless one is in the file: UMT5's, Gemma's and Mistral's.

    They are known by their weights, since files with the names of transformers may call their architecture anything.
    """
    if "spiece_model" in state or "tekken_model" in state:
        return {}
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    is_umt5 = _UMT5 in shapes and shapes.get("shared.weight", ())[1:] != (_PILE_T5_WIDTH,)
    if is_umt5 or "model.layers.0.post_feedforward_layernorm.weight" in shapes:
        return {"spiece_model": _as_bytes(sentencepiece_model(file))}
    splits = file.metadata.get("tokenizer.ggml.pre")
    if splits == "tekken":
        return {"tekken_model": _as_bytes(tekken_model(file))}
    if shapes.get("model.embed_tokens.weight", ())[:1] == (_TEKKEN_ROWS,):
        raise UnsupportedFormat(
            f"Mistral's tokenizer cannot be rebuilt, since the file splits words like {splits or 'nothing'} and not "
            f"like tekken: get this text encoder from another source ({file.path})"
        )
    return {}


def _as_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def projector_files(path: str | os.PathLike[str]) -> list[Path]:
    """What may be the projector of a text encoder: GGUF files of its folder with ``mmproj`` in their names."""
    files = Path(path).parent.glob("*.[gG][gG][uU][fF]")
    return sorted(file for file in files if "mmproj" in file.name.lower())


def projector_beside(file: GGUFFile, unreadable: list[GraftError] | None = None) -> GGUFFile | None:
    """The projector of a text encoder that can see, from its folder.

    Among those whose outputs are as wide as the text encoder the one is taken that is called like it, else the first.

    Args:
        unreadable: where none is found, takes what is wrong with files that may be the one.
    """
    if file.architecture != "qwen2vl":
        return None
    width = file.metadata.get("qwen2vl.embedding_length")
    fitting, errors = [], []
    for path in projector_files(file.path):
        try:
            candidate = open_gguf(path)
        except GraftError as error:
            errors.append(error)
            continue
        if candidate.metadata.get("clip.vision.projection_dim") == width:
            fitting.append(candidate)
    if unreadable is not None and not fitting:
        unreadable += errors
    own = _QUANT_SUFFIX.sub("", file.path.stem.lower())
    return min(fitting, key=lambda candidate: own not in candidate.path.name.lower(), default=None)


def _vision_tensors(projector: GGUFFile) -> dict[str, torch.Tensor]:
    state = _renamed(projector, _VISION)

    def taken(*names: str) -> list[torch.Tensor]:
        missing = [name for name in names if name not in state]
        if missing:
            raise CorruptFile(f"{', '.join(missing)} is missing: get the projector again ({projector.path})")
        return [state.pop(name) for name in names]

    # queries, keys and values are one layer in the model
    for name in [name for name in state if ".attn_q." in name]:
        parts = taken(*(name.replace(".attn_q.", f".attn_{part}.") for part in "qkv"))
        if len({format_of(part) for part in parts}) > 1:
            parts = [part.float() for part in parts]
        state[_rename(name.replace(".attn_q.", ".attn_qkv."), _VISION)] = torch.cat(parts)
    # and the two frames that a patch spans one convolution
    if "v.patch_embd.weight.1" in state:
        frames = taken("visual.patch_embed.proj.weight", "v.patch_embd.weight.1")
        state["visual.patch_embed.proj.weight"] = torch.stack([frame.float() for frame in frames], dim=2)
    return state
