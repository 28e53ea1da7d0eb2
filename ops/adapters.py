"""What an adapter file says about one weight: one class per kind, in the adapter's own terms.

Every class gives its exact activation-space form, so that the base weight is never rebuilt. The names
and the meaning of each factor are those of the format's trainers (kohya-ss/sd-scripts, LyCORIS, PEFT).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch


class Region(NamedTuple):
    """The part of a weight that a patch is about: ``weight.narrow(dim, start, length)``."""

    dim: int
    start: int
    length: int


class Factors(NamedTuple):
    """ΔW = scale · B · A, flattened: A ``[r, in · k]``, B ``[out, r]``."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


class Adapter:
    """One adapter on one weight, without its strength."""

    kind: ClassVar[str]

    def low_rank(self) -> Factors | None:
        """The adapter as an additive low-rank term, if it is one."""
        return None


@dataclass(frozen=True, eq=False)
class LoRA(Adapter):
    """``ΔW = alpha / r · up · down`` (Hu et al. 2021); for convolutions kohya's LoCon, a k×k down and a 1×1 up.

    Attributes:
        up: ``[out, r]`` or ``[out, r, 1, 1]``.
        down: ``[r, in]`` or ``[r, in, k, k]``.
        alpha: None stands for r.
    """

    up: torch.Tensor
    down: torch.Tensor
    alpha: float | None = None

    kind: ClassVar[str] = "lora"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def low_rank(self) -> Factors:
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return Factors(self.down.flatten(1), self.up.flatten(1), scale)


@dataclass(frozen=True, eq=False)
class Diff(Adapter):
    """``ΔW = diff``: a full difference, of a bias here.

    Attributes:
        diff: of the parameter's shape.
    """

    diff: torch.Tensor

    kind: ClassVar[str] = "diff"


@dataclass(frozen=True, eq=False)
class Opaque(Adapter):
    """A patch that only the host understands: it runs through the host's own merge on the decoded weight.

    Attributes:
        value: what the host's patch list holds.
        reason: why it takes this path, for the report.
    """

    value: Any
    reason: str

    kind: ClassVar[str] = "exact"


@dataclass(frozen=True, eq=False)
class Patch:
    """One entry of a parameter's patch list, in the order in which nodes added them.

    ``W ← strength_model · W``, then the adapter with `strength`, both within `region`.

    Attributes:
        function: applied to ΔW on its way into the weight (a permutation of rows).
        origin: the host's own tuple, for its merge and save.
    """

    strength: float
    adapter: Adapter
    strength_model: float = 1.0
    region: Region | None = None
    function: Callable[[torch.Tensor], torch.Tensor] | None = None
    origin: tuple | None = None
