"""Names of model files: which file here is nearest to one that a workflow names. `web/names.js` says the same."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .table import NAMES

QUANTIZATION = re.compile(NAMES["quantization"])
"""What a name in small letters says of its file's type."""

LONGEST = NAMES["longest"]
"""Characters that a system lets a file's name have: a longer one, which a workflow may hold, names no file."""

_FILLERS = re.compile(NAMES["fillers"])  # words that tell nothing apart
# words that tell models of one family apart: two names have the same ones, or are of different models
_KINDS = frozenset(NAMES["kinds"].split())


def slashes(name: str) -> str:
    """A name with the slashes that all systems take."""
    return name.replace("\\", "/")


def fold(name: str) -> str:
    """A name without what differs from one system to another."""
    return slashes(name).lower()


def base(name: str) -> str:
    """The file's name without its folders."""
    return slashes(name).rpartition("/")[2]


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def nearest(name: object, files: Sequence[str], fits: Callable[[str], bool] = is_gguf) -> str | None:
    """The file that is meant by `name`.

    Returns:
        it, or the same in another spelling or folder, or the nearest of those that `fits`; None if none is near.
    """
    if not isinstance(name, str) or not name:
        return None
    spelled = [file for file in files if fold(file) == fold(name)]
    moved = [file for file in files if base(fold(file)) == base(fold(name))]
    for found in (spelled, [file for file in moved if fits(file)]):
        if len(found) == 1 and fits(found[0]):
            return found[0]
    wanted = _described(name)
    near = [(_likeness(wanted, _described(file)), file) for file in files if fits(file)]
    near = [pair for pair in near if pair[0] >= NAMES["near"]]
    if near:
        return max(near, key=lambda pair: pair[0])[1]
    if spelled:
        return spelled[0]
    return moved[0] if len(moved) == 1 else None


class _Described(NamedTuple):
    """A name as its letters, the words that tell kinds apart, its version and its size."""

    letters: str
    kinds: tuple[str, ...]
    version: str | None
    size: str | None


def _described(name: str) -> _Described:
    words = re.sub(r"\.[a-z0-9]+$", "", base(name)[-LONGEST:], flags=re.IGNORECASE)
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", words)
    plain = _FILLERS.sub("", QUANTIZATION.sub("", words.lower()))
    tokens = [re.sub(r"^(high|low)noise$", r"\1", token) for token in re.split(r"[^a-z0-9]+", plain)]
    kinds = sorted(token for token in tokens if token in _KINDS or re.fullmatch(r"[0-9]{4}", token))
    unkind = "_".join(token for token in tokens if token not in _KINDS)
    version = re.search(r"[a-z]_?([0-9]+(?:_[0-9](?![a-z0-9]))*)", unkind)
    size = re.search(r"(?<![0-9])([0-9]+(?:\.[0-9]+)?)b(?![a-z0-9])", plain)
    return _Described("".join(tokens), tuple(kinds), version and version[1], size and size[1])


def _likeness(a: _Described, b: _Described) -> float:
    """From 0, of different models, to 1: the share of pairs of letters that both have."""

    def differ(one: str | None, other: str | None) -> bool:
        return one is not None and other is not None and one != other

    if a.kinds != b.kinds or differ(a.version, b.version) or differ(a.size, b.size):
        return 0.0
    of, other = (list(itertools.pairwise(described.letters)) for described in (a, b))
    return 2 * sum(pair in other for pair in of) / (len(of) + len(other) or 1)
