"""Text encoders in GGUF, with the names and layouts that hosts load.

llama.cpp's converter (convert_hf_to_gguf.py, now in conversion/) renames tensors (gguf-py's tensor_mapping.py),
interleaves the halves of each head of Llama's queries and keys for its rotary embedding, adds 1 to the norm scales of
Gemma 2 and 3 and of Qwen3.5, whose linear attention it also sorts, takes gpt-oss's experts apart, and puts the part
that sees pictures into a file of its own (`projectors.py`). All of that is undone here; packed weights stay packed.
Files with the names of transformers, as other converters write them, are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ...kernels.errors import CorruptFile, UnsupportedFormat
from ..layers import format_of
from ..packed import PackedTensor
from .contents import PROJECTOR, TEXT_ENCODER, other_kind
from .gguf import GGUFFile
from .projectors import vision_tensors
from .renaming import renamed
from .scales import weights_of
from .tokenizers import byte_level_tokenizer, gemma4_tokenizer, sentencepiece_model, tekken_model

State = dict[str, torch.Tensor]

T5 = {
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
T5_UNGATED = T5 | {"enc.blk.N.ffn_up": "encoder.block.N.layer.1.DenseReluDense.wi"}

LLAMA = {
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
_GEMMA = LLAMA | {
    "blk.N.post_attention_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_norm": "model.layers.N.pre_feedforward_layernorm",
    "blk.N.post_ffw_norm": "model.layers.N.post_feedforward_layernorm",
}
_GEMMA4 = _GEMMA | {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
    "blk.N.inp_gate": "model.layers.N.per_layer_input_gate",
    "blk.N.proj": "model.layers.N.per_layer_projection",
    "blk.N.post_norm": "model.layers.N.post_per_layer_input_norm",
    "blk.N.layer_output_scale": "model.layers.N.layer_scalar",
}
_QWEN35 = LLAMA | {
    "blk.N.post_attention_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.attn_qkv": "model.layers.N.linear_attn.in_proj_qkv",
    "blk.N.attn_gate": "model.layers.N.linear_attn.in_proj_z",
    "blk.N.ssm_alpha": "model.layers.N.linear_attn.in_proj_a",
    "blk.N.ssm_beta": "model.layers.N.linear_attn.in_proj_b",
    "blk.N.ssm_out": "model.layers.N.linear_attn.out_proj",
    "blk.N.ssm_conv1d": "model.layers.N.linear_attn.conv1d",
    "blk.N.ssm_norm": "model.layers.N.linear_attn.norm",
    "blk.N.ssm_a": "model.layers.N.linear_attn.A_log",
    "blk.N.ssm_dt": "model.layers.N.linear_attn.dt_proj",
}
_GPT_OSS = LLAMA | {
    "blk.N.post_attention_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.attn_sinks": "model.layers.N.self_attn.sinks",
    "blk.N.ffn_gate_inp": "model.layers.N.mlp.router",
    "blk.N.ffn_gate_exps": "model.layers.N.mlp.experts.gate_proj",
    "blk.N.ffn_up_exps": "model.layers.N.mlp.experts.up_proj",
    "blk.N.ffn_down_exps": "model.layers.N.mlp.experts.down_proj",
}
_NAMES: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("t5", "t5encoder"), T5),
    **dict.fromkeys(("llama", "mistral3", "qwen2", "qwen2vl", "qwen3", "qwen3vl"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), _GEMMA),
    "gemma4": _GEMMA4,
    "qwen35": _QWEN35,
    "gpt-oss": _GPT_OSS,
}
_KNOWN_BY = {
    "blk.0.ssm_a": "qwen35",
    "blk.0.attn_sinks.weight": "gpt-oss",
    "blk.0.layer_output_scale.weight": "gemma4",
    "blk.0.post_ffw_norm.weight": "gemma3",
    "blk.0.attn_q_norm.weight": "qwen3",
    "blk.0.attn_q.bias": "qwen2",
    "enc.blk.0.attn_q.weight": "t5",
}
"""Tensors by which an architecture is known whatever the file calls it, the more particular ones first. Llama's has
none: whether its queries and keys are interleaved no tensor tells."""

_PREFIXES = {"qwen35": "model.language_model.", "gpt-oss": ""}
"""Where hosts look for the layers of these, which elsewhere are under ``model.``."""

_DROPPED = ("dec.", "rope_freqs.")
"""What text encoders do not have: T5's decoder, and factors that llama.cpp keeps for its rotary embedding."""

_UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
"""Other T5 have distances in their first block alone."""

GEMMA_MARK = "model.layers.0.post_feedforward_layernorm.weight"
"""Only Gemma has it, 2, 3 and 4."""

TOKENIZERS = ("spiece_model", "tekken_model", "tokenizer_json")
"""Names under which hosts keep a tokenizer beside the weights."""

_PILE_T5_WIDTH = 2048
"""AuraFlow's, which is a UMT5, too; hosts have a copy of its tokenizer."""

_TEKKEN_ROWS = 131072
"""Of Mistral's vocabulary, in all models with this tokenizer."""


def text_encoder_tensors(
    file: GGUFFile, projector: GGUFFile | None = None, tokenizer: bool = True
) -> dict[str, torch.Tensor]:
    """A text encoder's state dict under the names of transformers, as hosts load it.

    Where a host wants a tokenizer in the file (UMT5, Gemma, Mistral, gpt-oss), it is rebuilt from the metadata, as
    uint8 bytes under ``spiece_model``, ``tekken_model`` or ``tokenizer_json``.

    Args:
        file: the text encoder.
        projector: the part that sees pictures, where there is one (`projector_beside`).
        tokenizer: whether the host wants one.

    Raises:
        UnsupportedFormat: it is no text encoder, or one that no host has.
        CorruptFile: its tokenizer is damaged, or the projector is.
    """
    check_text_encoder(file)
    architecture = architecture_of(file)
    if not architecture:
        state = weights_of(file.tensors, file)
        return state | _tokenizer(file, state, "") if tokenizer else state
    names = _NAMES[architecture]
    if names is T5 and "enc.blk.0.ffn_gate.weight" not in file.tensors:
        names = T5_UNGATED
    state = renamed(file, names, _dropped(file))
    undo = _UNDONE.get(architecture)
    if undo is not None:
        state = undo(state, file, architecture)
    if tokenizer:
        state |= _tokenizer(file, state, architecture)
    prefix = _PREFIXES.get(architecture)
    if prefix is not None:
        state = {_moved(name, prefix): weight for name, weight in state.items()}
    return state if projector is None else state | vision_tensors(projector, architecture)


def architecture_of(file: GGUFFile) -> str:
    """llama.cpp's name of a text encoder's architecture, also where the file calls it something else.

    Returns:
        ``""`` for a file with the names of transformers.

    Raises:
        UnsupportedFormat: it is none that this can read.
    """
    if not _has_llama_cpp_names(file):
        return ""
    found = file.architecture if file.architecture in _NAMES else None
    if found is None and file.architecture not in TEXT_ENCODER.architectures:
        counted = (key.removesuffix(".attention.head_count") for key in file.metadata)
        known = (name for tensor, name in _KNOWN_BY.items() if tensor in file.tensors)
        found = next((name for name in (*counted, *known) if name in _NAMES), None)
    if found is None:
        raise UnsupportedFormat(
            f"get this text encoder as safetensors: of GGUF its architecture {file.architecture or 'nothing'} cannot "
            f"be read, only {', '.join(_NAMES)} ({file.path})"
        )
    return found


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
        remedy = "use a loader for diffusion models" if kind is None else kind.remedy
    subject = file.architecture or "this" if kind is None else kind.subject(file)
    what = "" if kind is None else f"{kind.what}, "
    raise UnsupportedFormat(f"{subject} is {what}not a text encoder: {remedy} ({file.path})")


def _has_llama_cpp_names(file: GGUFFile) -> bool:
    return "token_embd.weight" in file.tensors or any(name.startswith(("blk.", "enc.blk.")) for name in file.tensors)


def _dropped(file: GGUFFile) -> tuple[str, ...]:
    """Beginnings of the names of what text encoders do not have; of Qwen3.5 also the blocks that guess ahead."""
    ahead = {f"{name.partition('.nextn.')[0]}." for name in file.tensors if ".nextn." in name}
    return (*_DROPPED, *ahead)


def _moved(name: str, prefix: str) -> str:
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name


