"""The model patcher: where every LoRA node in the world arrives.

A Graft MODEL is a `ModelPatcher` of the class that the host made, with `GraftPatcher` mixed in. Patches
of packed layers become residuals; all others stay the host's. `patches` and `patches_uuid` are left
alone, so the host neither patches nor reloads the model for a LoRA.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ..kernels import AdapterError, GraftError, scratch
from ..ops import kinds
from ..ops.adapters import Adapter, Patch, Region, from_host, is_the_hosts_own
from ..ops.kinds import Padded
from ..ops.layers import PackedLayer, packed_layers
from ..ops.packed import PackedTensor
from ..ops.report import examples
from ..ops.residual import FactorCache, ResidualStack, StackFactors
from .ops import HostLayer, plain_key

log = logging.getLogger(__name__)

_ORPHAN = (
    "another node copied this MODEL in a way that left its LoRAs behind: connect that node to the model loader, "
    "and the LoRAs behind it"
)
KEY = "graft"
"""Under which our wrapper stands with the host."""


class Graft:
    """What all clones of one loaded model share: its layers and the factors that are in memory.

    Attributes:
        layers: every Graft layer by path, e.g. ``diffusion_model.double_blocks.0.img_attn.qkv``.
        sources: the memory-mapped data of each layer, to go back to when the model leaves the GPU.
        summary: one line on the file, for reports.
        loaded: the branch that the host loaded last, or None.
        encoding: whether a call of this model as a text encoder is under way.
    """

    encoding = False

    def __init__(self, model: torch.nn.Module, summary: str = "", backend: str = "auto") -> None:
        layers = packed_layers(model)
        for layer in layers.values():
            layer.backend = backend
        sources = {name: layer.weight.data for name, layer in layers.items() if layer.weight is not None}
        self._own(layers, sources, summary)

    def __deepcopy__(self, memo: dict) -> Graft:
        """That of a copy of the model: with its layers and the same file, and no factors yet."""
        copied = memo[id(self)] = Graft.__new__(Graft)
        copied._own(copy.deepcopy(self.layers, memo), self.sources, self.summary)
        return copied

    def _own(self, layers: dict[str, PackedLayer], sources: dict[str, torch.Tensor], summary: str) -> None:
        self.layers, self.sources, self.summary = layers, sources, summary
        self.factors = FactorCache()
        self.loaded: Callable[[], GraftPatcher | None] = lambda: None
        self.take_layers()
        # what weights were decoded into goes with the model; another one takes memory anew in its next step
        weakref.finalize(self, scratch.release)

    def take_layers(self) -> None:
        """Tell every layer whose it is; a copy of the model still names the original's owner."""
        for name, layer in self.layers.items():
            if isinstance(layer, HostLayer):
                # weak, so that a model that nobody needs goes at once
                layer.path, layer.owner = name, weakref.ref(self)

    def layer_of(self, key: str) -> PackedLayer | None:
        """The layer that parameter `key` belongs to, if it is one of ours."""
        path, _, parameter = plain_key(key).rpartition(".")
        return self.layers.get(path) if parameter in ("weight", "bias") else None

    def shown(self, key: str) -> torch.Tensor:
        """A parameter of one of our layers as a loaded model of the host's would hold it.

        With an adapter beside it that is the merged weight, in memory of its own.
        """
        layer, patcher = self.layer_of(key), self.loaded()
        assert layer is not None
        if patcher is not None and patcher.residuals.patches.get(key):
            return patcher.merged(key, layer).to(patcher.compute_dtype())
        return layer.packed_weight() if key.endswith(".weight") else layer.bias.detach()

    def return_to_file(self) -> None:
        """Let go of copies, on a device or in memory, and show the memory map again: nothing is copied back."""
        scratch.release()
        for name, source in self.sources.items():
            layer = self.layers[name]
            if layer.weight.data_ptr() != source.data_ptr():
                layer.weight = torch.nn.Parameter(source, requires_grad=False)


