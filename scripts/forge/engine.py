"""The hooks in Forge's backend, and the forward pass of a GGUF layer.

    y = dequant(Wq) x + b  +  s · B (A x)

Forge keeps owning the weights, their movement and the list of LoRAs. Graft runs the layer: it reads the
packed bytes as they are and puts the LoRAs beside the matmul. Whatever it does not know goes to Forge's own
forward and is counted; nothing here raises while an image is being made.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...kernels import FORMATS, Format, GraftError, NoBackend, UnsupportedFormat, by_name, choose, dequantize
from ...ops.adapters import Patch
from ...ops.layers import LinearMath, autocast_dtype, format_of, without_autocast
from ...ops.residual import FactorCache, ResidualStack, RunningResidual
from . import layout, patches
from .host import Host

log = logging.getLogger(__name__)

MODES = ("auto", "on", "off")
DTYPES: dict[str, torch.dtype | None] = {
    "auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How layers run.

    Attributes:
        mode: ``auto``: LoRAs beside the matmul unless their rank is so large that a full weight is cheaper;
            ``on``: always beside it; ``off``: everything as Forge does it.
        backend: of the kernels.
        dtype: of the computation; ``auto`` is that of the activations.
    """

    mode: str = "auto"
    backend: str = "auto"
    dtype: str = "auto"


class ForgeMath(LinearMath):
    """The arithmetic of a linear layer whose weight Forge holds."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def __init__(self, fmt: Format, shape: torch.Size) -> None:
        super().__init__()
        self.fmt = fmt
        self.logical_shape = shape

    @contextlib.contextmanager
    def holding(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Iterator[None]:
        """With the layer's own tensors, which adapters look at while they are put together."""
        self.weight, self.bias = weight, bias
        try:
            yield
        finally:
            self.weight = self.bias = None

    def format_of(self, data: torch.Tensor) -> Format:
        """Bytes are in the layer's format; anything else is a float tensor that says itself what it is."""
        assert self.fmt is not None
        return self.fmt if data.dtype == torch.uint8 else format_of(data)


class LayerState:
    """What Graft knows about one of Forge's layers. The format belongs to the layer: parameters get replaced.

    Attributes:
        header: what baking lost of the weight, while it is baked.
        refused: why this layer runs in Forge's own forward.
        path, reason: how its LoRAs run, and why not beside the weight; empty without any.
        left_out: why patches of theirs fit nothing.
        residual: them, put together from the host's patches `seen`.
    """

    def __init__(self, fmt: Format, shape: torch.Size) -> None:
        self.fmt, self.shape = fmt, shape
        self.math = ForgeMath(fmt, shape)
        self.known: patches.Known = {}
        self.cache = FactorCache(keep=1)
        self.header: torch.Tensor | None = None
        self.refused = ""
        self.path = self.reason = ""
        self.left_out: list[str] = []
        self.residual: RunningResidual | None = None
        self.seen: tuple = ()

    def take(self, residual: RunningResidual, seen: tuple, left_out: list[str]) -> None:
        """Run with these adapters from now on."""
        self.residual, self.seen = residual, seen
        self.path, self.reason = residual.residual.path, residual.residual.reason
        self.left_out = left_out + residual.residual.rejected

    def release(self) -> None:
        """Let go of the factors; they are put together again when the layer next runs."""
        if self.seen:
            self.residual, self.seen = None, ()
            self.known, self.cache = {}, FactorCache(keep=1)

    def forget(self) -> None:
        """There are no adapters any more."""
        if self.path:
            self.release()
            self.path, self.reason, self.left_out = "", "", []


STATE = "_graft_state"


def state_of(layer: nn.Module) -> LayerState | None:
    """What Graft knows about `layer`; None if it has not seen it."""
    return layer.__dict__.get(STATE)


