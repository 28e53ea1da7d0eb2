"""Gradient checkpointing: of a block only what went into it is kept, and on the way back it runs a second time.

A model call is over by then and its adapters are off the layers (`calls.py`). So what ran beside each layer is noted
with the block and put back for the second run, which may be in another thread: autograd has one for each GPU.
What a block puts into dicts and lists that it is given, for the blocks behind it, comes out of it as what it returns
does: else no gradient would pass there (SeedVR2's first block keeps the embedding of the timestep for all others).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .calls import Calls, calls_on
from .layers import PackedLayer, packed_layers
from .residual import RunningResidual

_PLAIN = (type(None), bool, int, float, str, torch.Tensor, torch.dtype, torch.device, dict, list, tuple)


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
    put = _Put(given)

    def first() -> Any:
        return forward(*map(_own, args), **{name: _own(value) for name, value in kwargs.items()}), put.since()

    def again(tensors: Sequence[torch.Tensor]) -> Any:
        own_args, own_kwargs = _with_tensors(kept, tensors)
        put = _Put((own_args, own_kwargs))
        with _put_back(beside, calls):
            return forward(*own_args, **own_kwargs), put.since()

    returned: list[Any] = []
    # something that wants a gradient, whether or not what goes in does
    outputs = _Twice.apply(first, again, returned, torch.ones((), requires_grad=True), *tensors)
    result, entries = _with_tensors(returned[0], outputs)
    put.replace(entries)
    return result


class _Put:
    """What is put into the dicts and lists within a value from now on."""

    def __init__(self, value: Any) -> None:
        places: list[dict | list] = []
        _changed(value, lambda tensor: tensor, places.append)
        self._dicts = [(place, set(place)) for place in places if isinstance(place, dict)]
        self._lists = [(place, len(place)) for place in places if isinstance(place, list)]

    def since(self) -> list[Any]:
        """By place, the entries that are new."""
        in_dicts = [{name: place[name] for name in place if name not in before} for place, before in self._dicts]
        return [*in_dicts, *(place[before:] for place, before in self._lists)]

    def replace(self, entries: Sequence[Any]) -> None:
        """Put these, of `since`, in their places."""
        for (named, _), new in zip(self._dicts, entries, strict=False):
            named.update(new)
        for (listed, before), new in zip(self._lists, entries[len(self._dicts) :], strict=True):
            listed[before:] = new


def _tensors_of(value: Any) -> list[torch.Tensor]:
    """All in it, within tuples, lists, dicts and plain objects."""
    found: list[torch.Tensor] = []
    _changed(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _with_tensors(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """A copy of it with these in their places."""
    following = iter(tensors)
    return _changed(value, lambda _: next(following))


def _changed(
    value: Any, change: Callable[[torch.Tensor], torch.Tensor],
    place: Callable[[dict | list], None] = lambda _: None,
) -> Any:  # fmt: skip
    """A copy of it with other tensors; `place` is told each dict and list. What is in it twice is one in the copy."""
    copies: dict[int, Any] = {}

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if id(value) in copies:
            return copies[id(value)]
        if isinstance(value, tuple):
            parts = [of(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, (dict, list)):
            place(value)
            copied: Any = {} if isinstance(value, dict) else []
            copies[id(value)] = copied
            if isinstance(value, dict):
                copied.update((name, of(part)) for name, part in value.items())
            else:
                copied.extend(of(part) for part in value)
        elif _is_plain(value):
            copied = copies[id(value)] = copy.copy(value)
            for name, part in vars(value).items():
                object.__setattr__(copied, name, of(part))
        else:
            return value
        return copied

    return of(value)


def _is_plain(value: Any) -> bool:
    """Whether it is an object that only holds something, such as Chroma's modulations or SeedVR2's cache."""
    held = getattr(value, "__dict__", None)
    if not held or isinstance(value, (type, nn.Module, FunctionType, MethodType)):
        return False
    return is_dataclass(value) or all(isinstance(part, _PLAIN) for part in held.values())


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
        result, entries = first()
        known = {id(tensor) for tensor in _tensors_of(result)}
        # one tensor in two places comes out as two
        entries = _changed(entries, lambda tensor: tensor.clone() if id(tensor) in known else tensor)
        returned.append((result, entries))
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
