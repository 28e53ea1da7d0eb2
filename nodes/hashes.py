"""What files are, whatever they are called: their SHA-256, worked out once and kept in the host's user folder.

A thread of its own reads files that workflows use, and those that may be what a workflow names. It stands still while
prompts run. What a workflow says of its files comes with the prompt, as the page sends it along: `expect` notes it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths

from ..ops.files.origin import url_of
from ..ops.make import sha256_of
from ..ops.workflows.names import fold

log = logging.getLogger(__name__)

PROPERTY = "graft_files"
"""Under which saved nodes of ours say what their files are; hosts' own ``models`` takes only those with a URL."""

SHORTEST = 8
"""Digits of a hash that tell one file from another."""

SHOWN = 12
"""Digits of a hash in messages: what model sites find a file by."""

_HASH = re.compile(rf"[0-9a-f]{{{SHORTEST},64}}")
_NAMED = re.compile(rf"sha256:({_HASH.pattern})", re.IGNORECASE)
_USED, _LOOKED_FOR = 1, 0  # what is looked for is read first
_MOST = 4096  # names that are remembered
_PAUSE = 0.5  # seconds between two looks at whether prompts run


class Wanted(NamedTuple):
    """What a workflow says of a file: the beginning of its SHA-256, and its size in bytes where that is known."""

    sha256: str
    size: int | None = None


@dataclass(frozen=True)
class Known:
    """What a file is: size in bytes and time in ns when it was read, SHA-256, and where it says that it is from."""

    size: int
    changed: int
    sha256: str
    url: str = ""


class Library:
    """The files that were read, and the thread that reads more.

    Args:
        place: the file in which that is kept.
        is_busy: whether to stand still.
        tell: what to call with a file once it was read.
    """

    def __init__(self, place: Path, is_busy: Callable[[], bool], tell: Callable[[str, Known], None]) -> None:
        self._place, self._is_busy, self._tell = place, is_busy, tell
        self.version = 0  # one more with each file that was read
        self._known = _read(place)
        self._queue: queue.PriorityQueue[tuple[int, int, str]] = queue.PriorityQueue()
        self._queued: set[str] = set()
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def known(self, path: str) -> Known | None:
        """What a file is, where it was read as it is now."""
        found, state = self._known.get(path), _state(path)
        return found if found is not None and state == (found.size, found.changed) else None

    def items(self) -> list[tuple[str, Known]]:
        return list(self._known.items())

    def want(self, path: str, looked_for: bool = False) -> None:
        """Have a file read; at once returns."""
        with self._lock:
            if path in self._queued or self.known(path) is not None:
                return
            self._queued.add(path)
            self._queue.put((_LOOKED_FOR if looked_for else _USED, next(self._count), path))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="Graft: SHA-256 of model files", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            _, _, path = self._queue.get()
            with contextlib.suppress(OSError):
                self._look_at(path)
            with self._lock:
                self._queued.discard(path)

    def _look_at(self, path: str) -> None:
        before = _state(path)
        digest = sha256_of(path, self._wait)
        if before is None or before != _state(path):  # gone, or written to meanwhile
            return
        known = Known(*before, digest, url_of(path))
        self._known = {**_read(self._place), **self._known, path: known}  # another process may have read others
        self.version += 1
        try:
            _write(self._place, self._known)
        except OSError as error:  # it is known for as long as this process runs
            log.warning("SHA-256 of model files cannot be kept in %s: %s", self._place, error.strerror)
        self._tell(path, known)

    def _wait(self) -> None:
        while self._is_busy():
            time.sleep(_PAUSE)


