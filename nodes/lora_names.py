"""What the host's loader makes of a LoRA file, with the names and forms that it does not know itself.

LoRA Stack loads this way. So do stock nodes and those of other packs on a Graft model: all of them ask `comfy.lora` for
a model's names, and hand these back to it with the file. For our own models these two functions do more, for all others
they are what they were.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import comfy.lora
import torch

from ..kernels import AdapterError
from ..ops.adapters import Set
from ..ops.files.dialects import LayerNames, Target, extra_dialects
from ..ops.files.lora import Placed, host_key_of, place, target_of
from ..ops.report import cause_of, examples, is_text_encoder, modules_of
from .patcher import Graft

log = logging.getLogger(__name__)

Patches = dict[Any, Any]
_WHOLE = {".diff", ".set_weight"}
_BESIDE_WHOLE = _WHOLE | {".diff_b", ".diff_m", ".alpha"}


class LoadedFile:
    """A file's patches for a model.

    Attributes:
        patches: to be put on one after another, since each has one patch for a parameter.
        placed: modules whose patches are ours, since the host's loader cannot make them.
        missing: modules of diffusion models that no layer here is called like.
        rejected: modules whose adapters do not fit, and why.
    """

    def __init__(
        self, model: Any, state: Mapping[str, torch.Tensor], hosts: Mapping[str, Any], log_missing: bool = False
    ) -> None:
        """Load a file.

        Args:
            model: a diffusion model, or None: then the host's names are all that there are.
            state: the file's tensors, with names that `extra_dialects` has been through.
            hosts: the host's map of names.
            log_missing: whether the host's loader is to log what it leaves unloaded.
        """
        self.placed: list[str] = []
        self.missing: list[str] = []
        self.rejected: dict[str, str] = {}
        self._model, self._hosts, self._modules = model, hosts, modules_of(state)
        self._ours: list[Patches] = []
        names, rest, again = dict(hosts), dict(state), {}
        for module, fields in self._modules.items():
            targets = self._targets(module)
            if targets and (len(targets) > 1 or not _is_for_host({field: state[key] for field, key in fields.items()})):
                self._place(module, {field: rest.pop(key) for field, key in fields.items()}, targets)
                continue
            if targets:
                # the host tries every name that it is given on every kind of adapter, so it gets no others
                names[module] = host_key_of(targets[0])
                if ".diff_b" in fields and targets[0].region is not None:
                    # of a part of a layer it would make a key of no parameter
                    self._add(targets[0], "bias", ("diff", (rest.pop(fields[".diff_b"]),)))
            elif not is_text_encoder(module):
                self.missing.append(module)
            if fields.keys() - _BESIDE_WHOLE:
                # a difference would take the place of factors
                again |= {fields[field]: rest.pop(fields[field]) for field in _WHOLE & fields.keys()}
        found = [comfy.lora.load_lora(part, names, log_missing=log_missing) for part in (rest, again) if part]
        self.patches = [patches for patches in (*found, *self._ours) if patches]

    def _targets(self, module: str) -> tuple[Target, ...]:
        theirs = self._hosts.get(module)
        if isinstance(theirs, str) or self._model is None:
            return () if theirs is None else (target_of(theirs),)
        return () if theirs is None and is_text_encoder(module) else self._known.targets(module)

    @cached_property
    def _known(self) -> LayerNames:
        hosts = {name: target_of(key) for name, key in self._hosts.items()}
        return LayerNames(self._shapes, hosts, (m for m in self._modules if not is_text_encoder(m)))

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {} if self._model is None else weight_shapes(self._model)

    def _place(self, module: str, fields: Mapping[str, torch.Tensor], targets: Sequence[Target]) -> None:
        try:
            if any(target.layer not in self._shapes for target in targets):
                raise AdapterError("ComfyUI cannot read this adapter: get the file again")
            placed = place(fields, targets, self._shapes)
            values = [self._value(adapter) for adapter in placed]
        except AdapterError as error:
            self.rejected[module] = str(error)
            return
        self.placed.append(module)
        for (target, parameter, _), value in zip(placed, values, strict=True):
            self._add(target, parameter, value)

    def _value(self, placed: Placed) -> Any:
        """The adapter as the model's patcher takes it; of ours only a Graft patcher does."""
        target, parameter, adapter = placed
        if is_graft(self._model):
            return adapter
        if isinstance(adapter, Set):
            return "set", (adapter.value,)
        if not adapter.additive:
            raise AdapterError(f"ComfyUI cannot merge this form of {adapter.kind}: use the model as GGUF with Graft")
        shape = self._shapes[target.layer] if parameter == "weight" else self._shapes[target.layer][:1]
        part = shape if target.region is None else target.region.within(shape)
        return "diff", (adapter.delta(torch.zeros(part)),)

    def _add(self, target: Target, parameter: str, value: Any) -> None:
        key = host_key_of(target._replace(key=f"{target.layer}.{parameter}"))
        free = next((patches for patches in self._ours if key not in patches), None)
        if free is None:
            self._ours.append(free := {})
        free[key] = value

    def in_one(self) -> Patches:
        """All patches in one dict: a second one for a parameter has a key that says of it no more than the first."""
        found: Patches = {}
        for key, value in (item for patches in self.patches for item in patches.items()):
            while key in found:
                key = (key, None) if isinstance(key, str) else (*key, None)
            found[key] = value
        return found