class Engine:
    """Graft in one Forge.

    Attributes:
        active: whether the hooks do anything.
        counts: layer calls by ``(path, reason)``; paths are ``base``, ``residual``, ``exact`` and ``forge``.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.settings = Settings()
        self.active = False
        self.counts: Counter[tuple[str, str]] = Counter()
        self._originals: list[tuple[Any, str, Any, Any]] = []
        self._added: list[Any] = []
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # whose layers Forge would have baked
        self._layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._backends: dict[tuple[torch.device, str], str] = {}

    # hooks

    def install(self) -> None:
        """Put the hooks in; a second call changes nothing."""
        if self.active:
            return
        self.active = True
        self._wrap(self.host.linear, "forward", self._forward)
        self._wrap(self.host.linear, "_load_from_state_dict", self._load)
        self._wrap(self.host.patcher, "add_patches", self._add_patches)
        if self.host.memory is not None:
            self._wrap(self.host.memory, "bake_gguf_model", self._bake_model)
        self._add_types()

    def uninstall(self) -> None:
        """Take the hooks out, and leave every model as Forge expects it."""
        self.active = False
        for owner, name, original, ours in reversed(self._originals):
            # if somebody wrapped ours in turn, it stays, and does nothing while inactive
            if getattr(owner, name) is ours:
                setattr(owner, name, original)
        self._originals.clear()
        for number in self._added:
            self.host.types.pop(number, None)
        self._added.clear()
        for model in list(self._models):
            self._bake_layers(model)

    @property
    def added(self) -> list[str]:
        """GGUF types that Forge can load since Graft is there."""
        return [self.host.types[number].__name__ for number in self._added]

    def configure(self, settings: Settings) -> bool:
        """Use other settings from the next layer call on; whether LoRAs have to be added to the model anew."""
        before, self.settings = self.settings, settings
        self._backends.clear()
        return (before.mode == "off") != (settings.mode == "off")

    def _wrap(self, owner: Any, name: str, hook: Callable) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs) if self.active else original(*args, **kwargs)

        setattr(owner, name, hooked)
        self._originals.append((owner, name, original, hooked))

    def _add_types(self) -> None:
        """Teach Forge the types that it can read from a file and cannot decode."""
        for fmt in FORMATS:
            try:
                number = self.host.type_of(fmt.ggml_type)
            except ValueError:
                continue  # its GGUF reader refuses the file before anyone is asked
            if fmt.is_quantized and number not in self.host.types:
                self.host.types[number] = ForeignType(fmt)
                self._added.append(number)

    # loading

    def _load(self, original: Callable, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(layer, *args, **kwargs)
        layer.__dict__.pop(STATE, None)
        self._note(layer)
        return result

    def _note(self, layer: nn.Module) -> LayerState | None:
        """Read type and shape off the parameter while it still knows them."""
        try:
            fmt, shape = _describe(layer.weight)
        except GraftError as error:
            log.debug("a layer stays with Forge: %s", error)
            return None
        state = LayerState(fmt, shape)
        layer.__dict__[STATE] = state
        self._layers.add(layer)
        return state

    # LoRAs

    def _add_patches(self, original: Callable, patcher: Any, *args: Any, **kwargs: Any) -> Any:
        """Patches of our layers stay beside the weights, all others are merged as Forge does it."""
        if self.settings.mode == "off":
            return original(patcher, *args, **kwargs)
        signature = inspect.signature(original)
        bound = signature.bind(patcher, *args, **kwargs)
        everything = bound.arguments.get("patches")
        if "online_mode" not in signature.parameters or not isinstance(everything, Mapping):
            return original(patcher, *args, **kwargs)
        ours = {k: v for k, v in everything.items() if self.runs(patcher.model, k if isinstance(k, str) else k[0])}
        if not ours:
            return original(patcher, *args, **kwargs)
        rest = {k: v for k, v in everything.items() if k not in ours}
        bound.arguments.update(patches=ours, online_mode=True)
        loaded = original(*bound.args, **bound.kwargs)
        if rest:
            bound.arguments.update(patches=rest, online_mode=False)
            loaded = type(loaded)([*loaded, *original(*bound.args, **bound.kwargs)])
        return loaded

    def runs(self, model: nn.Module, key: str) -> bool:
        """Whether the parameter `key` belongs to a layer that Graft runs."""
        path, _, name = key.rpartition(".")
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            return False
        return isinstance(layer, self.host.linear) and name in ("weight", "bias")

    # the two layouts

    def _bake_model(self, original: Callable, model: nn.Module) -> Any:
        """Forge's re-layout of a freshly loaded model: only what Graft does not run is baked."""
        self._models.add(model)
        if self.settings.mode == "off":
            self._bake_layers(model)
            return original(model)
        ours = {id(p) for layer in self.layers(model) for p in layer.parameters(recurse=False)}
        for parameter in model.parameters():
            if id(parameter) not in ours and getattr(parameter, "gguf_cls", None) is not None:
                parameter.gguf_cls.bake(parameter)
        return model

    def layers(self, model: nn.Module) -> Iterator[nn.Module]:
        """The GGUF layers of `model`."""
        return (m for m in model.modules() if isinstance(m, self.host.linear))

    def _bake_layers(self, model: nn.Module) -> None:
        for layer in self.layers(model):
            self._bake(layer)

    def _bake(self, layer: nn.Module) -> None:
        """Re-lay a layer's bytes out for Forge's own decode, keeping what that loses."""
        for parameter in layer.parameters(recurse=False):
            cls = getattr(parameter, "gguf_cls", None)
            if cls is None or getattr(parameter, "baked", True):
                continue
            state = state_of(layer) or self._note(layer)
            if state is not None and parameter is layer.weight and state.fmt.name in layout.BAKED:
                blocks = parameter.data.view(torch.uint8).reshape(-1, state.fmt.type_size)
                state.header = layout.headers(blocks, state.fmt.name)
            cls.bake(parameter)

    def data(self, layer: nn.Module, state: LayerState) -> torch.Tensor:
        """The layer's weight as our kernels take it: the file's bytes, or a float tensor."""
        weight = layer.weight
        data = weight.data
        if data.element_size() > 1:
            return data
        if state.fmt.name in layout.BAKED and getattr(weight, "baked", False):
            blocks = self._file_blocks(weight, state)
            if blocks is None:
                return self.host.decode(weight).detach()
            weight.data, weight.baked = blocks, False
            return blocks
        if state.fmt.dtype is not None:
            return data.reshape(-1).view(state.fmt.dtype).view(state.shape)
        return data.view(torch.uint8)

    def _file_blocks(self, weight: Any, state: LayerState) -> torch.Tensor | None:
        """The file's bytes behind baked ones, if they can be found; Forge may have merged something since."""
        bake = getattr(weight.gguf_cls, "bake_inner", None)
        if bake is None:
            return None
        candidates = [None] if state.header is None else [state.header, None]
        for header in candidates:
            blocks = layout.file_blocks(weight.data, state.fmt.name, weight.computation_dtype, header)
            if blocks is None:
                continue
            again = types.SimpleNamespace(data=blocks, computation_dtype=weight.computation_dtype)
            bake(again)
            if torch.equal(again.data.view(torch.uint8), weight.data.view(torch.uint8)):
                return blocks
        return None

    # the forward pass

    def _forward(self, original: Callable, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.settings.mode == "off":
            return self._forge_forward(original, layer, x, "Graft is off")
        state = state_of(layer) or self._note(layer)
        if state is None or state.refused:
            reason = state.refused if state is not None else "unknown weight"
            return self._forge_forward(original, layer, x, reason)
        try:
            return self._run(layer, state, x)
        except patches.Unreadable as error:
            return self._forge_forward(original, layer, x, str(error))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            state.refused = f"{type(error).__name__}: {error}"
            log.warning("a %s layer goes back to Forge's own forward: %s", state.fmt, error, exc_info=True)
            return self._forge_forward(original, layer, x, state.refused)

    def _forge_forward(self, original: Callable, layer: nn.Module, x: torch.Tensor, reason: str) -> torch.Tensor:
        self.counts["forge", reason] += 1
        self._bake(layer)
        return original(layer, x)

    def _run(self, layer: nn.Module, state: LayerState, x: torch.Tensor) -> torch.Tensor:
        wanted = autocast_dtype(x) or x.dtype
        dtype = DTYPES[self.settings.dtype] or wanted
        data = self.data(layer, state)
        bias = None if layer.bias is None else _plain(layer.bias)
        state.math.backend = self.backend(x.device, state.fmt)
        self._gather(layer, state, data, bias, dtype, x.device)
        residual = state.residual
        with self.host.on_device(data, bias, x.device) as (data, bias), without_autocast(x.device):
            h = x.to(dtype)
            y = state.math.compute(h, data, bias) if residual is None else residual(h, state.math, data, bias)
        self.counts[state.path or "base", state.reason] += 1
        return y.to(wanted)

    def backend(self, device: torch.device, fmt: Format) -> str:
        """The backend asked for, or the best one where that cannot run."""
        key = (device, fmt.name)
        if key not in self._backends:
            wanted = self.settings.backend
            try:
                choose(device, fmt, wanted)
            except NoBackend as error:
                log.warning("%s", error)
                wanted = "auto"
            self._backends[key] = wanted
        return self._backends[key]

    def release(self) -> None:
        """Between images, give the memory of a GPU back: what is on it came from LoRAs that Forge holds anyway."""
        for layer in list(self._layers):
            state = state_of(layer)
            # weights may be back in main memory by now: where the layer ran last is where the factors are
            if state is not None and state.seen and state.seen[1].type != "cpu":
                state.release()

    def _gather(
        self, layer: nn.Module, state: LayerState, data: torch.Tensor, bias: torch.Tensor | None,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        """Put the adapters that Forge has hung on this layer together, once for each change of them."""
        on_weight, on_bias = patches.host_patches(layer, "weight"), patches.host_patches(layer, "bias")
        if not on_weight and not on_bias:
            state.forget()
            return
        # the values themselves, not their ids: an id may come back for another object
        seen = (dtype, device, self.settings.mode, *(v for p in (*on_weight, (), *on_bias) for v in p or (None,)))
        if len(seen) == len(state.seen) and all(map(_same, seen, state.seen)):
            return
        reader, left_out = patches.Reader(state.known), []
        weight = [p for p in (self._read(reader, p, state.shape, left_out) for p in on_weight) if p]
        biases = [p for p in (self._read(reader, p, state.shape[:1], left_out) for p in on_bias) if p]
        state.known = reader.known
        with state.math.holding(data, bias):
            stack = ResidualStack({"layer.weight": weight, "layer.bias": biases}, self._merge)
            stack.build({"layer": state.math}, state.cache, dtype).to(device)
            state.take(stack.running({"layer": state.math}, device)["layer"], seen, left_out)

    def _read(
        self, reader: patches.Reader, patch: Sequence, shape: torch.Size, left_out: list[str]
    ) -> Patch | None:
        """One patch as an adapter; None if it fits nothing, which is noted."""
        try:
            read = reader.read(patch, shape)
            part = shape if read.region is None else read.region.within(shape)
        except GraftError as error:
            left_out.append(str(error))
            log.warning("an adapter is left out on one layer: %s", error)
            return None
        if self.settings.mode == "auto" and patches.is_wide(read.adapter, part):
            return patches.left_whole(read, "its rank is so large that a full weight is cheaper")
        return read

    def _merge(self, wanted: Sequence[Patch], weight: torch.Tensor, key: str) -> torch.Tensor:
        return self.host.merge([p.origin for p in wanted], weight, key, computation_dtype=weight.dtype)


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, (float, int, str, torch.dtype, torch.device)) and a == b)


