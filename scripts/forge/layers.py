"""Forge's layers as Graft runs them: the arithmetic of each kind, and what is known about one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...kernels import Format, UnsupportedFormat, by_name
from ...ops.factors import FactorCache
from ...ops.layers import ConvMath, EmbeddingMath, LinearMath, PackedLayer, autocast_dtype, format_of
from ...ops.residual import ResidualStack, RunningResidual
from ...ops.strengths import Call
from . import patches


class ForgeMath(PackedLayer):
    """The arithmetic of a layer whose weight Forge holds."""

    weight: torch.Tensor | None = None  # type: ignore[assignment]
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def __init__(self, layer: nn.Module, fmt: Format, shape: torch.Size) -> None:
        super().__init__()
        self.fmt = fmt
        self.logical_shape = shape

    @contextlib.contextmanager
    def holding(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Iterator[None]:
        """With the layer's own tensors, which adapters look at while they are put together."""
        self.weight, self.bias = weight, bias
        try:
            yield
        finally:
            self.weight = self.bias = None

    def format_of(self, data: torch.Tensor) -> Format:
        """Bytes are in the layer's format; anything else is a float tensor that says itself what it is."""
        assert self.fmt is not None
        return self.fmt if data.dtype == torch.uint8 else format_of(data)

    def scale_of(self, data: torch.Tensor) -> torch.Tensor | None:
        """What packed `data` is multiplied by beside its format, fp32 ``[1]`` or ``[rows]``, on its device."""
        return None if self.scale is None or data.dtype != torch.uint8 else self.scale.to(data.device)

    def gives(self, x: torch.Tensor) -> torch.dtype:
        """The dtype of what Forge's own forward makes of `x`."""
        return autocast_dtype(x) or x.dtype

    def takes(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`x` as `compute` takes it, for a computation in `dtype`."""
        return x.to(dtype)


class ForgeLinear(ForgeMath, LinearMath):
    """``[..., K] -> [..., N]``."""


class ForgeConv(ForgeMath, ConvMath):
    """``[B, C, H, W] -> [B, N, H, W]``."""

    _conv_forward = nn.Conv2d._conv_forward  # type: ignore[assignment]

    def __init__(self, layer: nn.Conv2d, fmt: Format, shape: torch.Size) -> None:
        super().__init__(layer, fmt, shape)
        for name in ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(layer, name))


class ForgeEmbedding(ForgeMath, EmbeddingMath):
    """Integer indices ``[...] -> [..., width]``, in the dtype that Forge has chosen for the layer."""

    def __init__(self, layer: nn.Module, fmt: Format, shape: torch.Size) -> None:
        super().__init__(layer, fmt, shape)
        self.given = getattr(layer, "_dtype", None) or torch.float32

    def gives(self, x: torch.Tensor) -> torch.dtype:
        return self.given

    def takes(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        self.dtype = dtype
        return x


def math_of(layer: nn.Module, fmt: Format, shape: torch.Size) -> ForgeMath:
    """What runs a layer of one of Forge's classes."""
    if isinstance(layer, nn.Embedding):
        return ForgeEmbedding(layer, fmt, shape)
    return ForgeConv(layer, fmt, shape) if isinstance(layer, nn.Conv2d) else ForgeLinear(layer, fmt, shape)


class LayerState:
    """What Graft knows about one of Forge's layers. The format belongs to the layer: parameters get replaced.

    Attributes:
        header: what baking lost of the weight, while it is baked.
        where: its path in a diffusion model; empty in a text encoder.
        int8: the choice (`ops/int8.RULES`) by which it was told to multiply in int8, if it can; empty without.
        refused: why this layer runs in Forge's own forward.
        path, reason: how its LoRAs run, and why not beside the weight; empty without any.
        left_out: why patches of theirs fit nothing.
        residual: them, put together from the patches `seen`.
        ran: dtype and device of the computation for which they are put together.
        stale: whether there may be other patches by now.
        varies: whether a strength of theirs depends on the call of the model.
        call: that for which `residual` is, if so.
    """

    def __init__(self, layer: nn.Module, fmt: Format, shape: torch.Size) -> None:
        self.fmt, self.shape = fmt, shape
        self.math = math_of(layer, fmt, shape)
        self.known: patches.Known = {}
        self.cache = FactorCache(keep=1)
        self.where, self.int8 = "", ""
        self.header: torch.Tensor | None = None
        self.refused = ""
        self.path = self.reason = ""
        self.left_out: list[str] = []
        self.residual: RunningResidual | None = None
        self.seen: tuple = ()
        self.ran: tuple[torch.dtype, torch.device] | None = None
        self.stale = True
        self.varies = False
        self.call: Call | None = None
        self._stack = ResidualStack()

    def take(self, stack: ResidualStack, seen: tuple, left_out: list[str], call: Call | None) -> None:
        """Run with these adapters, of this layer alone, from now on."""
        self._stack, self.seen, self.varies = stack, seen, stack.varies
        self.ran = seen[0], seen[1]
        self.start(call)
        assert self.residual is not None
        self.path, self.reason = self.residual.residual.path, self.residual.residual.reason
        self.left_out = left_out + self.residual.residual.rejected

    def start(self, call: Call | None) -> None:
        """Run with the strengths that the adapters have in this call."""
        if self.seen:
            (where,) = self._stack.residuals
            self.call = call
            self.residual = self._stack.running({where: self.math}, self.seen[1], call)[where]

    def release(self) -> None:
        """Let go of the factors; they are put together again when the layer next runs."""
        if self.seen:
            self.residual, self.seen, self.call = None, (), None
            self.stale, self.varies = True, False
            self._stack = ResidualStack()
            self.known, self.cache = {}, FactorCache(keep=1)

    def forget(self) -> None:
        """There are no adapters any more."""
        if self.path:
            self.release()
            self.ran, self.stale = None, False
            self.path, self.reason, self.left_out = "", "", []


STATE = "_graft_state"


def state_of(layer: nn.Module) -> LayerState | None:
    """What Graft knows about `layer`; None if it has not seen it."""
    return layer.__dict__.get(STATE)


def describe(weight: Any) -> tuple[Format, torch.Size]:
    """Format and logical shape of a parameter of Forge's.

    Raises:
        GraftError: it says neither itself, nor does its dtype.
    """
    if weight is None:
        raise UnsupportedFormat("the layer has no weight")
    cls, shape = getattr(weight, "gguf_cls", None), torch.Size(map(int, getattr(weight, "real_shape", weight.shape)))
    if cls is not None:
        named = getattr(getattr(cls, "qtype", None), "name", None) or getattr(cls, "__name__", "")
        return by_name(named), shape
    if weight.data.is_floating_point() and weight.data.element_size() > 1:
        return format_of(weight.data), shape
    raise UnsupportedFormat(f"a weight of {weight.data.dtype} does not say what it holds")
