"""Which backend decodes what, and why.

A backend is a module with `unavailable(device, fmt) -> reason | None`. It is chosen by capability,
never by version or name of a device, and the reasons against the better ones are kept for the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import torch

from . import cpu
from .errors import NoBackend
from .formats import Format

BackendName = Literal["auto", "triton", "cpu", "torch"]
BACKENDS: tuple[str, ...] = get_args(BackendName)


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that was taken, and in words why not another."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


@functools.cache
def triton_backend() -> ModuleType | str:
    """The Triton backend, imported on first use, or why there is none."""
    try:
        from . import triton_
    except ImportError as error:
        return f"Triton is not installed ({error.name or error})"
    except Exception as error:  # an old one, such as Forge's, fails in ways of its own where kernels are declared
        return f"this Triton cannot build the kernels, update it ({type(error).__name__}: {error})"
    return triton_


def _unavailable(name: str, device: torch.device, fmt: Format | None) -> str | None:
    if name == "triton":
        # a model on the CPU never needs to find out whether Triton is there
        backend = triton_backend()
        return backend if isinstance(backend, str) else backend.unavailable(device, fmt)
    if name == "cpu":
        return cpu.unavailable(device, fmt)
    return None


def warm(
    fmts: Iterable[Format], device: torch.device, dtype: torch.dtype, progress: Callable[[str], None] | None = None,
    int8: bool = False,
) -> None:  # fmt: skip
    """Compile now what the first step would otherwise wait for: the Triton kernels of `fmts`; else nothing.

    `progress` is called with a line for each format; `int8` is whether those for int8 products are wanted, too.
    """
    compiled = [fmt for fmt in dict.fromkeys(fmts) if fmt.is_quantized and choose(device, fmt).name == "triton"]
    backend = triton_backend() if compiled else ""
    if not isinstance(backend, str):
        backend.warm(compiled, device, dtype, progress, int8=int8)
        choose.cache_clear()  # what did not compile is decoded in another way


@functools.cache
def choose(device: torch.device, fmt: Format | None = None, requested: str = "auto") -> Choice:
    """The backend for `fmt` on `device`.

    Raises:
        NoBackend: `requested` is unknown, or cannot run here; the message says why and what can.
    """
    if requested not in BACKENDS:
        raise NoBackend(f"there is no backend {requested!r}: choose one of {', '.join(BACKENDS)}")
    if requested != "auto":
        if reason := _unavailable(requested, device, fmt):
            raise NoBackend(f"backend {requested!r} cannot run here: {reason}; choose 'auto' to take the best that can")
        return Choice(requested, "as chosen")
    reasons = []
    for name in ("cpu",) if device.type == "cpu" else ("triton",):
        reason = _unavailable(name, device, fmt)
        if reason is None:
            return Choice(name, "")
        reasons.append(f"{name}: {reason}")
    return Choice("torch", "; ".join(reasons))
