"""A model at a glance: which types its groups of layers are in, and how much each LoRA changes in each block."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..kernels import AdapterError, plain
from .extract import Change, change_of
from .kinds import Patch
from .layers import PackedLayer
from .report import size_text

PREFIX = "diffusion_model."
"""Of all layers, in the hosts' names."""

OUTSIDE = "outside of the blocks"
_BLOCK = re.compile(r"^([A-Za-z_]+(?:\.[A-Za-z_]+)*)\.(\d+)\.")
_SAMPLE = 64
"""Rows of a weight that stand for all of it where its size is estimated."""


@dataclass
class Group:
    """Layers that do the same in every block.

    Attributes:
        layers: how many are in a type, by its name.
        nbytes: that they take, likewise.
    """

    layers: Counter[str] = field(default_factory=Counter)
    nbytes: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        return sum(self.nbytes.values())


def group_of(name: str) -> str:
    """``double_blocks.img_attn`` of ``diffusion_model.double_blocks.3.img_attn.qkv``; `OUTSIDE` where no block is."""
    name = name.removeprefix(PREFIX)
    if not _BLOCK.match(name):
        return OUTSIDE
    parts = name.split(".")
    words = [part for part in parts if not part.isdigit()]
    return ".".join(words if parts[-1].isdigit() else words[:-1])


def block_of(name: str) -> tuple[str, int | None]:
    """``("double_blocks", 3)``; the number is None outside of blocks."""
    found = _BLOCK.match(name.removeprefix(PREFIX))
    return (found[1], int(found[2])) if found else (OUTSIDE, None)


def groups(layers: Mapping[str, PackedLayer]) -> dict[str, Group]:
    """The types of a model's layers by their groups, in the model's order."""
    found: dict[str, Group] = {}
    for name, layer in layers.items():
        if layer.fmt is not None:
            group = found.setdefault(group_of(name), Group())
            group.layers[layer.fmt.name] += 1
            group.nbytes[layer.fmt.name] += layer.weight.numel() * layer.weight.element_size()
    return found


Effects = dict[tuple[str, int | None], float]
"""By block: the norm of what is added to its weights, as a share of the norm of these."""


def effects(
    layers: Mapping[str, PackedLayer],
    patches: Mapping[str, Sequence[Patch]],
    label: Callable[[Patch], str],
    host: Callable[[str, Patch, torch.Tensor], torch.Tensor] | None = None,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Effects]:
    """How much each LoRA changes the weights of each block.

    What works on a part of the picture or of the steps counts where and when it is strongest. Norms of weights are
    estimated from some of their rows; those of what is added are exact.

    Args:
        patches: by parameter.
        label: what a patch belongs to.
        host: merges what is `Opaque` into the weight of a parameter.
        step: called before each layer, to show progress or to stop.
    """
    labels = dict.fromkeys(label(patch) for found in patches.values() for patch in found)
    weights: Effects = defaultdict(float)
    changed: dict[str, Effects] = {name: defaultdict(float) for name in labels}
    for name, layer in layers.items():
        if layer.fmt is None:
            continue
        step()
        block, own = block_of(name), patches.get(f"{name}.weight", ())
        weights[block] += _estimated_square(layer)
        for what in dict.fromkeys(map(label, own)):
            those = [_strongest(patch, name) for patch in own if label(patch) == what]
            changed[what][block] += _square_of(those, name, layer, host)
    return {
        what: {block: math.sqrt(squares[block] / total) for block, total in weights.items() if total and squares[block]}
        for what, squares in changed.items()
    }


def _strongest(patch: Patch, name: str) -> Patch:
    """A patch of a layer as a constant: its strength in this block, at the highest point of its course."""
    if patch.when is None:
        return patch
    course = 1.0 if patch.when.curve is None else max(abs(value) for _, value, _ in patch.when.curve.keys)
    block = 1.0 if patch.when.blocks is None else patch.when.blocks(name)
    return replace(patch, strength=patch.strength * course * block, when=None)


def _square_of(
    patches: list[Patch], name: str, layer: PackedLayer,
    host: Callable[[str, Patch, torch.Tensor], torch.Tensor] | None,
) -> float:  # fmt: skip
    """The square of the norm of what patches add to a layer; 0 where that has no norm, as of one that is widened."""
    merge = None if host is None else lambda patch, weight: host(f"{name}.weight", patch, weight)
    try:
        change = change_of(patches, torch.Size(layer.logical_shape), layer.dequantized, merge)
    except AdapterError:
        return 0.0
    return 0.0 if change is None else squared_norm(change)


def squared_norm(change: Change) -> float:
    """‖ΔW‖², of factors by their products with themselves, ``tr(UᵀU · DDᵀ)``, without ΔW."""
    if change.full is not None:
        return float(change.full.square().sum())
    assert change.up is not None and change.down is not None
    return float(((change.up.T @ change.up) * (change.down @ change.down.T)).sum())


def _estimated_square(layer: PackedLayer) -> float:
    """Of the norm of a layer's weight, from its first rows."""
    for rows, part in layer.chunks(layer.weight.data, torch.float32):
        count = min(_SAMPLE, rows.stop - rows.start)
        return float(part[:count].square().mean()) * math.prod(layer.logical_shape)
    return 0.0


def told(found: Mapping[str, Group]) -> list[str]:
    """A line for each group: ``double_blocks.img_attn: Q4_K 38, Q6_K 19 · 1.2 GB``."""
    return [
        f"{name}: {', '.join(f'{fmt} {n}' for fmt, n in group.layers.most_common())} · {size_text(group.size)}"
        for name, group in found.items()
    ]


def effect_line(what: str, found: Effects) -> str:
    """``style.safetensors ×0.80: double_blocks 1.2 % (most in 7: 2.1 %), single_blocks 0.90 %``."""
    families = dict.fromkeys(family for family, _ in found)
    parts = [_of_family(family, {n: s for (f, n), s in found.items() if f == family}) for family in families]
    return plain(f"{what} changes the weights by: {', '.join(parts) or 'nothing'}")


def _of_family(family: str, shares: Mapping[int | None, float]) -> str:
    mean = math.sqrt(sum(share**2 for share in shares.values()) / len(shares))
    number = max(shares, key=lambda n: shares[n])
    most = "" if number is None or len(shares) < 2 else f" (most in {number}: {percent(shares[number])})"
    return f"{family} {percent(mean)}{most}"


def percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def matching(words: str, names: Iterable[str]) -> list[str]:
    """The names in which all of these words are, whatever their case."""
    wanted = words.casefold().split()
    return [name for name in names if all(word in name.casefold() for word in wanted)]
