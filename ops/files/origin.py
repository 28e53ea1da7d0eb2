"""Where a file of a model says that it comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from safetensors import safe_open

from ...kernels.errors import GraftError
from .gguf import open_gguf

KEYS = (
    "general.source.url", "general.url", "general.source.repo_url", "general.repo_url", "modelspec.source_url",
    "source_url",
)  # fmt: skip
"""Of a file's metadata those with its own address, the nearest first (ggml-org/ggml, docs/gguf.md)."""

_REPOSITORY = "general.source.huggingface.repository"
_ADDRESS = re.compile(r"https://[\w.-]+(?:/[\w.~%/?&=+@:,;()#-]*)?", re.ASCII)
_LONGEST = 500


def url_of(path: str | os.PathLike[str]) -> str:
    """The address that a file names in its metadata; "" where it names none, or cannot be read."""
    try:
        metadata = _metadata(str(path))
    except (GraftError, OSError, ValueError, RuntimeError):
        return ""
    return address_in(metadata)


def address_in(metadata: Mapping[str, str]) -> str:
    """As `url_of`, of metadata."""
    repository = metadata.get(_REPOSITORY, "")
    found = [*(metadata.get(key, "") for key in KEYS), f"https://huggingface.co/{repository}" if repository else ""]
    return next((text for text in found if len(text) <= _LONGEST and _ADDRESS.fullmatch(text)), "")


def _metadata(path: str) -> Mapping[str, str]:
    if path.lower().endswith(".gguf"):
        return open_gguf(path).metadata.texts()
    if path.lower().endswith((".safetensors", ".sft")):
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    return {}
