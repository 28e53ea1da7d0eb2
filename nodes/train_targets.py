"""Which layers Train LoRA (Graft) trains: by what they are called here or in diffusers, or by a pattern of names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..kernels import AdapterError
from ..ops.kinds import Region
from ..ops.layers import LinearMath
from ..ops.report import examples
from ..ops.trainable import Target, can_learn
from .patcher import GraftPatcher
from .save_lora import PREFIX, diffusers_names

ATTENTION, MLP, BOTH, BLOCKS, ALL = "attention", "MLP", "attention and MLP", "all in blocks", "all"
LAYERS = (BOTH, ATTENTION, MLP, BLOCKS, ALL)

_ATTENTION = re.compile(r"att(?:n|ention)|qkv|to_[qkv]\b|proj_out|linear2")
_MLP = re.compile(r"mlp|(?:^|[._])ff|feed_?forward|proj_out|linear2|\.net\.")
_IN_A_BLOCK = re.compile(r"(?:^|\.)\d+\.[A-Za-z_]")


def targets(patcher: GraftPatcher, which: str, pattern: str) -> list[Target]:
    """What learns: linear layers by what they are called, here or in diffusers, or by a pattern of names.

    Raises:
        AdapterError: no layer is called so.
    """
    learnable = {
        path: layer for path, layer in patcher.graft.layers.items() if path.startswith(PREFIX) and can_learn(layer)
    }
    if pattern.strip():
        parts = [part.strip() for part in pattern.split(",") if part.strip()]
        found = [
            Target(path) for path in learnable if any(fnmatchcase(path, f"*{part}*") for part in parts)
        ]  # fmt: skip
    elif which == ALL:
        found = [Target(path) for path in learnable]
    else:
        names = diffusers_names(patcher)
        found = [
            target
            for path, layer in learnable.items()
            if isinstance(layer, LinearMath) and _IN_A_BLOCK.search(path)
            if (target := _target(path, which, names.get(f"{path.removeprefix(PREFIX)}.weight", ())))
        ]
    if not found:
        raise AdapterError(
            f"no layer of this model is called like {pattern.strip() or which!r}: choose other layers, or a part of a "
            f"name such as {examples([path.removeprefix(PREFIX) for path in learnable])}"
        )
    return found


def _target(path: str, which: str, names: Sequence[Any]) -> Target | None:
    """The layer or those of its rows that are wanted, None where none are."""
    own = path.removeprefix(PREFIX)
    wanted = {ATTENTION: (_ATTENTION,), MLP: (_MLP,), BOTH: (_ATTENTION, _MLP)}.get(which)
    if wanted is None or _is_called(own, wanted):
        return Target(path)
    parts = [part for part in names if _is_called(part.name, wanted)]
    if not parts:
        return None
    rows = [part.region for part in parts if part.region is not None]
    whole = len(parts) == len(names) or not rows
    together = sum(row.length for row in rows) == rows[-1].start + rows[-1].length - rows[0].start if rows else True
    if whole or not together:
        return Target(path)
    return Target(path, Region(0, rows[0].start, rows[-1].start + rows[-1].length - rows[0].start))


def _is_called(name: str, patterns: Sequence[re.Pattern[str]]) -> bool:
    return any(pattern.search(name) for pattern in patterns)


__all__ = ["LAYERS", "targets"]
