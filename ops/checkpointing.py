"""Gradient checkpointing: of a block only what went into it is kept, and on the way back it runs a second time.

A model call is over by then and its adapters are off the layers (`calls.py`). So what ran beside each layer is noted
with the block and put back for the second run, which may be in another thread: autograd has one for each GPU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .calls import Calls, calls_on
from .layers import PackedLayer, packed_layers
from .residual import RunningResidual


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that follow one another: the outermost entries of its lists that hold several layers."""
    return list(_blocks(model, False))


def _blocks(module: nn.Module, in_list: bool) -> Iterator[nn.Module]:
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))  # UNets call the entries of such a one by one
    if in_list and not is_list and len(packed_layers(module)) > 1:
        yield module
        return
    for child in module.children():
        yield from _blocks(child, in_list or is_list)


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Within this, the blocks of `model` keep their inputs alone for the way back, which has to be `backward`."""
    replaced = [(block, vars(block).get("forward")) for block in blocks_of(model)]
    try:
        for block, _ in replaced:
            block.forward = functools.partial(_run, block, block.forward)
        yield
    finally:
        for block, own in replaced:
            del block.forward
            if own is not None:
                block.forward = own


def _run(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    layers = packed_layers(block)
    beside, calls = {layer: layer.residual for layer in layers.values()}, calls_on(layers)
    given = args, kwargs
    tensors = _tensors_of(given)
    # a copy: what the model tells its blocks in a dict changes from one to the next
    kept = _with_tensors(given, tensors)

    def first() -> Any:
        return forward(*map(_own, args), **{name: _own(value) for name, value in kwargs.items()})

    def again(tensors: Sequence[torch.Tensor]) -> Any:
        own_args, own_kwargs = _with_tensors(kept, tensors)
        with _put_back(beside, calls):
            return forward(*own_args, **own_kwargs)

    returned: list[Any] = []
    # something that wants a gradient, whether or not what goes in does
    outputs = _Twice.apply(first, again, returned, torch.ones((), requires_grad=True), *tensors)
    return _with_tensors(returned[0], outputs)


def _tensors_of(value: Any) -> list[torch.Tensor]:
    """All in it, within tuples, lists, dicts and dataclasses."""
    found: list[torch.Tensor] = []
    _changed(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _with_tensors(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """A copy of it with these in their places."""
    following = iter(tensors)
    return _changed(value, lambda _: next(following))


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _changed(part, change) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_changed(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):  # Chroma's modulations
        copied = copy.copy(value)
        for field in fields(value):
            object.__setattr__(copied, field.name, _changed(getattr(value, field.name), change))
        return copied
    return value


class _Twice(torch.autograd.Function):
    """A block whose way back runs it a second time, in a graph of its own.

    That of torch saves tensors there past the counters by which autograd sees that something was written to them.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Callable[[], Any], again: Callable[[Sequence[torch.Tensor]], Any], returned: list[Any],
        wanting: torch.Tensor, *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        ctx.again = again
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        returned.append(first())
        outputs = tuple(_tensors_of(returned[0]))
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        given = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = _tensors_of(ctx.again([_own(tensor) for tensor in given]))
        pairs = [
            (output, grad) for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]  # fmt: skip
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
        return None, None, None, None, *(tensor.grad for tensor in given)


@contextlib.contextmanager
def _put_back(beside: Mapping[PackedLayer, RunningResidual | None], calls: Calls) -> Iterator[None]:
    """Run within the call that is over, or go on within it where it is not: another thread would wait for its end."""
    if calls.under_way and all(layer.residual is residual for layer, residual in beside.items()):
        yield
    else:
        with calls.enter(beside):
            yield


def _own(value: Any) -> Any:
    """A copy, for blocks that write into what they are given."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


__all__ = ["blocks_of", "checkpointed"]
