"""How much each column of a layer's weight counts: the mean square of what it is multiplied by, while a model runs.

    calibration = Calibration()
    with calibration.watching(watched_layers(model)):
        model(x)
    importance = calibration.importance()

A quantizer that knows it rounds the columns that count with less error, which is what llama.cpp's imatrix is for.
Nothing is left on the layers behind the block, and what a layer gives back is not touched.

For a repair of what rounding takes (`extract.cut`) that is too little: it has to know which inputs come together, of
which a layer has its width squared. A sketch of them is kept instead, S with SᵀS near to the sum of x xᵀ: each input is
added to one of a few rows, by chance and with a sign by chance (Charikar, Chen, Farach-Colton 2004).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import GraftError
from .files.imatrix import Importance
from .layers import EmbeddingMath

Entering = Callable[[nn.Module, tuple, Mapping[str, Any]], torch.Tensor]
"""What a layer multiplies its weight by, of the arguments of its call."""

_Key = tuple[str, torch.device]
_CHUNK = 1 << 22  # numbers that are squared at once: 32 MiB in fp64
_HAS_FP64 = ("cpu", "cuda")


def watched_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model`, ours or a host's, whose weight is multiplied by what goes in, by path.

    Not embeddings, of which rows are looked up.
    """
    return {name: module for name, module in model.named_modules() if _is_watched(module)}


def _is_watched(module: nn.Module) -> bool:
    if isinstance(module, EmbeddingMath):
        return False
    # hosts have linear layers that are none of torch's
    is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
    return is_linear or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def first_argument(layer: nn.Module, arguments: tuple, named: Mapping[str, Any]) -> torch.Tensor:
    """What torch's own layers multiply."""
    return arguments[0] if arguments else next(iter(named.values()))


_seeds = itertools.count()
"""Sketches of different inputs add up if no two were made by the same chance."""


