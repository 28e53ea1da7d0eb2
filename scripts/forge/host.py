"""What of Forge's backend Graft touches, found by its features: the names and shapes differ between its branches."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from ...kernels import AdapterError, Format
from ...ops.adapters import Adapter, LoRA, Patch, Region, Set
from ...ops.kinds import merge

log = logging.getLogger(__name__)

OURS = "graft"
"""What an adapter of ours is called among Forge's kinds of patches."""


class NoForge(Exception):
    """The backend has not what Graft needs; the message says what is missing."""


@dataclass
class Host:
    """The parts of a Forge that hooks go into.

    Attributes:
        name: for people, e.g. ``Forge f2.0.1``.
        layers: the layer classes of GGUF models by name, ``Linear`` and what else `ForgeOperationsGGUF` has of its own.
        patcher: ``ModelPatcher``; every LoRA arrives in its `add_patches`.
        loads: the method of it that runs whenever a patcher's model goes to the device.
        merge: Forge's own ``(patches, weight, key, computation_dtype) -> weight``.
        load_lora: Forge's own ``(tensors, names) -> (patches, what is left)``.
        calculators: how Forge's merge finds kinds of patches that it does not know, by name.
        decode: Forge's own decode of one of its GGUF parameters.
        parameter: Forge's class of GGUF parameters.
        types: GGUF type number to the class that decodes it; missing ones can be added.
        memory: the module whose `bake_gguf_model` re-lays packed bytes out; None if it does not.
        operations: the module with `weights_manual_cast`, which brings weights to the compute device.
        readers: modules whose `load_torch_file` reads models.
        loader: the module with `replace_state_dict`, which finds the place of a text encoder.
        networks: the module with `load_lora_for_models`, which puts a LoRA file on a model.
        prompt_loras: the class whose `activate` reads the prompt's LoRAs.
        whole_model: the class around a diffusion model, whose `apply_model` is each call of it.
        references: gives the latents of reference pictures that Forge has set for all calls of a model.
        others_online: `online_mode` for LoRAs on what Graft does not run; None is what the caller asks for.
        features: what was found, for the report.
    """

    name: str
    layers: Mapping[str, type[nn.Module]]
    patcher: type
    loads: str
    merge: Callable[..., torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    load_lora: Callable[..., tuple[dict, dict]] | None = None
    calculators: MutableMapping[str, Any] = field(default_factory=dict)
    parameter: type | None = None
    types: MutableMapping[Any, Any] = field(default_factory=dict)
    type_of: Callable[[int], Any] = int
    memory: ModuleType | Any | None = None
    operations: ModuleType | Any | None = None
    readers: Sequence[ModuleType | Any] = ()
    loader: ModuleType | Any | None = None
    networks: ModuleType | Any | None = None
    prompt_loras: type | None = None
    whole_model: type | None = None
    references: Callable[[], Sequence[torch.Tensor]] = tuple
    others_online: bool | None = None
    features: dict[str, str] = field(default_factory=dict)

    def is_layer(self, module: nn.Module) -> bool:
        """Whether Graft runs it."""
        return isinstance(module, tuple(self.layers.values()))

    def gguf_parameter(self, data: torch.Tensor, fmt: Format, shape: Sequence[int], kind: Any) -> torch.Tensor:
        """One of Forge's parameters around a tensor of a file.

        Args:
            data: floats of the logical shape, or ``uint8``, flat.
            shape: the logical shape.
            kind: Forge's class of the type; None for floats.
        """
        assert self.parameter is not None
        if fmt.is_quantized:
            # rows of bytes, as Forge's own reader has them; what has no whole rows is one
            columns = shape[-1] if shape else 1
            whole = columns % fmt.block_size == 0
            data = data.reshape(math.prod(shape) // columns if whole else 1, -1)
        if "torch_tensor" in inspect.signature(self.parameter.__init__).parameters:
            made = self.parameter(data, tensor_type=None, tensor_shape=torch.Size(shape))
        else:
            made = self.parameter(SimpleNamespace(data=data, tensor_type=None, shape=tuple(reversed(shape))))
        made.gguf_cls = kind
        return made

    @property
    def lists_loras(self) -> bool:
        """Whether its list of LoRA files, and what reads one, can be reached."""
        names = ("process_network_files", "available_network_aliases", "list_available_networks")
        return all(hasattr(self.networks, name) for name in (*names, "load_lora_state_dict"))

    def loaded(self) -> Any:
        """The checkpoint that Forge has loaded; None if there is none, or nobody to ask."""
        models = getattr(self.networks, "sd_models", None)
        return None if models is None else models.model_data.get_sd_model()

    def value_of(self, adapter: Adapter, shape: torch.Size) -> Any:
        """An adapter of ours as Forge's patch lists hold one.

        Args:
            shape: of the part of a parameter that it is about.

        Raises:
            AdapterError: Forge has nothing like it.
        """
        if isinstance(adapter, LoRA) and not isinstance(adapter.alpha, tuple):
            return self._lora(adapter)
        if isinstance(adapter, Set):
            return "set", (adapter.value,)
        if not adapter.additive:
            raise AdapterError(f"Forge cannot merge this form of {adapter.kind}: use the model as GGUF, with Graft on")
        return "diff", (adapter.delta(torch.zeros(shape)),)

    def _lora(self, lora: LoRA) -> Any:
        """As Forge's own loader makes it of a file: a tuple, or an object of a class of its own."""
        if self.load_lora is None:
            return "lora", (lora.up, lora.down, lora.alpha, lora.mid, None)
        tensors = {"x.lora_up.weight": lora.up, "x.lora_down.weight": lora.down}
        if lora.alpha is not None:
            tensors["x.alpha"] = torch.tensor(lora.alpha)
        if lora.mid is not None:
            tensors["x.lora_mid.weight"] = lora.mid
        return self.load_lora(tensors, {"x": "x"})[0]["x"]

    def _named(self, patch: Sequence) -> Sequence:
        """A patch as lists hold it: an adapter of ours under the name by which Forge's merge finds how to merge it."""
        strength, value, *rest = patch
        if not isinstance(value, Adapter):
            return patch
        self.calculators[OURS] = _merge_adapter
        return strength, (OURS, value), *rest

    def merged(self, patches: Sequence[Sequence], weight: torch.Tensor, key: str) -> torch.Tensor:
        """A weight with patches in it by Forge's own merge; what is an adapter of ours is merged here.

        Args:
            weight: may be written to.
        """
        for patch in patches:
            strength, value, strength_model, offset = patch[:4]
            if isinstance(value, Adapter):
                region = None if offset is None else Region(*offset)
                weight = merge(weight, [Patch(strength, value, strength_model, region)])
            else:
                weight = self.merge([patch], weight, key, computation_dtype=weight.dtype)
        return weight

    @contextlib.contextmanager
    def hanging(self, layer: nn.Module, patches: Mapping[str, Sequence]) -> Iterator[None]:
        """With patches of a layer's ``weight`` and ``bias`` where Forge's own forward looks for them."""
        if not patches:
            yield
            return
        places: dict[str, Any]
        if hasattr(layer, "weight_function"):
            places = {
                f"{name}_function": [
                    *getattr(layer, f"{name}_function"), functools.partial(self.merged, found, key=name),
                ]
                for name, found in patches.items()
            }  # fmt: skip
        else:
            theirs = getattr(layer, "forge_online_loras", {})
            lists = {name: [*theirs.get(name, ())] for name in {*theirs, *patches}}
            for name, found in patches.items():
                lists[name] += map(self._named, found)
            places = {"forge_online_loras": lists}
        before = {name: layer.__dict__[name] for name in places if name in layer.__dict__}
        layer.__dict__.update(places)
        try:
            yield
        finally:
            for name in places:
                del layer.__dict__[name]
            layer.__dict__.update(before)

    @contextlib.contextmanager
    def on_device(
        self, data: torch.Tensor, bias: torch.Tensor | None, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight bytes and bias on the device of the computation, in their own types.

        Where they lie elsewhere, Forge's own mover brings them (on its own stream, if the user chose that).
        """
        if data.device == device and (bias is None or bias.device == device):
            yield data, bias
            return
        move = getattr(self.operations, "weights_manual_cast", None)
        settle = getattr(self.operations, "main_stream_worker", None)
        if move is None or settle is None:
            yield data.to(device), None if bias is None else bias.to(device)
            return
        carrier = _Carrier(data, bias)
        target = torch.empty(0, device=device)
        weight, moved_bias, signal = move(carrier, target, skip_weight_dtype=True, skip_bias_dtype=True)
        with settle(weight, moved_bias, signal):
            yield weight, moved_bias


def _merge_adapter(weight: torch.Tensor, strength: float, adapter: Adapter) -> torch.Tensor:
    """As Forge's merge calls it, with the part of a weight that is patched: what is not in place would be lost."""
    return weight.copy_(adapter.merged(weight, strength))


class _Carrier:
    """What Forge's mover needs to see of a layer: no scale, and no patches that it would merge."""

    scale_weight = None
    weight_function: Sequence[Callable] = ()
    bias_function: Sequence[Callable] = ()

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias


def detect() -> Host:
    """Look at the Forge that this process runs.

    Raises:
        NoForge: something that Graft cannot do without is not there.
    """
    operations = _module("backend.operations")
    gguf = _module("backend.operations_gguf")
    base = _module("backend.patcher.base")
    lora = _module("backend.patcher.lora")
    memory = _module("backend.memory_management")
    layers = _layers(getattr(operations, "ForgeOperationsGGUF", None))
    if "Linear" not in layers:
        raise NoForge("this Forge has no ForgeOperationsGGUF.Linear, so it cannot run GGUF models itself: update Forge")
    patcher = getattr(base, "ModelPatcher", None)
    loads = next((name for name in ("refresh_loras", "patch_model") if hasattr(patcher, name)), None)
    needed = {
        "ModelPatcher.add_patches": hasattr(patcher, "add_patches"),
        "ModelPatcher.patch_model": loads is not None,
        "merge_lora_to_weight": hasattr(lora, "merge_lora_to_weight"),
        "dequantize_tensor": hasattr(gguf, "dequantize_tensor"),
    }
    if missing := [name for name, found in needed.items() if not found]:
        raise NoForge(f"this Forge lacks {', '.join(missing)}: update Forge, or Graft")
    bakes = hasattr(memory, "bake_gguf_model")
    types = getattr(gguf, "quants_mapping", None) or getattr(gguf, "QUANTS_MAPPING", None) or {}
    loader = _optional("backend.loader")
    return Host(
        name=_name(),
        layers=layers,
        patcher=base.ModelPatcher,
        loads=str(loads),
        merge=lora.merge_lora_to_weight,
        load_lora=getattr(lora, "load_lora", None),
        calculators=getattr(lora, "extra_weight_calculators", {}),
        decode=gguf.dequantize_tensor,
        parameter=getattr(gguf, "ParameterGGUF", None),
        types=types,
        type_of=type(next(iter(types))) if types else int,
        memory=memory if bakes else None,
        operations=operations,
        readers=[m for m in (_optional("backend.utils"), loader) if hasattr(m, "load_torch_file")],
        loader=loader if hasattr(loader, "replace_state_dict") else None,
        networks=_networks(),
        prompt_loras=getattr(sys.modules.get("extra_networks_lora"), "ExtraNetworkLora", None),
        whole_model=_whole_model(),
        references=_references(),
        # where lists of LoRAs hang on layers, norms never look at them
        others_online=False if loads == "refresh_loras" else None,
        features={
            "Forge's GGUF layers": ", ".join(layers),
            "Forge's re-layout": "held back: the weights stay the file's bytes" if bakes else "none",
            "Forge's GGUF types": ", ".join(getattr(t, "name", str(t)) for t in types),
        },
    )


def _layers(operations: Any) -> dict[str, type[nn.Module]]:
    """The classes that hold packed weights; what `operations` only inherits are layers of floats."""
    own = vars(operations) if operations is not None else {}
    found = {name: own.get(name) for name in ("Linear", "Conv2d", "Embedding")}
    return {name: cls for name, cls in found.items() if isinstance(cls, type) and hasattr(cls, "forward")}


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NoForge(f"this Forge has no module {name} ({error}): update Forge, or Graft") from error


def _networks() -> ModuleType | None:
    """Forge's own extension for LoRAs, which is there before others are loaded."""
    module = sys.modules.get("networks")
    names = ("load_lora_for_models", "model_lora_keys_unet", "model_lora_keys_clip")
    return module if all(hasattr(module, name) for name in names) else None


def _optional(name: str) -> ModuleType | None:
    with contextlib.suppress(NoForge):
        return _module(name)
    return None


def _whole_model() -> type | None:
    found = getattr(_optional("backend.modules.k_model"), "KModel", None)
    return found if hasattr(found, "apply_model") else None


def _references() -> Callable[[], Sequence[torch.Tensor]]:
    arguments = getattr(_optional("backend.args"), "dynamic_args", None)
    return lambda: getattr(arguments, "ref_latents", None) or ()


def _name() -> str:
    """``Forge f2.0.1`` or ``Forge Neo 2.26``."""
    try:
        module = importlib.import_module("modules_forge.forge_version")
        version, release = str(module.version), getattr(module, "release", "")
    except (ImportError, AttributeError):
        return "Forge"
    return f"Forge f{version}" if version[:1].isdigit() else f"Forge {version.capitalize()} {release}".strip()
