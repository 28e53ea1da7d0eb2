"""The demo model out of its GGUF file, with adapters beside its weights: what the nodes do, without a host."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import layers as packed_operations
from ..ops import load_adapters, open_gguf
from ..ops.factors import FactorCache
from ..ops.files.gguf import diffusion_tensors
from ..ops.files.scales import weights_of
from ..ops.layers import packed_layers, unpack_leftovers
from ..ops.places import Picture, architecture_of
from ..ops.residual import ResidualStack
from ..ops.strengths import Call, Strength
from .wan import PATCH, Wan

WITHOUT_PLACE = re.compile(r"^(?:text|time)_|\.cross_attn\.[kv]$")
"""Layers of Wan whose rows are words or times, and no part of the picture."""

FOLDER = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def shipped(name: str) -> Path:
    """``Q8_0.gguf`` or ``neon.safetensors`` of this folder."""
    return FOLDER / f"graft-demo-{name}"


def load_model(path: Path) -> Wan:
    """What the loader node does: map the file, hand its bytes to the layers."""
    file = open_gguf(path)
    state = weights_of(diffusion_tensors(file), file)
    model = Wan.like({name: weight.shape for name, weight in state.items()}, packed_operations)
    model.load_state_dict(state)
    unpack_leftovers(model)
    return model.eval()


class Grafted:
    """A packed model with the demo's adapters beside its weights.

    Args:
        model: see `load_model`; other adapters may use it at the same time.
        strengths: by style.
        masks: by style, where in the picture it works, ``[1, rows, columns]`` of any size; everywhere without one.
    """

    def __init__(self, model: Wan, strengths: Mapping[str, float], masks: Mapping[str, Tensor] | None = None) -> None:
        self.model, self.layers, self.stack = model, packed_layers(model), ResidualStack()
        for style, strength in strengths.items():
            when = Strength(mask=masks[style]) if masks and style in masks else None
            load_adapters(shipped(f"{style}.safetensors")).on(self.layers).add_to(self.stack, strength, when)
        self.stack.build(self.layers, FactorCache())

    def __call__(self, x: Tensor, *inputs: Tensor) -> Tensor:
        frames, rows, columns = x.shape[2:]
        picture = Picture(frames, rows, columns, (1, PATCH, PATCH))
        call = Call(picture=picture, architecture=architecture_of(self.layers))
        with self.stack.active(self.layers, CPU, call):
            return self.model(x, *inputs)

    def merged(self) -> dict[str, Tensor]:
        """Every parameter in fp64, with the adapters added to it, wherever in the picture they work."""
        state = decoded(self.model)
        for name, patches in self.stack.patches.items():
            for patch in patches:
                state[name] = patch.adapter.merged(state[name], patch.strength)
        return state

    def twin(self, dtype: torch.dtype = torch.float32) -> Wan:
        """The same of torch's own layers: merged, or with each adapter's difference added where its mask is."""
        if not self.stack.varies:
            return dense(self.merged(), dtype)
        state = decoded(self.model)
        model = dense(state, dtype)
        for name, patches in self.stack.patches.items():
            path = name.removesuffix(".weight")
            for patch in patches if not WITHOUT_PLACE.search(path) else ():
                difference = (patch.adapter.merged(state[name], patch.strength) - state[name]).to(dtype)
                model.get_submodule(path).register_forward_hook(_adding(difference, patch.when.mask.to(dtype)))
        return model


def _adding(difference: Tensor, mask: Tensor) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """A hook that adds what a linear layer's weight differs by, as much as the mask says at each token."""

    def add(layer: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
        side = math.isqrt(y.shape[1])
        return y + F.adaptive_avg_pool2d(mask, side).view(1, -1, 1) * F.linear(inputs[0], difference)

    return add


def decoded(model: Wan) -> dict[str, Tensor]:
    """Every parameter of a packed model as numbers in fp64."""
    plain = {name: value.double() for name, value in model.named_parameters() if value.is_floating_point()}
    return plain | {f"{name}.weight": layer.dequantized().double() for name, layer in packed_layers(model).items()}


def dense(state: Mapping[str, Tensor], dtype: torch.dtype) -> Wan:
    """A model of torch's own layers."""
    with torch.device("meta"):
        model = Wan.like({name: weight.shape for name, weight in state.items()})
    model.load_state_dict({name: weight.to(dtype) for name, weight in state.items()}, assign=True)
    return model.eval()