def _join_halves(state: State, file: GGUFFile, architecture: str) -> State:
    """Put the rows of each head of queries and keys, ``[d/2, 2]`` in llama.cpp, into transformers' ``[2, d/2]``."""
    heads = _count(file, f"{architecture}.attention.head_count")
    kv_heads = _count(file, f"{architecture}.attention.head_count_kv", heads)
    for name, weight in state.items():
        count = {"q_proj": heads, "k_proj": kv_heads}.get(name.rpartition(".")[0].rpartition(".")[2])
        if count is None:
            continue
        rows = weight.shape[0] if weight.dim() else 0
        if not rows or rows % (2 * count):
            raise UnsupportedFormat(f"{name} has {rows} rows, which {count} heads do not divide ({file.path})")
        order = torch.arange(rows).view(count, -1, 2).transpose(1, 2).flatten()
        state[name] = weight.index_select(0, order)
    return state


def _count(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        what = f"{key} is {value!r}, where a number of heads is needed"
        raise UnsupportedFormat(f"{what}: get the model from another source ({file.path})")
    return value


def _shift_norms(state: State, file: GGUFFile, architecture: str) -> State:
    """Gemma multiplies by 1 + w; llama.cpp's files hold that sum."""
    return {name: _unshifted(weight) if name.endswith("norm.weight") else weight for name, weight in state.items()}


def _unshifted(norm: torch.Tensor) -> torch.Tensor:
    return norm.to(torch.float32) - 1


def _without_suffix(state: State, file: GGUFFile, architecture: str) -> State:
    """Scalars of Gemma 4's layers, which are no module's weights."""
    return {name.replace(".layer_scalar.weight", ".layer_scalar"): weight for name, weight in state.items()}


def _sort_linear_attention(state: State, file: GGUFFile, architecture: str) -> State:
    """Qwen3.5's norms, decays and convolutions, and the order of its value heads.

    Each key head serves several value heads. transformers keeps these together, llama.cpp has the first ones of all key
    heads, then the second ones: in rows of what makes values and what goes by them, in columns of what reads them.
    """
    keys, heads, inner = (
        _count(file, f"{architecture}.ssm.{n}") for n in ("group_count", "time_step_rank", "inner_size")
    )
    if heads % keys or inner % heads:
        raise UnsupportedFormat(f"{heads} value heads on {keys} keys, {inner} wide, cannot be sorted ({file.path})")
    order = torch.arange(heads).view(-1, keys).T.flatten()
    sorted_ = {}
    for name, weight in state.items():
        module = name.removesuffix(".weight").removesuffix(".bias")
        kind = module.rpartition(".linear_attn.")[2] if ".linear_attn." in module else ""
        weight = _with_heads_sorted(weight, kind, order, inner, name, file)
        if kind == "conv1d":
            weight = weight.reshape(weight.shape[0], 1, -1)
        elif kind == "A_log":  # the decay itself
            weight = torch.log(-weight.to(torch.float32))
        elif name.endswith("norm.weight") and kind != "norm":
            weight = _unshifted(weight)
        sorted_[f"{module.removesuffix('dt_proj')}dt_bias" if kind == "dt_proj" else name] = weight
    return sorted_


def _with_heads_sorted(
    weight: torch.Tensor, kind: str, order: torch.Tensor, inner: int, name: str, file: GGUFFile
) -> torch.Tensor:
    """A tensor of a linear attention whose last `inner` rows, or columns, or all of whose rows, belong to heads."""
    if kind not in ("in_proj_qkv", "conv1d", "in_proj_z", "out_proj", "in_proj_a", "in_proj_b", "A_log", "dt_proj"):
        return weight
    heads = order.numel()
    dim = 1 if kind == "out_proj" else 0
    size = weight.shape[dim] if weight.dim() > dim else 0
    belonging = heads if kind in ("in_proj_a", "in_proj_b", "A_log", "dt_proj") else inner
    if size < belonging or (kind not in ("in_proj_qkv", "conv1d") and size != belonging):
        raise UnsupportedFormat(
            f"{name} has {size} {'columns' if dim else 'rows'}, where {belonging} are needed: get the model "
            f"from another source ({file.path})"
        )
    if torch.equal(order, torch.arange(heads)):
        return weight
    width, before = belonging // heads, size - belonging
    picks = torch.cat([torch.arange(before), before + (order[:, None] * width + torch.arange(width)).flatten()])
    if dim and isinstance(weight, PackedTensor) and width % weight.fmt.block_size == 0:
        # whole blocks of columns, as rows of a reshaped one
        return _with_columns_of_blocks(weight, order, width)
    return weight.index_select(dim, picks)


def _with_columns_of_blocks(weight: PackedTensor, order: torch.Tensor, width: int) -> torch.Tensor:
    parts = weight.packed.view(weight.shape[0], order.numel(), -1).index_select(1, order)
    return weight.with_packed(parts)


def _join_experts(state: State, file: GGUFFile, architecture: str) -> State:
    """gpt-oss: rows of gate and up by turns, ``[experts, 2·inner, width]``, and parameters that are no module's."""
    joined = {}
    for name, weight in state.items():
        if ".experts.gate_proj." in name:
            up = state.get(name.replace(".gate_proj.", ".up_proj."))
            if up is None or up.shape != weight.shape or weight.dim() < 2:
                raise CorruptFile(f"{name} has no up_proj of its shape: get the model again ({file.path})")
            joined[name.replace(".gate_proj.", ".gate_up_proj.")] = _by_turns(weight, up)
        elif ".experts.up_proj." not in name:
            joined[name.replace(".sinks.weight", ".sinks")] = weight
    return joined


def _by_turns(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``[E, n, …]`` twice -> ``[E, 2·n, …]``: the first row of one, the first of the other, and so on."""
    count = gate.shape[1]
    if format_of(gate) != format_of(up):
        gate, up = gate.to(torch.float32), up.to(torch.float32)
    order = torch.stack([torch.arange(count), count + torch.arange(count)], dim=1).flatten()
    return torch.cat([gate, up], dim=1).index_select(1, order)


_UNDONE: dict[str, Callable[[State, GGUFFile, str], State]] = {
    "llama": _join_halves,
    "mistral3": _join_halves,
    "gemma2": _shift_norms,
    "gemma3": _shift_norms,
    "gemma4": _without_suffix,
    "qwen35": _sort_linear_attention,
    "gpt-oss": _join_experts,
}
"""What the converter does to the weights of an architecture, backwards."""


def is_t5(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict is that of a T5, whatever the size."""
    return "encoder.block.0.layer.0.SelfAttention.q.weight" in state


def is_umt5(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict is that of a UMT5 with a tokenizer of its own, which other T5 of its size are not."""
    table = state.get("shared.weight")
    return _UMT5 in state and (table is None or tuple(table.shape[1:]) != (_PILE_T5_WIDTH,))


def _tokenizer(file: GGUFFile, state: Mapping[str, torch.Tensor], architecture: str) -> dict[str, torch.Tensor]:
    """The tokenizers that hosts have no copy of, unless one is in the file: UMT5's, Gemma's, Mistral's and gpt-oss's.

    They are known by their weights, since files with the names of transformers may call their architecture anything.
    """
    own = {name: state[name] for name in TOKENIZERS if name in state}
    if own:
        return {name: data.view(torch.uint8) if data.dtype == torch.int8 else data for name, data in own.items()}
    if architecture == "gpt-oss":
        return {"tokenizer_json": _as_bytes(byte_level_tokenizer(file))}
    if "model.layers.0.layer_scalar" in state or architecture == "gemma4":
        return {"tokenizer_json": _as_bytes(gemma4_tokenizer(file))}
    if is_umt5(state) or GEMMA_MARK in state:
        return {"spiece_model": _as_bytes(sentencepiece_model(file))}
    splits = file.metadata.get("tokenizer.ggml.pre")
    if splits == "tekken":
        return {"tekken_model": _as_bytes(tekken_model(file))}
    table = state.get("model.embed_tokens.weight")
    if table is not None and tuple(table.shape[:1]) == (_TEKKEN_ROWS,):
        raise UnsupportedFormat(
            f"Mistral's tokenizer cannot be rebuilt, since the file splits words like {splits or 'nothing'} and not "
            f"like tekken: get this text encoder from another source ({file.path})"
        )
    return {}


def _as_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
