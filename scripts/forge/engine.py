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
import os
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...kernels import FORMATS, AdapterError, Format, GraftError, NoBackend, choose, int8, is_full
from ...ops.adapters import Adapter, Patch
from ...ops.int8 import RULES, named, use_int8
from ...ops.layers import without_autocast
from ...ops.places import Architecture, architecture_of
from ...ops.residual import ResidualStack
from ...ops.strengths import Call, Strength
from . import layout, loras, patches, reading
from .host import Host
from .layers import STATE, LayerState, describe, state_of
from .prompt import PromptLoras
from .reading import ForeignType
from .strengths import Told, call_of

log = logging.getLogger(__name__)

MODES = ("auto", "on", "off")
DTYPES: dict[str, torch.dtype | None] = {
    "auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, **dict.fromkeys(RULES),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How layers run.

    Attributes:
        mode: ``auto``: LoRAs beside the matmul unless their rank is so large that a full weight is cheaper;
            ``on``: always beside it; ``off``: everything as Forge does it.
        backend: of the kernels.
        dtype: of the computation; ``auto`` is that of the activations, and ``int8`` and ``int8_all`` the same, with
            int8 products in large layers of a diffusion model.
    """

    mode: str = "auto"
    backend: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Varying:
    """What of a model has strengths that depend on the call.

    Attributes:
        architecture: where its tokens are; None where that is not known.
        layers: those on which the LoRAs are.
    """

    architecture: Architecture | None
    layers: tuple[nn.Module, ...]


class Engine:
    """Graft in one Forge.

    Attributes:
        active: whether the hooks do anything.
        step: the number of the sampler's next call of the model, and how many there will be.
        canvas: rows and columns of the latent that the sampler works on; empty where nobody has told.
        prompt: where and when the prompt's LoRAs work.
        fates: what became of LoRA files, by path.
        counts: layer calls by ``(path, reason)``, without those in compiled graphs; paths are ``base``, ``residual``,
            ``exact`` and ``forge``.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.settings = Settings()
        self.active = False
        self.counts: Counter[tuple[str, str]] = Counter()
        self.fates: dict[str, loras.Fate] = {}
        self.step = (0, 1)
        self.canvas: tuple[int, ...] = ()
        self.prompt = PromptLoras(host, self.possible)
        self._call: Call | None = None
        self._varying: weakref.WeakKeyDictionary[nn.Module, Varying] = weakref.WeakKeyDictionary()
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
        for cls in self.host.layers.values():
            self._wrap(cls, "forward", self._forward)
            self._wrap(cls, "_load_from_state_dict", self._load)
        self._wrap(self.host.patcher, "add_patches", self._add_patches)
        self._wrap(self.host.patcher, self.host.loads, self._patcher_loads)
        if hasattr(self.host.patcher, "memory_required"):
            self._wrap(self.host.patcher, "memory_required", self._memory_required)
        if self.host.memory is not None:
            self._wrap(self.host.memory, "bake_gguf_model", self._bake_model)
        for module in self.host.readers:
            self._wrap(module, "load_torch_file", self._read_file)
        if self.host.loader is not None:
            self._wrap(self.host.loader, "replace_state_dict", self._place_text_encoder)
            if hasattr(self.host.loader, "process_pid"):
                self._wrap(self.host.loader, "process_pid", self._split_pid)
        if self.host.networks is not None:
            self._wrap(self.host.networks, "load_lora_for_models", self._load_lora)
            if hasattr(self.host.networks, "load_networks"):
                self._wrap(self.host.networks, "load_networks", self.prompt.load_networks)
            if self.host.lists_loras:
                self._wrap(self.host.networks, "process_network_files", self._list_loras)
                self._wrap(self.host.networks, "load_lora_state_dict", self._read_lora)
                self.host.networks.list_available_networks()  # which it has done before
        if self.host.prompt_loras is not None:
            self._wrap(self.host.prompt_loras, "activate", self.prompt.activate)
        if self.host.whole_model is not None:
            self._wrap(self.host.whole_model, "apply_model", self._apply_model)
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
        if self.host.lists_loras:
            self.host.networks.list_available_networks()
        for model in list(self._models):
            self._bake_layers(model)

    @property
    def added(self) -> list[str]:
        """GGUF types that Forge can load since Graft is there."""
        return [self.host.types[number].__name__ for number in self._added]

    def configure(self, settings: Settings) -> bool:
        """Use other settings from the next layer call on; whether LoRAs have to be added to the model anew."""
        before, self.settings = self.settings, settings
        for state in filter(None, map(state_of, self._layers)):
            state.stale = True
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
            fmt, shape = describe(layer.weight)
        except GraftError as error:
            log.debug("a layer stays with Forge: %s", error)
            return None
        state = LayerState(layer, fmt, shape)
        kind = getattr(layer.weight, "gguf_cls", None)
        state.math.scale = kind.scale if isinstance(kind, ForeignType) else None
        layer.__dict__[STATE] = state
        self._layers.add(layer)
        return state

    # LoRAs

    def possible(self, model: nn.Module, when: Strength | None) -> tuple[Strength | None, str]:
        """What of it LoRAs on `model` can have, and why not all."""
        if when is None:
            return None, ""
        if self.settings.mode == "off":
            return None, "Graft is off"
        if next(self.layers(model), None) is None:
            return None, "this works with GGUF models"
        if self.host.whole_model is None:
            return None, "this Forge lacks KModel.apply_model: update Forge, or Graft"
        try:
            if when.mask is not None:
                self._architecture(model)
        except AdapterError as error:
            return replace(when, mask=None), str(error)
        return when, ""

    def _architecture(self, model: nn.Module) -> Architecture:
        paths = [path for path, _ in model.named_modules()]  # not all of its layers are in GGUF
        return architecture_of(paths, type(getattr(model, "diffusion_model", model)))

    def _add_patches(self, original: Callable, patcher: Any, *args: Any, **kwargs: Any) -> Any:
        """Patches of our layers run beside the weights; all others are added as the caller asks Forge to."""
        bound = inspect.signature(original).bind(patcher, *args, **kwargs)
        bound.apply_defaults()
        options = bound.arguments
        everything = options.get("patches")
        if not isinstance(everything, Mapping):
            return original(patcher, *args, **kwargs)
        strength, when, text = _told(options.get("strength_patch", 1.0))
        when, _ = self.possible(patcher.model, when)
        options["strength_patch"] = strength
        strengths = strength, options.get("strength_model", 1.0)
        ours: dict[Any, Any] = {}
        if self.settings.mode != "off":
            ours = {key: v for key, v in everything.items() if self.runs(patcher.model, _parameter(key))}
        rest = {key: v for key, v in everything.items() if key not in ours}
        refused: tuple[str, ...] = ()
        if when is not None:  # which Forge's own patches cannot have
            refused, rest = tuple(dict.fromkeys(map(_parameter, rest))), {}
        loaded: Any = []
        if rest or not ours:
            options["patches"] = rest
            if ours and self.host.others_online is not None:
                options["online_mode"] = self.host.others_online
            loaded = original(*bound.args, **bound.kwargs)
        others = tuple(dict.fromkeys(map(_parameter, loaded)))
        added = patches.Added(
            str(options.get("filename")), strength, _as_patches(ours, *strengths, when), others,
            "" if when is None else text, refused,
        )  # fmt: skip
        if added.keys:
            patches.carry(patcher, added)
        # Forge would drop a file for what is refused
        return type(loaded)([*loaded, *ours, *(everything if refused else ())])

    def _list_loras(self, original: Callable, names: Any = None) -> None:
        original(names)
        loras.list_gguf(self.host.networks, names)

    def _read_lora(self, original: Callable, filename: Any) -> Any:
        """A LoRA's tensors; of a GGUF file that cannot be read none, and a note says why."""
        if not loras.is_gguf(filename):
            return original(filename)
        try:
            return loras.read_gguf(filename)
        except AdapterError as error:
            self.prompt.notes.append(f"{os.path.basename(filename)} is left out: {error}")
            self.host.loaded().current_lora_hash = None  # so that Forge asks again, with the next picture
            return {}

    def _load_lora(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Forge's loader of one LoRA file, with names that it does not know."""
        bound = inspect.signature(original).bind(*args, **kwargs)
        given = bound.arguments
        if not given["lora"]:  # of which it would count shares
            return given.get("model"), given.get("clip")
        unet, clip = getattr(given.get("model"), "model", None), getattr(given.get("clip"), "cond_stage_model", None)
        norm = "merged" if unet is not None and next(self.layers(unet), None) is not None else "comfy"
        try:
            value_of = functools.partial(self._value_of, unet)
            file = loras.LoraFile.read(self.host.networks, given["lora"], unet, clip, norm, value_of)
        except Exception as error:
            log.warning("a LoRA goes to Forge as it is: %s", error, exc_info=True)
            return original(*args, **kwargs)
        given["lora"] = file.state
        with file.known_to(self.host.networks):
            loaded = original(*bound.args, **bound.kwargs)
        filename = str(given.get("filename"))
        report = file.report(filename, float(given.get("strength_model", 1.0)))
        used = any(new is not old for new, old in zip(loaded, (given.get("model"), given.get("clip")), strict=True))
        self.fates[filename] = loras.Fate(report, used)
        return loaded

    def _value_of(self, model: nn.Module, key: str, adapter: Adapter, shape: torch.Size) -> Any:
        """What `add_patches` takes for an adapter on a parameter of `model`."""
        if self.settings.mode != "off" and self.runs(model, key):
            return adapter
        return self.host.value_of(adapter, shape)

    def runs(self, model: nn.Module, key: str) -> bool:
        """Whether the parameter `key` belongs to a layer that Graft runs. One without a bias may get one."""
        path, _, name = key.rpartition(".")
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            return False
        if not self.host.is_layer(layer) or layer.weight is None:
            return False
        return name == "weight" or (name == "bias" and not isinstance(layer, nn.Embedding))

    def _patcher_loads(self, original: Callable, patcher: Any, *args: Any, **kwargs: Any) -> Any:
        """From now on the layers run with what this patcher carries, and with nothing that another one did."""
        model = patcher.model
        for layer in self.layers(model):
            layer.__dict__.pop(patches.ON_LAYER, None)
            if (state := state_of(layer)) is not None:
                state.stale = True
        if hasattr(model, "diffusion_model"):
            for path, layer in model.named_modules():
                if (state := state_of(layer)) is not None:
                    state.where = path
        varying = []
        for path, found in patches.by_layer(patches.carried(patcher)).items():
            layer = model.get_submodule(path)
            layer.__dict__.update({patches.ON_LAYER: found, patches.AT: path})
            if any(patches.when_of(patch) is not None for listed in found.values() for patch in listed):
                varying.append(layer)
        self._varying.pop(model, None)
        if varying:
            architecture = None
            with contextlib.suppress(AdapterError):
                architecture = self._architecture(model)
            self._varying[model] = Varying(architecture, tuple(varying))
        return original(patcher, *args, **kwargs)

    def _apply_model(self, original: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """One call of a diffusion model, with the strengths that LoRAs have in it."""
        if self.settings.mode == "off":
            return original(model, *args, **kwargs)
        for layer in self.layers(model):
            self._refresh(layer)
        varying = self._varying.get(model)
        if varying is None:
            return original(model, *args, **kwargs)
        inner, references = model.diffusion_model, self.host.references()
        self._call = call_of(inner, varying.architecture, self.step, self.canvas, references, *args, **kwargs)
        try:
            for layer in varying.layers:
                state = state_of(layer)
                if state is not None and state.varies:
                    state.start(self._call)
            return original(model, *args, **kwargs)
        finally:
            self._call = None

    def _memory_required(self, original: Callable, patcher: Any, *args: Any, **kwargs: Any) -> Any:
        """With the factors of the LoRAs, in the dtype of the computation."""
        dtype = DTYPES[self.settings.dtype] or getattr(patcher.model, "computation_dtype", None) or torch.float16
        return original(patcher, *args, **kwargs) + patches.carried(patcher).numbers * dtype.itemsize

    # files

    def _read_file(self, original: Callable, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Text encoders get the names and the order of rows that Forge loads; all types of GGUF can be read.

        In every mode: a model outlives the settings that it was loaded with.
        """
        if not os.fspath(path).lower().endswith(".gguf"):
            return original(path, *args, **kwargs)
        read, error = None, None
        try:
            read = reading.state_dict(path, self.host)
        except GraftError as ours:
            error = ours
        if read is not None:
            return (read, None) if kwargs.get("return_metadata") else read
        try:
            loaded = original(path, *args, **kwargs)
        except Exception as theirs:
            raise (error or theirs) from theirs
        if error is not None:
            log.warning("Forge has loaded what Graft would not: %s", error)
        return loaded

    def _place_text_encoder(self, original: Callable, state: dict, other: dict, guess: Any, *args: Any) -> Any:
        placed = reading.placed(other, guess)
        return original(state, other, guess, *args) if placed is None else {**state, **placed}

    def _split_pid(self, original: Callable, state: dict[str, Any]) -> Any:
        """PiD's modulations in their two parts: Forge reshapes numbers, of packed weights whole rows are taken."""
        packed = {k: state.pop(k) for k in list(state) if reading.is_pid_modulation(k, state[k])}
        result = original(state)
        for name, parameter in packed.items():
            fmt, shape = describe(parameter)
            state.update(reading.pid_parts(name, parameter, fmt, shape, state, self.host))
        return result

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
        return filter(self.host.is_layer, model.modules())

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
        reason = patches.foreign(layer) or ("unknown weight" if state is None else state.refused)
        if state is None or reason:
            return self._forge_forward(original, layer, x, reason)
        try:
            return self._run(layer, state, x)
        except Exception as error:
            # full memory says nothing of the layer, and neither does a call that has no place for a mask
            if is_full(error) or (isinstance(error, GraftError) and state.varies):
                raise
            state.refused = f"{type(error).__name__}: {error}"
            log.warning("a %s layer goes back to Forge's own forward: %s", state.fmt, error, exc_info=True)
            return self._forge_forward(original, layer, x, state.refused)

    def _forge_forward(self, original: Callable, layer: nn.Module, x: torch.Tensor, reason: str) -> torch.Tensor:
        self.counts["forge", reason] += 1
        self._bake(layer)
        with self.host.hanging(layer, patches.constant(layer, self._call)):
            return original(layer, x)

    def _run(self, layer: nn.Module, state: LayerState, x: torch.Tensor) -> torch.Tensor:
        math = state.math
        wanted = math.gives(x)
        dtype = DTYPES[self.settings.dtype] or wanted
        data = self.data(layer, state)
        bias = None if layer.bias is None else _plain(layer.bias)
        math.backend = self.backend(x.device, state.fmt)
        if not torch.compiler.is_compiling():
            self._settle_int8(state, x.device)
        self._gather(layer, state, data, bias, dtype, x.device)
        residual = state.residual
        with self.host.on_device(data, bias, x.device) as (data, bias), without_autocast(x.device):
            h = math.takes(x, dtype)
            y = math.compute(h, data, bias) if residual is None else residual(h, math, data, bias)
        if not torch.compiler.is_compiling():  # a graph would be traced anew for each number
            self.counts[state.path or "base", state.reason] += 1
        return y.to(wanted)

    def _settle_int8(self, state: LayerState, device: torch.device) -> None:
        """Have a layer of a diffusion model multiply in int8, if that is asked for and runs here, or no longer."""
        asked = self.settings.dtype in RULES and state.where != "" and int8.unavailable(device) is None
        wanted = self.settings.dtype if asked else ""
        if wanted != state.int8:
            state.int8, state.math.int8_bound, state.math.int8_reason = wanted, None, ""
            if wanted:
                use_int8({state.where: state.math}, named(), RULES[wanted])

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
        """Put the adapters on this layer together, once for each change of them."""
        if torch.compiler.is_compiling() and not state.stale and state.ran in (None, (dtype, device)):
            return  # what is compared below would be a part of the graph
        state.stale = False
        found = patches.on_layer(layer)
        on_weight, on_bias = found.get("weight", ()), found.get("bias", ())
        if not on_weight and not on_bias:
            state.forget()
            return
        # the values themselves, not their ids: an id may come back for another object
        seen = (dtype, device, self.settings.mode, *(v for p in (*on_weight, (), *on_bias) for v in p or (None,)))
        if len(seen) == len(state.seen) and all(map(_same, seen, state.seen)):
            if state.varies and state.call is not self._call:
                state.start(self._present())
            return
        reader, left_out = patches.Reader(state.known), []
        weight = [p for p in (self._read(reader, p, state.shape, left_out) for p in on_weight) if p]
        biases = [p for p in (self._read(reader, p, state.shape[:1], left_out) for p in on_bias) if p]
        state.known = reader.known
        where = layer.__dict__.get(patches.AT, "layer")
        with state.math.holding(data, bias):
            stack = ResidualStack({f"{where}.weight": weight, f"{where}.bias": biases}, self._merge)
            stack.build({where: state.math}, state.cache, dtype).to(device)
            state.take(stack, seen, left_out, self._present() if stack.varies else None)

    def _refresh(self, layer: nn.Module) -> None:
        """Put other adapters together before a graph runs that knows the layer, as it ran last."""
        state = state_of(layer)
        if state is not None and state.stale and state.ran is not None and not state.refused:
            dtype, device = state.ran
            bias = None if layer.bias is None else _plain(layer.bias)
            self._gather(layer, state, self.data(layer, state), bias, dtype, device)

    def _present(self) -> Call:
        """The call of the model that is under way; outside of any nobody knows a picture."""
        return self._call or Call(self.step[0] / self.step[1], self.step[0])

    def _read(self, reader: patches.Reader, patch: Sequence, shape: torch.Size, left_out: list[str]) -> Patch | None:
        """One patch as an adapter; None if it fits nothing, which is noted."""
        try:
            read = reader.read(patch, shape)
            part = shape if read.region is None else read.region.within(shape)
        except GraftError as error:
            left_out.append(str(error))
            log.warning("an adapter is left out on one layer: %s", error)
            return None
        if self.settings.mode == "auto" and read.when is None and patches.is_wide(read.adapter, part):
            return patches.left_whole(read, "its rank is so large that a full weight is cheaper")
        return read

    def _merge(self, wanted: Sequence[Patch], weight: torch.Tensor, key: str) -> torch.Tensor:
        return self.host.merged([(p.strength, *p.origin[1:5]) for p in wanted if p.origin is not None], weight, key)


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, (float, int, str, torch.dtype, torch.device)) and a == b)


def _parameter(key: Any) -> str:
    """The parameter that a key of a patch list names: a name, or ``(name, offset[, function])``."""
    return key if isinstance(key, str) else key[0]


def _told(strength: Any) -> tuple[float, Strength | None, str]:
    """A LoRA's strength, where and when it works, and how the prompt says that."""
    if isinstance(strength, Told):
        return float(strength), strength.when, strength.text
    return float(strength), None, ""


def _as_patches(
    values: Mapping[Any, Any], strength: float, strength_model: float, when: Strength | None
) -> dict[str, tuple[patches.HostPatch, ...]]:
    found: dict[str, tuple[patches.HostPatch, ...]] = {}
    for key, value in values.items():
        name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None, None)[:3]
        found[name] = (*found.get(name, ()), (strength, value, strength_model, offset, function, when))
    return found


def _plain(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor without the parameter around it, whose `shape` and `to` are Forge's own."""
    return parameter.data
