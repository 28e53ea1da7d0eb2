"""Linear, Conv1d/2d/3d and Embedding on packed weights, with live adapters beside them.

The format belongs to the layer: `weight` is an ordinary parameter (packed bytes as flat ``uint8``, floats
as they came, integers as floats), and the layer knows `fmt` and `logical_shape`. Hosts may move, pin and
re-wrap the parameter as they like; nothing hangs on it. Unquantized layers are Graft layers too,
because a host that patches an F16 weight rounds the LoRA to fp16.

`PackedLayer` is the mixin; a host's own layer classes take it before their own (see `nodes/ops.py`).
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from ..kernels import (
    FORMATS,
    Format,
    GraftError,
    LowRank,
    UnsupportedFormat,
    decoded_rows,
    dequantize,
    embedding,
    int8,
    is_slow,
    linear,
    retried,
)
from .files.shapes import fitted
from .frozen import frozen, is_wanted
from .merged import MergedTensor
from .packed import PackedTensor

if TYPE_CHECKING:
    from .calls import Calls
    from .residual import RunningResidual

_TO_INPUTS: dict[int, Callable[..., torch.Tensor]] = {1: conv1d_input, 2: conv2d_input, 3: conv3d_input}

_PLAIN = {fmt.dtype: fmt for fmt in FORMATS if fmt.dtype is not None}

# torch before 2.4, with which Forge comes, knows autocast on CUDA and on CPUs only, and by names of their own
_ASKS_BY_DEVICE = hasattr(torch, "get_autocast_dtype")


def format_of(tensor: torch.Tensor) -> Format:
    """The GGUF format of a weight: a PackedTensor's own, else that of its dtype.

    Raises:
        UnsupportedFormat: GGUF has none of this dtype.
    """
    if isinstance(tensor, PackedTensor):
        return tensor.fmt
    if tensor.dtype not in _PLAIN:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UnsupportedFormat(f"a weight is {kind}, which is no type of GGUF: convert it to fp16, bf16 or fp32")
    return _PLAIN[tensor.dtype]


def _floating(tensor: torch.Tensor) -> torch.Tensor:
    """Integers in a float type that holds them, so that what is merged into them is not rounded; others as they are."""
    if tensor.is_floating_point() or format_of(tensor).family != "integer":
        return tensor
    return tensor.to(torch.float32 if tensor.element_size() < 4 else torch.float64)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What torch's own layers would multiply x in and give back under `torch.autocast`; None where that is off."""
    kind = x.device.type
    if not _is_autocast(kind):
        return None
    if x.dtype == torch.float64:
        return x.dtype
    if _ASKS_BY_DEVICE:
        return torch.get_autocast_dtype(kind)
    return torch.get_autocast_cpu_dtype() if kind == "cpu" else torch.get_autocast_gpu_dtype()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Computes on tensors of this device in the dtypes that they have."""
    return torch.autocast(device.type, enabled=False) if _is_autocast(device.type) else contextlib.nullcontext()


def _has_autocast(kind: str) -> bool:
    try:
        return torch.amp.is_autocast_available(kind)
    except RuntimeError:  # a type of device that this torch does not know
        return False


# asked once and not in a call: compilers up to that of torch 2.9 would end a graph there, in every layer
_AUTOCASTS = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", torch._C._get_privateuse1_backend_name())
    if _ASKS_BY_DEVICE and _has_autocast(kind)
)


def _is_autocast(kind: str) -> bool:
    if _ASKS_BY_DEVICE:
        return kind in _AUTOCASTS and torch.is_autocast_enabled(kind)
    if kind == "cpu":
        return torch.is_autocast_cpu_enabled()
    return kind == "cuda" and torch.is_autocast_enabled()


class PackedLayer(nn.Module):
    """A layer whose weight may be packed, and beside which adapters may run.

    Attributes:
        fmt: format of the weight; None until it is loaded.
        logical_shape: the weight's shape as the architecture means it, ``[out, in, ...]``.
        residual: the adapters of the model call under way; set by `ResidualStack.active`.
        calls: what it has in common with the layers that it runs together with.
        backend: ``auto``, ``triton``, ``cpu`` or ``torch``.
        int8_bound: how far int8 may be off the weights for the layer to multiply in it (`ops/int8.py`); None where it
            does not multiply in it.
        int8_reason: why it does not, if it was asked to.
    """

    weight: torch.Tensor
    bias: Any  # a tensor or None: torch's own layers do not agree on how to declare it
    fmt: Format | None = None
    logical_shape: torch.Size
    residual: RunningResidual | None = None
    calls: Calls | None = None
    backend: str = "auto"
    int8_bound: float | None = None
    int8_reason: str = ""
    _cast_of: weakref.ref[torch.Tensor] | None = None

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Take the weight and bias as they are: bytes stay bytes, F16 stays F16."""
        weight = state_dict.get(prefix + "weight")
        weight = None if weight is None else fitted(weight, self.logical_shape)
        if weight is None:
            missing_keys.append(prefix + "weight")
        elif tuple(weight.shape) != tuple(self.logical_shape):
            error_msgs.append(
                f"size mismatch for {prefix}weight: the file has {tuple(weight.shape)}, "
                f"the model {tuple(self.logical_shape)}"
            )
        else:
            self.load_weight(weight)
        known = {prefix + "weight"}
        # a bias for a layer that was declared without one is not the model's: hosts ignore it, too
        if getattr(self, "bias", None) is not None:
            known.add(prefix + "bias")
            self._load_bias(state_dict.get(prefix + "bias"), prefix + "bias", missing_keys, error_msgs)
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]

    def _load_bias(self, bias: torch.Tensor | None, key: str, missing_keys: list[str], error_msgs: list[str]) -> None:
        rows = tuple(self.bias.shape)
        bias = None if bias is None else fitted(bias, rows)
        if bias is None:
            missing_keys.append(key)
        elif tuple(bias.shape) != rows:
            error_msgs.append(f"size mismatch for {key}: the file has {tuple(bias.shape)}, the model {rows}")
        else:
            plain = bias.dequantize(torch.float32) if isinstance(bias, PackedTensor | MergedTensor) else _floating(bias)
            self.bias = nn.Parameter(plain, requires_grad=False)

    def load_weight(self, weight: torch.Tensor) -> None:
        """Hold `weight`, a PackedTensor or a tensor of the logical shape, without copying it unless it is of integers.

        Raises:
            UnsupportedFormat: it is of a dtype that GGUF does not have.
        """
        weight = _floating(weight.dequantize() if isinstance(weight, MergedTensor) else weight)
        self.fmt = format_of(weight)
        data, scale = (weight.packed, weight.scale) if isinstance(weight, PackedTensor) else (weight.detach(), None)
        self.weight = nn.Parameter(data, requires_grad=False)
        # no parameter, and not in a state dict: hosts would take it for a weight of the model
        self.register_buffer("weight_scale", scale, persistent=False)
        self.register_buffer("int8_scales", None, persistent=False)
        self.register_buffer("bias_cast", None, persistent=False)

    def fetch(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, Callable[[], None]]:
        """Weight data and bias on x's device, and what to call when they are no longer needed.

        Hosts that offload weights override this with their own way of bringing them in.
        """
        # a module takes a while to find its own weight
        weight, bias, device = self._parameters["weight"], self._parameters.get("bias"), x.device
        assert weight is not None
        return _at(weight, device), None if bias is None else _at(bias, device), _nothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            raise GraftError(
                f"use a file of this model that is not GGUF: its code gave {x.dtype} to a {type(self).__name__} of "
                f"shape {list(self.logical_shape)}, which needs floating-point numbers"
            )
        dtype = autocast_dtype(x)
        if dtype is None:
            return self._run(x)
        # inside it would change the dtype of some of a layer's products, and not of those that add into the output
        with without_autocast(x.device):
            return self._run(x.to(dtype))

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        data, bias, release = self.fetch(x)
        try:
            if self.residual is None:
                return self.compute(x, data, bias)
            return self.residual(x, self, data, bias)
        finally:
            release()

    def compute(
        self, x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None = None, low_rank: LowRank | None = None
    ) -> torch.Tensor:
        """The layer's own operation on its base weight, with low-rank terms beside it."""
        raise NotImplementedError

    def compute_dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's own operation with `weight`, of the logical shape or a padded one, in x's dtype."""
        raise NotImplementedError

    def product(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """The layer's own operation on its base weight, without bias, in x's dtype and in no other."""
        raise NotImplementedError

    def input_gradient(self, grad: torch.Tensor, data: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The gradient at x, of `shape`, from that at `product`, in the latter's dtype."""
        raise NotImplementedError

    def bias_in(self, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """`bias` in `dtype`; the layer's own, which GGUF files hold in fp32, is cast once and not in every call."""
        if bias is None or bias.dtype == dtype:
            return bias
        own = self._parameters.get("bias")
        if own is None or own is not bias or own.requires_grad or torch.compiler.is_compiling():
            return bias.to(dtype)
        cast = self._buffers.get("bias_cast")
        known = cast is not None and cast.dtype == dtype and cast.device == bias.device
        if not known or self._cast_of is None or self._cast_of() is not bias:
            with torch.inference_mode(False):
                cast = bias.detach().to(dtype)
            # a buffer, so that the host moves it with the rest of the layer; it is in no state dict
            self.register_buffer("bias_cast", cast, persistent=False)
            self._cast_of = weakref.ref(bias)
        return cast

    def format_of(self, data: torch.Tensor) -> Format:
        """What `data` is in: packed bytes, or weights that a host has decoded and worked on already."""
        fmt = self.fmt
        assert fmt is not None
        if fmt.is_quantized:  # bytes
            return fmt if data.dtype == torch.uint8 else format_of(data)
        return fmt if data.dtype == self.weight.dtype else format_of(data)

    def scale_of(self, data: torch.Tensor) -> torch.Tensor | None:
        """What packed `data` is multiplied by beside its format, fp32 ``[1]`` or ``[rows]``, on its device."""
        scale = self._buffers.get("weight_scale")
        return None if scale is None or data.dtype != self.weight.dtype else _at(scale, data.device)

    def dequantized(self, data: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole weight in its logical shape, as a new tensor that the caller may write to."""
        data = self.weight.data if data is None else data
        fmt = self.format_of(data)
        if not fmt.is_quantized:
            return data.to(dtype, copy=True).reshape(self.logical_shape)
        return dequantize(data, fmt, self.logical_shape, dtype, self.backend, self.scale_of(data))

    def chunks(self, data: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Walk over the weight as ``[out, rest]``: ``(which rows, [n, rest] in dtype)``, gone with the next step."""
        rows, columns = self.logical_shape[0], math.prod(self.logical_shape[1:])
        return decoded_rows(data, self.format_of(data), rows, columns, dtype, self.backend, self.scale_of(data))

    def packed_weight(self) -> torch.Tensor:
        """The weight as it goes into a state dict: a PackedTensor, or the float tensor itself.

        It is shown in fp32, so that a host that copies it in the dtype that it shows rounds nothing.
        """
        assert self.fmt is not None
        if not self.fmt.is_quantized:
            return self.weight.data
        data = self.weight.data
        return PackedTensor(data, self.fmt, self.logical_shape, torch.float32, scale=self.scale_of(data))

    def extra_repr(self) -> str:
        return f"{list(self.logical_shape)}, {self.fmt.name if self.fmt else 'empty'}"


def _at(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor if tensor.device == device else tensor.to(device)


def _nothing() -> None:
    """Nothing to release: the weight never left."""


class LinearMath(PackedLayer):
    """``[..., K] -> [..., N]``."""

    def compute(
        self, x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None = None, low_rank: LowRank | None = None
    ) -> torch.Tensor:
        if is_wanted(x, data):
            return self._with_gradient(x, data, bias, low_rank)
        fmt, rows, scale = self.format_of(data), self.logical_shape[0], self.scale_of(data)
        if self.int8_bound is not None and fmt.is_quantized:
            scales = self._int8_scales_for(x, data)
            if scales is not None:
                return int8.linear(x, data, fmt, scales, bias, low_rank, self.backend, scale)
        return linear(x, data, fmt, bias, low_rank, rows, self.backend, scale)

    def _with_gradient(
        self, x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None, low_rank: LowRank | None
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = frozen(flat, self, data)
        if bias is not None:
            y = y + bias.to(y.dtype)
        if low_rank is not None:
            t = low_rank.project(flat)
            for start, first, up in low_rank.ups:
                y[:, start : start + up.shape[0]] += F.linear(t[:, first : first + up.shape[1]], up.to(y.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    def product(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        rows, scale = self.logical_shape[0], self.scale_of(data)
        return linear(x, data, self.format_of(data), None, None, rows, self.backend, scale)

    @retried
    def input_gradient(self, grad: torch.Tensor, data: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if is_slow(grad):
            return self.input_gradient(grad.float(), data, shape).to(grad.dtype)
        flat, total = grad.reshape(-1, grad.shape[-1]), None
        for rows, weight in self.chunks(data, grad.dtype):
            part = flat[:, rows] @ weight
            # each chunk's part is rounded once, and their sum once
            total = part if total is None else total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)
        return flat.new_zeros(shape) if total is None else total.to(grad.dtype).view(shape)

    def _int8_scales_for(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor | None:
        """The scales of the weight's int8 rows, on x's device; None where x is not multiplied in int8."""
        if not torch.compiler.is_compiling():  # in a graph the operator decides, on what was there when it was traced
            if not int8.pays(x, self.logical_shape[0], self.format_of(data), self.backend):
                return None
            self.prepare_int8(data)
        scales = self._buffers.get("int8_scales")
        return None if scales is None else scales.to(data.device)

    def prepare_int8(self, data: torch.Tensor) -> None:
        """Work out the scales of the int8 rows, once, and take no part where int8 is too far off.

        Args:
            data: the packed weight, on any device.
        """
        if self.int8_bound is None or self._buffers.get("int8_scales") is not None:
            return
        rows, columns = self.logical_shape
        scales, error = int8.prepare(data, self.format_of(data), (rows, columns), self.backend)
        if not error <= self.int8_bound:  # nor where it is no number
            self.int8_bound, self.int8_reason = None, f"weights off by {error:.1%}"
        else:
            self.register_buffer("int8_scales", scales, persistent=False)

    def compute_dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, weight, self.bias_in(bias, x.dtype))


class ConvMath(PackedLayer):
    """``[B, C, ...] -> [B, N, ...]``; a low-rank term is a k×k convolution to the ranks and a 1×1 one back."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    _conv_forward: Callable[..., torch.Tensor]

    def compute(
        self, x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None = None, low_rank: LowRank | None = None
    ) -> torch.Tensor:
        if is_slow(x):
            return self.compute(x.float(), data, bias, low_rank).to(x.dtype)
        if is_wanted(x, data):
            y = frozen(x, self, data)
            y = y if bias is None else y + bias.to(y.dtype).view(-1, *(1,) * len(self.logical_shape[2:]))
        else:
            y = self._convolve(x, data, bias)
        return y if low_rank is None else self._add_low_rank(x, y, low_rank)

    def product(self, x: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        return self._convolve(x, data, None)

    @retried
    def input_gradient(self, grad: torch.Tensor, data: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if is_slow(grad):
            return self.input_gradient(grad.float(), data, shape).to(grad.dtype)
        weight = self.dequantized(data, grad.dtype)
        if self.padding_mode == "zeros" and not isinstance(self.padding, str) and len(shape) == weight.dim():
            back = _TO_INPUTS[weight.dim() - 2]
            return back(shape, weight, grad, self.stride, self.padding, self.dilation, self.groups)
        with torch.enable_grad():  # whatever it does to the margins
            x = grad.new_zeros(shape).requires_grad_()
            return torch.autograd.grad(self._conv_forward(x, weight, None), x, grad)[0]

    @retried
    def _convolve(self, x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        bias, shape = self.bias_in(bias, x.dtype), self.logical_shape
        if self.groups != 1 or (torch.is_grad_enabled() and x.requires_grad):
            # on the way back autograd asks for the weight again: it must not lie in the scratch
            return self._conv_forward(x, self.dequantized(data, x.dtype), bias)
        parts = [
            self._conv_forward(x, weight.view(-1, *shape[1:]), None if bias is None else bias[rows])
            for rows, weight in self.chunks(data, x.dtype)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-len(shape) + 1)

    def _add_low_rank(self, x: torch.Tensor, y: torch.Tensor, low_rank: LowRank) -> torch.Tensor:
        kernel = self.logical_shape[2:]
        t = self._conv_forward(x, low_rank.down.to(x.dtype).view(-1, self.logical_shape[1], *kernel), None)
        t = t.movedim(-len(kernel) - 1, -1) * low_rank.scale.to(x.dtype)
        for start, first, up in low_rank.ups:
            term = F.linear(t[..., first : first + up.shape[1]], up.to(x.dtype)).movedim(-1, -len(kernel) - 1)
            y.narrow(-len(kernel) - 1, start, up.shape[0]).add_(term)
        return y

    def compute_dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._conv_forward(x, weight, self.bias_in(bias, x.dtype))


class EmbeddingMath(PackedLayer):
    """Integer indices ``[...] -> [..., width]``: only the rows that are looked up are decoded."""

    dtype: torch.dtype = torch.float32

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        data, _, release = self.fetch(x)
        usual = self.dtype
        try:
            self.dtype = out_dtype or usual
            with without_autocast(x.device):  # which leaves torch's own embeddings as they are
                return self.compute(x, data) if self.residual is None else self.residual(x, self, data, None)
        finally:
            self.dtype = usual
            release()

    def compute(
        self, x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None = None, low_rank: LowRank | None = None
    ) -> torch.Tensor:
        shape = (self.logical_shape[0], self.logical_shape[1])
        y = embedding(x, data, self.format_of(data), shape, self.dtype, self.backend, self.scale_of(data))
        if low_rank is not None:
            # ΔW = B·diag(S)·A, so row i of it is (B[i] ∘ S)·A
            for start, first, up in low_rank.ups:
                inside = (x >= start) & (x < start + up.shape[0])
                ranks = slice(first, first + up.shape[1])
                h = F.embedding((x - start).clamp(0, up.shape[0] - 1), up.to(y.dtype)) * low_rank.scale[ranks]
                y = y + torch.where(inside.unsqueeze(-1), h.to(y.dtype) @ low_rank.down[ranks].to(y.dtype), 0)
        return y

    def compute_dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.embedding(x, weight.to(self.dtype))


class ExpertsMath(PackedLayer):
    """A mixture of experts: one of E weights ``[out, in]`` is used at a time, ``[n, in] -> [n, out]``.

    The weight is ``[E, out, in]``, the bias ``[E, out]``.
    """

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **placed), requires_grad=False)
        biases = torch.empty(num_experts, out_features, **placed) if bias else None
        self.bias = None if biases is None else nn.Parameter(biases, requires_grad=False)

    def compute_expert(
        self, x: torch.Tensor, expert: int, data: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What one expert makes of x."""
        if self.residual is not None:
            raise GraftError("a LoRA on the experts of this text encoder cannot run: use the text encoder without it")
        fmt, scale, (count, rows, _) = self.format_of(data), self.scale_of(data), self.logical_shape
        scale = scale if scale is None or scale.numel() == 1 else scale[expert : expert + 1]
        own = data.view(count, -1)[expert] if fmt.is_quantized else data[expert]
        return linear(x, own, fmt, None if bias is None else bias[expert], None, rows, self.backend, scale)


class _Hostless(PackedLayer):
    """Builds an empty layer: shapes and settings, no memory for a weight that a file will bring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("dtype", None)
        device = kwargs.pop("device", None)
        super().__init__(*args, device="meta", **kwargs)
        self.take_shape(device)

    def take_shape(self, device: torch.device | str | None = None) -> None:
        """Note the logical shape and let go of the placeholder weight."""
        self.logical_shape = self.weight.shape
        self.register_parameter("weight", None)
        if self.bias is not None:
            self.bias = nn.Parameter(torch.zeros(self.bias.shape, device=device), requires_grad=False)


class Linear(_Hostless, LinearMath, nn.Linear):
    """`torch.nn.Linear` on a packed weight."""


class Conv1d(_Hostless, ConvMath, nn.Conv1d):
    """`torch.nn.Conv1d` on a packed weight."""


class Conv2d(_Hostless, ConvMath, nn.Conv2d):
    """`torch.nn.Conv2d` on a packed weight."""


class Conv3d(_Hostless, ConvMath, nn.Conv3d):
    """`torch.nn.Conv3d` on a packed weight."""


class Embedding(_Hostless, EmbeddingMath, nn.Embedding):
    """`torch.nn.Embedding` on a packed weight."""

    bias = None


def packed_layers(model: nn.Module, prefix: str = "") -> dict[str, PackedLayer]:
    """Every Graft layer of `model` under its path, e.g. ``double_blocks.0.img_attn.qkv``."""
    return {prefix + name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def unpack_leftovers(
    model: nn.Module, dtype_of: Callable[[nn.Module, str], torch.dtype] = lambda module, name: torch.float32
) -> None:
    """Give everything outside of our layers its weights: a norm scale or an embedding that arrived packed.

    Args:
        dtype_of: what the model holds this parameter or buffer of a module in.
    """
    for module in model.modules():
        for name, held in [*module._parameters.items(), *module._buffers.items()]:
            packed = held if isinstance(held, PackedTensor) else getattr(held, "data", None)
            if isinstance(packed, PackedTensor):
                plain = packed.dequantize(dtype_of(module, name))
                is_parameter = name in module._parameters
                setattr(module, name, nn.Parameter(plain, requires_grad=False) if is_parameter else plain)


__all__ = [
    "Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "PackedLayer", "packed_layers",
    "unpack_leftovers",
]  # fmt: skip
