"""What Forge's tab says of a file, of either kind, and what LoRA Stack says of one."""

from __future__ import annotations

from graft.kernels import GraftError
from graft.ops.files.lora_info import LABELS, lora_info
from graft.scripts.forge.inspection import inspect

from . import gguf_files, lora_files
from .bounds import bounded, written
from .choices import Choices

SUFFIX = ".gguf"  # of the half of them; the other half are LoRAs


def make(choices: Choices) -> bytes:
    return gguf_files.file(choices) if choices.once_in(2) else lora_files.file(choices)


def check(data: bytes) -> None:
    for suffix in (".gguf", ".safetensors"):
        path = written(data, suffix)
        with bounded(len(data)):
            rows = inspect(path)
        assert rows[0] == ("file", path.name)
        assert all(isinstance(text, str) for row in rows for text in row)
        assert sum(len(text) for row in rows for text in row) < 10_000, "more text than anybody reads"
        with bounded(len(data)):
            try:
                info = lora_info(path)
            except GraftError:
                continue
        assert {what for what, _ in info.notes} <= set(LABELS)
        assert sum(len(text) for _, text in info.notes) < 15_000
