"""LoRAs merged into a model's weights, without a host: each weight is merged in fp32 when it is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ..kernels import AdapterError
from . import kinds
from .adapters import Patch
from .files.lora import load_adapters
from .kinds import Padded
from .merged import MergedTensor
from .packed import in_fp32


def with_loras(
    state: Mapping[str, torch.Tensor],
    loras: Sequence[tuple[str | os.PathLike[str], float]],
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, torch.Tensor]:
    """`state` with LoRA files in it, where they reach a tensor as a `MergedTensor`.

    Args:
        state: a diffusion model's tensors by the host's names.
        loras: files and strengths, in the order in which they are merged.
        report: takes a line on each file.

    Raises:
        AdapterError: a file cannot be read, or nothing of it fits.
    """
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.dim() > 0
    }
    patches: dict[str, list[Patch]] = {}
    for path, strength in loras:
        fitted = load_adapters(path).on(shapes)
        for name, found in fitted.patches(strength).items():
            patches.setdefault(name, []).extend(found)
        report(fitted.report(strength).line)
    absent = [name for name in patches if name not in state]
    if absent:
        report(f"left out, the model has no place for it: {', '.join(absent[:3])}")
    merged = {name: _merged(state[name], found) for name, found in patches.items() if name in state}
    return {**state, **merged}


def _merged(tensor: torch.Tensor, patches: Sequence[Patch]) -> MergedTensor:
    if any(isinstance(patch.adapter, Padded) for patch in patches):
        raise AdapterError("a LoRA widens the model's first layer: bake it in ComfyUI, with Save as GGUF")
    return MergedTensor(partial(_merge, tensor, tuple(patches)), tensor.shape, tensor)


def _merge(tensor: torch.Tensor, patches: Sequence[Patch]) -> torch.Tensor:
    return kinds.merge(_own(tensor), patches)  # kept by no name here: it is gone once the first patch is in


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers in fp32, in memory of their own."""
    weight = in_fp32(tensor)
    return weight.clone() if weight is tensor else weight


__all__ = ["with_loras"]
