"""`PackedTensor`: a GGUF tensor on its way from the file into a layer.

Hosts look at shapes and dtypes in state dicts, rename, split and join them, long before a layer exists
that could hold packed bytes. A PackedTensor shows them the logical shape and a float dtype. Splitting,
joining and picking along rows, or any dimension behind which whole blocks lie, keeps it packed, since
blocks are independent; any other operation goes on with the weights as an ordinary tensor in fp32, so
that nothing is rounded that nobody asked to round. The bytes are only ever read.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import CorruptFile, Format, dequantize
from .files.gguf import GGUFTensor

_aten = torch.ops.aten

_READ_ONLY = "packed weights are read-only: load them into a layer, or dequantize() them"


class PackedTensor(torch.Tensor):
    """Packed bytes that look like a float tensor.

    Attributes:
        packed: ``uint8``, flat: the bytes as they stand in the file (a view of the memory map).
        fmt: their format.
        scale: fp32 ``[1]`` or ``[rows]``, by which the weights are multiplied that the bytes stand for, or None.
    """

    packed: torch.Tensor
    fmt: Format
    scale: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, packed: torch.Tensor, fmt: Format, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16,
        scale: torch.Tensor | None = None,
    ) -> PackedTensor:  # fmt: skip
        """Args:
        packed: the bytes; as many as `shape` needs in `fmt`.
        fmt: a quantized format.
        shape: the logical shape.
        dtype: the float dtype to show.
        scale: beside the bytes, one for all or one for each row, where the file has such.
        """
        # a view made in inference mode of a tensor from outside of it has to be an ordinary tensor, too
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(
                cls, tuple(shape), dtype=dtype, device=packed.device, requires_grad=False
            )
        self.packed = packed.reshape(-1)
        self.fmt = fmt
        self.scale = scale
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights as an ordinary tensor of the same shape, in `dtype` or the one that is shown."""
        return dequantize(self.packed, self.fmt, self.shape, dtype or self.dtype, scale=self.scale)

    @property
    def rows_are_whole(self) -> bool:
        """Whether dimension 0 can be cut without cutting a block."""
        return self.is_whole(0)

    def is_whole(self, dim: int) -> bool:
        """Whether dimension `dim` can be cut without cutting a block."""
        if not self.dim() or not self.numel():
            return False
        return math.prod(self.shape[dim % self.dim() + 1 :]) % self.fmt.block_size == 0

    def units(self, dim: int) -> torch.Tensor:
        """The bytes as ``[before, n, behind]`` of a dimension of n that can be cut."""
        dim %= self.dim()
        return self.packed.view(math.prod(self.shape[:dim]), self.shape[dim], -1)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """What it takes in memory, by which hosts count."""
        return self.packed.nbytes

    def with_packed(self, packed: torch.Tensor, shape: Sequence[int] | None = None) -> PackedTensor:
        """The same format and scale around other bytes."""
        scale = None if self.scale is None else self.scale.to(packed.device)
        return PackedTensor(packed, self.fmt, self.shape if shape is None else shape, self.dtype, scale)

    def row_scales(self) -> torch.Tensor:
        """The scale of each row, fp32 ``[rows]``."""
        one = torch.ones(1, device=self.packed.device) if self.scale is None else self.scale
        return one.expand(self.shape[0]) if one.numel() == 1 else one

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor({self.fmt.name}, {list(self.shape)}, {self.dtype}, {self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PackedTensor, (self.packed, self.fmt, tuple(self.shape), self.dtype, self.scale)

    def __deepcopy__(self, memo: dict) -> PackedTensor:
        return self.with_packed(self.packed.clone())

    def storage(self) -> Any:
        """What safetensors asks for at last, before it saves."""
        raise TypeError("packed weights have no storage of floats that could be saved: dequantize() them first")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(_READ_ONLY)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            # torch multiplies two of one dtype only, and here is the last place that knows of both
            dtypes = [t.dtype for t in (*args, *(kwargs or {}).values()) if _is_float(t)]
            if dtypes:
                args, kwargs = _dequantized(args, cls, dtypes[0]), _dequantized(kwargs or {}, cls, dtypes[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if any(isinstance(tensor, PackedTensor) for tensor in written(func, args, kwargs)):
            raise TypeError(_READ_ONLY)
        # in inference mode composite operations arrive whole: `to` is made of `_to_copy`, `chunk` of `split`
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func._schema.name.endswith("_like") or func._schema.name.startswith("aten::new_"):
            return func(_empty_like(args[0]), *args[1:], **kwargs)
        return on_weights(func, args, kwargs, cls)


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes to: ``self`` of ``add_``, ``out``."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[index] if index < len(args) else kwargs.get(argument.name)


def on_weights(func: Any, args: Sequence[Any], kwargs: dict[str, Any], cls: type) -> Any:
    """`func` on the same arguments, with every `cls` in them as an ordinary tensor in fp32."""
    # torch notes what a view was made from, which it cannot do on a tensor made in inference mode; for all else the
    # caller's modes stay, since to leave inference mode is also to turn gradients on
    outside = func.is_view and torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if outside else contextlib.nullcontext():
        return func(*_dequantized(args, cls), **_dequantized(kwargs, cls))


def _dequantized(value: Any, cls: Any, dtype: torch.dtype = torch.float32) -> Any:
    """`value` with every `cls` in it, at any depth of lists and dicts, replaced by its weights in `dtype`."""
    if isinstance(value, cls):
        return value.dequantize(dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_dequantized(v, cls, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _dequantized(v, cls, dtype) for k, v in value.items()}
    return value


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, PackedTensor) and value.is_floating_point()


def _same(tensor: PackedTensor, *args: Any, **kwargs: Any) -> PackedTensor:
    return tensor.with_packed(tensor.packed)


def _clone(tensor: PackedTensor, **kwargs: Any) -> PackedTensor:
    return tensor.with_packed(tensor.packed.clone())


def _to_copy(tensor: PackedTensor, **kwargs: Any) -> torch.Tensor:
    """A move keeps the bytes; another dtype is a question for the weights themselves."""
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if dtype is None or dtype == tensor.dtype:
        moved = tensor.packed.to(device=device, non_blocking=bool(kwargs.get("non_blocking")), copy=True)
        return tensor.with_packed(moved)
    # in fp32 first where more is asked for than is shown, so that nothing is rounded on the way
    wide = tensor.dequantize(torch.float32)
    return wide.to(device=device, dtype=dtype)


def _empty_like(tensor: PackedTensor, **kwargs: Any) -> torch.Tensor:
    """Room for the weights, not for the bytes."""
    dtype, device = kwargs.get("dtype") or tensor.dtype, kwargs.get("device") or tensor.device
    return torch.empty(tensor.shape, dtype=dtype, device=device)


def _copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    if isinstance(target, PackedTensor) or not isinstance(source, PackedTensor):
        return NotImplemented
    wanted = target.dtype if target.dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32
    return _aten.copy_.default(target, source.dequantize(wanted), non_blocking)


def _slice(tensor: PackedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    begin, stop, _ = slice(start, end).indices(tensor.shape[dim])
    if step == 1 and (begin, stop) == (0, tensor.shape[dim]):
        return _same(tensor)  # `[:, :]`, of which newer torch makes nothing itself
    if not tensor.is_whole(dim):
        return NotImplemented
    return _picked(tensor, dim, lambda t, d: t.movedim(d, 0)[begin : max(begin, stop) : step].movedim(0, d))


def _picked(tensor: PackedTensor, dim: int, pick: Callable[[torch.Tensor, int], torch.Tensor]) -> PackedTensor:
    """Those units of dimension `dim` that `pick` takes of its dimension; what a view can hold is not copied."""
    scale = tensor.scale
    if scale is not None and scale.numel() > 1 and dim % tensor.dim() == 0:
        scale = pick(scale, 0)
    return _with_units(tensor, dim, pick(tensor.units(dim), 1), scale)


def _with_units(tensor: PackedTensor, dim: int, units: torch.Tensor, scale: torch.Tensor | None) -> PackedTensor:
    """`tensor` with another number of units in dimension `dim`."""
    shape = list(tensor.shape)
    shape[dim] = units.shape[1]
    return PackedTensor(units, tensor.fmt, shape, tensor.dtype, scale)


def _split_with_sizes(tensor: PackedTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    if not tensor.is_whole(dim) or sum(sizes) != tensor.shape[dim] or min(sizes) < 0:
        return NotImplemented
    edges = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    return [_picked(tensor, dim, functools.partial(torch.narrow, start=a, length=b - a)) for a, b in edges]


def _split(tensor: PackedTensor, size: int, dim: int = 0) -> Any:
    count = tensor.shape[dim]
    return _split_with_sizes(tensor, [min(size, count - start) for start in range(0, count, size)], dim)


def _index_select(tensor: Any, dim: int, index: torch.Tensor) -> Any:
    if not isinstance(tensor, PackedTensor) or not tensor.is_whole(dim):
        return NotImplemented
    return _picked(tensor, dim, lambda t, d: t.index_select(d, index))


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    packed = [t for t in tensors if isinstance(t, PackedTensor)]
    first = packed[0]

    def others(tensor: torch.Tensor) -> list[int]:
        return [n for d, n in enumerate(tensor.shape) if d != dim % tensor.dim()]

    alike = len(packed) == len(tensors) and all(
        t.fmt == first.fmt and t.dim() == first.dim() and t.is_whole(dim) and others(t) == others(first) for t in packed
    )
    scaled = any(t.scale is not None for t in packed)
    if not alike or (scaled and dim % first.dim() != 0):
        return NotImplemented
    scale = torch.cat([t.row_scales() for t in packed]) if scaled else None
    return _with_units(first, dim, torch.cat([t.units(dim) for t in packed], dim=1), scale)


def _reshape(tensor: PackedTensor, shape: Sequence[int]) -> Any:
    """Blocks run along the flat order of the elements, so a reshape leaves the bytes as they are."""
    # a tensor without memory works out the -1, or says what is wrong with the shape
    wanted = torch.empty(tensor.shape, device="meta").reshape(*shape).shape
    if tensor.scale is not None and tensor.scale.numel() > 1 and wanted[:1] != tensor.shape[:1]:
        return NotImplemented  # scales belong to rows
    return tensor.with_packed(tensor.packed, wanted)


def _unsqueeze(tensor: PackedTensor, dim: int) -> Any:
    shape = list(tensor.shape)
    shape.insert(dim % (tensor.dim() + 1), 1)
    return _reshape(tensor, shape)


def _squeeze(tensor: PackedTensor, dims: int | Sequence[int] | None = None) -> Any:
    chosen = range(tensor.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    dropped = {dim % tensor.dim() for dim in chosen}
    return _reshape(tensor, [n for dim, n in enumerate(tensor.shape) if n != 1 or dim not in dropped])


_PRODUCTS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.mm, torch.bmm, torch.mv,
    torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__,
}  # fmt: skip

_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.lift_fresh.default: _same,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_,
    _aten.empty_like.default: _empty_like,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split_with_sizes,
    _aten.cat.default: _cat,
    _aten.index_select.default: _index_select,
    _aten.view.default: _reshape,
    _aten._unsafe_view.default: _reshape,
    _aten.reshape.default: _reshape,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.squeeze.default: _squeeze,
    _aten.squeeze.dim: _squeeze,
    _aten.squeeze.dims: _squeeze,
}


def as_weight(tensor: GGUFTensor) -> torch.Tensor:
    """A tensor of a file as a state dict holds it: packed, or as it is where torch has its type."""
    if tensor.fmt.is_quantized:
        return PackedTensor(tensor.data, tensor.fmt, tensor.shape)
    assert tensor.fmt.dtype is not None
    return tensor.data.view(tensor.fmt.dtype).reshape(tensor.shape)


def in_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of any tensor in fp32: a packed one that is shown in fp32 would else stay packed."""
    return tensor.dequantize(torch.float32) if isinstance(tensor, PackedTensor) else tensor.to(torch.float32)


State = Mapping[str, torch.Tensor]


def convert_rows(state: State, convert: Callable[[dict], dict | None]) -> dict[str, torch.Tensor] | None:
    """What a host's conversion of names makes of a state dict, exactly: packed rows of one format stay packed.

    A host joins layers in memory that it makes for floats of the first part's dtype. Here it is given numbers in the
    place of rows, and where those end up the rows are taken to.

    Args:
        convert: takes a dict, from which it may remove entries, and returns another or None. Tensors are moved whole,
            cut and joined along dimension 0; it sees one dimension of each.

    Returns:
        what `convert` returns; parts of several formats joined in fp32, or the widest of their dtypes.

    Raises:
        CorruptFile: a part of a joined tensor is missing.
    """
    tensors = list(state.values())
    rows = [max((1, *tensor.shape[:1])) for tensor in tensors]
    # with a gap behind each tensor, so that a run of numbers never spans two
    starts = list(itertools.accumulate((count + 1 for count in rows), initial=0))[:-1]
    numbers = {name: torch.arange(s, s + n) for name, s, n in zip(state, starts, rows, strict=True)}
    left = dict(numbers)
    converted = convert(left)
    if converted is None:
        return None
    used = sum(n for name, n in zip(state, rows, strict=True) if name not in left)
    if used < sum(order.numel() for order in converted.values()):
        raise CorruptFile("layers that this host joins are incomplete in the file: get it from another source")

    def rows_of(run: torch.Tensor) -> torch.Tensor:
        source = bisect.bisect_right(starts, int(run[0])) - 1
        first = int(run[0]) - starts[source]
        return _exact_rows(tensors[source], first, first + run.numel())

    return {name: _joined([rows_of(run) for run in _runs(order)]) for name, order in converted.items()}


def _runs(numbers: torch.Tensor) -> Sequence[torch.Tensor]:
    """`numbers` ``[n]``, cut where one does not follow on the one before."""
    return numbers.tensor_split((numbers.diff() != 1).nonzero().flatten() + 1)


def _exact_rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    if not tensor.dim() or stop - start == tensor.shape[0]:
        return tensor
    if isinstance(tensor, PackedTensor) and not tensor.rows_are_whole:
        tensor = tensor.dequantize(torch.float32)
    return tensor[start:stop]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    formats = {part.fmt if isinstance(part, PackedTensor) and part.rows_are_whole else None for part in parts}
    if len(formats) > 1 or None in formats:
        parts = [p.dequantize(torch.float32) if isinstance(p, PackedTensor) else p for p in parts]
    return torch.cat(list(parts))
