"""The demo model out of its GGUF file, with adapters beside its weights: what the nodes do, without a host."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..ops import layers as packed_operations
from ..ops import load_adapters, open_gguf
from ..ops.gguf_file import diffusion_tensors
from ..ops.layers import packed_layers, unpack_leftovers
from ..ops.packed import as_weight
from ..ops.residual import FactorCache, ResidualStack
from .wan import Wan

FOLDER = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def shipped(name: str) -> Path:
    """``Q8_0.gguf`` or ``neon.safetensors`` of this folder."""
    return FOLDER / f"graft-demo-{name}"


def load_model(path: Path) -> Wan:
    """What the loader node does: map the file, hand its bytes to the layers."""
    state = {name: as_weight(tensor) for name, tensor in diffusion_tensors(open_gguf(path)).items()}
    model = Wan.like({name: weight.shape for name, weight in state.items()}, packed_operations)
    model.load_state_dict(state)
    unpack_leftovers(model)
    return model.eval()


class Grafted:
    """A packed model with the demo's adapters beside its weights.

    Args:
        model: see `load_model`; other adapters may use it at the same time.
        strengths: by style.
    """

    def __init__(self, model: Wan, strengths: Mapping[str, float]) -> None:
        self.model, self.layers, self.stack = model, packed_layers(model), ResidualStack()
        for style, strength in strengths.items():
            load_adapters(shipped(f"{style}.safetensors")).on(self.layers).add_to(self.stack, strength)
        self.stack.build(self.layers, FactorCache())

    def __call__(self, *inputs: Tensor) -> Tensor:
        with self.stack.active(self.layers, CPU):
            return self.model(*inputs)

    def merged(self) -> dict[str, Tensor]:
        """Every parameter in fp64, with the adapters added to it."""
        state = decoded(self.model)
        for name, patches in self.stack.patches.items():
            for patch in patches:
                state[name] = patch.adapter.merged(state[name], patch.strength)
        return state

    def twin(self, dtype: torch.dtype = torch.float32) -> Wan:
        """The merged model, of torch's own layers."""
        return dense(self.merged(), dtype)


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