class GraftPatcher(comfy.model_patcher.ModelPatcher):
    """Mixed into the host's patcher class by `adopt`; never instantiated by itself."""

    residuals: ResidualStack
    hook_residuals: dict[Any, ResidualStack]
    rejected: dict[str, str]
    hooked: dict[tuple, ResidualStack]
    shows_merged = True

    @property
    def graft(self) -> Graft:
        """On the model and not on the patcher: a host may clone a patcher onto another copy of the model."""
        return self.model.graft

    def clone(self, *args: Any, **kwargs: Any) -> GraftPatcher:
        return adopt(super().clone(*args, **kwargs), self)

    def __deepcopy__(self, memo: dict) -> GraftPatcher:
        """A patcher with a model of its own, as the host's own are copied, and the same LoRAs."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return adopt(copied, copied)

    def add_patches(self, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        """Take patches of packed layers as residuals, and hand the host the others.

        Returns:
            the keys that were taken, as the host's own method does; what it misses, nodes report.
        """
        ours, theirs = self._sort(patches)
        taken = super().add_patches(theirs, strength_patch, strength_model) if theirs else []
        return taken + self._add(self.residuals, ours, strength_patch, strength_model)

    def add_hook_patches(
        self, hook: Any, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list:
        """The same for scheduled and masked LoRAs; a hook's strength is applied when it is active."""
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
                    f"Train LoRA cannot make factors for {name}, which is quantized: train on this model as "
                    "safetensors, the LoRA runs on the GGUF"
                )
        super().add_weight_wrapper(name, function)

    def _sort(self, patches: Mapping) -> tuple[dict, dict]:
        ours: dict = {}
        theirs: dict = {}
        for key, value in patches.items():
            name = key if isinstance(key, str) else key[0]
            (theirs if self.graft.layer_of(name) is None else ours)[key] = value
        return ours, theirs

    def _add(self, stack: ResidualStack, patches: Mapping, strength: float, strength_model: float) -> list:
        taken: list = []
        rejected: dict[str, str] = {}
        for key, value in patches.items():
            name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
            region = None if offset is None else Region(*offset)
            layer = self.graft.layer_of(name)
            assert layer is not None
            try:
                adapter = self._adapter(stack, name, layer, value, region, function)
            except AdapterError as error:
                rejected[name] = str(error)
                continue
            origin = (strength, value, strength_model, offset, function)
            stack.add(name, Patch(strength, adapter, strength_model, region, None, origin))
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
        return stack.build(self.graft.layers, self.graft.factors, self.compute_dtype(), keep)

    def _hosts_of(self, built: Sequence[StackFactors]) -> list:
        """The host's patchers for these factors, each of which is in one of them."""
        for factors in built:
            self.graft.factors.sets(factors)
        # only now: the sets of one stack may have been divided by the next
        found = dict.fromkeys(part for factors in built for part in self.graft.factors.sets(factors))
        for part in found:
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

    def restore_hook_patches(self) -> None:
        """After sampling the host forgets the hooks that it registered for it; so do we."""
        super().restore_hook_patches()
        self.hook_residuals = {ref: s for ref, s in self.hook_residuals.items() if ref in self.hook_patches}
        self.hooked = {}

    @contextmanager
    def grafted(self, device: torch.device) -> Iterator[None]:
        """Run the model with this branch's adapters on `device`, and with no other's."""
        stack = self.active_stack()
        if stack is self.residuals:
            if stack:
                self.build_residuals()
        else:
            # the host has loaded those of each hook, but not what only their sum needs, until the sampling is over
            self.build_residuals(stack, keep=False).to(device)
        with stack.active(self.graft.layers, device):
            yield

    def partially_load(self, *args: Any, **kwargs: Any) -> Any:
        self.graft.loaded = weakref.ref(self)
        self.graft.take_layers()
        return super().partially_load(*args, **kwargs)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights and device_to is not None and comfy.model_management.is_device_cpu(device_to):
            # what is pinned is the copy, and the host would no longer find it
            getattr(self, "unpin_all_weights", lambda: None)()
            self.graft.return_to_file()
        super().unpatch_model(device_to, unpatch_weights)

    def get_key_patches(self, filter_prefix: str | None = None) -> dict:
        """What merge nodes read: weights that look and behave like weights, with the residuals behind them."""
        self.shows_merged = False
        try:
            found = super().get_key_patches(filter_prefix)
        finally:
            self.shows_merged = True
        for key in found:
            layer = self.graft.layer_of(key)
            if layer is not None:
                found[key] = self._key_patches(key, layer)
        return found

    def _key_patches(self, key: str, layer: PackedLayer) -> list:
        """A parameter's weight and the patches for it; merged already if the host would merge one of them wrongly."""
        patches = self.residuals.patches.get(key, ())
        if not all(is_the_hosts_own(p.adapter, p.origin[1]) for p in patches if p.origin is not None):
            return [(self.merged(key, layer), _as_it_is)]
        weight = layer.packed_weight() if key.endswith(".weight") else layer.bias
        return [(weight, _as_it_is), *(p.origin for p in patches if p.origin is not None)]

    def model_state_dict(self, filter_prefix: str | None = None) -> dict:
        """Weights as a loaded model of the host's would show them: patched."""
        state = super().model_state_dict(filter_prefix)
        return {key: self._shown(key, value) for key, value in state.items()}

    def _shown(self, key: str, value: torch.Tensor) -> torch.Tensor:
        layer = self.graft.layer_of(key)
        if layer is None:
            return value
        if self.shows_merged and self.residuals.patches.get(key):
            return self.merged(key, layer)
        return layer.packed_weight() if key.endswith(".weight") else value

    def merged(self, key: str, layer: PackedLayer) -> torch.Tensor:
        """A layer's weight or bias with the residuals of this branch in it, fp32, in memory of its own."""
        weight = layer.dequantized() if key.endswith(".weight") else layer.bias.float().clone()
        return kinds.merge(weight, self.residuals.patches.get(key, ()), lambda patch, w: merge(self, [patch], w, key))

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Nodes that extract LoRAs ask here for a patched weight."""
        layer = self.graft.layer_of(key)
        if layer is not None and kwargs.get("return_weight"):
            return self.merged(key, layer)
        return super().patch_weight_to_device(key, *args, **kwargs)

    def merged_state_dict(
        self, dtype: torch.dtype = torch.float16, prefix: str = "diffusion_model."
    ) -> dict[str, torch.Tensor]:
        """The weights of a part of the model, decoded and with the residuals merged in, for a file of its own.

        Returns:
            tensors by their names behind `prefix`; packed ones in `dtype`, others as they are.
        """
        held = {k: v for k, v in self.model.state_dict().items() if k.startswith(prefix)}
        return {plain_key(key.removeprefix(prefix)): self._saved(key, value, dtype) for key, value in held.items()}

    def _saved(self, key: str, value: Any, dtype: torch.dtype) -> Any:
        layer = self.graft.layer_of(key)
        if value is None:
            return None
        if layer is None:
            return self._hosts_own(key, value)
        decoded = key.endswith(".weight") and layer.fmt is not None and layer.fmt.is_quantized
        if decoded or self.residuals.patches.get(key):
            return self.merged(key, layer).to(dtype if decoded else value.dtype)
        return value

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
        patcher.rejected = dict(parent.rejected)
    # both point back at their own patcher, so they are bound anew for every clone
    reference = weakref.ref(patcher)
    patcher.residuals.merge = _merge_of(reference)
    for stack in patcher.hook_residuals.values():
        stack.merge = patcher.residuals.merge
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model_with(reference))
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
        patcher = reference()
        if patcher is None:
            raise GraftError(_ORPHAN)
        with patcher.grafted(x.device):
            return executor(x, *args, **kwargs)

    return apply_model_grafted


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


__all__ = ["Graft", "GraftPatcher", "PackedTensor", "adopt", "make_savable"]
