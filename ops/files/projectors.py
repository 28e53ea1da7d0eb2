"""Vision projectors (mmproj): the part of a text encoder that sees pictures, which llama.cpp keeps in another file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ...kernels.errors import CorruptFile, GraftError
from ..layers import format_of
from .gguf import GGUFFile, open_gguf
from .renaming import rename, renamed

_QWEN2VL = {
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
_QWEN3VL = _QWEN2VL | {
    "mm.0": "visual.merger.linear_fc1",
    "mm.2": "visual.merger.linear_fc2",
    "v.position_embd": "visual.pos_embed",
    "v.post_ln": "visual.merger.norm",
    "v.blk.N.ffn_up": "visual.blocks.N.mlp.linear_fc1",
    "v.blk.N.ffn_down": "visual.blocks.N.mlp.linear_fc2",
}
_DEEPSTACK = re.compile(r"v\.deepsta(?:ck|st)\.(\d+)\.(norm|fc1|fc2)\.(weight|bias)")
"""What blocks in the middle hand to the text model, by the number of their block; early converters misspelled it."""

PROJECTORS: dict[str, tuple[Mapping[str, str], str]] = {
    "qwen2vl": (_QWEN2VL, ""),
    "qwen3vl": (_QWEN3VL, "model."),
    "qwen35": (_QWEN3VL, "model."),
}
"""By the text encoder's architecture: names, and what hosts have before them."""

_QUANT_SUFFIX = re.compile(r"[-_.]?(ud[-_])?(i?q\d\w{0,9}|tq\d\w{0,9}|b?f16|f32|mxfp4\w{0,9})$", re.IGNORECASE)


def projector_files(path: str | os.PathLike[str]) -> list[Path]:
    """What may be the projector of a text encoder: GGUF files of its folder with ``mmproj`` in their names."""
    files = Path(path).parent.glob("*.[gG][gG][uU][fF]")
    return sorted(file for file in files if "mmproj" in file.name.lower())


def projector_beside(file: GGUFFile, architecture: str, unreadable: list[GraftError] | None = None) -> GGUFFile | None:
    """The projector of a text encoder that can see, from its folder.

    Among those whose outputs are as wide as the text encoder the one is taken that is called like it, else the first.

    Args:
        unreadable: where none is found, takes what is wrong with files that may be the one.
    """
    if architecture not in PROJECTORS:
        return None
    fitting, errors = [], []
    for path in projector_files(file.path):
        try:
            candidate = open_gguf(path)
        except GraftError as error:
            errors.append(error)
            continue
        if fits(candidate, file, architecture):
            fitting.append(candidate)
    if unreadable is not None and not fitting:
        unreadable += errors
    own = _QUANT_SUFFIX.sub("", file.path.stem.lower())
    return min(fitting, key=lambda candidate: own not in candidate.path.name.lower(), default=None)


def fits(projector: GGUFFile, file: GGUFFile, architecture: str) -> bool:
    """Whether a projector's outputs are as wide as a text encoder, and of its kind: Qwen3-VL's has deepstack parts."""
    table = file.tensors.get("token_embd.weight")
    width = file.metadata.get(f"{architecture}.embedding_length", table and table.shape[-1])
    if projector.metadata.get("clip.vision.projection_dim") != width:
        return False
    return architecture == "qwen2vl" or any(map(_DEEPSTACK.match, projector.tensors)) == (architecture == "qwen3vl")


def vision_tensors(projector: GGUFFile, architecture: str) -> dict[str, torch.Tensor]:
    """A projector's state dict under the names that hosts load.

    Raises:
        CorruptFile: it is incomplete.
    """
    names, prefix = PROJECTORS[architecture]
    state = _with_deepstack(renamed(projector, names))

    def taken(*names: str, rows_may_differ: bool) -> list[torch.Tensor]:
        missing = [name for name in names if name not in state]
        if missing:
            raise CorruptFile(f"get the projector again: {', '.join(missing)} is missing ({projector.path})")
        parts = [state.pop(name) for name in names]
        sides = {part.shape[1:] if rows_may_differ else part.shape for part in parts}
        if len(sides) > 1 or min(part.dim() for part in parts) < (1 if rows_may_differ else 2):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise CorruptFile(f"get the projector again: {', '.join(names)} are {shapes} ({projector.path})")
        return parts

    # queries, keys and values are one layer in the model
    for name in [name for name in state if ".attn_q." in name]:
        parts = taken(*(name.replace(".attn_q.", f".attn_{part}.") for part in "qkv"), rows_may_differ=True)
        if len({format_of(part) for part in parts}) > 1:
            parts = [part.float() for part in parts]
        state[rename(name.replace(".attn_q.", ".attn_qkv."), names)] = torch.cat(parts)
    # and the two frames that a patch spans one convolution
    if "v.patch_embd.weight.1" in state:
        frames = taken("visual.patch_embed.proj.weight", "v.patch_embd.weight.1", rows_may_differ=False)
        state["visual.patch_embed.proj.weight"] = torch.stack([frame.float() for frame in frames], dim=2)
    return {prefix + name: weight for name, weight in state.items()}


def _with_deepstack(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """llama.cpp numbers these parts by their blocks, transformers one after another."""
    found = {name: match for name in state if (match := _DEEPSTACK.fullmatch(name))}
    order = sorted({int(match[1]) for match in found.values()})

    def named(match: re.Match[str]) -> str:
        part = match[2] if match[2] == "norm" else f"linear_{match[2]}"
        return f"visual.deepstack_merger_list.{order.index(int(match[1]))}.{part}.{match[3]}"

    return {named(found[name]) if name in found else name: weight for name, weight in state.items()}


__all__ = ["PROJECTORS", "fits", "projector_beside", "projector_files", "vision_tensors"]