def _is_for_host(fields: Mapping[str, torch.Tensor]) -> bool:
    """Whether the host's loader can read a module: some forms it does not know, and of others it makes an exception."""
    if any(field.startswith(".oft_R") for field in fields):
        return False
    alone = {f"x{field}": value for field, value in fields.items()}
    try:
        comfy.lora.load_lora(alone, {"x": "x.weight"}, log_missing=False)
    except Exception:  # a missing factor is a KeyError, an alpha for each rank a RuntimeError
        return False
    return True


def is_graft(model: Any) -> bool:
    """Whether a model of the host's runs on our layers."""
    return isinstance(getattr(model, "graft", None), Graft)


def weight_shapes(model: Any) -> dict[str, torch.Size]:
    """Shapes of a model's weights by layer; a Graft model's state dict would show those of packed bytes."""
    if is_graft(model):
        return {path: torch.Size(layer.logical_shape) for path, layer in model.graft.layers.items()}
    weights = {key.removesuffix(".weight"): w for key, w in model.state_dict().items() if key.endswith(".weight")}
    return {path: weight.shape for path, weight in weights.items() if weight.dim() > 1}


class _Names(dict):
    """The host's names of a Graft model, which remember whose they are."""

    model: Any = None


class _Loaded(dict):
    """What a LoRA node hands to `add_patches`.

    Attributes:
        rejected: what was left out and why, for Inspect.
    """

    rejected: Mapping[str, str] = {}


def _names_of(original: Callable, *args: Any, **kwargs: Any) -> Any:
    found = original(*args, **kwargs)
    model = args[0] if args else kwargs.get("model")
    if not is_graft(model):
        return found
    names = _Names(found)
    names.model = model
    return names


def _load(original: Callable, *args: Any, **kwargs: Any) -> Any:
    given = dict(zip(("lora", "to_load", "log_missing"), args, strict=False)) | kwargs
    names = given.get("to_load")
    if not isinstance(names, _Names):
        return original(*args, **kwargs)
    state = extra_dialects(given["lora"])
    file = LoadedFile(names.model, state, names, given.get("log_missing", True))
    loaded = _Loaded(file.in_one())
    loaded.rejected = dict(file.rejected)
    if file.missing:
        kind = type(names.model.model_config).__name__
        cause = cause_of(modules_of(state), file.missing, len(loaded), kind)
        why = f"{len(file.missing)} names that no layer of this model has"
        loaded.rejected[examples(file.missing)] = f"{why} ({cause})" if cause else why
    for module, reason in file.rejected.items():
        log.warning("%s is left out: %s", module, reason)
    return loaded


def extend_host() -> None:
    """Put our functions around the host's two; after a reload, in the place of those of the import before."""
    for name, ours in (("model_lora_keys_unet", _names_of), ("load_lora", _load)):
        found = getattr(comfy.lora, name)
        original = getattr(found, "without_graft", found)
        extended = functools.wraps(original)(functools.partial(ours, original))
        extended.without_graft = original  # type: ignore[attr-defined]
        setattr(comfy.lora, name, extended)


__all__ = ["LoadedFile", "extend_host", "is_graft", "weight_shapes"]
