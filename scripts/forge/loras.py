"""LoRA files on their way to Forge's loader: GGUF, names that it does not know, and what became of each file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...kernels import AdapterError
from ...ops.adapters import Adapter
from ...ops.files.dialects import LayerNames, Target, extra_dialects
from ...ops.files.lora import Placed, host_key_of, place, read_tensors, target_of
from ...ops.packed import PackedTensor, in_fp32
from ...ops.report import FileReport, cause_of, describe, family_of, is_text_encoder, modules_of

State = dict[str, torch.Tensor]
Valued = Callable[[str, Adapter, torch.Size], Any]
"""``(parameter, adapter, shape of the part of it) -> value``; AdapterError where there is none."""

GGUF = ".gguf"

_WHOLE = (".diff", ".set_weight")
_BESIDE_WHOLE = {*_WHOLE, ".diff_b", ".alpha"}
_OF_BIAS = (".diff_b", ".b_norm")


def list_gguf(networks: Any, names: Collection[str] | None = None) -> None:
    """Put the GGUF files in Forge's folders of LoRAs into its list; of two files of one name its own is listed.

    Args:
        networks: Forge's module of that name.
        names: the files that are looked for; None for all.
    """
    options, listed = networks.shared.cmd_opts, networks.available_networks
    for folder in (options.lora_dir, *getattr(options, "lora_dirs", ())):
        for path in networks.shared.walk_files(folder, allowed_extensions=[GGUF]):
            name = os.path.splitext(os.path.basename(path))[0]
            if (names and name not in names) or (name in listed and not is_gguf(listed[name].filename)):
                continue
            listed[name] = networks.available_network_aliases[name] = networks.network.NetworkOnDisk(name, path)


def is_gguf(path: Any) -> bool:
    return os.fspath(path).lower().endswith(GGUF)


def read_gguf(path: str | os.PathLike[str]) -> State:
    """A GGUF file of a LoRA as Forge's loader takes one of safetensors: what is packed is decoded, to fp32.

    Raises:
        AdapterError: it is damaged, or no LoRA.
    """
    state, _ = read_tensors(path)
    return {name: in_fp32(weight) if isinstance(weight, PackedTensor) else weight for name, weight in state.items()}


@dataclass(frozen=True)
class Fate:
    """What became of a file the last time that it was loaded.

    Attributes:
        report: how many of its layers the model has, and why not more.
        used: whether Forge has put anything of it on the model.
    """

    report: FileReport
    used: bool


@dataclass(frozen=True)
class LoraFile:
    """One file and the models that it is loaded on.

    Attributes:
        state: its tensors, under names that Forge understands where there are such.
        unet: the diffusion model; None where there is none.
        theirs: Forge's names for the diffusion model, and for the text encoders.
        ours: those of the file's modules that Forge has no name for, and what they stand for.
        made: patches that Forge's loader cannot make, by key of its patch lists.
    """

    state: State
    unet: nn.Module | None
    theirs: tuple[Mapping[str, Any], Mapping[str, Any]]
    ours: Mapping[str, Any]
    made: Made

    @classmethod
    def read(
        cls, networks: Any, state: State, unet: nn.Module | None, clip: nn.Module | None, norm: str, value_of: Valued
    ) -> LoraFile:
        """Look a file over, before Forge does.

        Args:
            networks: Forge's module of that name.
            norm: whose norm DoRA divides by, see `extra_dialects`.
            value_of: what the model's patch lists take for an adapter of ours.
        """
        state, shapes = extra_dialects(state, norm), _shapes(unet)
        on_unet = {} if unet is None else _there(networks.model_lora_keys_unet(unet, {}), unet)
        on_clip = {} if clip is None else networks.model_lora_keys_clip(clip, {})
        modules = {m: f for m, f in modules_of(state).items() if m not in on_clip and not is_text_encoder(m)}
        known = LayerNames(shapes, {name: target_of(key) for name, key in on_unet.items()}, modules)
        ours: dict[str, Any] = {}
        made = Made(networks.load_lora, value_of, shapes, state)
        for module, fields in modules.items():
            targets = known.targets(module)
            made.take(module, fields, targets)
            if targets and module not in made.whole and on_unet.get(module) != host_key_of(targets[0]):
                ours[module] = host_key_of(targets[0])
        return cls(state, unet, (on_unet, on_clip), ours, made)

    @contextlib.contextmanager
    def known_to(self, networks: Any) -> Iterator[None]:
        """Let Forge's loader find the layers of this file, and no names that another model has left."""
        before = networks.model_lora_keys_unet, networks.model_lora_keys_clip, networks.load_lora
        names = {**self.theirs[0], **self.ours}

        def load(state: State, asked: Any) -> tuple[dict, dict]:
            patches, rest = before[2]({k: v for k, v in state.items() if k not in self.made.tensors}, asked)
            if asked is names:
                for key, value in self.made.patches:
                    patches[_free(key, patches)] = value
            return patches, rest

        networks.model_lora_keys_unet, networks.load_lora = lambda model, key_map=None: names, load
        networks.model_lora_keys_clip = lambda model, key_map=None: before[1](model, {})
        try:
            yield
        finally:
            networks.model_lora_keys_unet, networks.model_lora_keys_clip, networks.load_lora = before

    def report(self, filename: str, strength: float) -> FileReport:
        """What of the file the models have."""
        modules = modules_of(self.state)
        on_unet, on_clip = self.theirs
        of_unet = [m for m in modules if not is_text_encoder(m) and m not in on_clip]
        known = {*on_unet, *self.ours, *self.made.whole, *self.made.rejected}
        missing = tuple(m for m in of_unet if m not in known)
        matched = len(of_unet) - len(missing) - len(self.made.rejected)
        family = family_of(_shapes(self.unet))
        return FileReport(
            os.path.basename(filename), strength, matched, len(of_unet), describe(self.state), missing,
            self.made.rejected, len(modules) - len(of_unet), cause_of(of_unet, missing, matched, family), family,
            on_clip=sum(m in on_clip for m in modules),
        )  # fmt: skip


