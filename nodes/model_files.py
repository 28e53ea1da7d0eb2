"""Files that a workflow names: which of those here is meant, and what to say where it is none.

A workflow comes from another computer, whose folders, slashes and letters' case differ, and names as well. The same
file by its SHA-256 is taken, where the workflow tells that, or one of the same name where there is one alone; another
quantization of the same model is offered and never taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import folder_paths

from ..kernels import CorruptFile, GraftError
from ..ops.workflows.names import LONGEST, QUANTIZATION, base, slashes
from . import hashes

OFFERED = 4
"""Files that a message names at most."""

# so many files are called so that the name says nothing without its folder
_COMMON = re.compile(r"(?:diffusion_pytorch_|pytorch_)?(?:model|lora|adapter_model|lora_weights|pytorch_lora_weights)")


class Found(NamedTuple):
    """What a name came to.

    Attributes:
        asked: the name.
        name: the file as lists show it; "" where it is none.
        path: where it lies; None where it is gone.
        others: files that may be meant, where there is none that must be.
        sha256: what it is, as far as the workflow tells and it was looked for by that.
        reading: how many files are still to be compared with that.
    """

    asked: str
    name: str = ""
    path: str | None = None
    others: tuple[str, ...] = ()
    sha256: str = ""
    reading: int = 0

    @property
    def note(self) -> str:
        """For the node's text: a file that lies elsewhere than the workflow says; "" where it says so."""
        as_named = self.path is None or slashes(self.asked) == slashes(self.name)
        by = ", the same file by its SHA-256" if self.sha256 else ""
        return "" if as_named else f"{self.name} is here for {self.asked}{by}"

    def missing(self, folder: str) -> str:
        """What to do about a file that is none, which belongs into `folder`.

        That is named without a slash: newer front ends show one as its code where a node is refused before it runs.
        """
        which = f"{self.asked} (SHA-256 {self.sha256[: hashes.SHOWN]})" if self.sha256 else self.asked
        wait = f" ({self.reading} files here are being compared with it: try again soon)" if self.reading else ""
        if not self.others:
            return f"{which} is not there: put it into {folder}, or choose another file{wait}"
        there = f"there is {' and '.join(self.others[:OFFERED])}"
        return f"{which} is not there, {there}: choose that, or put {base(self.asked)} into {folder}{wait}"

    def valid(self, folder: str) -> bool | str:
        """What `VALIDATE_INPUTS` answers: true, or what is missing from `folder`."""
        return self.path is not None or self.missing(folder)

    def present(self, folder: str, error: type[GraftError] = CorruptFile) -> str:
        """Where it lies.

        Raises:
            GraftError: it is missing from `folder`; as the class that is given.
        """
        if self.path is None:
            raise error(self.missing(folder))
        return self.path


def all_present(files: Iterable[Found], folder: str) -> list[str]:
    """Where files lie.

    Raises:
        CorruptFile: it names all which are missing from `folder`.
    """
    files = list(files)
    missing = [file.missing(folder) for file in files if file.path is None]
    if missing:
        raise CorruptFile("; ".join(missing))
    return [file.path for file in files if file.path is not None]


def listed(*keys: str) -> list[str]:
    """What a list shows: the files under some of the host's keys, in that order."""
    known = (folder_paths.get_filename_list(key) for key in keys if key in folder_paths.folder_names_and_paths)
    return list(dict.fromkeys(name for names in known for name in names))


def find(name: str, *keys: str, among: Sequence[str] | None = None) -> Found:
    """The file that a workflow calls `name`.

    Args:
        keys: the host's keys of folders.
        among: the files that are listed; all under `keys` if it is None.
    """
    path = _path(name, keys)
    if path is not None:
        return _taken(Found(name, name, path))
    names = listed(*keys) if among is None else among
    exact, others = match(name, names)
    spelled = exact and _folded(exact) == _folded(name)
    asked, reading = None if spelled else hashes.wanted(name), 0
    if asked is not None:
        paths = {path: other for other in names if (path := _path(other, keys)) is not None}
        found, reading = hashes.same(asked, list(paths))
        if found:
            return _taken(Found(name, paths[found[0]], found[0], sha256=asked.sha256))
    if exact:
        return _taken(Found(name, exact, _path(exact, keys)))
    return Found(name, others=others, sha256="" if asked is None else asked.sha256, reading=reading)


def _taken(found: Found) -> Found:
    if found.path is not None:
        hashes.use(found.path)
    return found


def match(name: str, names: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """The one of `names` that is meant by `name`, or "" and those that may be."""
    names = list(names)
    wanted, stem = _folded(name), _stem(name)
    spelled = [other for other in names if _folded(other) == wanted]
    moved = [other for other in names if base(_folded(other)) == base(wanted)]
    for found in (spelled, moved):
        if len(found) == 1 and (found is spelled or not _COMMON.fullmatch(stem)):
            return found[0], ()
        if found:
            return "", tuple(found)
    return "", tuple(other for other in names if stem and _stem(other) == stem)


def _path(name: str, keys: Iterable[str]) -> str | None:
    known = (key for key in keys if key in folder_paths.folder_names_and_paths)
    return next((path for key in known if (path := folder_paths.get_full_path(key, name))), None)


def _folded(name: str) -> str:
    return slashes(name).casefold().strip("/ ")


def _stem(name: str) -> str:
    """The model's name without folder, ending and quantization."""
    stem, dot, _ = base(_folded(name))[-LONGEST:].rpartition(".")
    return QUANTIZATION.sub("", stem if dot else "")
