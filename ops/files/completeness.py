"""Whether a file brought all of the model that a host built for it.

A host builds a model by what it finds in the file, logs what is missing and runs it, with whatever lies in that memory.
Parts that a file may lack, because they are kept elsewhere or never called, are missing as a whole. Of what is missing
from within a part that is there, or from one of many blocks, the model needs every layer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_NUMBER = re.compile(r"\d+")


def missing_within(missing: Iterable[str], held: Collection[str], layers: Collection[str]) -> list[str]:
    """Those of the `missing` parameters that a model cannot do without.

    Args:
        missing: parameters of the model that the file does not have.
        held: those that it has.
        layers: paths of layers, whose weights have no value of their own before one is loaded.
    """
    parts, kinds = set(map(_part, held)), set(map(_kind, held))
    return [
        name
        for name in missing
        if _kind(name) in kinds or (_part(name) in parts and name.removesuffix(".weight") in layers)
    ]


def missing_parts(missing: Iterable[str], held: Collection[str], layers: Collection[str]) -> list[str]:
    """Parts of the model of whose layers the file has none, e.g. ``video_embeddings_connector``."""
    parts = set(map(_part, held))
    lacking = (_part(name) for name in missing if name.removesuffix(".weight") in layers)
    return [part for part in dict.fromkeys(lacking) if part not in parts]


def stray_block(
    unexpected: Iterable[str], held: Collection[str], modules: Collection[str]
) -> tuple[str, str | None] | None:
    """A block of the file before which the model ends, and the one before it that the file lacks, if one does.

    Args:
        unexpected: tensors for which the model has no place.
        modules: paths of all that it has.
    """
    kinds = set(map(_kind, held))
    for name in unexpected:
        number = _NUMBER.search(name)
        if number and _kind(name) in kinds and name.rpartition(".")[0] not in modules:
            row = name[: number.start()]
            before = (f"{row}{i}" for i in range(int(number[0])))
            return row + number[0], next((block for block in before if block not in modules), None)
    return None


def _part(name: str) -> str:
    return name.partition(".")[0]


def _kind(name: str) -> str:
    """The name with the number of its block left open; one without a number is of no kind but its own."""
    return _NUMBER.sub("N", name, count=1)
