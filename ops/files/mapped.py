"""A file that stays mapped, and whether it is still the one that was read."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import BinaryIO

from ...kernels.errors import CorruptFile

_MAPPED: weakref.WeakSet[MappedFile] = weakref.WeakSet()


class MappedFile:
    """What a mapped file was when its header was read, by a descriptor of its own; `path` is where it was.

    One that is deleted, or gives its name to another, lives on behind the map. One that is written to changes under it,
    and where it has become shorter, reading ends the process (SIGBUS), which nobody can catch.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._descriptor, self.path = os.dup(file.fileno()), path
        self._state = self._now()
        _MAPPED.add(self)

    def is_at(self, path: Path) -> bool:
        """Whether `path` is the name of this very file."""
        return os.path.samestat(os.fstat(self._descriptor), os.stat(path))

    def check(self) -> None:
        """Raises:
        CorruptFile: somebody has written to it since.
        """
        if self._now() != self._state:
            raise CorruptFile(
                "the file was written to after it was loaded: load it again once that is done, and let a new version "
                f"take its place under another name first ({self.path})"
            )

    def _now(self) -> tuple[int, int]:
        """Size and time of the last change."""
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def __del__(self) -> None:
        os.close(self._descriptor)


def is_mapped(path: Path) -> bool:
    """Whether the file at `path` is one that is loaded here."""
    return any(file.is_at(path) for file in list(_MAPPED))
