"""The same operations as nodes of a traced graph, for `torch.compile`.

Chunked decoding, thread-local scratch and the choice of a kernel are nothing that dynamo could or should
trace: in a graph, `linear` and `dequantize` are each one opaque operator with a known output shape.
Strengths and factors are tensors that go in, so a new one does not recompile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import dispatch


def _operator(schema: str) -> Callable[[Any], Any]:
    """`torch.library.custom_op`, or what torch before 2.4, with which Forge comes, has in its place."""
    name = f"graft::{schema.partition('(')[0]}"
    if hasattr(torch.library, "custom_op"):
        return torch.library.custom_op(name, mutates_args=())

    def register(function: Any) -> Any:
        torch.library.define(name, schema[schema.index("(") :])
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        function.register_fake = torch.library.impl_abstract(name)
        return function

    return register


@_operator(
    "linear(Tensor x, Tensor data, str fmt, int rows, Tensor? bias, Tensor? down, Tensor? scale, Tensor[] ups, "
    "int[] places, str backend) -> Tensor"
)
def linear(
    x: torch.Tensor, data: torch.Tensor, fmt: str, rows: int, bias: torch.Tensor | None, down: torch.Tensor | None,
    scale: torch.Tensor | None, ups: list[torch.Tensor], places: list[int], backend: str,
) -> torch.Tensor:  # fmt: skip
    """`dispatch.linear` with the low-rank terms taken apart: `places` holds start and first rank of each up."""
    low_rank = None
    if down is not None and scale is not None:
        pairs = zip(places[::2], places[1::2], ups, strict=True)
        low_rank = dispatch.LowRank(down, scale, tuple(pairs))
    return dispatch.linear(x, data, fmt, bias, low_rank, rows, backend)


@linear.register_fake
def _(x, data, fmt, rows, bias, down, scale, ups, places, backend):
    return x.new_empty(*x.shape[:-1], rows)


@_operator("dequantize(Tensor data, str fmt, int[] shape, ScalarType dtype, str backend) -> Tensor")
def dequantize(data: torch.Tensor, fmt: str, shape: list[int], dtype: torch.dtype, backend: str) -> torch.Tensor:
    """`dispatch.dequantize` of a whole weight."""
    result = dispatch.dequantize(data, fmt, tuple(shape), dtype, backend)
    # an operator may not hand its input on
    return result.clone() if result.data_ptr() == data.data_ptr() else result


@dequantize.register_fake
def _(data, fmt, shape, dtype, backend):
    return data.new_empty(shape, dtype=dtype)
