"""A strength that is a function of the model call, and not a number.

    s(step, token, conditioning, block) = value · curve(step) · mask(token) · [conditioning] · weight(block)

It is worked out once a call into the buffer that the layers read as a constant strength: no pass over the weights, no
patch, no reload. A layer's activations get one strength a row, since a row never mixes with another in a linear layer.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..kernels import AdapterError, GraftError
from ..kernels.compiled import operator
from .places import Architecture, Picture, Place, Window, native, on_positions, over_rows, place_of

UNITS = ("share", "step", "sigma")
EASES = ("hold", "linear", "ease")
APPLIES_TO = ("all", "positive", "negative")
ELSEWHERE = ("off", "mean", "full")

_KEPT = 32  # resized masks of one strength: a UNet has six levels, and guidance may ask for several sizes


@dataclass(frozen=True)
class Call:
    """One model call, as far as strengths depend on it.

    Attributes:
        share: of the steps that are done, 0 at the first.
        step: its number, from 0; between two where a sampler asks there.
        sigma: the noise.
        conditionings: what the parts of the batch are, in order: ``positive``, ``negative``, or a name of their own.
        picture: None where nobody could tell.
        windows: of each conditioning, which part of the whole picture it draws, if not all of it; empty where all draw
            all of it, None where somebody has cut it in an unknown way.
        architecture: where its tokens are; None where that is not known.
        shared: what has been worked out for it, for all layers.
    """

    share: float = 0.0
    step: float = 0.0
    sigma: float = 1.0
    conditionings: tuple[str, ...] = ("positive",)
    picture: Picture | None = None
    architecture: Architecture | None = None
    windows: tuple[Window | None, ...] | None = ()
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def place(self, path: str) -> Place | None:
        """What the rows of the layer at `path` are; None where that is not known of its model."""
        return None if self.architecture is None else place_of(self.architecture, path)

    def value(self, curve: Curve) -> float:
        """Of a curve in this call."""
        if id(curve) not in self.shared:
            self.shared[id(curve)] = curve(self)
        return self.shared[id(curve)]


@dataclass(frozen=True)
class Curve:
    """A number over the steps, by keyframes; before the first and behind the last it stays as there.

    Attributes:
        keys: ``(at, value, way)``, by `at`: how it goes from this one to the next, at once when that is reached
            (``hold``), evenly (``linear``), or slowly at both ends (``ease``).
        unit: what `at` counts: the ``share`` of steps that are done, the number of the ``step``, or the ``sigma``,
            which falls.
    """

    keys: tuple[tuple[float, float, str], ...]
    unit: str = "share"

    def __post_init__(self) -> None:
        if not self.keys or self.unit not in UNITS or any(way not in EASES for _, _, way in self.keys):
            raise AdapterError(
                f"a schedule needs keyframes by {', '.join(UNITS)} that go {', '.join(EASES)} to the next one"
            )

    @classmethod
    def between(cls, start: float, end: float, unit: str = "share") -> Curve | None:
        """1 from `start` up to `end`, 0 outside; None if that is all of the steps."""
        if start <= 0.0 and end >= 1.0:
            return None
        keys = [(0.0, 0.0, "hold")] if start > 0.0 else []
        keys.append((max(0.0, start), 1.0, "hold"))
        if end < 1.0:
            keys.append((end, 0.0, "hold"))
        return cls(tuple(keys), unit)

    def __call__(self, call: Call) -> float:
        now = getattr(call, self.unit)
        # sigmas fall: the same walk with every sign turned
        sign = -1.0 if self.unit == "sigma" else 1.0
        keys = sorted(self.keys, key=lambda key: sign * key[0])
        # a hair's breadth early, since shares of steps are divisions
        index = bisect.bisect_right([sign * key[0] for key in keys], sign * now + 1e-6) - 1
        if index < 0:
            return keys[0][1]
        at, value, way = keys[index]
        if way == "hold" or index + 1 == len(keys):
            return value
        then, target, _ = keys[index + 1]
        share = min(1.0, max(0.0, (now - at) / (then - at)))
        if way == "ease":
            share = share * share * (3 - 2 * share)
        return value + (target - value) * share


_RULE = re.compile(r"(?<![\w.*])([A-Za-z_*][\w.*]*)(?:\s+(\d+)(?:\s*-\s*(\d+))?)?\s*=\s*([-+]?\d*\.?\d+)")
_BLOCK = re.compile(r"(?<![A-Za-z_])([A-Za-z_]+)\.(\d+)\.")
_ANY = 1 << 30
"""The last number of a rule that is for all blocks of its name."""

PRESETS = {
    "attention": "attn = 1, attention = 1, linear1 = 1, linear2 = 1, * = 0",
    "feed-forward": "ff = 1, mlp = 1, feed_forward = 1, linear1 = 1, linear2 = 1, * = 0",
    "double": "double_blocks = 1, * = 0",
    "single": "single_blocks = 1, * = 0",
    "in": "input_blocks = 1, * = 0",
    "middle": "middle_block = 1, * = 0",
    "out": "output_blocks = 1, * = 0",
    "content": "output_blocks 0 = 1, * = 0",
    "style": "output_blocks 1 = 1, * = 0",
}
"""Weights of blocks with a name, each for one part of a model alone. A single block of Flux has attention and
feed-forward in one layer: it belongs to both. `in`, `middle` and `out` are the parts of a UNet; `content` and `style`
are SDXL's blocks for what is in the picture and for how it looks, after B-LoRA (Frenkel et al., arXiv 2403.14572)."""


