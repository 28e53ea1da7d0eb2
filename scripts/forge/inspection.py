"""What is in a GGUF or LoRA file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open

from ...kernels import GraftError, plain
from ...ops.files.gguf import open_gguf
from ...ops.files.lora import load_adapters
from ...ops.report import modules_of, size_text

SUFFIXES = (".gguf", ".safetensors")

_LONGEST = 300
"""Characters of a value: a file may hold megabytes of text."""

_TOLD = ("ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "modelspec.architecture",
         "modelspec.title", "modelspec.trigger_phrase")  # fmt: skip


def files(folders: Iterable[str | os.PathLike[str] | None]) -> Iterator[Path]:
    """Every model file below `folders`, in order of its name."""
    for folder in dict.fromkeys(map(str, filter(None, folders))):
        yield from sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def inspect(path: Path) -> list[tuple[str, str]]:
    """What a file holds, as ``(what, value)``; of a file that cannot be read, why."""
    try:
        rows = _gguf(path) if path.suffix.lower() == ".gguf" else _safetensors(path)
    except (GraftError, OSError) as error:
        return [("file", path.name), ("problem", str(error))]
    shown = [(what, plain(text[:_LONGEST])) for what, text in rows]
    return [("file", path.name), ("size", size_text(path.stat().st_size)), *shown]


def _gguf(path: Path) -> list[tuple[str, str]]:
    file = open_gguf(path)
    rows = [
        ("kind", f"GGUF, {file.architecture or 'architecture not named'}"),
        ("parameters", f"{file.parameters / 1e6:,.1f} million in {len(file.tensors)} tensors"),
        ("types", ", ".join(f"{name} {count}" for name, count in file.type_counts.items())),
        ("bits per weight", f"{8 * file.nbytes / max(1, file.parameters):.2f}"),
    ]
    shown = ("general.name", "general.quantized_by", "general.file_type", "general.license")
    return rows + [(key, str(file.metadata[key])) for key in shown if key in file.metadata]


def _safetensors(path: Path) -> list[tuple[str, str]]:
    try:
        with safe_open(str(path), "pt") as opened:
            names = list(opened.keys())
    except Exception:  # the library's own error is of a private class
        load_adapters(path)  # says what the file is instead
        raise
    if not modules_of(dict.fromkeys(names)):  # type: ignore[arg-type]
        return [("kind", "no adapter"), ("tensors", f"{len(names)}")]
    file = load_adapters(path)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in file.state.values())
    return [
        ("kind", file.what or "full differences"),
        ("names", file.dialect),
        ("trained for", file.trained_for or "unknown"),
        ("modules", f"{len(modules_of(file.state))}"),
        ("tensors", ", ".join(f"{name} {count}" for name, count in dtypes.most_common())),
        *((key, file.metadata[key]) for key in _TOLD if file.metadata.get(key)),
    ]
