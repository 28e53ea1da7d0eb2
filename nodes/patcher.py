"""The model patcher: where every LoRA node in the world arrives.

A Graft MODEL is a `ModelPatcher` of the class that the host made, with `GraftPatcher` mixed in. Patches
of packed layers become residuals; all others stay the host's. `patches` and `patches_uuid` are left
alone, so the host neither patches nor reloads the model for a LoRA.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ..kernels import AdapterError, GraftError, plain, scratch
from ..ops import int8, kinds
from ..ops.adapters import Adapter, Patch, Region, from_host, is_the_hosts_own
from ..ops.calls import calls_on
from ..ops.factors import FactorCache, StackFactors
from ..ops.files.gguf import GGUFFile
from ..ops.files.mapped import MappedFile
from ..ops.kinds import Padded
from ..ops.layers import PackedLayer, packed_layers
from ..ops.merged import MergedTensor
from ..ops.packed import PackedTensor
from ..ops.places import Architecture, architecture_of
from ..ops.report import examples
from ..ops.residual import ResidualStack, unfit
from ..ops.strengths import Call, Number, Strength
from ..ops.training import Training
from .calls import calc_cond_batch_told, call_of, predict_noise_told
from .ops import HostLayer, plain_key

log = logging.getLogger(__name__)

_ORPHAN = (
    "another node copied this MODEL in a way that left its LoRAs behind: connect that node to the model loader, "
    "and the LoRAs behind it"
)
_ONLY_IN_THE_MODEL = (
    "LoRAs by region, step or prompt work in the model alone: a node that works with a copy of its weights, such as a "
    "Control-LoRA, works without these LoRAs"
)
KEY = "graft"
"""Under which our wrapper stands with the host."""

COMPILED = "torch.compile"
"""Under which the host's stands that runs compiled parts of a model."""


def _notes(file: GGUFFile) -> dict[str, str]:
    """The texts of a file's metadata, cut, without those of a tokenizer, which are not for people."""
    found = {key: text for key, text in file.metadata.texts().items() if not key.startswith("tokenizer.")}
    return {plain(key[:80]): plain(text[:200]) for key, text in itertools.islice(found.items(), 64)}