class Rule(NamedTuple):
    """A weight for blocks.

    Attributes:
        name: the beginning of a block's name, or of a part of a layer's; ``*`` is everything.
        first: of the blocks of that name, by number.
        last: `_ANY` if it is for all of them.
        weight: what the strength is multiplied with.
        preset: the one that it belongs to.
    """

    name: str
    first: int
    last: int
    weight: float
    preset: str = ""

    def fits(self, path: str) -> bool:
        """Whether a layer is one of those that the rule is about."""
        plain = native(path)
        if self.last != _ANY:
            block = _BLOCK.search(plain + ".")
            if block is None or not self.first <= int(block[2]) <= self.last:
                return False
        return self.name == "*" or any(f"{mark}{self.name}" in f"{mark}{plain}" for mark in "._")

    def __str__(self) -> str:
        return self.preset or (self.name if self.last == _ANY else f"{self.name} {self.first}-{self.last}")


@dataclass(frozen=True)
class Blocks:
    """A weight for each block of a model.

    Attributes:
        rules: the first that fits a layer counts, and 1 where none does.
    """

    rules: tuple[Rule, ...]

    @classmethod
    def parse(cls, text: str) -> Blocks | None:
        """From ``double 0-9 = 0.5, single = 0, * = 1``: the beginning of a block's name or a part of a layer's, numbers
        if need be, a weight. A preset stands for its rules. None if there is nothing in it.

        Raises:
            AdapterError: a rule cannot be read.
        """
        rules: list[Rule] = []
        for part in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
            preset = part.lower()
            if preset in PRESETS:
                named = cls.parse(PRESETS[preset])
                assert named is not None
                rules += (rule._replace(preset=preset) for rule in named.rules)
                continue
            found = _RULE.fullmatch(part)
            if found is None:
                raise AdapterError(
                    f"a rule for blocks cannot be read ({part[:60]}): write it like double 0-9 = 0.5, "
                    f"and a comma between two, or take one of {', '.join(PRESETS)}"
                )
            name, first, last, weight = found.groups()
            low = 0 if first is None else int(first)
            high = _ANY if first is None else low if last is None else int(last)
            if high < low:
                raise AdapterError(f"a rule for blocks counts down ({part[:60]}): write the smaller number first")
            rules.append(Rule(name, low, high, float(weight)))
        return cls(tuple(rules)) if rules else None

    def __call__(self, path: str) -> float:
        return next((rule.weight for rule in self.rules if rule.fits(path)), 1.0)

    def unused(self, paths: Collection[str]) -> list[str]:
        """Rules that fit none of these layers, as a misspelt one, or one for another model: ``double 0-9``.

        Of a preset it is enough that one besides its rest fits.
        """
        used = [rule.name != "*" and any(map(rule.fits, paths)) for rule in self.rules]
        presets = {rule.preset for rule, fits in zip(self.rules, used, strict=True) if fits}
        unused = (r for r, fits in zip(self.rules, used, strict=True) if not fits and (r.preset or r.name != "*"))
        return list(dict.fromkeys(str(rule) for rule in unused if not rule.preset or rule.preset not in presets))