class Calibration:
    """Sums of the squares of what goes into layers.

    They are taken in fp64, so that neither the size of a batch nor the dtype of the computation changes them.

    Args:
        sketched: rows of the sketch that is kept of the inputs of linear layers; none for 0.
    """

    def __init__(self, sketched: int = 0) -> None:
        self._sums: dict[_Key, torch.Tensor] = {}
        self._rows: dict[_Key, int] = {}
        self._sketches: dict[_Key, torch.Tensor] = {}
        self._sketched = sketched
        self._chance = torch.Generator().manual_seed(next(_seeds))

    @contextlib.contextmanager
    def watching(self, layers: Mapping[str, nn.Module], entering: Entering = first_argument) -> Iterator[None]:
        """Count what this thread has these layers multiply.

        Args:
            layers: by path, see `watched_layers`.
            entering: for layers that work on their input before they multiply it.
        """
        thread = threading.get_ident()

        def hook_of(name: str) -> Callable:
            def count(layer: nn.Module, arguments: tuple, named: dict) -> None:
                if threading.get_ident() == thread:  # others run the same layers for somebody else
                    self.count(name, layer, entering(layer, arguments, named))

            return count

        with contextlib.ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_pre_hook(hook_of(name), with_kwargs=True).remove)
            yield

    @torch.no_grad()
    def count(self, name: str, layer: nn.Module, x: torch.Tensor) -> None:
        """Add one input of a layer: ``[..., K]`` of a linear one, ``[B, C, ...]`` or ``[C, ...]`` of a convolution."""
        if not x.is_floating_point() or not x.numel():
            return
        if hasattr(layer, "kernel_size"):
            sums, rows = _of_convolution(layer, x)
        else:
            sums, rows = _of_linear(x)
            self._sketch((name, x.device), x.detach().reshape(-1, x.shape[-1]))
        self._take((name, x.device), sums, rows)

    def _sketch(self, key: _Key, x: torch.Tensor) -> None:
        if not self._sketched:
            return
        into = torch.randint(self._sketched, (len(x),), generator=self._chance).to(x.device)
        signs = (torch.randint(2, (len(x), 1), generator=self._chance) * 2 - 1).to(x.device)
        sketch = torch.zeros(self._sketched, x.shape[1], device=x.device)
        parts = (tensor.split(max(1, _CHUNK // x.shape[1])) for tensor in (x, into, signs))
        for rows, places, sign in zip(*parts, strict=True):
            sketch.index_add_(0, places, rows.float() * sign)
        # all of them together are gigabytes, which the model needs where it runs
        held, sketch = self._sketches.get(key), sketch.cpu()
        self._sketches[key] = sketch if held is None else held.add_(sketch)

    def add(self, other: Calibration) -> None:
        """Count what another calibration has counted.

        Raises:
            GraftError: it is of another model.
        """
        for key, found in other._sums.items():
            self._take(key, found, other._rows[key])
        for key, found in other._sketches.items():
            held = self._sketches.get(key)
            self._sketches[key] = found if held is None else held + found

    def _take(self, key: _Key, sums: torch.Tensor, rows: int) -> None:
        held = self._sums.get(key)
        if held is not None and held.shape != sums.shape:
            raise GraftError(
                f"{key[0]} was given {sums.numel()} columns after {held.numel()}: one calibration takes one model"
            )
        self._sums[key] = sums if held is None else held + sums
        self._rows[key] = self._rows.get(key, 0) + rows

    def importance(self, calls: int = 1, datasets: Sequence[str] = ()) -> Importance:
        """What has been counted, by the names that weights have in a GGUF file.

        Args:
            calls: model calls that were watched.
            datasets: what they were of, in words, for a file.

        Raises:
            GraftError: something that went into a layer was no number.
        """
        sums: dict[str, torch.Tensor] = {}
        rows: dict[str, int] = {}
        for (name, device), found in self._sums.items():
            key = f"{name}.weight"
            sums[key] = sums.get(key, 0) + found.cpu()
            rows[key] = rows.get(key, 0) + self._rows[name, device]
        sketches: dict[str, torch.Tensor] = {}
        for (name, _), found in self._sketches.items():
            key = f"{name}.weight"
            sketches[key] = sketches[key] + found if key in sketches else found
        for key, found in sums.items():
            if not torch.isfinite(found).all():
                raise GraftError(
                    f"what goes into {key.removesuffix('.weight')} was not a number (NaN or infinite): the pictures "
                    "of this run are broken, too; load the model with compute_dtype bf16 or fp32"
                )
        return Importance.of(sums, rows, calls, datasets, sketches)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp64, where it lies if that device has such."""
    return (x if x.device.type in _HAS_FP64 else x.cpu()).detach().double()


def _of_linear(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sums ``[K]``, and how many rows they are of."""
    rows = x.reshape(-1, x.shape[-1])
    parts = rows.split(max(1, _CHUNK // rows.shape[1]))
    return _total(_wide(part).square_().sum(0) for part in parts), rows.shape[0]


def _of_convolution(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sums ``[C / groups * kernel]``, as a row of the weight lies, and how many places they are of.

    With several groups a column is multiplied by another channel in each: the sums are over all of them.
    """
    x = x if x.dim() == len(layer.kernel_size) + 2 else x.unsqueeze(0)
    parts = x.split(max(1, _CHUNK // math.prod(x.shape[1:])))
    found = [_of_pictures(layer, part) for part in parts]
    sums = _total(part for part, _ in found)  # [C, kernel]
    return sums.view(layer.groups, -1).sum(0), sum(places for _, places in found) * layer.groups


def _of_pictures(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sums ``[C, kernel]`` over all places of ``[B, C, ...]``, and how many these are."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    squares = F.pad(_wide(x), layer._reversed_padding_repeated_twice, mode).square_()
    axes = list(zip(squares.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True))
    places = [(size - dilation * (width - 1) - 1) // stride + 1 for size, width, stride, dilation in axes]
    over = [0, *range(2, squares.dim())]
    columns = []
    for at in itertools.product(*(range(width) for _, width, _, _ in axes)):
        seen = squares
        for axis, (first, count, (_, _, stride, dilation)) in enumerate(zip(at, places, axes, strict=True), 2):
            start = first * dilation
            seen = seen[(slice(None),) * axis + (slice(start, start + stride * (count - 1) + 1, stride),)]
        columns.append(seen.sum(over))
    return torch.stack(columns, dim=1), x.shape[0] * math.prod(places)


def _total(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    first = next(parts)
    for part in parts:
        first += part
    return first


__all__ = ["Calibration", "first_argument", "watched_layers"]
