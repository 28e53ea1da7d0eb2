"""From what a host's patch list holds to one of our classes, and what cannot be applied refused in a sentence.

A patch comes as an object of ``comfy.weight_adapter``, known by its `name` and `weights`, or as one of the tuples
that older ComfyUI and Forge use. Nothing of a host is imported: the fields and their order are the interface.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import AdapterError
from .kinds import (
    BOFT,
    OFT,
    Adapter,
    Diff,
    DoRA,
    GLoRA,
    Idle,
    LoHa,
    LoKr,
    LoRA,
    Merge,
    ModelDiff,
    Opaque,
    Padded,
    Patch,
    Permuted,
    Region,
    Set,
    Shape,
    times,
)


def from_host(
    value: Any,
    shape: Shape,
    region: Region | None = None,
    function: Callable[[torch.Tensor], torch.Tensor] | None = None,
    norm: str = "comfy",
) -> Adapter:
    """One of our classes for what a host's patch list holds.

    Args:
        value: an object of ``comfy.weight_adapter`` (known by `name` and `weights`), a tuple ``(diff,)``,
            ``(kind, (...))``, a list for a merge, or an Adapter, which is only checked.
        shape: of the whole parameter, ``[out, in, ...]`` or ``[out]``.
        region: the part of it that the value is about.
        function: what the host passes the difference through.
        norm: whose norm DoRA on the output axis divides by: ``comfy`` or ``merged``.

    Returns:
        the adapter; an `Opaque` one if its kind is unknown here.

    Raises:
        AdapterError: it cannot be applied to this parameter.
    """
    part = torch.Size(shape) if region is None else region.within(shape)
    try:
        adapter = _parse(value, part, norm)
        adapter = adapter if function is None else _through(adapter, function, part, value)
        if region is not None and isinstance(adapter, Padded):
            raise AdapterError("the adapter pads a part of a weight, which has no room for it: leave it out")
        adapter.check(part)
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise AdapterError(f"the adapter is malformed ({error}): get the file again") from error
    return adapter


def is_the_hosts_own(adapter: Adapter, value: Any) -> bool:
    """Whether the host would merge `value` into what `adapter`, which `from_host` made of it, stands for.

    It leaves out or misreads what is taken here beyond its own formats.
    """
    if isinstance(value, Adapter):
        return False
    if isinstance(adapter, (Padded, Permuted)):
        return is_the_hosts_own(adapter.inner, value)
    if isinstance(adapter, DoRA):
        return adapter.norm == "comfy" and is_the_hosts_own(adapter.inner, value)
    if isinstance(adapter, LoRA):
        fields = value.weights if hasattr(value, "weights") else value[1]
        return adapter.up is fields[0] and not isinstance(adapter.alpha, tuple)
    return not (isinstance(adapter, LoKr) and adapter.t2 is not None)


def _parse(value: Any, shape: torch.Size, norm: str) -> Adapter:
    if isinstance(value, Adapter):
        return value
    if hasattr(value, "name") and hasattr(value, "weights"):
        return _of_kind(value.name, value.weights, shape, norm, value)
    if isinstance(value, list):
        return _merge(value, shape, norm)
    if isinstance(value, torch.Tensor):
        return Diff(value)
    if isinstance(value, tuple) and len(value) == 1:
        # a node that only scales the weight by its strength_model has nothing to add
        return Idle() if value[0] is None else Diff(value[0])
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return _of_kind(value[0], value[1], shape, norm, value)
    return Opaque(value, f"a patch of unknown form ({type(value).__name__})")


def _of_kind(kind: str, fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    parse = _PARSERS.get(kind)
    if parse is None:
        return Opaque(value, f"adapter kind {kind!r} is unknown here")
    return parse(fields, shape, norm, value)


def _parse_lora(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    up, down, alpha, mid, magnitude, reshape = (*fields, None, None)[:6]
    if up is None or down is None:
        raise AdapterError("one of lora_up and lora_down is missing: the file is incomplete")
    inside = shape if reshape is None else _reshape(reshape)
    up, down = _oriented(up, down, inside) if mid is None else (up, down)
    adapter = _decomposed(LoRA(up, down, _alpha(alpha, down.shape[0]), mid), magnitude, inside, norm)
    return adapter if reshape is None else Padded(adapter, tuple(inside))


def _reshape(values: Any) -> torch.Size:
    """A file's ``reshape_weight``: the shape that a weight is to have."""
    sizes = values.tolist() if isinstance(values, torch.Tensor) else values
    if not isinstance(sizes, (list, tuple)) or not all(_is_size(n) for n in sizes):
        raise AdapterError(f"reshape_weight is {str(sizes)[:40]}, which is no shape: the file is damaged")
    return torch.Size(int(n) for n in sizes)