@dataclass
class Made:
    """Patches of a file that Forge's loader cannot make, or makes wrongly; made here instead.

    It knows one layer, or one part of a layer, for each module; it keeps only the last of two patches on a weight, and
    loses a difference of the bias of a part. Some forms it leaves unloaded, and at some it raises and loses the file.

    Attributes:
        load: Forge's own ``(tensors, names) -> (patches, what is left)``.
        value_of: what the model's patch lists take for an adapter.
        shapes: of the model's weights, by layer.
        state: the file's tensors.
        patches: ``(key, value)`` for Forge's patch lists.
        whole: modules that are made of these alone.
        rejected: modules that do not fit, and why.
        tensors: names of those that Forge's loader is not to see.
    """

    load: Callable[..., tuple[dict, dict]]
    value_of: Valued
    shapes: Mapping[str, torch.Size]
    state: Mapping[str, torch.Tensor]
    patches: list[tuple[Any, Any]] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)
    rejected: dict[str, str] = field(default_factory=dict)
    tensors: set[str] = field(default_factory=set)

    def take(self, module: str, fields: Mapping[str, str], targets: Sequence[Target]) -> None:
        """Make what Forge cannot of a module that stands for `targets`; `fields` are the names of its tensors."""
        if not targets or any(target.layer not in self.shapes for target in targets):
            return
        wanted = [field for field in fields if self._is_lost(field, fields, targets)]
        if len(targets) > 1 or not self._is_read({f: k for f, k in fields.items() if f not in wanted}):
            wanted = list(fields)
            self.whole.add(module)
        if not wanted:
            return
        self.tensors.update(fields[field] for field in wanted)
        try:
            placed = place({field: self.state[fields[field]] for field in wanted}, targets, self.shapes)
            self.patches += [(host_key_of(one.target._replace(key=one.key)), self._value(one)) for one in placed]
        except AdapterError as error:
            self.rejected[module] = str(error)

    def _value(self, placed: Placed) -> Any:
        shape, region = self.shapes[placed.target.layer], placed.region
        shape = shape if placed.parameter == "weight" else shape[:1]
        return self.value_of(placed.key, placed.adapter, shape if region is None else region.within(shape))

    def _is_lost(self, field: str, fields: Mapping[str, str], targets: Sequence[Target]) -> bool:
        """Whether Forge's loader would lose this field of a module that it can read."""
        if field in _OF_BIAS:
            return targets[0].region is not None
        return field in _WHOLE and bool(fields.keys() - _BESIDE_WHOLE)

    def _is_read(self, fields: Mapping[str, str]) -> bool:
        """Whether Forge's loader makes patches of all of these fields."""
        alone = {f"x{field}": self.state[key] for field, key in fields.items()}
        try:
            _, left = self.load(alone, {"x": "x.weight"})
        except Exception:  # a missing factor is a KeyError, an alpha for each rank a RuntimeError
            return False
        return not left


def _free(key: Any, patches: Mapping[Any, Any]) -> Any:
    """A key that says the same and that `patches` has not yet: a part that is None is the whole."""
    while key in patches:
        key = (key, None) if isinstance(key, str) else (*key, None)
    return key


def _there(names: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Those of Forge's names whose parameters the model has."""
    parameters = model.state_dict().keys()
    return {name: key for name, key in names.items() if target_of(key).key in parameters}


def _shapes(model: nn.Module | None) -> dict[str, torch.Size]:
    """Shapes of weights by layer; Forge's parameters show the logical ones."""
    if model is None:
        return {}
    named = ((key, p.shape) for key, p in model.named_parameters() if key.endswith(".weight"))
    return {key.removesuffix(".weight"): torch.Size(shape) for key, shape in named if len(shape) > 1}


__all__ = ["Fate", "LoraFile", "is_gguf", "list_gguf", "read_gguf"]
