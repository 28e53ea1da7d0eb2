"""Which layers multiply in int8: a rule, what names say against it, and what became of it.

int8 products pay where they are large, and cost about one percent in precision (`kernels/int8.py`). Layers that are
small, that stand before or behind the blocks, or that whoever made the file kept unquantized stay as they are; so does
one whose weights int8 would change too much, once that is measured. Where the file's own rounding costs less than int8
would, only who asks for that has it. How many rows of x a call has decides each time: modulations, with one, are never
multiplied in int8.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..kernels import int8
from .layers import LinearMath, PackedLayer
from .report import examples, layers


@dataclass(frozen=True)
class Rule:
    """What a layer has to be to multiply in int8.

    Attributes:
        columns: inputs, at least.
        rows: outputs, at least.
        error: of its weights in int8, at most: a layer is off by that and by as much again for its activations.
        finer: types that are left out: rounding to them changes a layer's output less than int8 does (Q8_0 by 0.5 %,
            the next, Q6_K, by 1.8 %; int8 by 1.2 %).
    """

    columns: int = 1024
    rows: int = 768
    error: float = 0.0125
    finer: frozenset[str] = frozenset({"Q8_0"})


USUAL = Rule()
RULES = {"int8": USUAL, "int8_all": replace(USUAL, finer=frozenset())}
"""By what a user chooses: what costs less than the file's own rounding did, or all that is faster."""

FINER = "more exact than int8; int8_all takes them, too"

_IN_A_BLOCK = re.compile(r"(?:^|\.)\d+\.[A-Za-z_]")


def against(path: str, layer: PackedLayer, rule: Rule = USUAL) -> str:
    """Why the rule keeps a layer out; "" where it does not.

    Args:
        path: of the layer, e.g. ``double_blocks.0.img_attn.qkv``.
    """
    if reason := _impossible(layer):
        return reason
    rows, columns = layer.logical_shape
    if rows < rule.rows or columns < rule.columns:
        return f"smaller than {rule.rows}×{rule.columns}"
    if not _IN_A_BLOCK.search(path):
        return "before or behind the blocks"
    return FINER if layer.fmt is not None and layer.fmt.name in rule.finer else ""


def _impossible(layer: PackedLayer) -> str:
    """Why there is no int8 for a layer, whoever asks; "" where there is."""
    if not isinstance(layer, LinearMath) or len(layer.logical_shape) != 2:
        return "not linear"
    if layer.fmt is None or not layer.fmt.is_quantized:
        return "not quantized"
    return f"inputs not a multiple of {int8.BLOCK}" if layer.logical_shape[1] % int8.BLOCK else ""


def named() -> str:
    """What the user says against the rule, for every model: see `use_int8`."""
    return os.environ.get("GRAFT_INT8_LAYERS", "")


def use_int8(found: Mapping[str, PackedLayer], names: str = "", rule: Rule = USUAL) -> None:
    """Have layers multiply in int8, those that the rule lets and those that are named.

    Args:
        found: layers by path.
        names: parts of paths, separated by commas. One behind a minus stays out, another takes part whatever the rule
            says of it, if it can.
        rule: see `Rule`.
    """
    parts = [name for part in names.split(",") if (name := part.strip())]
    kept = [part[1:].strip() for part in parts if part.startswith("-")]
    wanted = [part for part in parts if not part.startswith("-")]
    for path, layer in found.items():
        if any(part in path for part in kept if part):
            layer.int8_reason, bound = "named with a minus", None
        elif any(part in path for part in wanted):
            layer.int8_reason, bound = _impossible(layer), 1.0
        else:
            layer.int8_reason, bound = against(path, layer, rule), rule.error
        layer.int8_bound = None if layer.int8_reason else bound


def prepare(found: Mapping[str, PackedLayer], device: torch.device) -> None:
    """Work out now what layers need for int8 on `device`, and not in their first call: a traced graph cannot."""
    at = torch.empty(0, device=device)
    for layer in found.values():
        if isinstance(layer, LinearMath) and layer.int8_bound is not None and int8.unavailable(device) is None:
            data, _, release = layer.fetch(at)
            try:
                layer.prepare_int8(data)
            finally:
                release()


def count(found: Mapping[str, PackedLayer]) -> int:
    """How many layers multiply in int8."""
    return sum(layer.int8_bound is not None for layer in found.values())


def kept_finer(found: Mapping[str, PackedLayer]) -> int:
    """How many layers stay as they are only because their type is more exact than int8."""
    return sum(layer.int8_reason == FINER for layer in found.values())


def report(found: Mapping[str, PackedLayer]) -> list[str]:
    """How many layers multiply in int8, and which do not, each with its reason; nothing where none was asked to."""
    reasons: dict[str, list[str]] = {}
    for path, layer in found.items():
        if layer.int8_reason:
            reasons.setdefault(layer.int8_reason, []).append(path)
    if not (reasons or count(found)):
        return []
    lines = [f"{layers(count(found))} in int8, where there are many tokens"]
    for reason, paths in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"{layers(len(paths))} not in int8 ({reason}): {examples(paths)}")
    return lines


__all__ = [
    "FINER", "RULES", "USUAL", "Rule", "against", "count", "kept_finer", "named", "prepare", "report", "use_int8",
]  # fmt: skip