def _is_size(n: Any) -> bool:
    return isinstance(n, (int, float)) and 0 < n < 1 << 31 and n == int(n)


def _parse_loha(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, magnitude = fields
    return _decomposed(LoHa(w1_a, w1_b, w2_a, w2_b, _number(alpha), t1, t2), magnitude, shape, norm)


def _parse_lokr(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, magnitude = fields
    return _decomposed(LoKr(w1, w2, _number(alpha), w1_a, w1_b, w2_a, w2_b, t2), magnitude, shape, norm)


def _parse_glora(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    a1, a2, b1, b2, alpha, magnitude = fields
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if not old and not new:
        raise AdapterError("the ranks of GLoRA's factors differ from each other: the file is damaged")
    # both only fit a rank as large as the weight, where the host takes the old names
    if old and (not new or a2.shape[0] == shape[0] == shape[1]):
        if math.prod(shape[2:]) > 1:
            return Opaque(value, "a GLoRA of old LyCORIS on a k×k convolution mixes kernel positions")
        a1, a2, b1, b2 = a2.flatten(1), a1.flatten(1), b2, b1
    return _decomposed(GLoRA(a1, a2, b1, b2, _number(alpha)), magnitude, shape, norm)


def _parse_oft(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    blocks, rescale, constraint, magnitude = (*fields, None, None, None)[:4]
    if magnitude is not None:
        return Opaque(value, "OFT under DoRA")
    limit = _number(constraint) or 0.0
    return BOFT(blocks, limit, rescale) if blocks.dim() == 4 else OFT(blocks, limit)


def _parse_diff(fields: Any, shape: torch.Size, norm: str, value: Any) -> Adapter:
    diff, options = (*fields, {})[:2]
    if options.get("pad_weight") and diff.shape != shape:
        return Padded(Diff(diff), tuple(diff.shape))
    return Diff(diff)


_PARSERS: dict[str, Callable[[Any, torch.Size, str, Any], Adapter]] = {
    "lora": _parse_lora,
    "loha": _parse_loha,
    "lokr": _parse_lokr,
    "glora": _parse_glora,
    "oft": _parse_oft,
    "boft": _parse_oft,
    "diff": _parse_diff,
    "set": lambda fields, shape, norm, value: Set(fields[0]),
    "model_as_lora": lambda fields, shape, norm, value: ModelDiff(fields[0]),
}


def _merge(value: list, shape: torch.Size, norm: str) -> Adapter:
    """ComfyUI's ``[(weight, convert), patch, ...]``; Forge has the weight alone in first place."""
    head, *rest = value
    weight = head[1](head[0]) if isinstance(head, tuple) else head
    patches = []
    for entry in rest:
        strength, inner, strength_model, offset, function = (*entry, None, None)[:5]
        region = None if offset is None else Region(*offset)
        patches.append(Patch(strength, from_host(inner, shape, region, function, norm), strength_model, region))
    if any(isinstance(p.adapter, Opaque) for p in patches):
        return Opaque(value, "a merged model has a patch of unknown kind")
    return Merge(weight, tuple(patches))


def _decomposed(adapter: Adapter, magnitude: torch.Tensor | None, shape: torch.Size, norm: str) -> Adapter:
    """`adapter` under DoRA, if the file has magnitudes.

    A vector without further dimensions is PEFT's ``lora_magnitude_vector``, which is meant for the norm of the merged
    weight; the host would broadcast it to a square.
    """
    if magnitude is None:
        return adapter
    if magnitude.dim() == 1:
        return DoRA(adapter, magnitude, 0, "merged")
    axis = 0 if magnitude.shape[0] == shape[0] else 1
    if magnitude.numel() != shape[axis]:
        raise AdapterError(f"dora_scale is {times(magnitude.shape)} for a weight of {times(shape)}")
    return DoRA(adapter, magnitude.flatten(), axis, norm)


def _through(adapter: Adapter, function: Callable, shape: torch.Size, value: Any) -> Adapter:
    """`adapter` with the host's function on its ΔW taken in, where that reorders rows."""
    if isinstance(adapter, (Set, Opaque)):
        return adapter
    if isinstance(adapter, DoRA):
        inner = _through(adapter.inner, function, shape, value)
        return inner if isinstance(inner, Opaque) else DoRA(inner, adapter.magnitude, adapter.axis, adapter.norm)
    order = _row_order(function, shape)
    if order is None or not adapter.additive or isinstance(adapter, ModelDiff):
        return Opaque(value, "its difference passes through a function of the host")
    return Permuted(adapter, order)


def _row_order(function: Callable[[torch.Tensor], torch.Tensor], shape: torch.Size) -> tuple[int, ...] | None:
    """The permutation of rows that `function` is, or None if it is something else."""
    rows = shape[0]
    ones = (1,) * (len(shape) - 1)
    try:
        moved = function(torch.arange(rows, dtype=torch.float64).reshape(rows, *ones))
        order = [int(i) for i in moved.reshape(-1).tolist()]
        # the same on a few columns of arbitrary values: nothing but rows may have moved
        probe = torch.randn(rows, *(min(n, 3) for n in shape[1:]), generator=torch.Generator().manual_seed(0))
        pure = torch.equal(function(probe.clone()), probe[order])
    except Exception:
        return None  # whatever a stranger's function raises on this, it is no permutation
    return tuple(order) if pure and sorted(order) == list(range(rows)) else None


def _alpha(alpha: Any, rank: int) -> float | tuple[float, ...] | None:
    """A file's alpha: none, a number in any wrapping, or one for each rank."""
    if isinstance(alpha, torch.Tensor) and alpha.numel() > 1:
        alpha = alpha.flatten().tolist()
    if isinstance(alpha, (list, tuple)) and len(alpha) != 1:
        if len(alpha) != rank:
            raise AdapterError(f"there are {len(alpha)} alphas for a rank of {rank}: the file is damaged")
        return tuple(_finite(float(a)) for a in alpha)
    return _number(alpha)


def _number(alpha: Any) -> float | None:
    if alpha is None:
        return None
    if isinstance(alpha, torch.Tensor) or (isinstance(alpha, (list, tuple)) and len(alpha) == 1):
        values = torch.as_tensor(alpha)
        if values.numel() != 1:
            raise AdapterError(f"there are {values.numel()} alphas where one is needed: the file is damaged")
        return _finite(float(values.item()))
    return _finite(float(alpha))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise AdapterError(f"alpha is {value}: the training has diverged or the file is damaged")
    return value


def _oriented(up: torch.Tensor, down: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Up and down the right way round, where a file has them transposed or swapped and only one way fits."""

    def fits(b: torch.Tensor, a: torch.Tensor) -> bool:
        columns = math.prod(shape[1:])
        return b.shape[0] == shape[0] and b.shape[1] == a.shape[0] and math.prod(a.shape[1:]) == columns

    if up.dim() != 2 or down.dim() != 2 or fits(up, down):
        return up, down
    others = [pair for pair in ((up.t(), down.t()), (down, up)) if fits(*pair)]
    return others[0] if len(others) == 1 else (up, down)


__all__ = [
    "BOFT", "OFT", "Adapter", "Diff", "DoRA", "GLoRA", "LoHa", "LoKr", "LoRA", "Merge", "ModelDiff", "Opaque", "Padded",
    "Patch", "Permuted", "Region", "Set", "from_host", "is_the_hosts_own",
]  # fmt: skip
