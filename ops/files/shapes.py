"""Shapes that a file tells differently from the model: ones in front that ggml drops, ones behind that others keep.

ggml has no dimension of 1 in front: what llama.cpp's tools have written again has ``[384]`` for ``[1, 384]``.
stable-diffusion.cpp writes a Linear that was a convolution once as ``[C, C, 1, 1]``. The numbers and their order are
the same, so whoever knows the model's own shape puts it back (`fitted`); at some hosts look before there is a model.
Of a convolution over time, which has five dimensions, it makes the first two one, since ggml has four.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

State = Mapping[str, torch.Tensor]

_RANKS = {
    "pos_embed": 3,  # SD3, PixArt
    "positional_encoding": 3,  # AuraFlow
    "img_emb.emb_pos": 3,  # Wan with a first and a last frame
    "txtfusion.projector.weight": 2,  # Krea 2
    "lq_proj.gate_modules.0.content_proj.weight": 2,  # PiD
    "head.scratch.output_conv2.2.weight": 4,  # Depth Anything 3
}
"""Tensors that may begin with a 1, of whose shape hosts read the model's sizes: how many dimensions they have."""

_ONCE_CONVOLUTIONS = ("proj_in.weight", "proj_out.weight")
"""Of a UNet's attention: by their rank hosts know which Stable Diffusion it is."""

_MISMATCH = re.compile(r"size mismatch for (\S+): .*?[\[(]([\d, ]*)[\])].*?[\[(]([\d, ]*)[\])]")


def fitted(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`tensor` in `shape` where only dimensions of 1 tell them apart; any other as it is."""
    if tuple(tensor.shape) == tuple(shape) or _without_ones(tensor.shape) != _without_ones(shape):
        return tensor
    return tensor.reshape(tuple(shape))


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


def with_leading_ones(state: State) -> dict[str, torch.Tensor]:
    """`state` with the ones in front that hosts need to know the model by."""
    put_back = {
        name: state[name].reshape(*[1] * (rank - state[name].dim()), *state[name].shape)
        for name, rank in _RANKS.items()
        if name in state and 0 < state[name].dim() < rank
    }
    return {**state, **put_back}


def with_inputs_apart(state: State) -> dict[str, torch.Tensor]:
    """`state` with ``[out · in, t, h, w]`` as ``[out, in, t, h, w]``: there are as many outputs as biases."""
    apart = {}
    for name, weight in state.items():
        bias = state.get(f"{name.removesuffix('.weight')}.bias") if name.endswith(".weight") else None
        if bias is None or weight.dim() != 4 or bias.dim() != 1 or not bias.numel():
            continue
        if bias.numel() < weight.shape[0] and weight.shape[0] % bias.numel() == 0:
            apart[name] = weight.reshape(bias.numel(), -1, *weight.shape[1:])
    return {**state, **apart}


def other_ranks(state: State) -> Iterator[dict[str, torch.Tensor]]:
    """What `state` may have been before ones behind were kept, or dropped, for hosts that do not know it as it is."""
    spatial = {name: tensor for name, tensor in state.items() if tensor.dim() > 2 and set(tensor.shape[2:]) == {1}}
    if spatial:
        yield {**state, **{name: tensor.reshape(tensor.shape[:2]) for name, tensor in spatial.items()}}
    matrices = {name: state[name] for name in state if name.endswith(_ONCE_CONVOLUTIONS) and state[name].dim() == 2}
    if matrices:
        yield {**state, **{name: tensor.reshape(*tensor.shape, 1, 1) for name, tensor in matrices.items()}}


class Mismatch(NamedTuple):
    """A tensor whose shape is not the one that the model has for it."""

    name: str
    in_file: tuple[int, ...]
    in_model: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} is {list(self.in_file)} and not {list(self.in_model)}"


def mismatches(error: BaseException) -> list[Mismatch]:
    """The shapes that `load_state_dict` complains about, torch's own or our layers'."""
    found = _MISMATCH.findall(str(error)) if isinstance(error, RuntimeError) else []
    return [Mismatch(name, *(tuple(map(int, re.findall(r"\d+", s))) for s in shapes)) for name, *shapes in found]


def refitted(state: State, wrong: Sequence[Mismatch]) -> dict[str, torch.Tensor] | None:
    """`state` in the shapes of the model; None if something tells them apart that is no dimension of 1.

    Hosts cut prefixes off names, so a mismatch is in the tensor whose name ends with its own.
    """
    fixed = {}
    for mismatch in wrong:
        shape = mismatch.in_file
        names = [n for n, t in state.items() if f".{n}".endswith(f".{mismatch.name}") and tuple(t.shape) == shape]
        if len(names) != 1 or _without_ones(shape) != _without_ones(mismatch.in_model):
            return None
        fixed[names[0]] = fitted(state[names[0]], mismatch.in_model)
    return {**state, **fixed} if fixed else None