@dataclass(frozen=True, eq=False)
class Strength:
    """What a patch's strength is multiplied with.

    Attributes:
        curve: over the steps.
        mask: over the picture, fp32 ``[n, rows, columns]`` of any size; n is 1, or goes from the first frame of a video
            to its last, or is one for each picture of a batch.
        applies_to: ``all``, or the conditioning whose part of the batch it is for.
        blocks: weights of blocks.
        elsewhere: of what has no place in the picture, under a mask: ``off``, the mask's ``mean``, or ``full``.
    """

    curve: Curve | None = None
    mask: torch.Tensor | None = None
    applies_to: str = "all"
    blocks: Blocks | None = None
    elsewhere: str = "off"
    _kept: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False)
    _weights: dict[str, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.mask is not None and (self.mask.dim() != 3 or not self.mask.numel()):
            raise AdapterError(f"choose another mask: this one has no pixels, its shape is {list(self.mask.shape)}")
        if self.elsewhere not in ELSEWHERE:
            raise AdapterError(f"what has no place in the picture is {', '.join(ELSEWHERE)}, not {self.elsewhere}")

    def __str__(self) -> str:
        """In words, e.g. ``in a region of 50 %, by share 0 = 1, 0.25 = 0, for the positive prompt``."""
        parts = []
        if self.mask is not None:
            parts.append(f"in a region of {100 * self._mean:.0f} %")
        if self.curve is not None:
            keys = ", ".join(f"{at:g} = {value:g}" for at, value, _ in self.curve.keys)
            parts.append(f"by {self.curve.unit} {keys}")
        if self.applies_to != "all":
            parts.append(f"for the {self.applies_to} prompt")
        if self.blocks is not None:
            parts.append("with weights of blocks")
        return ", ".join(parts) or "everywhere"

    def number(self, call: Call, path: str) -> float:
        """The part of it that is one number for a whole layer."""
        value = 1.0 if self.curve is None else call.value(self.curve)
        if self.blocks is None:
            return value
        if path not in self._weights:
            self._weights[path] = self.blocks(path)
        return value * self._weights[path]

    def is_one_number(self, call: Call) -> bool:
        """Whether that is all of it in this call."""
        everybody = self.applies_to == "all" or set(call.conditionings) == {self.applies_to}
        return self.mask is None and everybody

    @property
    def is_steady(self) -> bool:
        """Whether it is the same number in all calls, which may differ from layer to layer."""
        return self.curve is None and self.mask is None and self.applies_to == "all"

    def rows(self, call: Call, path: str, lead: torch.Size, is_conv: bool, device: torch.device) -> torch.Tensor:
        """The rest of it: fp32, to multiply each row of a layer's activations with.

        Args:
            lead: the shape of the output without its channels, ``[B, ...]``.
            is_conv: whether what follows B is space.

        Returns:
            of as many dimensions as `lead`, each as long as there or 1.
        """
        part = self._of_batch(call, lead, device)
        if self.mask is None:
            return part
        return part * self._of_mask(call, path, lead, is_conv, device)

    def _of_batch(self, call: Call, lead: torch.Size, device: torch.device) -> torch.Tensor:
        ones = (1,) * (len(lead) - 1)
        if self.applies_to == "all" or not lead:
            return torch.ones((1, *ones)[: len(lead)], device=device)
        chunks = torch.tensor([float(name == self.applies_to) for name in call.conditionings], device=device)
        if lead[0] % len(chunks):
            return torch.ones(1, *ones, device=device)
        batch = 0 if call.picture is None else call.picture.batch
        if len(lead) == 1 and batch and lead[0] % batch == 0:
            # Qwen-Image-Edit and Flux.2 have the time of references, zero, behind those of the whole batch
            return chunks.repeat_interleave(batch // len(chunks)).repeat(lead[0] // batch)
        return chunks.repeat_interleave(lead[0] // len(chunks)).view(-1, *ones)

    def _of_mask(self, call: Call, path: str, lead: torch.Size, is_conv: bool, device: torch.device) -> torch.Tensor:
        if call.architecture is None or call.picture is None:
            raise AdapterError("a mask was given to a model whose picture is not known: take the mask off")
        assert self.mask is not None
        place = place_of(call.architecture, path)
        if place in (Place.NOWHERE, Place.WORDS) or len(lead) < 2:
            return torch.full((1,) * len(lead), self._elsewhere(), device=device)
        if call.windows is None:
            raise GraftError(
                "a LoRA has a mask, and another node draws the picture in parts (tiles): nobody tells which, so take "
                "the mask off or that node out"
            )
        windows, masks = call.windows or (None,) * len(call.conditionings), self._of_pictures(call, lead)
        if len(set(windows)) == len(masks) == 1:
            return self._laid_out(masks[0], windows[0], call.picture, place, path, lead, is_conv, device)
        # conditionings lie behind each other in a batch, each with all of its pictures
        times = lead[0] // (len(windows) * len(masks))
        parts = [
            self._laid_out(mask, window, call.picture, place, path, lead, is_conv, device)
            for window in windows
            for mask in masks
        ]
        return torch.cat([part.expand(times, *part.shape[1:]) for part in parts])

    def _of_pictures(self, call: Call, lead: torch.Size) -> Sequence[slice]:
        """Which masks the pictures of a batch have, one after the other; one for all where they have the same."""
        assert self.mask is not None and call.picture is not None
        count, batch = self.mask.shape[0], lead[0] // len(call.conditionings)
        if count == 1 or call.picture.frames > 1:
            return [slice(None)]
        if count != batch:
            raise AdapterError(
                f"a LoRA's mask is a batch of {count}, and {batch} are drawn: give it one mask, or one for each picture"
            )
        return [slice(index, index + 1) for index in range(count)]

    def _laid_out(
        self, which: slice, window: Window | None, picture: Picture, place: Place, path: str, lead: torch.Size,
        is_conv: bool, device: torch.device,
    ) -> torch.Tensor:  # fmt: skip
        """The mask over the rows of a layer, ``[1, ...]`` with as many dimensions as `lead`."""
        key = (which.start, window, picture, place, lead, is_conv, device)
        if key not in self._kept:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            assert self.mask is not None
            mask = self.mask[which].to(device, torch.float32)
            mask = mask if window is None else window.cut(mask, picture)
            if is_conv:
                self._kept[key] = on_positions(mask, torch.Size(lead[1:]))
            else:
                rows = over_rows(mask, picture, place, lead[-1], self._elsewhere(), path, lead[0])
                self._kept[key] = rows.view(*(1,) * (len(lead) - 1), -1)
        return self._kept[key]

    @functools.cached_property
    def _mean(self) -> float:
        assert self.mask is not None
        return float(self.mask.mean())

    def _elsewhere(self) -> float:
        return {"off": 0.0, "full": 1.0}[self.elsewhere] if self.elsewhere != "mean" else self._mean


class Number(float):
    """A constant strength that brings along where and when it counts.

    For whoever knows nothing of it, it is the number. Stackers and loaders of other packs hand strengths on as they
    are, so that it comes to `add_patches` of a model of ours by any of them.

    Attributes:
        when: None is everywhere and always.
    """

    when: Strength | None

    def __new__(cls, value: float, when: Strength | None = None) -> Number:
        number = super().__new__(cls, value)
        number.when = when
        return number


_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, RowStrengths] = weakref.WeakValueDictionary()
"""By the number that stands for them in a traced graph, where a new one is another input and no other graph."""


@operator("row_strengths(Tensor x, Tensor number, int[] lead, int size, bool is_conv) -> Tensor")
def row_strengths(x: torch.Tensor, number: torch.Tensor, lead: list[int], size: int, is_conv: bool) -> torch.Tensor:
    """`RowStrengths.on` as a node of a graph."""
    return _known[int(number)].known(torch.Size(lead), is_conv, x.device).clone()


@row_strengths.register_fake
def _(x, number, lead, size, is_conv):
    return x.new_empty(*lead, size, dtype=torch.float32)


class RowStrengths:
    """The strengths of one member of a layer's residual where they differ from row to row of its activations."""

    def __init__(
        self, values: Sequence[float], order: Sequence[int], strengths: Sequence[Strength | None], call: Call,
        path: str, made: dict[Any, torch.Tensor],
    ) -> None:  # fmt: skip
        """Args:
        values: of each slot, the part that is one number.
        order: which of `strengths` each slot has, -1 for padding.
        strengths: of the member's patches; None is 1 everywhere.
        made: what layers of one place that have the same slots share in this call.
        """
        self.values, self.order, self.strengths = values, order, strengths
        self.call, self.path, self.size, self.made = call, path, len(values), made
        number = next(_numbers)
        _known[number] = self
        self.number = torch.tensor(number)

    def on(self, x: torch.Tensor, lead: torch.Size, is_conv: bool) -> torch.Tensor:
        """fp32 ``[*lead, size]`` on x's device for an output of shape `lead` without its channels."""
        if torch.compiler.is_compiling():
            return torch.ops.graft.row_strengths(x, self.number, list(lead), self.size, is_conv)
        return self.known(lead, is_conv, x.device)

    def known(self, lead: torch.Size, is_conv: bool, device: torch.device) -> torch.Tensor:
        """The same, without x."""
        key = (lead, is_conv, device)
        if key not in self.made:
            self.made[key] = self._on(lead, is_conv, device)
        return self.made[key]

    def _on(self, lead: torch.Size, is_conv: bool, device: torch.device) -> torch.Tensor:
        one = torch.ones((1,) * len(lead), device=device)
        parts = [one if s is None else s.rows(self.call, self.path, lead, is_conv, device) for s in self.strengths]
        shape = torch.broadcast_shapes(*(part.shape for part in parts))
        stacked = torch.stack([part.expand(shape) for part in (*parts, one)], dim=-1)
        # the last one, of ones, is for the padding
        order = torch.tensor([index % (len(parts) + 1) for index in self.order], device=device)
        every = stacked.index_select(-1, order) * torch.tensor(self.values, device=device)
        return every.expand(*lead, -1).contiguous()


__all__ = ["APPLIES_TO", "EASES", "ELSEWHERE", "UNITS", "Blocks", "Call", "Curve", "RowStrengths", "Strength"]