class Graft:
    """What all clones of one loaded model share: its layers and the factors that are in memory.

    Attributes:
        layers: every Graft layer by path, e.g. ``diffusion_model.double_blocks.0.img_attn.qkv``.
        sources: the memory-mapped data of each layer, to go back to when the model leaves the GPU.
        summary: one line on the file, for reports.
        notes: what the files say of themselves, beginnings of their texts.
        files: those that are mapped, to see before a run whether one was written to.
        network: the class of the diffusion model.
        told: branches of which was said that not all of their LoRAs are in copies of the weights.
    """

    def __init__(
        self, model: torch.nn.Module, summary: str = "", backend: str = "auto", files: Sequence[GGUFFile] = ()
    ) -> None:
        layers = packed_layers(model)
        for layer in layers.values():
            layer.backend = backend
        sources = {name: layer.weight.data for name, layer in layers.items() if layer.weight is not None}
        # not the files themselves, whose maps would stay for tensors that nobody needs
        notes = {key: text for file in files for key, text in _notes(file).items()}
        self.network = type(getattr(model, "diffusion_model", model))
        self._own(layers, sources, summary, [file.mapped for file in files if file.mapped is not None], notes)

    def __deepcopy__(self, memo: dict) -> Graft:
        """That of a copy of the model: with its layers and the same file, and no factors yet."""
        copied = memo[id(self)] = Graft.__new__(Graft)
        copied.network = self.network
        copied._own(copy.deepcopy(self.layers, memo), self.sources, self.summary, self.files, self.notes)
        return copied

    def _own(
        self, layers: dict[str, PackedLayer], sources: dict[str, torch.Tensor], summary: str, files: list[MappedFile],
        notes: dict[str, str],
    ) -> None:  # fmt: skip
        self.layers, self.sources, self.summary, self.files, self.notes = layers, sources, summary, files, notes
        self.factors = FactorCache(busy=_host_is_at_its_models)
        self.calls = calls_on(layers)
        self.told: weakref.WeakSet[GraftPatcher] = weakref.WeakSet()
        self._loaded: Callable[[], GraftPatcher | None] = lambda: None
        self._loaded_here = threading.local()
        self.take_layers()
        # what weights were decoded into goes with the model; another one takes memory anew in its next step
        weakref.finalize(self, scratch.release)

    @functools.cached_property
    def architecture(self) -> Architecture | None:
        """Where the model's tokens are, if that is known."""
        try:
            return architecture_of(self.layers, self.network)
        except AdapterError:
            return None

    def take_layers(self) -> None:
        """Tell every layer whose it is; a copy of the model still names the original's owner."""
        for name, layer in self.layers.items():
            if isinstance(layer, HostLayer):
                # weak, so that a model that nobody needs goes at once
                layer.path, layer.owner = name, weakref.ref(self)

    def is_loaded(self, patcher: GraftPatcher) -> None:
        """Note that the host has just loaded this branch."""
        self._loaded = self._loaded_here.last = weakref.ref(patcher)

    def loaded(self) -> GraftPatcher | None:
        """The branch that the host loaded last, in this thread if it loads any here; None once it is gone."""
        return getattr(self._loaded_here, "last", self._loaded)()

    @contextmanager
    def outside(self, layer: HostLayer, device: torch.device) -> Iterator[None]:
        """Run one layer that the host calls outside of a model call: with the adapters of the branch that is loaded."""
        patcher = self.loaded()
        stack = None if patcher is None else patcher.active_stack()
        if not stack or patcher.model.graft is not self:
            yield
            return
        call = Call(architecture=self.architecture) if stack.varies else None
        with patcher.grafted(device, {layer.path: layer}, call):
            yield

    def layer_of(self, key: str) -> PackedLayer | None:
        """The layer that parameter `key` belongs to, if it is one of ours."""
        path, _, parameter = plain_key(key).rpartition(".")
        return self.layers.get(path) if parameter in ("weight", "bias") else None

    def shown(self, key: str, to_keep: bool) -> torch.Tensor:
        """A parameter of one of our layers as a loaded model of the host's would hold it.

        Args:
            to_keep: by what reads it again and again: what adapters make of it is merged now, in memory of its own.
                It works outside of model calls, so that adapters by region, step or prompt are left out of it.
        """
        layer, patcher = self.layer_of(key), self.loaded()
        assert layer is not None
        if patcher is None:
            return _plain(key, layer)
        if not to_keep:
            return patcher.shown(key, layer)
        everything = patcher.residuals.patches.get(key, ())
        kept = [steady for patch in everything if (steady := _steady(patch, layer.path))]
        if len(kept) < len(everything) and patcher not in self.told:
            self.told.add(patcher)
            log.warning(_ONLY_IN_THE_MODEL)
        shown = patcher.shown(key, layer, kept)
        return shown.dequantize(patcher.compute_dtype()) if isinstance(shown, MergedTensor) else shown

    def return_to_file(self) -> None:
        """Let go of copies, on a device or in memory, and show the memory map again: nothing is copied back."""
        scratch.release()
        for name, source in self.sources.items():
            layer = self.layers[name]
            if layer.weight.data_ptr() != source.data_ptr():
                layer.weight = torch.nn.Parameter(source, requires_grad=False)


