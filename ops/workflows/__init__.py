"""Workflows of ComfyUI as files: which loaders of others ours stand for, and which file a name means."""

from .file import read_workflow, swapped
from .names import is_gguf, nearest
from .prompts import prompt_of, use_ours_in_prompt, use_theirs_in_prompt
from .swap import Choose, Swapped, sign, use_ours, use_theirs
from .table import MODEL, TEXT, Loader, loader_of

__all__ = [
    "MODEL", "TEXT", "Choose", "Loader", "Swapped", "is_gguf", "loader_of", "nearest", "prompt_of", "read_workflow",
    "sign", "swapped", "use_ours", "use_ours_in_prompt", "use_theirs", "use_theirs_in_prompt",
]  # fmt: skip
