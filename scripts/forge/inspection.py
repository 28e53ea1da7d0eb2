"""What is in a GGUF or LoRA file, from its header alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open

from ...kernels import CorruptFile, GraftError
from ...ops.gguf_file import open_gguf

SUFFIXES = (".gguf", ".safetensors")

_KINDS = (
    (".hada_w1_a", "LoHa"), (".lokr_w1", "LoKr"), (".lokr_w1_a", "LoKr"), (".oft_blocks", "OFT"),
    (".a1.weight", "GLoRA"), (".dora_scale", "with DoRA magnitudes"), (".diff", "full difference"),
    (".diff_b", "bias difference"), (".lora_down.weight", "LoRA"), (".lora_A.weight", "LoRA"),
    (".lora.down.weight", "LoRA"), (".lora_A.default.weight", "LoRA"),
)  # fmt: skip
_DOWNS = tuple(suffix for suffix, kind in _KINDS if kind == "LoRA")
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
    return [("file", path.name), ("size", size(path.stat().st_size)), *rows]


def size(nbytes: float) -> str:
    """Bytes in the unit that people use."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"


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
        opened = safe_open(str(path), "pt")
    except Exception as error:  # the library's own error is of a private class
        raise CorruptFile(f"this is no safetensors file ({error}): download it again") from error
    with opened as file:
        names, told = list(file.keys()), file.metadata() or {}
        slices = {n: file.get_slice(n) for n in names}
        dtypes = Counter(s.get_dtype() for s in slices.values())
        ranks = Counter(s.get_shape()[0] for n, s in slices.items() if n.endswith(_DOWNS))
    kinds = Counter(kind for n in names for suffix, kind in _KINDS if n.endswith(suffix))
    rows = [
        ("kind", ", ".join(f"{kind} on {count} modules" for kind, count in kinds.items()) or "no adapter"),
        ("tensors", f"{len(names)}: " + ", ".join(f"{name} {count}" for name, count in dtypes.most_common())),
    ]
    if ranks:
        rows.append(("rank", ", ".join(f"{rank} on {count}" for rank, count in ranks.most_common(4))))
    return rows + [(key, told[key]) for key in _TOLD if told.get(key)]