def _host_is_at_its_models() -> bool:
    """Whether the host loads or unloads models: it walks its list of them, and a model that dies takes itself off it.

    A weight of another model's may die there, and with it the factors that were made of it.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == comfy.model_management.__file__:
            return True
        frame = frame.f_back
    return False


class GraftPatcher(comfy.model_patcher.ModelPatcher):
    """Mixed into the host's patcher class by `adopt`; never instantiated by itself."""

    residuals: ResidualStack
    hook_residuals: dict[Any, ResidualStack]
    rejected: dict[str, str]
    hooked: dict[tuple, ResidualStack]
    training: Training | None = None
    """What learns beside the layers, on this branch and its clones."""

    @property
    def graft(self) -> Graft:
        """On the model and not on the patcher: a host may clone a patcher onto another copy of the model."""
        return self.model.graft

    def clone(self, *args: Any, **kwargs: Any) -> GraftPatcher:
        return adopt(super().clone(*args, **kwargs), self)

    def __deepcopy__(self, memo: dict) -> GraftPatcher:
        """A patcher with a model of its own, as the host's own are copied, and the same LoRAs."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        # without the second model that dynamic VRAM keeps for scheduled LoRAs: the host makes one where it needs it
        vars(copied).update(copy.deepcopy(vars(self) | {"non_dynamic_delegate_model": None}, memo))
        return adopt(copied, copied)

    def add_patches(
        self, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0, when: Strength | None = None,
        source: str = "",
    ) -> list:  # fmt: skip
        """Take patches of packed layers as residuals, and hand the host the others.

        Args:
            when: where and when `strength_patch` counts, which no host's own patches can have; other packs' loaders
                hand it on in the number (`Number`).
            source: the file that they come from, for reports.

        Returns:
            the keys that were taken, as the host's own method does; what it misses, nodes report.
        """
        self.rejected |= getattr(patches, "rejected", {})
        if when is None and isinstance(strength_patch, Number) and hasattr(self.model, "diffusion_model"):
            when = strength_patch.when
        strength_patch = float(strength_patch)
        ours, theirs = self._sort(patches)
        if when is not None and theirs:
            why = "ComfyUI patches it, with one strength for all of the picture"
            self.rejected |= {str(key): why for key in theirs}
            theirs = {}
        taken = super().add_patches(theirs, strength_patch, strength_model) if theirs else []
        return taken + self._add(self.residuals, ours, strength_patch, strength_model, when, source)

    def add_hook_patches(
        self, hook: Any, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list:
        """The same for scheduled and masked LoRAs; a hook's strength is applied when it is active."""
        self.rejected |= getattr(patches, "rejected", {})
        ours, theirs = self._sort(patches)
        taken = super().add_hook_patches(hook, theirs, strength_patch, strength_model)
        stack = self.hook_residuals.setdefault(hook.hook_ref, ResidualStack(merge=self.residuals.merge))
        return taken + self._add(stack, ours, strength_patch, strength_model)

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        """What a trainer puts around a weight; it sees the decoded one.

        Raises:
            GraftError: it was made for the shape of packed bytes, which the host's trainer takes for the weight's.
        """
        layer = self.graft.layer_of(name)
        if layer is not None and layer.fmt is not None and layer.fmt.is_quantized and name.endswith(".weight"):
            parameters = function.parameters() if isinstance(function, torch.nn.Module) else ()
            if any(parameter.shape == layer.weight.shape for parameter in parameters):
                raise GraftError(
                    f"Train LoRA cannot make factors for {name}, which is quantized: use Train LoRA (Graft), which "
                    "trains on quantized models"
                )
        super().add_weight_wrapper(name, function)

    def _sort(self, patches: Mapping) -> tuple[dict, dict]:
        ours: dict = {}
        theirs: dict = {}
        for key, value in patches.items():
            name = key if isinstance(key, str) else key[0]
            (theirs if self.graft.layer_of(name) is None else ours)[key] = value
        return ours, theirs

    def _add(
        self, stack: ResidualStack, patches: Mapping, strength: float, strength_model: float,
        when: Strength | None = None, source: str = "",
    ) -> list:  # fmt: skip
        if when is not None and when.mask is not None:
            architecture_of(self.graft.layers, self.graft.network)  # or the mask is refused now, and not while sampling
        taken: list = []
        rejected: dict[str, str] = {}
        for key, value in patches.items():
            name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
            region = None if offset is None else Region(*offset)
            layer = self.graft.layer_of(name)
            assert layer is not None
            try:
                adapter = self._adapter(stack, name, layer, value, region, function)
                origin = (strength, value, strength_model, offset, function)
                patch = Patch(strength, adapter, strength_model, region, None, origin, when, source)
                if why := unfit(patch, layer):
                    raise AdapterError(why)
            except AdapterError as error:
                rejected[name] = str(error)
                continue
            stack.add(name, patch)
            taken.append(key)
            if isinstance(adapter, Padded) and hasattr(self.model, "concat_cond"):
                # not a closure: of a partial a deep copy takes the copied model
                widened = functools.partial(_concat_cond, self.model, layer, adapter.shape)
                self.add_object_patch("concat_cond", widened)
        if rejected:
            reasons = [f"{name}: {why}" for name, why in rejected.items()]
            log.warning("%d of %d patches left out, such as %s", len(rejected), len(patches), examples(reasons))
        self.rejected |= rejected
        return taken

    def _adapter(
        self, stack: ResidualStack, name: str, layer: PackedLayer, value: Any, region: Region | None, function: Any
    ) -> Adapter:
        if name.endswith(".bias") and layer.bias is None:
            # what the host merges, saves and loads again has no place for one
            raise AdapterError("it adds a bias to a layer that has none in this model")
        shape = layer.logical_shape if name.endswith(".weight") else layer.logical_shape[:1]
        adapter = from_host(value, shape, region, function)
        if isinstance(adapter, Padded) and hasattr(self.model, "concat_cond") and stack is not self.residuals:
            # the host makes its conditionings before it switches hooks on
            raise AdapterError("it widens the model's first layer, which a scheduled or masked LoRA cannot")
        return adapter

    def get_additional_models(self) -> list:
        """The host loads these beside the model: the factors, so that it moves and counts their memory."""
        models = super().get_additional_models()
        stacks = [s for s in (self.residuals, *self.hook_residuals.values()) if s]
        return models + self._hosts_of([self.build_residuals(stack) for stack in stacks])

    def model_patches_models(self) -> list:
        """The same for text encoders, which the host loads without asking for additional models."""
        found = super().model_patches_models()
        return found + self.get_additional_models() if self.is_clip else found

    def build_residuals(self, stack: ResidualStack | None = None, keep: bool = True) -> StackFactors:
        """Concatenate the factors of `stack`, or of this branch, or find them where an earlier build left them."""
        stack = self.residuals if stack is None else stack
        with self.graft.calls.lock:
            return stack.build(self.graft.layers, self.graft.factors, self.compute_dtype(), keep)

    def _hosts_of(self, built: Sequence[StackFactors]) -> list:
        """The host's patchers for these factors, each of which is in one of them."""
        with self.graft.calls.lock:
            for factors in built:
                self.graft.factors.sets(factors)
            # only now: the sets of one stack may have been divided by the next
            found = dict.fromkeys(part for factors in built for part in self.graft.factors.sets(factors))
            for part in found:
                if part.host is not None and part.host.load_device != self.load_device:
                    part.leave_host()  # that of a branch by which a node had this model run elsewhere
                if part.host is None:
                    part.host = _factors_patcher(part.module, self.load_device, self.offload_device)
            return [part.host for part in found]

    def compute_dtype(self) -> torch.dtype:
        """As this branch has it: on the model another branch's choice may still stand."""
        if self.is_clip:
            return torch.float32  # which the host has its text encoders compute in
        return self.get_model_object("manual_cast_dtype") or self.model.get_dtype()

    def active_stack(self) -> ResidualStack:
        """The residuals of this branch, with those of the hooks that the host has switched on."""
        hooks = self.current_hooks
        active = [h for h in hooks.hooks if h.hook_ref in self.hook_residuals] if hooks is not None else []
        if not active:
            return self.residuals
        state = tuple((h.hook_ref, h.strength) for h in active)
        if state not in self.hooked:
            combined = self.residuals.copy()
            for hook in active:
                for key, patches in self.hook_residuals[hook.hook_ref].patches.items():
                    for patch in patches:
                        combined.add(key, replace(patch, strength=patch.strength * hook.strength))
            self.hooked[state] = combined
        return self.hooked[state]

    def is_compiled(self) -> bool:
        """Whether `torch.compile` runs the model or parts of it: by the host's wrapper, or as a node put them there."""
        by_host = COMPILED in self.wrappers.get(WrappersMP.APPLY_MODEL, {})
        return by_host or any(hasattr(patch, "_orig_mod") for patch in self.object_patches.values())

    def call_of(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Call | None:
        """What a call of the model tells strengths; None where all of them are constants."""
        if not self.active_stack().varies:
            return None
        return call_of(self.model, self.graft.architecture, x, *args, **kwargs)

    def restore_hook_patches(self) -> None:
        """After sampling the host forgets the hooks that it registered for it; so do we, on all devices."""
        super().restore_hook_patches()
        for patcher in (self, *self.additional_models.get("multigpu", ())):
            stacks = patcher.hook_residuals.items()
            patcher.hook_residuals = {ref: stack for ref, stack in stacks if ref in self.hook_patches}
            patcher.hooked = {}

    @contextmanager
    def grafted(
        self, device: torch.device, layers: Mapping[str, PackedLayer] | None = None, call: Call | None = None
    ) -> Iterator[None]:
        """Run the model, or these of its `layers`, with this branch's adapters on `device`, and with no other's.

        `call` tells their strengths where and when.
        """
        with self.graft.calls.lock:
            stack = self.active_stack()
            if stack is self.residuals:
                if stack:
                    self.build_residuals()
            else:
                # the host has loaded those of each hook, but not what only their sum needs, until the sampling is over
                self.build_residuals(stack, keep=False).to(device)
            layers = self.graft.layers if layers is None else layers
            with stack.active(layers, device, call):
                if self.training is None:
                    yield
                else:
                    with self.training.beside(layers):
                        yield

    def partially_load(self, *args: Any, **kwargs: Any) -> Any:
        for file in self.graft.files:
            file.check()
        self.graft.is_loaded(self)
        self.graft.take_layers()
        return super().partially_load(*args, **kwargs)

    def load(self, *args: Any, **kwargs: Any) -> None:
        """Under dynamic VRAM the host patches a weight when its layer is called: none that it reads or never casts."""
        dynamic = hasattr(self, "is_dynamic") and self.is_dynamic()
        if dynamic:
            for key, held in self.backup.items():
                comfy.utils.set_attr_param(self.model, key, held.weight)
        super().load(*args, **kwargs)
        for key in self.patches if dynamic else ():
            path, _, parameter = key.rpartition(".")
            module, held = comfy.utils.get_attr(self.model, path), self.backup.get(key)
            if hasattr(module, "is_read") or (held is not None and not hasattr(module, "comfy_cast_weights")):
                if held is not None:
                    comfy.utils.set_attr_param(self.model, key, held.weight)
                setattr(module, f"{parameter}_lowvram_function", None)
                super().patch_weight_to_device(key, device_to=self.load_device)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights and device_to is not None and comfy.model_management.is_device_cpu(device_to):
            # what is pinned is the copy, and the host would no longer find it
            getattr(self, "unpin_all_weights", lambda: None)()
            self.graft.return_to_file()
        super().unpatch_model(device_to, unpatch_weights)

    def get_key_patches(self, filter_prefix: str | None = None) -> dict:
        """What merge nodes read: weights that look and behave like weights, with the residuals behind them."""
        if filter_prefix is not None:  # without one hosts ask for the weights behind hooks while they sample
            self._refuse_varying()
        found = super().get_key_patches(filter_prefix)
        for key in found:
            layer = self.graft.layer_of(key)
            if layer is not None:
                found[key] = self._key_patches(key, layer)
        return found

    def _key_patches(self, key: str, layer: PackedLayer) -> list:
        """A parameter's weight and the patches for it; merged already if the host would merge one of them wrongly."""
        patches = self.residuals.patches.get(key, ())
        if not all(is_the_hosts_own(p.adapter, p.origin[1]) for p in patches if p.origin is not None):
            return [(self.shown(key, layer), _as_it_is)]
        return [(_plain(key, layer), _as_it_is), *(p.origin for p in patches if p.origin is not None)]

    def model_state_dict(self, filter_prefix: str | None = None) -> dict:
        """Weights as a loaded model of the host's would show them: patched, once they are read."""
        state = super().model_state_dict(filter_prefix)
        return {key: self._shown(key, value) for key, value in state.items()}

    def _shown(self, key: str, value: torch.Tensor) -> torch.Tensor:
        layer = self.graft.layer_of(key)
        return value if layer is None else self.shown(key, layer)

    def shown(self, key: str, layer: PackedLayer, patches: Sequence[Patch] | None = None) -> torch.Tensor:
        """A layer's weight or bias with these patches, or those of this branch, merged where somebody reads it."""
        plain, patches = _plain(key, layer), tuple(self.residuals.patches.get(key, ()) if patches is None else patches)
        if not patches:
            return plain
        widened = [p.adapter.shape for p in patches if isinstance(p.adapter, Padded)]
        read = functools.partial(self.merged, key, layer, patches)
        return MergedTensor(read, (widened or [plain.shape])[-1], plain)

    def merged(self, key: str, layer: PackedLayer, patches: Sequence[Patch] | None = None) -> torch.Tensor:
        """A layer's weight or bias with these patches, or those of this branch, in it: fp32, in memory of its own."""
        patches = self.residuals.patches.get(key, ()) if patches is None else patches
        return kinds.merge(
            layer.dequantized() if key.endswith(".weight") else layer.bias.float().clone(),
            patches, lambda patch, w: merge(self, [patch], w, key),
        )  # fmt: skip

    def model_size(self) -> int:
        """Bytes that the host has to move; older ones would count the weights that the state dict shows."""
        if not self.size:
            self.size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        return self.size

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Nodes that extract LoRAs ask here for a patched weight; hosts with dynamic VRAM move small layers by it."""
        layer = self.graft.layer_of(key)
        if layer is not None and kwargs.get("return_weight"):
            return self.merged(key, layer)
        if layer is not None and kwargs.get("force_cast") and key not in self.patches:
            return self._move(key, kwargs["device_to"])
        return super().patch_weight_to_device(key, *args, **kwargs)

    def _move(self, key: str, device: torch.device) -> None:
        """Put a copy of a parameter as it is, a packed one's bytes, on `device`; the host brings the original back."""
        held = comfy.utils.get_attr(self.model, key)
        self.backup.setdefault(key, _Held(held))
        moved = comfy.model_management.cast_to_device(held, device, None, copy=True)
        comfy.utils.set_attr_param(self.model, key, moved)

    def merged_state_dict(
        self, dtype: torch.dtype = torch.float16, prefix: str = "diffusion_model."
    ) -> dict[str, torch.Tensor]:
        """The weights of a part of the model, decoded and with the residuals merged in, for a file of its own.

        Returns:
            tensors by their names behind `prefix`; packed ones in `dtype`, others as they are.

        Raises:
            GraftError: a LoRA on it has no single strength.
        """
        self._refuse_varying()
        held = {k: v for k, v in self.model.state_dict().items() if k.startswith(prefix)}
        return {plain_key(key.removeprefix(prefix)): self._saved(key, value, dtype) for key, value in held.items()}

    def _refuse_varying(self) -> None:
        """Weights would have it at full strength, everywhere and in all steps, and nobody would know."""
        if self.residuals.varies:
            raise GraftError(
                "a LoRA by region, step, prompt or block cannot be merged or saved in a model: take it off, or put it "
                "on behind this node"
            )

    def weights_to_save(self, prefix: str = "diffusion_model.") -> dict[str, torch.Tensor]:
        """The weights of a part of the model, by their names behind `prefix`; merged, as fp32, when they are read."""
        held = {k: v for k, v in self.model.state_dict().items() if k.startswith(prefix) and v is not None}
        found = {}
        for key, value in held.items():
            layer = self.graft.layer_of(key)
            found[plain_key(key.removeprefix(prefix))] = (
                self._hosts_own(key, value) if layer is None else self.shown(key, layer)
            )
        return found

    def _saved(self, key: str, value: Any, dtype: torch.dtype) -> Any:
        layer = self.graft.layer_of(key)
        if value is None:
            return None
        if layer is None:
            return self._hosts_own(key, value)
        plain = _plain(key, layer)
        decoded = isinstance(plain, PackedTensor)
        if decoded or self.residuals.patches.get(key):
            return self.merged(key, layer).to(dtype if decoded else plain.dtype)
        return plain

    def _hosts_own(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """A parameter outside of our layers, with the patches that the host may not have written into it yet."""
        if key not in self.patches or key in self.backup:
            return value
        return comfy.lora.calculate_weight(self.patches[key], value.float().clone(), key).to(value.dtype)

    def model_state_dict_for_saving(self, model: torch.nn.Module | None = None, prefix: str = "") -> dict:
        """What the newest hosts ask for a text encoder, or for the part `model` whose names begin with `prefix`."""
        return self.merged_state_dict(prefix=prefix)

    def state_dict_for_saving(
        self, clip_state_dict: Any = None, vae_state_dict: Any = None, clip_vision_state_dict: Any = None
    ) -> dict:
        """What newer hosts ask the patcher for when they save."""
        return self.model.state_dict_for_saving(
            self.merged_state_dict(), clip_state_dict, vae_state_dict, clip_vision_state_dict
        )


class _Held(NamedTuple):
    """What the host finds in `backup`."""

    weight: torch.nn.Parameter
    inplace_update: bool = False


class _WholePatcher(comfy.model_patcher.ModelPatcher):
    """Loads all of its model or nothing: on the host's list of what may be left behind, factors would not appear."""

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, **kwargs: Any) -> Any:
        return super().partially_load(device_to, extra_memory=1 << 60, **kwargs)


def _factors_patcher(module: torch.nn.Module, load_device: Any, offload_device: Any) -> Any:
    # under dynamic VRAM the host has another class, and treats a load with any plain patcher in it the old way
    core = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    chosen = _WholePatcher if core is comfy.model_patcher.ModelPatcher else core
    return chosen(module, load_device, offload_device)


def _concat_cond(model: torch.nn.Module, layer: PackedLayer, shape: tuple[int, ...], **kwargs: Any) -> Any:
    """`concat_cond` of a model whose first layer a control LoRA widens.

    The host asks the layer's weight how many channels it takes; it would see the unpatched one.
    """
    held = layer.weight
    layer.weight = torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    try:
        return type(model).concat_cond(model, **kwargs)
    finally:
        layer.weight = held


def _steady(patch: Patch, path: str) -> Patch | None:
    """A patch with the one strength that it has in all calls of the layer at `path`; None if it has several."""
    if patch.when is None or not patch.when.is_steady:
        return patch if patch.when is None else None
    return replace(patch, strength=patch.strength * patch.when.number(Call(), path), when=None)


def _plain(key: str, layer: PackedLayer) -> torch.Tensor:
    """A layer's weight or bias as the file has it."""
    return layer.packed_weight() if key.endswith(".weight") else layer.bias.detach()


def runs_bypassed(model: Any) -> bool:
    """Whether the host's Load LoRA (Bypass) is on a model: it hangs on the layers, and is in no patch."""
    return "bypass_lora" in getattr(model, "injections", {})


def _as_it_is(weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return weight


def merge(patcher: GraftPatcher, patches: Sequence[Patch], weight: torch.Tensor, key: str) -> torch.Tensor:
    """The host's own merge of `patches` into an fp32 `weight` that may be written to."""
    layer = patcher.graft.layer_of(key)
    original = layer.packed_weight() if layer is not None and key.endswith(".weight") else weight.clone()
    scaled = [(p.strength, *p.origin[1:]) for p in patches if p.origin is not None]
    return comfy.lora.calculate_weight(
        scaled, weight, key, intermediate_dtype=torch.float32, original_weights={key: [(original, _as_it_is)]}
    )


@functools.cache
def _class_for(base: type) -> type[GraftPatcher]:
    return type("Graft" + base.__name__, (GraftPatcher, base), {})


def adopt(patcher: comfy.model_patcher.ModelPatcher, parent: GraftPatcher | None = None) -> GraftPatcher:
    """Make a patcher of the host's a Graft patcher, with the residuals of the one that it was cloned from."""
    if not isinstance(patcher, GraftPatcher):
        patcher.__class__ = _class_for(type(patcher))
    patcher.hooked = {}
    if parent is None:
        patcher.residuals, patcher.hook_residuals, patcher.rejected = ResidualStack(), {}, {}
    else:
        patcher.residuals = parent.residuals.copy()
        patcher.hook_residuals = {ref: stack.copy() for ref, stack in parent.hook_residuals.items()}
        patcher.rejected, patcher.training = dict(parent.rejected), parent.training
    # both point back at their own patcher, so they are bound anew for every clone
    reference = weakref.ref(patcher)
    patcher.residuals.merge = _merge_of(reference)
    for stack in patcher.hook_residuals.values():
        stack.merge = patcher.residuals.merge
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model_with(reference))
    tellers = {WrappersMP.CALC_COND_BATCH: calc_cond_batch_told, WrappersMP.PREDICT_NOISE: predict_noise_told}
    for kind, told in tellers.items():
        patcher.remove_wrappers_with_key(kind, KEY)
        patcher.add_wrapper_with_key(kind, KEY, _told_with(reference, told))
    return patcher


def _merge_of(reference: Callable[[], GraftPatcher | None]) -> Callable:
    def merge_of_patcher(patches: Sequence[Patch], weight: torch.Tensor, key: str) -> torch.Tensor:
        patcher = reference()
        if patcher is None:
            raise GraftError(_ORPHAN)
        return merge(patcher, patches, weight, key)

    return merge_of_patcher


def _apply_model_with(reference: Callable[[], GraftPatcher | None]) -> Callable:
    def apply_model_grafted(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        patcher = _caller(executor.class_obj, reference())
        if patcher is None:
            return executor(x, *args, **kwargs)
        if patcher.is_compiled():
            int8.prepare(patcher.graft.layers, x.device)
        with patcher.grafted(x.device, call=patcher.call_of(x, *args, **kwargs)):
            return executor(x, *args, **kwargs)

    return apply_model_grafted


def _told_with(reference: Callable[[], GraftPatcher | None], told: Callable) -> Callable:
    """A wrapper of the host's that lets `told` make its call, where a strength asks for what that tells."""

    def call_told(executor: Any, *args: Any, **kwargs: Any) -> Any:
        patcher = reference()
        # nothing more in what models get and compilers look at, where none does
        if patcher is None or not patcher.residuals.varies:
            return executor(*args, **kwargs)
        return told(executor, *args, **kwargs)

    return call_told


def _caller(model: Any, owner: GraftPatcher | None) -> GraftPatcher | None:
    """Whose call of `model` this is; for several devices a host calls all models by the wrappers of one `owner`.

    None for a model of another loader: so does a guider with a second model for the negative prompt.

    Raises:
        GraftError: the model's own patcher is gone.
    """
    for patcher in (owner, model.current_patcher):
        if isinstance(patcher, GraftPatcher) and patcher.model is model:
            return patcher
    if packed_layers(model):
        raise GraftError(_ORPHAN)
    return None


class _Savable:
    """Mixed into the host's model class by `make_savable`."""

    def state_dict_for_saving(self: Any, *args: Any, **kwargs: Any) -> dict:
        patcher = self.graft.loaded()
        if patcher is None:
            return super().state_dict_for_saving(*args, **kwargs)  # type: ignore[misc]
        merged = patcher.merged_state_dict()
        self.diffusion_model.state_dict = lambda *a, **k: merged
        try:
            return super().state_dict_for_saving(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self.diffusion_model.state_dict


def make_savable(model: torch.nn.Module) -> None:
    """Let hosts that ask the model itself for its state dict (up to 0.3.x) save weights, not bytes."""
    base = type(model)
    # a newer host asks the patcher, which hands the weights in
    if "unet_state_dict" not in inspect.signature(base.state_dict_for_saving).parameters:
        model.__class__ = type(base.__name__, (_Savable, base), {})


__all__ = ["Graft", "GraftPatcher", "PackedTensor", "adopt", "make_savable", "runs_bypassed"]
