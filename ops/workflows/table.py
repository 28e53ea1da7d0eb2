"""The table of loaders in `web/loaders.json`, which the page reads, too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL = "GraftUNETLoader"
TEXT = "GraftCLIPLoader"
PACK = "graft"
"""This pack in ComfyUI's registry."""

_TABLE = json.loads((Path(__file__).resolve().parents[2] / "web" / "loaders.json").read_text(encoding="utf-8"))

OURS: Mapping[str, Mapping[str, str]] = _TABLE["ours"]
"""Our loaders: their widgets in their order, with what they are when nobody has chosen."""

STOCK: Mapping[str, list[str]] = _TABLE["stock"]
"""For each of our loaders the host's own, by the number of files."""

MEANINGLESS = frozenset(_TABLE["meaningless"])
"""Choices of others that have no meaning here: what Graft decodes to, and LoRAs in, is fp32 whatever they offer."""

ORIGIN: tuple[str, ...] = tuple(_TABLE["origin"])
"""Of a node's properties those that tell where it comes from."""

WAS = "graft_was"
"""Under which a node keeps what it was."""

NAMES: Mapping[str, Any] = _TABLE["names"]
"""What tells names of model files apart (`names.py`)."""


@dataclass(frozen=True)
class Loader:
    """How a loader of ours stands for another one.

    Attributes:
        ours: our node.
        widgets: the other's inputs without links, in their order.
        kept: those of them that ours has too, with ours.
        set: what ours is set to beside them.
    """

    ours: str
    widgets: list[str]
    kept: Mapping[str, str]
    set: Mapping[str, str] = field(default_factory=dict)


_LOADERS = {
    name: Loader(row["ours"], row["widgets"], row["kept"], row["set"])
    for row in _TABLE["theirs"]
    for name in row["names"]
}


def loader_of(kind: object) -> Loader | None:
    """What a class of nodes is among the loaders, wrapped by ComfyUI-MultiGPU or not."""
    return _LOADERS.get(re.sub(_TABLE["wrapper"], "", str(kind)))


def is_file(name: str | None) -> bool:
    """Whether an input of ours names a file."""
    return name is not None and (name in ("unet_name", "module_name") or name.startswith("clip_name"))
