"""What all our nodes share: category, text on the node, when a file counts as changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

CATEGORY = "Graft"

UNKNOWN = ""
"""Stands for the state of a file whose name comes through a link: hosts tell it only to the node itself."""

WEB = Path(__file__).resolve().parent.parent / "web"
"""What the front end is served: help pages by node id."""


def result(outputs: tuple, text: str, unique_id: str | None = None) -> dict[str, Any]:
    """A node's outputs, with `text` shown on the node (where the host can) and kept in its history."""
    show(text, unique_id)
    return {"ui": {"text": (text,)}, "result": outputs}


def show(text: str, unique_id: str | None) -> None:
    """Show `text` on the node while it runs; hosts without a server, or too old for it, show nothing."""
    try:
        from server import PromptServer
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    if unique_id and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, unique_id)


def file_state(path: str | None) -> str | float:
    """What tells that a file was replaced: a digest of its path, time and size, since hosts write it into pictures."""
    if path is None or not os.path.isfile(path):
        return float("nan")
    stat = os.stat(path)
    return hashlib.sha256(f"{path} {stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()
