"""One layer of each type of the loaded model: a LoRA beside it, merged by Forge, and requantized by Forge.

What is compared is the LoRA's effect, ``y(with) - y(without)``, on fp32 activations, with ``x (B A)ᵀ`` in
fp64. So what shows is what each way does to the weights, and not the rounding of y, which all share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels import GraftError
from ...ops.adapters import LoRA, Patch
from ...ops.factors import FactorCache
from ...ops.layers import LinearMath
from ...ops.residual import ResidualStack, RunningResidual
from .engine import Engine
from .host import Host
from .layers import LayerState
from .session import gguf_layers, patchers

RANK = 16
CHANGE = 0.01  # |ΔW| as a share of |W|, as a LoRA at strength 1 has it
TOKENS = 256
REPEATS = 3


@dataclass
class Comparison:
    """One layer; errors are relative to the LoRA's effect, and None where Forge has no such way.

    Attributes:
        path, fmt, shape: which layer.
        residual: error of the LoRA beside the layer.
        merged: error of Forge's online mode, which rebuilds the weight for each step.
        requantized: error of Forge's offline mode, which writes it back in the file's type.
        kept: share of the effect that requantizing keeps.
        refusal: what Forge says instead.
        base_ms, residual_ms, merged_ms: for `TOKENS` tokens without a LoRA, beside it, and in Forge's online mode.
    """

    path: str
    fmt: str
    shape: tuple[int, ...]
    residual: float
    base_ms: float
    residual_ms: float
    merged: float | None = None
    merged_ms: float | None = None
    requantized: float | None = None
    kept: float | None = None
    refusal: str = ""


class Trial:
    """A layer, a LoRA for it and activations.

    Attributes:
        effect: what the LoRA should do, fp64 ``[TOKENS, rows]``.
    """

    def __init__(self, engine: Engine, layer: nn.Module, state: LayerState, device: torch.device) -> None:
        self.layer, self.state, self.device = layer, state, device
        self.data = engine.data(layer, state).to(device)
        state.math.backend = engine.backend(device, state.fmt)
        weight = state.math.dequantized(self.data)
        random = torch.Generator().manual_seed(0)
        rows, columns = weight.shape
        up = torch.randn(rows, RANK, generator=random).to(device)
        down = torch.randn(RANK, columns, generator=random).to(device)
        up *= CHANGE * weight.norm() / (up @ down).norm()
        self.lora = LoRA(up, down)
        self.x = torch.randn(TOKENS, columns, generator=random).to(device)
        self.effect = self.x.double() @ down.double().t() @ up.double().t()

    def error(self, y: torch.Tensor, without: torch.Tensor) -> float:
        """Relative error of an effect."""
        return float((y.double() - without.double() - self.effect).norm() / self.effect.norm())

    def kept(self, y: torch.Tensor, without: torch.Tensor) -> float:
        """Share of the wanted effect that is in this one."""
        got = y.double() - without.double()
        return float((got * self.effect).sum() / (self.effect * self.effect).sum())

    def residual(self, dtype: torch.dtype) -> RunningResidual:
        """The LoRA as an engine runs it, its factors in `dtype`."""
        stack = ResidualStack({"layer.weight": [Patch(1.0, self.lora)]})
        stack.build({"layer": self.state.math}, FactorCache(keep=1), dtype).to(self.device)
        return stack.running({"layer": self.state.math}, self.device)["layer"]


def verify(engine: Engine, model: Any, device: torch.device, dtype: torch.dtype) -> list[Comparison]:
    """Compare the largest layer of each quantized type.

    Args:
        model: what Forge has loaded.
        device, dtype: of the computation.
    """
    found = []
    with torch.inference_mode():
        for path, layer, state in _one_of_each(engine, model):
            trial = Trial(engine, layer, state, device)
            comparison = _ours(trial, path, dtype)
            _forges(engine.host, trial, dtype, comparison)
            found.append(comparison)
    return found


def _one_of_each(engine: Engine, model: Any) -> Iterator[tuple[str, nn.Module, LayerState]]:
    best: dict[str, tuple[str, nn.Module, LayerState]] = {}
    for _, patcher in patchers(model):
        for path, layer, state in gguf_layers(engine, patcher.model):
            if not isinstance(state.math, LinearMath):
                continue
            known = best.get(state.fmt.name)
            if state.fmt.is_quantized and (known is None or state.shape.numel() > known[2].shape.numel()):
                best[state.fmt.name] = (path, layer, state)
    yield from best.values()


def _ours(trial: Trial, path: str, dtype: torch.dtype) -> Comparison:
    math, data, x = trial.state.math, trial.data, trial.x
    running, half = trial.residual(dtype), x.to(dtype)
    return Comparison(
        path, trial.state.fmt.name, tuple(trial.state.shape),
        residual=trial.error(running(x, math, data, None), math.compute(x, data)),
        base_ms=_milliseconds(lambda: math.compute(half, data), trial.device),
        residual_ms=_milliseconds(lambda: running(half, math, data, None), trial.device),
    )  # fmt: skip


def _forges(host: Host, trial: Trial, dtype: torch.dtype, into: Comparison) -> None:
    """What Forge itself would do, on a copy of its parameter."""
    weight = trial.layer.weight
    if not hasattr(weight, "copy_with_data"):
        into.refusal = "the parameter has lost its type"
        return
    weight = weight.to(trial.device)
    weight.gguf_cls.bake(weight)
    patch = (1.0, host.value_of(trial.lora, weight.shape), 1.0, None, None)

    def merged(dtype: torch.dtype) -> torch.Tensor:
        return host.merge([patch], host.decode(weight).to(dtype), "verify", computation_dtype=dtype)

    before = F.linear(trial.x, host.decode(weight).float())
    try:
        rounded = host.decode(weight).to(dtype).float()
        into.merged = trial.error(F.linear(trial.x, merged(dtype).float()), F.linear(trial.x, rounded))
        half = trial.x.to(dtype)
        into.merged_ms = _milliseconds(lambda: F.linear(half, merged(dtype)), trial.device)
        weight.gguf_cls.quantize_pytorch(merged(torch.float32), weight)
    except (NotImplementedError, GraftError):
        into.refusal = "Forge cannot do this"
        return
    except Exception as error:  # a Forge of another shape
        into.refusal = f"{type(error).__name__}: {error}"
        return
    after = F.linear(trial.x, host.decode(weight).float())
    into.requantized, into.kept = trial.error(after, before), trial.kept(after, before)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])
