"""ComfyUI's layer classes, holding packed weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.ops
import comfy.rmsnorm
import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import GraftError
from ..ops.calibration import first_argument
from ..ops.layers import ConvMath, EmbeddingMath, ExpertsMath, LinearMath, PackedLayer

# since 0.3.68 the host hands out a handle with a weight, and wants it back for its asynchronous offload
_OFFLOADABLE = "offloadable" in inspect.signature(comfy.ops.cast_bias_weight).parameters
_interruption_point: Callable[[], None] = getattr(comfy.ops, "run_every_op", lambda: None)

_INPUT_ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "swiglu": lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],
}

_PAST_THE_PATCHER = (
    "a patch reached a GGUF weight past Graft's model patcher, and packed weights are never written to: "
    "apply the patch to the MODEL that the loader returns"
)


def plain_key(key: str) -> str:
    """A parameter's name without what `torch.compile` puts around a module that nodes have compiled."""
    return key.replace("_orig_mod.", "")


class HostLayer(PackedLayer):
    """Brings weights in through `cast_bias_weight`, so that the host's pinning, offload and dynamic VRAM carry them.

    Attributes:
        path: where the layer stands in the whole model; empty until that is there.
        owner: what all clones of that model share (`Graft`), or None once it is gone.
        remedy: what to do where the file brought no weight.
        keywords: what the forward of the layer's kind takes by name.
        declared_dtype: what the architecture wants the layer in.
        noted_keys: those of the whole model that were missing, and unexpected, as it was loaded, for the loader.
    """

    comfy_cast_weights = True
    keywords: tuple[str, ...] = ()
    declared_dtype: torch.dtype | None = None
    # newer hosts ask for it before they multiply by the weight themselves, past the layer's forward
    _full_precision_mm = True
    weight_function: list[Callable[[torch.Tensor], torch.Tensor]]
    path: str = ""
    owner: Callable[[], Any]
    remedy: str = "it is incomplete for this architecture, get it from another source"
    noted_keys: tuple[list[str], list[str]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # on the meta device: a real allocation of the full weight would double memory while loading
        device = kwargs.pop("device", None)
        super().__init__(*args, device="meta", **kwargs)
        self.logical_shape, self.declared_dtype = self.weight.shape, kwargs.get("dtype")
        self.weight = None
        if getattr(self, "bias", None) is not None:
            dtype = self.bias.dtype
            self.bias = nn.Parameter(torch.zeros(self.bias.shape, dtype=dtype, device=device), requires_grad=False)

    def forward(self, input: torch.Tensor, *args: Any, **asked: Any) -> torch.Tensor:
        unknown = [name for name, value in asked.items() if name not in self.keywords and value is not None]
        if unknown:
            raise GraftError(
                f"this ComfyUI calls a {type(self).__name__} with {', '.join(unknown)}, which this version of Graft "
                "does not know: update Graft"
            )
        known = {name: value for name, value in asked.items() if name in self.keywords}
        if self._is_outside():
            with self.owner().outside(self, input.device):
                return super().forward(input, *args, **known)
        return super().forward(input, *args, **known)

    def forward_comfy_cast_weights(self, *args: Any, **asked: Any) -> torch.Tensor:
        """Where the host's own layers compute, which some callers know."""
        return type(self).forward(self, *args, **asked)

    def _is_outside(self) -> bool:
        """Whether a host calls the layer by itself, as to prepare a conditioning, and not within a model call."""
        if self.residual is not None or torch.compiler.is_compiling():
            return False
        return bool(self.path) and self.calls is not None and not self.calls.under_way and self.owner() is not None

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # torch passes the same lists to every module, and hosts only log what is in them at the end
        self.noted_keys = missing_keys, unexpected_keys

    def fetch(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, Callable[[], None]]:
        _interruption_point()
        if self.weight is None:
            raise GraftError(
                f"the file brought no weight for {self.path.removeprefix('diffusion_model.') or type(self).__name__} "
                f"of shape {list(self.logical_shape)}: {self.remedy}"
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
        """Bytes where this layer alone is asked, by which the host counts memory; else weights.

        Of the whole model hosts mostly want the names. ControlNets that share layers with it ask a part of it.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        owner = self.owner() if self.path and prefix else None
        for name in ("weight", "bias") if owner is not None else ():
            if prefix + name in destination:
                of_part = plain_key(prefix) != f"{self.path}."
                destination[prefix + name] = owner.shown(f"{self.path}.{name}", to_keep=of_part)

    def set_weight(self, weight: torch.Tensor, **kwargs: Any) -> None:
        """Where the host would write a patched weight: a packed one is never written to."""
        raise GraftError(_PAST_THE_PATCHER)

    @property
    def weight_lowvram_function(self) -> None:
        """Where dynamic VRAM hangs a patch, to work it into what it brings in: none."""

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch: Any) -> None:
        if patch is not None:
            raise GraftError(_PAST_THE_PATCHER)

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: Any) -> torch.Tensor:
        """Where the host reads the weight for a merge: the weights themselves (bytes may arrive as numbers)."""
        if tuple(weight.shape) == tuple(self.logical_shape):
            return weight
        return self.dequantized(weight.to(self.weight.dtype))


def _nothing() -> None:
    """This host wants nothing back."""


def _activated(x: torch.Tensor, act: str | None, weight: Any, eps: float) -> torch.Tensor:
    """What newer hosts have a layer do to x before its product.

    Args:
        act: the host's name for it.
        weight: for ``rms_norm`` the norm, or its weight.
    """
    if act is None:
        return x
    if act == "rms_norm":
        return weight(x) if isinstance(weight, nn.Module) else comfy.rmsnorm.rms_norm(x, weight, eps)
    function = getattr(comfy.ops, "INPUT_ACT_EAGER", {}).get(act) or _INPUT_ACTS.get(act)
    if function is None:
        raise GraftError(
            f"this ComfyUI has a layer apply {act}, which this version of Graft does not know: update Graft"
        )
    return function(x)


def entering(layer: nn.Module, arguments: tuple, named: Mapping[str, Any]) -> torch.Tensor:
    """What a layer of the host's or ours multiplies its weight by, of the arguments of its call."""
    asked = dict(zip(("input", "input_act", "act_weight"), arguments, strict=False)) | dict(named)
    x = asked["input"] if "input" in asked else first_argument(layer, arguments, named)
    if not isinstance(layer, nn.Linear):
        return x
    return _activated(x, asked.get("input_act"), asked.get("act_weight"), asked.get("act_eps", 0.0))


class GraftOps(comfy.ops.manual_cast):
    """What a model is built from instead of `comfy.ops.manual_cast`."""

    class Linear(HostLayer, LinearMath, comfy.ops.manual_cast.Linear):
        def forward(
            self, input: torch.Tensor, input_act: str | None = None, act_weight: Any = None,
            residual: torch.Tensor | None = None, residual_scale: torch.Tensor | None = None, act_eps: float = 0.0,
            **asked: Any,
        ) -> torch.Tensor:  # fmt: skip
            """``residual + residual_scale · linear(act(input))``, as newer hosts write it in one call."""
            y = super().forward(_activated(input, input_act, act_weight, act_eps), **asked)
            if residual is None:
                return y
            return residual + y if residual_scale is None else torch.addcmul(residual, y, residual_scale)

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
        keywords = ("out_dtype",)

        def host_rows(self, input: torch.Tensor, *args: Any, **asked: Any) -> torch.Tensor:
            """Rows of the table where it lies, of which newer hosts index the weight."""
            return self.forward(input.to(self.weight.device), *args, **asked)

    class MoEExperts(HostLayer, ExpertsMath, comfy.ops.CastWeightBiasOp):
        """gpt-oss's experts; the host has layers for them in its own quantized formats only."""

        _resident: tuple[torch.Tensor, torch.Tensor | None] | None = None

        @contextmanager
        def bank_resident(self, input: torch.Tensor) -> Iterator[Any]:
            """Within this, all experts lie where x does."""
            data, bias, release = self.fetch(input)
            self._resident = data, bias
            try:
                yield self
            finally:
                self._resident = None
                release()

        def expert_linear(self, input: torch.Tensor, i: int) -> torch.Tensor:
            if self._resident is not None:
                return self.compute_expert(input, i, *self._resident)
            with self.bank_resident(input):
                return self.expert_linear(input, i)

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
