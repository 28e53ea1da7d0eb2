"""The same operations as nodes of a traced graph, for `torch.compile`.

Chunked decoding, thread-local scratch and the choice of a kernel are nothing that dynamo could or should
trace: in a graph, `linear` and `dequantize` are each one opaque operator with a known output shape.
Strengths and factors are tensors that go in, so a new one does not recompile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import dispatch, int8

# the scratch outlives a call, so its memory may not come from a CUDA graph's pool (mode="reduce-overhead"): torch from
# 2.8 on leaves the operators out of the graphs
_OUTSIDE_OF_GRAPHS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


def operator(schema: str) -> Callable[[Any], Any]:
    """`torch.library.custom_op`, or what torch before 2.4, with which Forge comes, has in its place.

    The schema is given and not left to the annotations: torch before 2.7 does not read ``list[...]`` there.
    """
    name, types = f"graft::{schema.partition('(')[0]}", schema[schema.index("(") :]
    if hasattr(torch.library, "custom_op"):
        return torch.library.custom_op(name, mutates_args=(), schema=types, **_OUTSIDE_OF_GRAPHS)

    def register(function: Any) -> Any:
        torch.library.define(name, types)
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        function.register_fake = torch.library.impl_abstract(name)
        return function

    return register


def _together(
    down: torch.Tensor | None, scale: torch.Tensor | None, ups: list[torch.Tensor], places: list[int]
) -> dispatch.LowRank | None:
    if down is None or scale is None:
        return None
    return dispatch.LowRank(down, scale, tuple(zip(places[::2], places[1::2], ups, strict=True)))


@operator(
    "linear(Tensor x, Tensor data, str fmt, int rows, Tensor? bias, Tensor? down, Tensor? scale, Tensor[] ups, "
    "int[] places, str backend, Tensor? weight_scale) -> Tensor"
)
def linear(
    x: torch.Tensor, data: torch.Tensor, fmt: str, rows: int, bias: torch.Tensor | None, down: torch.Tensor | None,
    scale: torch.Tensor | None, ups: list[torch.Tensor], places: list[int], backend: str,
    weight_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """`dispatch.linear` with the low-rank terms taken apart: `places` holds start and first rank of each up."""
    low_rank = _together(down, scale, ups, places)
    return dispatch.linear(x, data, fmt, bias, low_rank, rows, backend, weight_scale)


@linear.register_fake
def _(x, data, fmt, rows, bias, down, scale, ups, places, backend, weight_scale):
    return x.new_empty(*x.shape[:-1], rows)


@operator(
    "int8_linear(Tensor x, Tensor data, str fmt, Tensor row_scales, Tensor? bias, Tensor? down, Tensor? scale, "
    "Tensor[] ups, int[] places, str backend, Tensor? weight_scale) -> Tensor"
)
def int8_linear(
    x: torch.Tensor, data: torch.Tensor, fmt: str, row_scales: torch.Tensor, bias: torch.Tensor | None,
    down: torch.Tensor | None, scale: torch.Tensor | None, ups: list[torch.Tensor], places: list[int], backend: str,
    weight_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """`int8.linear` with the low-rank terms taken apart."""
    return int8.linear(x, data, fmt, row_scales, bias, _together(down, scale, ups, places), backend, weight_scale)


@int8_linear.register_fake
def _(x, data, fmt, row_scales, bias, down, scale, ups, places, backend, weight_scale):
    return x.new_empty(*x.shape[:-1], row_scales.shape[0])


@operator("dequantize(Tensor data, str fmt, int[] shape, ScalarType dtype, str backend, Tensor? scale) -> Tensor")
def dequantize(
    data: torch.Tensor, fmt: str, shape: list[int], dtype: torch.dtype, backend: str, scale: torch.Tensor | None
) -> torch.Tensor:
    """`dispatch.dequantize` of a whole weight."""
    result = dispatch.dequantize(data, fmt, tuple(shape), dtype, backend, scale)
    # an operator may not hand its input on
    return result.clone() if result.data_ptr() == data.data_ptr() else result


@dequantize.register_fake
def _(data, fmt, shape, dtype, backend, scale):
    return data.new_empty(shape, dtype=dtype)
