"""What all our nodes share: category, text on the node, when a file counts as changed."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_paths

from .. import kernels

CATEGORY = "Graft"

UNKNOWN = ""
"""Stands for the state of a file whose name comes through a link: hosts tell it only to the node itself."""

BACKEND = (
    list(kernels.BACKENDS),
    {"default": "auto", "tooltip": "What decodes the weights. auto takes the fastest that works here."},
)
"""An input of both loaders."""

WEB = Path(__file__).resolve().parent.parent / "web"
"""What the front end is served: its part of the nodes, and help pages by node id."""


class Result(dict):
    """What a node returns: the host's dict, and the tuple of outputs for nodes of other packs that call ours.

    Those take ``result[0]``, or unpack it.
    """

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("result")[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self["result"])


def result(outputs: tuple, text: str, *notes: str) -> Result:
    """A node's outputs, and a text that the front end shows on the node (`web/graft.js`) and the history keeps.

    Args:
        notes: lines below the text; empty ones are left out.
    """
    return Result(ui={"text": ("\n".join([text, *filter(None, notes)]),)}, result=outputs)


def _server() -> Any:
    """The host's, or None where it runs without: its module may not even be importable there."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def say(text: str, unique_id: str | None) -> None:
    """Show a text on a node while it runs, where the host can."""
    send = getattr(_server(), "send_progress_text", None)
    if send is not None and unique_id is not None:
        send(text, unique_id)


def at_start(act: Callable[[], Any]) -> None:
    """Have something done when the server starts, if it does: all packs are loaded by then."""
    server = _server()
    if server is None:
        return

    async def started(app: Any) -> None:
        act()

    server.app.on_startup.append(started)


def share_folder(key: str, source: str) -> None:
    """Let the host list ``.gguf`` files of the folders that it knows as `source`, if any, under `key`."""
    known = folder_paths.folder_names_and_paths
    paths, extensions = known.get(key, ([], set()))
    for folder in known.get(source, ([],))[0]:
        if folder not in paths:
            paths.append(folder)
    known[key] = (paths, set(extensions) | {".gguf"})


def file_state(path: str | None) -> str | float:
    """What tells that a file was replaced: a digest of its path, time and size, since hosts write it into pictures."""
    if path is None or not os.path.isfile(path):
        return float("nan")
    stat = os.stat(path)
    return hashlib.sha256(f"{path} {stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()