def _plain(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor without the parameter around it, whose `shape` and `to` are Forge's own."""
    return parameter.data


def _describe(weight: Any) -> tuple[Format, torch.Size]:
    """Format and logical shape of a parameter of Forge's.

    Raises:
        GraftError: it says neither itself, nor does its dtype.
    """
    if weight is None:
        raise UnsupportedFormat("the layer has no weight")
    cls, shape = getattr(weight, "gguf_cls", None), torch.Size(map(int, getattr(weight, "real_shape", weight.shape)))
    if cls is not None:
        named = getattr(getattr(cls, "qtype", None), "name", None) or getattr(cls, "__name__", "")
        return by_name(named), shape
    if weight.data.is_floating_point() and weight.data.element_size() > 1:
        return format_of(weight.data), shape
    raise UnsupportedFormat(f"a weight of {weight.data.dtype} does not say what it holds")


class ForeignType:
    """A GGUF type that Forge has no decode for, in the shape of one of its own type classes."""

    def __init__(self, fmt: Format) -> None:
        self.fmt = fmt
        self.__name__ = fmt.name

    def bake(self, parameter: Any) -> None:
        """There is nothing to re-lay out."""
        parameter.baked = True

    def dequantize_pytorch(self, parameter: Any) -> torch.Tensor:
        """The weights in the parameter's computation dtype and logical shape."""
        data = parameter.data.view(torch.uint8)
        return dequantize(data, self.fmt, tuple(map(int, parameter.real_shape)), parameter.computation_dtype)

    def quantize_pytorch(self, data: torch.Tensor, parent: Any) -> torch.Tensor:
        raise UnsupportedFormat(
            f"a LoRA cannot be merged into {self.fmt.name} weights without losing it: turn Graft on in the tab Graft"
        )
