"""What the host raises over a file that it can make no model of, in one sentence with the name of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management
import torch

from ..kernels import CorruptFile, GraftError, UnsupportedFormat, is_full
from ..ops.files.shapes import mismatches
from ..ops.report import examples

_OVER_FILES = (
    *(LookupError, ArithmeticError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError),
    StopIteration,
)
_DRIVERS = ("CUDA", "HIP")

VARIANT = "update ComfyUI, or get another file of it (it is damaged, or a variant that this ComfyUI does not know)"
"""What to do, before all that may be long: hosts cut messages short."""


class Asked(dict):
    """A state dict that notes of which tensors a host reads what the model is.

    Attributes:
        names: them, the last one last.
        answered: whether the host then knew the model.
    """

    answered = False

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__(state)
        self.names: dict[str, None] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        self._note(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._note(name)
        return super().get(name, default)

    def _note(self, name: str) -> None:
        self.names.pop(name, None)
        if name in self:
            self.names[name] = None


def is_about_files(error: Exception) -> bool:
    """Whether the host stumbled over what the file holds, and not over memory, a driver or a user's wish to stop."""
    if is_full(error) or (isinstance(error, RuntimeError) and any(word in str(error) for word in _DRIVERS)):
        return False
    return isinstance(error, _OVER_FILES) and not isinstance(error, comfy.model_management.OOM_EXCEPTION)


def refusal(error: Exception, asked: Asked, path: str) -> GraftError:
    """One sentence on `error`, over a file of which the host read `asked`."""
    wrong = mismatches(error)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return UnsupportedFormat(f"the file does not fit the model: {VARIANT}: {wrong[0]}{more} ({path})")
    missing = error.args[0] if isinstance(error, KeyError) and error.args else None
    if isinstance(missing, str) and "." in missing and missing not in asked:
        return CorruptFile(f"the file is incomplete: get it from another source, {missing} is missing ({path})")
    # what it stumbled over as it looked is what it looked at last; what came of the sizes shows only in the model
    names = list(asked.names) if asked.answered else list(asked.names)[-1:]
    read = examples([f"{name} {list(asked[name].shape)}" for name in names])
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    where = f"what it reads from {read}" if read else "its tensors"
    return UnsupportedFormat(f"ComfyUI makes no model out of this file: {VARIANT}: {where} ({reason}) ({path})")
