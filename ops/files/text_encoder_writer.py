"""What lies in a file of a text encoder: the way back from what hosts load (`text_encoders.py`).

What ComfyUI-GGUF, llama.cpp and stable-diffusion.cpp read in llama.cpp's names (T5, Llama, Qwen) gets these, and its
layout. All others keep the names and the layout of the host's own files, which only Graft reads as GGUF; where the
host keeps a tokenizer in such a file, its bytes lie in it as a tensor, as in the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ...kernels import UnsupportedFormat
from ..merged import MergedTensor
from ..packed import in_fp32
from .contents import OWN_NAMES
from .renaming import rename
from .text_encoders import GEMMA_MARK, LLAMA, T5, T5_UNGATED, TOKENIZERS, is_t5, is_umt5
from .tokenizer_writer import unigram_entries
from .writer import Value

_LAYER = "model.layers.0.self_attn."
_EYES = "visual."


class WrittenEncoder(NamedTuple):
    """A text encoder as it lies in a file.

    Attributes:
        architecture: ``general.architecture``.
        state: tensors by their names there.
        metadata: what else it needs.
        left_out: whether it has a part that sees pictures, which goes into a file of its own.
    """

    architecture: str
    state: dict[str, torch.Tensor]
    metadata: dict[str, Value]
    left_out: bool = False


def text_encoder_in_a_file(
    name: str,
    state: Mapping[str, torch.Tensor],
    tokenizer: Mapping[str, torch.Tensor],
    heads: tuple[int, int] | None = None,
) -> WrittenEncoder:
    """Names, layout and metadata of a text encoder in a file of its own.

    Args:
        name: the host's for it, such as ``clip_l``.
        state: its tensors, as the host names them.
        tokenizer: what the host keeps of it in files, ``uint8``: `TOKENIZERS`.
        heads: how many of queries, and of keys, a Llama has.

    Raises:
        UnsupportedFormat: its tokenizer is missing.
    """
    if is_t5(state):
        return _t5(state, tokenizer)
    architecture = _known_architecture(state, tokenizer)
    if architecture is None or (architecture == "llama" and heads is None):
        return _as_hosts_have_it(name, state, tokenizer)
    metadata: dict[str, Value] = {}
    if architecture == "llama" and heads is not None:
        metadata = {"llama.attention.head_count": heads[0], "llama.attention.head_count_kv": heads[1]}
        state = {key: _split_halves(key, weight, heads) for key, weight in state.items()}
    eyes = any(key.startswith(_EYES) for key in state)
    return WrittenEncoder(architecture, _renamed(state, LLAMA), metadata, eyes)


def _t5(state: Mapping[str, torch.Tensor], tokenizer: Mapping[str, torch.Tensor]) -> WrittenEncoder:
    ungated = "encoder.block.0.layer.1.DenseReluDense.wi.weight" in state
    metadata: dict[str, Value] = {}
    if is_umt5(state):
        if "spiece_model" not in tokenizer:
            raise UnsupportedFormat("this UMT5 has no tokenizer, without which nobody can use it: load it for Wan")
        table = state["shared.weight"]
        metadata = unigram_entries(_bytes_of(tokenizer["spiece_model"]), table.shape[0])
    return WrittenEncoder("t5encoder", _renamed(state, T5_UNGATED if ungated else T5), metadata)


def _known_architecture(state: Mapping[str, torch.Tensor], tokenizer: Mapping[str, torch.Tensor]) -> str | None:
    """llama.cpp's name of a text encoder that needs no tokenizer in its file; None of any other."""
    if f"{_LAYER}q_proj.weight" not in state or GEMMA_MARK in state or tokenizer.keys() & set(TOKENIZERS):
        return None
    if any(".linear_attn." in key for key in state):
        return None
    if f"{_LAYER}q_norm.weight" in state:
        return "qwen3vl" if any("visual.deepstack" in key for key in state) else "qwen3"
    return "qwen2vl" if f"{_LAYER}q_proj.bias" in state else "llama"


def _renamed(state: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """What llama.cpp has a name for; a head that writes text, and eyes, are not what words are read with."""
    back = {host: name for name, host in names.items()}
    found = {key: rename(key, back) for key in state if not key.startswith(_EYES)}
    return {new: state[key] for key, new in found.items() if new != key}


def _split_halves(key: str, weight: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """Rows of each head of queries and keys, ``[2, d/2]`` in transformers, as llama.cpp has them, ``[d/2, 2]``."""
    count = {"q_proj": heads[0], "k_proj": heads[1]}.get(key.rpartition(".")[0].rpartition(".")[2])
    if count is None:
        return weight
    order = torch.arange(weight.shape[0]).view(count, 2, -1).transpose(1, 2).flatten()
    if isinstance(weight, MergedTensor):
        return MergedTensor(lambda: in_fp32(weight).index_select(0, order), weight.shape, weight.source)
    return weight.index_select(0, order.to(weight.device))


def _as_hosts_have_it(
    name: str, state: Mapping[str, torch.Tensor], tokenizer: Mapping[str, torch.Tensor]
) -> WrittenEncoder:
    into = next((into for is_one, into in _PREFIXES if is_one(state)), {})
    found = {}
    for key, weight in state.items():
        prefix = next((prefix for prefix in into if key.startswith(prefix)), "")
        found[into.get(prefix, "") + key.removeprefix(prefix)] = weight
    found |= {kind: tokenizer[kind].view(torch.int8) for kind in TOKENIZERS if kind in tokenizer}
    return WrittenEncoder(OWN_NAMES, found, {"general.name": name})


_PREFIXES: tuple[tuple[Callable[[Mapping], bool], Mapping[str, str]], ...] = (
    (
        lambda state: any(".linear_attn." in key for key in state),
        {"model.lm_head.": "lm_head.", "model.": "model.language_model.", "visual.": "model.visual."},
    ),
)
"""Of Qwen3.5, what hosts cut off or move when they load it."""


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


__all__ = ["WrittenEncoder", "text_encoder_in_a_file"]
