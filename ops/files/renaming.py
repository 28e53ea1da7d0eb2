"""llama.cpp's names of tensors, turned into those of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from .gguf import GGUFFile
from .scales import weights_of

_BLOCK = re.compile(r"\.(\d+)\.")


def renamed(file: GGUFFile, names: Mapping[str, str], dropped: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """A file's state dict under other names.

    Args:
        names: by llama.cpp's name of a module, with N for the number of a block.
        dropped: beginnings of names that are left out.
    """
    held = {name: tensor for name, tensor in file.tensors.items() if not (dropped and name.startswith(dropped))}
    return {rename(name, names): weight for name, weight in weights_of(held, file).items()}


def rename(name: str, names: Mapping[str, str]) -> str:
    """``blk.7.attn_q.weight`` -> ``model.layers.7.self_attn.q_proj.weight``; a name that is not listed stays."""
    module = name.rpartition(".")[0]
    if module in names:
        return names[module] + name[len(module) :]
    block = _BLOCK.search(name)
    if block is None:
        return name
    template = name[: block.start(1)] + "N" + name[block.end(1) :]
    # a few names have no parameter behind them
    module = template if template in names else template.rpartition(".")[0]
    if module not in names:
        return name
    return names[module].replace(".N.", f".{block[1]}.") + template[len(module) :]


__all__ = ["rename", "renamed"]
