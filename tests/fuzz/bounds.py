"""What an input may cost, and where it lies while it is tried."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import resource

SECONDS = 2
MEMORY_PER_BYTE = 16
MEMORY = 64 << 20
"""Beside that: what torch, an import or a first use takes once."""

ROOM = 2 << 30
"""Addresses that the process may take beside those that it has: a claim of 4 GB fails though nobody writes to it."""

_SHM = Path("/dev/shm")
_room = tempfile.TemporaryDirectory(prefix="graft-fuzz-", dir=_SHM if os.access(_SHM, os.W_OK) else None)
FOLDER = Path(_room.name)
"""In memory where the system has such a place; gone with the process."""


def written(data: bytes, suffix: str) -> Path:
    """The input as a file in memory; the next one takes its place."""
    path = FOLDER / f"input{suffix}"
    with open(path, "wb", buffering=0) as file:
        file.write(data)
    return path


def peak() -> int:
    """The most memory in bytes that this process has had so far; 0 where that cannot be asked."""
    if sys.platform == "win32":
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


@contextmanager
def bounded(nbytes: int) -> Iterator[None]:
    """Within this, an input of so many bytes has to be done with.

    Raises:
        AssertionError: it took too much time or memory.
    """
    before, start = peak(), time.process_time()
    yield
    seconds, grown = time.process_time() - start, peak() - before
    assert seconds <= SECONDS, f"{nbytes} bytes took {seconds:.1f} s"
    assert grown <= MEMORY + MEMORY_PER_BYTE * nbytes, f"{nbytes} bytes took {grown >> 20} MiB"


@contextmanager
def confined() -> Iterator[None]:
    """Within this, what never ends is ended, and what asks for gigabytes gets none."""
    if not sys.platform.startswith("linux"):
        yield
        return
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def watch() -> None:
    """Give the input that begins now ten times the seconds that it may take; within `confined`."""
    if sys.platform.startswith("linux"):
        signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"took over {10 * SECONDS} seconds")


def sentence(error: Exception) -> None:
    """Hold a refusal to what people can read."""
    text = str(error)
    assert text and "\n" not in text, f"not one line: {text[:300]!r}"
    assert len(text) < 2000, f"a message of {len(text)} characters: {text[:300]!r}"
