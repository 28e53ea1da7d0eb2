"""A model's weights from safetensors, in one file or several, or from GGUF: what there is to make a GGUF of."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch

from ...kernels import CorruptFile, GraftError, UnsupportedFormat
from .contents import TEXT_ENCODER, other_kind
from .gguf import GGUFFile, diffusion_tensors, open_gguf
from .scales import weights_of
from .writer import Raw, Value

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.")
"""Under which checkpoints keep the diffusion model; the last two if all names have them."""

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_NOT_PASSED_ON = ("general.architecture", "general.quantization_version", "general.file_type", "general.alignment")
_NOR_THESE = ("comfy.gguf.", "graft.", "split.", "quantize.")


@dataclass(frozen=True)
class Checkpoint:
    """An open model; its weights are views of mapped files.

    Attributes:
        paths: its files.
        state: the tensors, without the prefix of a whole checkpoint.
        entries: what the files say of themselves that goes on into a new one.
        architecture: what a GGUF file calls itself.
        is_text_encoder: whether a GGUF file is one.
    """

    paths: tuple[Path, ...]
    state: dict[str, torch.Tensor] = field(repr=False)
    entries: dict[str, Value] = field(default_factory=dict, repr=False)
    architecture: str | None = None
    is_text_encoder: bool = False


def open_checkpoint(paths: Sequence[str | os.PathLike[str]]) -> Checkpoint:
    """Open a model that lies in one file, or in several of safetensors; of one shard the others are found.

    Raises:
        CorruptFile: a file is missing or damaged.
        UnsupportedFormat: it is of another kind, or holds no diffusion model.
    """
    files = _with_other_shards([Path(path) for path in paths])
    if all(path.suffix.lower() == ".gguf" for path in files) and len(files) == 1:
        return _open_gguf(files[0])
    if any(path.suffix.lower() != ".safetensors" for path in files):
        raise UnsupportedFormat(
            f"only .safetensors and .gguf are read, and one GGUF at a time: convert the others first "
            f"({', '.join(str(path) for path in files)})"
        )
    state: dict[str, torch.Tensor] = {}
    texts: dict[str, str] = {}
    for path in files:
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                texts |= opened.metadata() or {}
                state |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
        except Exception as error:  # the reader's own errors have no common base
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            raise CorruptFile(f"the file cannot be read ({reason}): get it again ({path})") from error
    return Checkpoint(files, _diffusion_model(state), passed_on(texts))


def _open_gguf(path: Path) -> Checkpoint:
    file = open_gguf(path)
    encodes = other_kind(file) is TEXT_ENCODER
    tensors = file.tensors if encodes else diffusion_tensors(file)
    return Checkpoint((path,), weights_of(tensors, file), _entries_of(file), file.architecture, encodes)


def notes_of(path: Path) -> dict[str, Value]:
    """What a model's file says of itself that goes on into a file made of it; nothing of one that cannot be read."""
    try:
        if path.suffix.lower() == ".gguf":
            return _entries_of(open_gguf(path))
        with safetensors.safe_open(path, framework="pt") as opened:
            return passed_on(opened.metadata() or {})
    except Exception:
        return {}  # pickles, and whatever else a host's loader takes


def _entries_of(file: GGUFFile) -> dict[str, Value]:
    return {
        key: Raw(*file.metadata.raw(key))
        for key in file.metadata
        if key not in _NOT_PASSED_ON and not key.startswith(_NOR_THESE)
    }


_SPEC = {f"modelspec.{theirs}": f"general.{ours}" for theirs, ours in
         (("title", "name"), ("author", "author"), ("license", "license"))}  # fmt: skip


def passed_on(texts: Mapping[str, str]) -> dict[str, Value]:
    """Of what a safetensors file says of itself that which GGUF has a place for: author, licence, name, ``config``."""
    found: dict[str, Value] = {_SPEC[key]: value for key, value in texts.items() if key in _SPEC and value}
    if texts.get("config"):
        found["config"] = texts["config"]
    return found


def _with_other_shards(paths: Sequence[Path]) -> tuple[Path, ...]:
    shard = _SHARD.search(paths[0].name) if len(paths) == 1 else None
    if shard is None:
        return tuple(paths)
    stem, count = paths[0].name[: shard.start()], int(shard[2])
    found = [paths[0].with_name(f"{stem}-{number:05}-of-{count:05}.safetensors") for number in range(1, count + 1)]
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise CorruptFile(f"{missing[0]} of this model is missing: put all {count} files there ({paths[0]})")
    return tuple(found)


def _diffusion_model(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in _PREFIXES:
        within = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if within and (prefix.endswith("diffusion_model.") or len(within) == len(state)):
            return within
    if not state:
        raise GraftError("the file holds no tensors: get the model itself")
    return dict(state)


__all__ = ["Checkpoint", "notes_of", "open_checkpoint", "passed_on"]
