"""Kernels compiled on a machine without a GPU, for one that has it: a cache of Triton's that is carried there.

What Triton finds a kernel by is its source and that of Triton, its arguments, its options and the card's architecture:
nothing of a device, nor where the checkout lies. So the cache fits where Triton is the very same build; anywhere else
it is not found, and kernels are compiled. Only the files that list a kernel's parts name them by where they were.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def use(folder: Path) -> None:
    """Let Triton, in this process and those that it starts, look into `folder` first, wherever it has come from."""
    folder.mkdir(parents=True, exist_ok=True)
    for listing in folder.glob("*/__grp__*.json"):
        parts = json.loads(listing.read_text(encoding="utf-8"))
        here = {name: str(listing.parent / name) for name in parts["child_paths"]}
        if here != parts["child_paths"]:
            listing.write_text(json.dumps(parts | {"child_paths": here}), encoding="utf-8")
    os.environ["TRITON_CACHE_DIR"] = str(folder)


def prepare(folder: Path) -> None:
    """The same for a cache that is to be carried: without what only a reader of kernels wants."""
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    use(folder)


def stand_in_for(architecture: str) -> None:
    """What a process that compiles for a card does first."""
    import checkout  # noqa: F401, binds the checkout

    from .standin import stand_in

    stand_in(architecture)
