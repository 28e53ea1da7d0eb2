"""ComfyUI's layer classes, holding packed weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.ops
import torch
from torch import nn

from ..kernels import GraftError
from ..ops.layers import ConvMath, EmbeddingMath, LinearMath, PackedLayer

# since 0.3.68 the host hands out a handle with a weight, and wants it back for its asynchronous offload
_OFFLOADABLE = "offloadable" in inspect.signature(comfy.ops.cast_bias_weight).parameters
_interruption_point: Callable[[], None] = getattr(comfy.ops, "run_every_op", lambda: None)


def plain_key(key: str) -> str:
    """A parameter's name without what `torch.compile` puts around a module that nodes have compiled."""
    return key.replace("_orig_mod.", "")


class HostLayer(PackedLayer):
    """Brings weights in through `cast_bias_weight`, so that the host's pinning, offload and dynamic VRAM carry them.

    Attributes:
        path: where the layer stands in the whole model; empty until that is there.
        owner: what all clones of that model share (`Graft`), or None once it is gone.
        remedy: what to do where the file brought no weight.
    """

    comfy_cast_weights = True
    weight_function: list[Callable[[torch.Tensor], torch.Tensor]]
    path: str = ""
    owner: Callable[[], Any]
    remedy: str = "it is incomplete for this architecture, get it from another source"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # on the meta device: a real allocation of the full weight would double memory while loading
        device = kwargs.pop("device", None)
        super().__init__(*args, device="meta", **kwargs)
        self.logical_shape = self.weight.shape
        self.weight = None
        if getattr(self, "bias", None) is not None:
            dtype = self.bias.dtype
            self.bias = nn.Parameter(torch.zeros(self.bias.shape, dtype=dtype, device=device), requires_grad=False)

    def fetch(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, Callable[[], None]]:
        _interruption_point()
        if self.weight is None:
            raise GraftError(
                f"the file brought no weight for a {type(self).__name__} of shape {list(self.logical_shape)}: "
                f"{self.remedy}"
            )
        if not self.weight_function:
            return self._bring(x.device)
        # the host's weight functions are meant for weights, not for their packed bytes
        functions, self.weight_function = self.weight_function, []
        try:
            data, bias, release = self._bring(x.device)
        finally:
            self.weight_function = functions
        dense = self.dequantized(data)
        for function in functions:
            dense = function(dense)
        return dense, bias, release

    def _bring(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None, Callable[[], None]]:
        bias_dtype = None if self.bias is None else self.bias.dtype
        wanted = {"dtype": self.weight.dtype, "device": device, "bias_dtype": bias_dtype}
        if not _OFFLOADABLE:
            return *comfy.ops.cast_bias_weight(self, **wanted), _nothing
        data, bias, handle = comfy.ops.cast_bias_weight(self, offloadable=True, **wanted)
        return data, bias, lambda: comfy.ops.uncast_bias_weight(self, data, bias, handle)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Bytes where the whole model or this layer alone is asked, by which the host counts memory; else weights.

        ControlNets that share layers with the model ask a part of it.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.path or plain_key(prefix) in ("", f"{self.path}."):
            return
        owner = self.owner()
        for name in ("weight", "bias") if owner is not None else ():
            if prefix + name in destination:
                destination[prefix + name] = owner.shown(f"{self.path}.{name}")

    def set_weight(self, weight: torch.Tensor, **kwargs: Any) -> None:
        """Where the host would write a patched weight: a packed one is never written to."""
        raise GraftError(
            "a patch reached a GGUF weight past Graft's model patcher, and packed weights are never written to: "
            "apply the patch to the MODEL that the loader returns"
        )

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: Any) -> torch.Tensor:
        """Where the host reads the weight for a merge: the weights themselves (bytes may arrive as numbers)."""
        if tuple(weight.shape) == tuple(self.logical_shape):
            return weight
        return self.dequantized(weight.to(self.weight.dtype))


def _nothing() -> None:
    """This host wants nothing back."""


class GraftOps(comfy.ops.manual_cast):
    """What a model is built from instead of `comfy.ops.manual_cast`."""

    class Linear(HostLayer, LinearMath, comfy.ops.manual_cast.Linear):
        pass

    class Conv1d(HostLayer, ConvMath, comfy.ops.manual_cast.Conv1d):
        pass

    class Conv2d(HostLayer, ConvMath, comfy.ops.manual_cast.Conv2d):
        pass

    class Conv3d(HostLayer, ConvMath, comfy.ops.manual_cast.Conv3d):
        def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            # newer hosts take a further argument (autopad) that only their VAEs use
            return nn.Conv3d._conv_forward(self, x, weight, bias)

    class Embedding(HostLayer, EmbeddingMath, comfy.ops.manual_cast.Embedding):
        bias = None

    @classmethod
    def conv_nd(cls, dims: int, *args: Any, **kwargs: Any) -> nn.Module:
        """A convolution over `dims` dimensions; the host's own would build its own classes."""
        return {1: cls.Conv1d, 2: cls.Conv2d, 3: cls.Conv3d}[dims](*args, **kwargs)


class TextEncoderOps(GraftOps):
    """What a text encoder is built from."""

    class Embedding(GraftOps.Embedding):
        def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
            """Take the vocabulary that the file has: converters leave out rows that no token has, or added tokens."""
            weight = state_dict.get(prefix + "weight")
            if weight is not None and weight.dim() == 2 and weight.shape[1] == self.logical_shape[1]:
                self.logical_shape, self.num_embeddings = weight.shape, weight.shape[0]
            super()._load_from_state_dict(state_dict, prefix, *args)
