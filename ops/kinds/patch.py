"""One entry of a parameter's patch list, and what a list of them makes of a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...kernels import AdapterError
from ..layout import Layout
from ..strengths import Strength
from .adapter import Adapter, Current, Region
from .factors import check_same
from .whole import Diff, ModelDiff, SecondWeight


@dataclass(frozen=True, eq=False, repr=False)
class Patch:
    """One entry of a parameter's patch list, in the order in which nodes added them.

    ``W ← strength_model · W``, then the adapter with `strength`, both within `region`.

    Attributes:
        function: applied to ΔW on its way into the weight; `from_host` takes permutations of rows in.
        origin: the host's own tuple, for its merge and save.
        when: what `strength` is multiplied with in each call, if it is no constant.
        source: the file that it comes from, for reports; "" where nobody says so.
    """

    strength: float
    adapter: Adapter
    strength_model: float = 1.0
    region: Region | None = None
    function: Callable[[torch.Tensor], torch.Tensor] | None = None
    origin: tuple | None = None
    when: Strength | None = None
    source: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Merge(SecondWeight):
    """``ΔW = weight with patches of its own``: another model merged in (ComfyUI's model merging).

    Attributes:
        weight: of the parameter's shape.
        patches: in that model's order.
    """

    weight: torch.Tensor
    patches: tuple[Patch, ...] = ()

    kind: ClassVar[str] = "merge"

    def check(self, shape: torch.Size) -> None:
        check_same(self.weight, shape)

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {"weight": self.delta(current.base())}

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        return merge(Diff(self.weight).delta(weight), self.patches)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Adapter):
    """``W' = s·W``: a patch's ``strength_model``."""

    kind: ClassVar[str] = "scale"
    idle_at_zero: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {}

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return y.mul_(s)

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        return weight * s


@dataclass(frozen=True, eq=False, repr=False)
class Idle(Adapter):
    """``ΔW = 0``: the patch is about its ``strength_model`` alone (ComfyUI's attention multipliers)."""

    kind: ClassVar[str] = "idle"

    def tensors(self, current: Current) -> dict[str, torch.Tensor]:
        return {}

    def output(self, p: Any, at: Layout, y: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return y

    def merged(self, weight: torch.Tensor, s: float) -> torch.Tensor:
        return weight.clone()


@dataclass(frozen=True, eq=False, repr=False)
class Opaque(Adapter):
    """A patch that only the host understands: it runs through the host's own merge on the decoded weight.

    Attributes:
        value: what the host's patch list holds.
        reason: why it takes this path, for the report.
    """

    value: Any
    reason: str

    kind: ClassVar[str] = "exact"
    additive: ClassVar[bool] = False


def merge(
    weight: torch.Tensor,
    patches: Sequence[Patch],
    host: Callable[[Patch, torch.Tensor], torch.Tensor] | None = None,
    base: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """`weight` with `patches` merged in: what the forms stand for, in full.

    Args:
        weight: fp32 or fp64, may be written to.
        host: merges an `Opaque` patch.
        base: the weight without any patch, for `ModelDiff`; None if `weight` is that.

    Raises:
        AdapterError: a patch is opaque, and there is no host.
    """
    original = weight.clone() if base is None and any(isinstance(p.adapter, ModelDiff) for p in patches) else None
    for patch in patches:
        if isinstance(patch.adapter, Opaque):
            if host is None:
                raise AdapterError(f"{patch.adapter.reason}, and no host is there that knows it: leave it out")
            weight = host(patch, weight)
            continue
        part = weight if patch.region is None else weight.narrow(*patch.region)
        part = part * patch.strength_model if patch.strength_model != 1.0 else part
        adapter = patch.adapter
        if isinstance(adapter, ModelDiff):
            first = original if base is None else base()
            assert first is not None
            adapter = Diff(adapter.target.to(first) - (first if patch.region is None else first.narrow(*patch.region)))
        if patch.strength or not adapter.idle_at_zero:
            part = adapter.merged(part, patch.strength)
        if patch.region is None:
            weight = part
        else:
            weight.narrow(*patch.region).copy_(part)
    return weight