def _state(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _read(place: Path) -> dict[str, Known]:
    """What was kept; nothing of a file that is damaged."""
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        return {str(path): Known(**entry) for path, entry in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(place: Path, known: Mapping[str, Known]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_suffix(f".{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps({path: vars(entry) for path, entry in known.items()}), encoding="utf-8")
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)


_library: Library | None = None
_folders: dict[str, Sequence[str]] = {}
_expected: dict[str, Wanted] = {}
_shown: tuple[int, dict[str, dict]] = (-1, {})


def offer_hashes(folders: Mapping[str, Sequence[str]]) -> None:
    """Begin, where there is a server.

    Args:
        folders: by the folders' names in workflows, the host's keys under which our nodes list files.
    """
    global _library
    try:
        from server import PromptServer
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    if server is None or not hasattr(server, "add_on_prompt_handler"):
        return

    def tell(path: str, known: Known) -> None:
        server.send_sync("graft.files", _described([(path, known)]))

    place = Path(folder_paths.get_user_directory(), "__graft", "sha256.json")  # a user that hosts show to nobody
    _library = Library(place, lambda: server.prompt_queue.get_tasks_remaining() > 0, tell)
    _folders.update(folders)
    server.add_on_prompt_handler(expect)


def expect(request: dict[str, Any]) -> dict[str, Any]:
    """Note what the workflow of a request for the queue says of its files; the request stays as it is."""
    extra = (request.get("extra_data") or {}).get("extra_pnginfo") or {}
    for name, wanted in _said(extra.get("workflow")):
        _expected.pop(name, None)
        _expected[name] = wanted
    while len(_expected) > _MOST:
        del _expected[next(iter(_expected))]
    return request


def _said(workflow: Any) -> Iterator[tuple[str, Wanted]]:
    graphs = [workflow, *((workflow.get("definitions") or {}).get("subgraphs") or [])] if workflow else []
    for node in (node for graph in graphs for node in graph.get("nodes") or []):
        properties = node.get("properties") or {}
        for entry in [*(properties.get("models") or []), *(properties.get(PROPERTY) or [])]:
            digest, size = str(entry.get("hash") or "").lower(), entry.get("size")
            if _HASH.fullmatch(digest) and str(entry.get("hash_type", "SHA256")).upper() == "SHA256":
                yield fold(str(entry.get("name"))), Wanted(digest, size if isinstance(size, int) else None)


def wanted(name: str) -> Wanted | None:
    """What the file is that a workflow calls so; a name may be nothing else: ``sha256:`` and at least 8 digits."""
    named = _NAMED.fullmatch(name)
    return Wanted(named[1].lower()) if named else _expected.get(fold(name))


def use(path: str) -> None:
    """Have a file read that a workflow uses, when there is time."""
    if _library is not None:
        _library.want(path)


def digest_of(path: str | os.PathLike[str], progress: Callable[[], None] = lambda: None) -> str:
    """A file's SHA-256, read once for all; `progress` is called while it is worked out, see `sha256_of`."""
    known = None if _library is None else _library.known(os.fspath(path))
    return sha256_of(path, progress) if known is None else known.sha256


def same(file: Wanted, paths: Sequence[str]) -> tuple[list[str], int]:
    """Of these files those that are the one that is wanted, and how many are still to be compared with it.

    Where a prefix fits files that differ none is meant.
    """
    if _library is None:
        return [], 0
    found, reading = {}, 0
    for path in paths:
        known = _library.known(path)
        if known is not None and known.sha256.startswith(file.sha256):
            found[path] = known.sha256
        elif known is None and file.size in (None, (_state(path) or (None,))[0]):
            _library.want(path, looked_for=True)
            reading += 1
    return list(found) if len(set(found.values())) == 1 else [], reading


def shown() -> dict[str, dict]:
    """For the page, by folder and name as our nodes list them: what files are."""
    global _shown
    if _library is not None and _library.version != _shown[0]:
        _shown = _library.version, _described(_library.items())
    return _shown[1]


def _described(items: Sequence[tuple[str, Known]]) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for path, known in items:
        entry = {"hash": known.sha256, "size": known.size} | ({"url": known.url} if known.url else {})
        for folder, keys in _folders.items():
            for key in keys:
                found.setdefault(folder, {}).update((name, entry) for name in _names(path, key))
    return found


def _names(path: str, key: str) -> Iterator[str]:
    """What a file is called in the host's lists under a key."""
    roots = folder_paths.folder_names_and_paths.get(key, ([],))[0]
    for root in roots:
        if path.startswith(os.path.join(root, "")):
            name = os.path.relpath(path, root)
            if folder_paths.get_full_path(key, name) == path:
                yield name
