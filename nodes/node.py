"""What all our nodes share: category, text on the node, when a file counts as changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import folder_paths

CATEGORY = "Graft"

UNKNOWN = ""
"""Stands for the state of a file whose name comes through a link: hosts tell it only to the node itself."""

WEB = Path(__file__).resolve().parent.parent / "web"
"""What the front end is served: its part of the nodes, and help pages by node id."""


def result(outputs: tuple, text: str) -> dict[str, Any]:
    """A node's outputs, and a text that the front end shows on the node (`web/graft.js`) and the history keeps."""
    return {"ui": {"text": (text,)}, "result": outputs}


def files(folder: str, demo: str) -> list[str]:
    """What a list shows: people's own files, then the demo's, each under its key of the host's."""
    shipped = folder_paths.get_filename_list(demo) if demo in folder_paths.folder_names_and_paths else []
    return list(dict.fromkeys([*folder_paths.get_filename_list(folder), *shipped]))


def file_path(name: str, folder: str, demo: str) -> str | None:
    """Where a listed file lies, or None if it is gone."""
    return folder_paths.get_full_path(folder, name) or folder_paths.get_full_path(demo, name)


def file_state(path: str | None) -> str | float:
    """What tells that a file was replaced: a digest of its path, time and size, since hosts write it into pictures."""
    if path is None or not os.path.isfile(path):
        return float("nan")
    stat = os.stat(path)
    return hashlib.sha256(f"{path} {stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()
