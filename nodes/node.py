"""What all our nodes share: category, text on the node, when a file counts as changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import folder_paths

from .. import kernels

CATEGORY = "Graft"

UNKNOWN = ""
"""Stands for the state of a file whose name comes through a link: hosts tell it only to the node itself."""

BACKEND = (
    list(kernels.BACKENDS),
    {"default": "auto", "tooltip": "What decodes the weights: auto takes the first that can."},
)
"""An input of both loaders."""

WEB = Path(__file__).resolve().parent.parent / "web"
"""What the front end is served: its part of the nodes, and help pages by node id."""


def result(outputs: tuple, text: str) -> dict[str, Any]:
    """A node's outputs, and a text that the front end shows on the node (`web/graft.js`) and the history keeps."""
    return {"ui": {"text": (text,)}, "result": outputs}


def share_folder(key: str, source: str) -> None:
    """Let the host list ``.gguf`` files of the folders that it knows as `source` under `key`."""
    known = folder_paths.folder_names_and_paths
    paths, extensions = known.get(key, ([], set()))
    for folder in known[source][0]:
        if folder not in paths:
            paths.append(folder)
    known[key] = (paths, set(extensions) | {".gguf"})


def files(*keys: str) -> list[str]:
    """What a list shows: the files under some of the host's keys, in that order."""
    known = (folder_paths.get_filename_list(key) for key in keys if key in folder_paths.folder_names_and_paths)
    return list(dict.fromkeys(name for names in known for name in names))


def file_path(name: str, *keys: str) -> str | None:
    """Where a listed file lies, or None if it is gone."""
    return next((path for key in keys if (path := folder_paths.get_full_path(key, name))), None)


def missing(name: str, remedy: str) -> str:
    """What to say of a file that is chosen and gone."""
    return f"{name} is not there: {remedy}"


def file_state(path: str | None) -> str | float:
    """What tells that a file was replaced: a digest of its path, time and size, since hosts write it into pictures."""
    if path is None or not os.path.isfile(path):
        return float("nan")
    stat = os.stat(path)
    return hashlib.sha256(f"{path} {stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()
