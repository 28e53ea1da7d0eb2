"""Adapters as hosts hold them: what is taken gives what its own merge gives, whatever its tensors are."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import adapter_samples as samples
import torch
from graft.kernels import AdapterError
from graft.ops.adapters import Opaque, Patch, Region, from_host
from graft.ops.kinds import Padded, merge

from .bounds import bounded, sentence
from .choices import Choices

_SHAPES = ((16, 8), (8, 16), (16, 4, 3, 3), (8, 8, 3))
_ODD = (float("nan"), float("inf"), -1.0, 0.0, 1e30)
_ALPHAS = (None, 0, 1, 2.0, -1.0, *_ODD, True, (1.0, 2.0), [3.0], "4", torch.tensor(2.0), torch.ones(4), torch.ones(3))
_DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.complex64)
_LARGEST = 1e6
"""Of factors up to this the products stay where fp64 has digits left."""


class Input(NamedTuple):
    value: Any
    shape: tuple[int, ...]
    region: Region | None
    strength: float


def make(choices: Choices) -> Input:
    shape = choices.pick(_SHAPES)
    sampler = samples.Sampler(choices.below(1 << 16), torch.float64)
    kinds = samples.KINDS | (samples.CONV_KINDS if len(shape) > 2 else samples.LINEAR_KINDS)
    region = None
    inner = shape
    if choices.once_in(6):
        dim, half = choices.pick(((0, shape[0] // 2), (1, shape[1] // 2)))
        region = Region(dim, choices.pick((half, 0)), half)
        inner = tuple(half if axis == dim else n for axis, n in enumerate(shape))
        if choices.odd():
            region = Region(choices.pick((0, 1, 2, -1)), choices.pick((-1, 0, 5, 99)), choices.pick((0, 1, 99)))
    kind, fields = kinds[choices.pick(tuple(kinds))](sampler, inner)
    changed = [_changed(choices, field) for field in fields]
    if choices.odd():
        changed = changed[: choices.below(len(changed) + 1)]
    value: Any = (choices.pick(tuple(samples.FIELDS)) if choices.odd() else kind, tuple(changed))
    if choices.odd():
        value = choices.pick(([], (None,), (), ("lora",), [(torch.ones(shape), lambda w, **_: w)], "lora", 4, value[1]))
    return Input(value, shape, region, choices.pick((1.0, 0.5, -2.0, 0.0)))


def _changed(choices: Choices, field: Any) -> Any:
    if not choices.odd():
        return field
    if not isinstance(field, torch.Tensor) or choices.once_in(8):
        return choices.pick(_ALPHAS)
    way = choices.below(7)
    if way == 0:
        return None
    if way == 1:
        return field.to(choices.pick(_DTYPES))
    if way == 2:
        return field.transpose(0, -1)
    if way == 3:
        return field.flatten()[choices.below(2) :]
    if way == 4:
        return field * choices.pick(_ODD)
    if way == 5:
        return field.unsqueeze(choices.below(field.dim() + 1))
    return torch.ones(tuple(choices.pick((0, 1, 2, 4, 8, 16)) for _ in range(choices.below(5))))


@torch.no_grad()
def check(sample: Input) -> None:
    value, shape, region, strength = sample
    with bounded(1 << 16):
        try:
            adapter = from_host(value, torch.Size(shape), region)
        except AdapterError as error:
            sentence(error)
            return
        if isinstance(adapter, Opaque):
            return
        _held_to_its_merge(Patch(strength, adapter, region=region), shape)


def _held_to_its_merge(patch: Patch, shape: tuple[int, ...]) -> None:
    r = samples.Sampler(7)
    weight = r(*shape, scale=1.0)
    layer = samples.make_layer(shape, weight)
    wide = patch.adapter.shape if isinstance(patch.adapter, Padded) else shape
    x = samples.make_input(wide, r)
    y = samples.run(layer, x, [patch], dtype=torch.float64)
    whole = merge(weight.clone(), [patch])
    want = samples.make_layer(tuple(whole.shape), whole)(x)
    assert y.shape == want.shape, f"{tuple(y.shape)} and not {tuple(want.shape)}"
    if not whole.isfinite().all() or whole.abs().max() > _LARGEST:
        return  # nothing is left to compare
    scale = float(want.norm()) + math.sqrt(want.numel()) * float(whole.abs().max())
    assert float((y - want).norm()) <= 1e-4 * scale, "beside the weight it gives something else than merged"
