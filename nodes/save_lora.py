"""Saving what is on a model, or what sets it apart from another, as one LoRA file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ..kernels import AdapterError
from ..ops import extract
from ..ops.adapters import Patch, Region, from_host
from ..ops.extract import Change
from ..ops.files.imatrix import Importance
from ..ops.files.lora import target_of
from ..ops.files.lora_writer import FORMS, Name, diffusers_state, kohya_state, write_lora
from ..ops.report import examples, layers
from . import node
from .calibrate import TYPE
from .lora import rows_on
from .patcher import GraftPatcher, merge, runs_bypassed

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."
NAMES = ("kohya", "diffusers")
BYPASSED = "LoRAs of Load LoRA (Bypass) are in no file: put them on with another LoRA node"
_HIGHEST_RANK = 4096
_ROOM = 32
"""Times the largest parameter's bytes, which may be packed: what working on one takes in fp32."""


@dataclass(frozen=True)
class _Parameter:
    """One of a model's parameters.

    Attributes:
        shape: its own.
        weight: gives its value without patches, as a new tensor in fp32, where the host computes.
        patches: what nodes have put on it.
        host: merges a patch that only the host understands.
    """

    shape: torch.Size
    weight: Callable[[], torch.Tensor]
    patches: Sequence[Patch]
    host: Callable[[Patch, torch.Tensor], torch.Tensor]

    def change(self) -> Change | None:
        """What the patches add."""
        return extract.change_of(self.patches, self.shape, self.weight, self.host)

    def merged(self) -> torch.Tensor:
        """Its value with the patches, fp32."""
        change, weight = self.change(), self.weight()
        return weight if change is None else weight + change.matrix().reshape(self.shape).to(weight)


def _parameters(model: Any) -> dict[str, _Parameter]:
    """All of a diffusion model's, by their names in it.

    Raises:
        AdapterError: a patch cannot be read.
    """
    return {
        key.removeprefix(PREFIX): _parameter(model, key, found)
        for key, found in comfy.model_patcher.ModelPatcher.get_key_patches(model, PREFIX).items()
        if _is_weight(key, found)
    }


def _is_weight(key: str, found: list) -> bool:
    """Or it is one of the model's own numbers, such as places."""
    held = found[0][0]
    return isinstance(held, torch.Tensor) and (held.is_floating_point() or key.endswith(".weight") or len(found) > 1)


def _layer(model: Any, key: str) -> Any:
    return model.graft.layer_of(key) if isinstance(model, GraftPatcher) else None


def _parameter(model: Any, key: str, found: list) -> _Parameter:
    (held, convert), *hosts = found
    layer, device = _layer(model, key), comfy.model_management.get_torch_device()
    if layer is not None:
        shape = layer.logical_shape if key.endswith(".weight") else layer.logical_shape[:1]
        patches = model.residuals.patches.get(key, ())

        def ours() -> torch.Tensor:
            held = layer.dequantized() if key.endswith(".weight") else layer.bias.detach().float().clone()
            return held.to(device)

        return _Parameter(torch.Size(shape), ours, patches, lambda patch, weight: merge(model, [patch], weight, key))

    def theirs() -> torch.Tensor:
        if not held.is_floating_point():
            raise AdapterError(
                f"{key.removeprefix(PREFIX)} is in a form that only its own loader reads "
                f"({str(held.dtype).removeprefix('torch.')}): load the model with Graft's loader"
            )
        return convert(held.detach().to(device, copy=True), inplace=True).float()

    shape = torch.Size(held.shape)
    return _Parameter(
        shape, theirs, [_patch(entry, shape) for entry in hosts],
        lambda patch, weight: comfy.lora.calculate_weight([patch.origin], weight, key),
    )  # fmt: skip


def _patch(entry: tuple, shape: torch.Size) -> Patch:
    """An entry of the host's own list."""
    strength, value, strength_model, offset, function = (*entry, None, None)[:5]
    region = None if offset is None else Region(*offset)
    return Patch(strength, from_host(value, shape, region, function), strength_model, region, None, entry)


def changes_of(model: Any, base: Any = None) -> Iterator[tuple[str, Change | None, str]]:
    """What is on a model, or what sets it apart from `base`: by parameter, with a reason where it is left out."""
    own = _parameters(model)
    others = None if base is None else _parameters(base)
    for name, parameter in own.items():
        if others is None:
            yield name, parameter.change() if parameter.patches else None, ""
        elif name not in others:
            yield name, None, "the other model has no such weight"
        elif others[name].shape != parameter.shape:
            yield name, None, f"it is {list(parameter.shape)} in one model and {list(others[name].shape)} in the other"
        else:
            yield name, extract.between(parameter.merged(), others[name].merged()), ""


def _cut(change: Change, rank: int, device: torch.device, inputs: torch.Tensor | None = None) -> Change:
    """At most of this rank, worked out where the host computes."""
    moved = Change(change.shape, *(_to(t, device) for t in (change.up, change.down, change.full)))
    found = extract.cut(moved, rank, _to(inputs, device)) if rank else moved
    tensors = (_to(t, torch.device("cpu")) for t in (found.up, found.down, found.full))
    return Change(found.shape, *tensors, found.lost, found.norm)


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def diffusers_names(model: Any) -> dict[str, list[Name]]:
    """What diffusers calls a model's layers, as far as the host knows that: by parameter, all of its rows in order."""
    parts: dict[str, dict[int, Name]] = {}
    whole: dict[str, Name] = {}
    for name, value in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        if not isinstance(name, str) or not name.startswith("transformer."):
            continue
        parameter, region, function = target_of(value)
        key = parameter.removeprefix(PREFIX)
        if region is None and _undoes_itself(function):
            whole.setdefault(key, Name(name, None, function))
        elif region is not None and region.dim == 0 and _undoes_itself(function):
            parts.setdefault(key, {}).setdefault(region.start, Name(name, region, function))
    rows = {name: parameter.shape[0] for name, parameter in model.model.state_dict().items() if parameter.dim()}
    names = {key: [name] for key, name in whole.items()}
    # hosts know the whole of some fused layers by name, too, which diffusers has in parts
    for key, found in parts.items():
        ordered = [found[start] for start in sorted(found)]
        if _covers(ordered, _rows(model, PREFIX + key, rows)):
            names[key] = ordered
    return names


def _rows(model: Any, key: str, rows: Mapping[str, int]) -> int:
    layer = _layer(model, key)
    return rows.get(key, 0) if layer is None else layer.logical_shape[0]


def _covers(parts: Sequence[Name], rows: int) -> bool:
    at = 0
    for part in parts:
        assert part.region is not None
        if part.region.start != at:
            return False
        at += part.region.length
    return at == rows


def _undoes_itself(function: Callable[[torch.Tensor], torch.Tensor] | None) -> bool:
    if function is None:
        return True
    probe = torch.arange(12.0).view(12, 1)
    return torch.equal(function(function(probe)), probe)


class GraftSaveLora:
    """Save LoRA (Graft)."""

    DESCRIPTION = (
        "Saves all LoRAs on a model as one file, with their strengths. With a second model it saves the difference of "
        "the two as a LoRA. The file loads in any LoRA node, on the plain model."
    )
    SEARCH_ALIASES = ["merge loras", "extract lora", "save lora", "combine loras", "model as lora"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("path", "report")
    OUTPUT_TOOLTIPS = ("Where the file is.", "How many layers are in it, and how much the rank has lost.")
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        prefix = {"default": "loras/Graft", "tooltip": "Folder and beginning of the file's name, in ComfyUI's output."}
        rank = {
            "default": 0, "min": 0, "max": _HIGHEST_RANK,
            "tooltip": "0 keeps everything. Another number cuts the LoRA to that rank: the file gets smaller, and the "
            "report says how much is lost. With base, set a rank, for example 64.",
        }  # fmt: skip
        form = {
            "default": "fp16",
            "tooltip": "How numbers are stored. GGUF in Q8_0 is half as large as fp16, and for Graft's nodes only.",
        }
        repair = (
            "For a repair LoRA: from Importance (Graft), with for_repair on in Calibrate (Graft). The LoRA then "
            "repairs first what counts most in the pictures."
        )
        names = {"default": NAMES[0], "tooltip": "How the file names its layers. kohya loads nearly everywhere."}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A model with LoRAs on it, from Graft's loader or any other."}),
                "filename_prefix": ("STRING", prefix),
                "rank": ("INT", rank),
                "names": (list(NAMES), names),
                "file": (list(FORMS), form),
            },
            "optional": {
                "base": ("MODEL", {"tooltip": "Another model. The file then holds the difference of the two."}),
                "importance": (TYPE, {"tooltip": repair}),
            },
        }

    def save(
        self, model: Any, filename_prefix: str, rank: int, names: str, file: str, base: Any = None,
        importance: Importance | None = None,
    ) -> dict:  # fmt: skip
        if base is not None and not rank:
            raise AdapterError("what sets two models apart has no rank of its own: set rank, for example to 64")
        if importance is not None and not importance.sketches:
            raise AdapterError(
                "this calibration has nothing for a repair: switch for_repair on in Calibrate (Graft), and connect "
                "Importance (Graft) here, since files do not hold it"
            )
        changes, left_out = self._collect(model, base, rank, {} if importance is None else importance.sketches)
        if not changes:
            raise AdapterError(_nothing(base, left_out, runs_bypassed(model)))
        if importance is not None and importance.sketches.keys().isdisjoint(changes):
            raise AdapterError("the calibration is of another model, which has none of these layers: make one of this")
        state = kohya_state(changes) if names == NAMES[0] else diffusers_state(changes, diffusers_names(model))
        path = free_path(filename_prefix, ".safetensors" if FORMS[file] is not None else ".gguf")
        size = write_lora(path, state, file, _metadata(model, changes, base))
        of = "change" if importance is None else "change in what layers give, as calibrated"
        text = _report(changes, left_out, rank, of, size, path)
        text += f"\n{BYPASSED}" if runs_bypassed(model) else ""
        log.info("%s", text)
        return node.result((path, text), text)

    @staticmethod
    def _collect(
        model: Any, base: Any, rank: int, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, Change], dict[str, str]]:
        changes: dict[str, Change] = {}
        left_out: dict[str, str] = {}
        device = comfy.model_management.get_torch_device()
        largest = max(parameter.nbytes for parameter in model.model.state_dict().values())
        comfy.model_management.free_memory(_ROOM * largest, device)
        bar = comfy.utils.ProgressBar(len(model.model.state_dict()))
        for name, change, reason in changes_of(model, base):
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update(1)
            if reason:
                left_out[name] = reason
            if change is not None:
                # a file has no factors for what is no layer's weight
                wanted = rank if name.endswith(".weight") else 0
                changes[name] = _cut(change, wanted, device, inputs.get(name))
        return changes, left_out


def _nothing(base: Any, left_out: Mapping[str, str], bypassed: bool) -> str:
    if bypassed:
        return BYPASSED
    if base is None:
        return "there is no LoRA on this model: connect a LoRA node before this one"
    if left_out:
        reasons = [f"{name}: {why}" for name, why in left_out.items()]
        return f"the two models have no weight in common ({examples(reasons)}): take two of one architecture"
    return "the two models are the same: there is nothing to save"


def free_path(prefix: str, suffix: str) -> str:
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    while os.path.exists(path := os.path.join(folder, f"{name}_{counter:05}_{suffix}")):
        counter += 1
    return path


def _metadata(model: Any, changes: Mapping[str, Change], base: Any) -> dict[str, str]:
    rank = max(change.rank for change in changes.values())
    files = ", ".join(f"{name} ×{strength:.2f}" for name, strength in rows_on(model))
    made_from = {} if base is not None or not files else {"graft.made_from": files}
    return {"ss_network_dim": str(rank), "ss_network_alpha": str(rank), **made_from}


def _report(
    changes: Mapping[str, Change], left_out: Mapping[str, str], rank: int, of: str, size: int, path: str
) -> str:
    products = [change for change in changes.values() if change.rank]
    lines = [f"{layers(len(products))} of rank up to {max((change.rank for change in products), default=0)}"]
    whole = [name for name, change in changes.items() if not change.rank]
    if whole:
        lines.append(f"{len(whole)} in full, as two small factors cannot hold them: {examples(whole)}")
    lost = extract.error(list(changes.values()))
    lines.append(f"lost by rank {rank}: {lost:.2%} of the {of}" if rank else "nothing was cut")
    if left_out:
        reasons = [f"{name}: {why}" for name, why in left_out.items()]
        lines.append(f"{len(left_out)} left out: {examples(reasons)}")
    lines.append(f"{size:,} bytes: {path}")
    return "\n".join(lines)


__all__ = ["GraftSaveLora", "changes_of", "diffusers_names", "free_path"]
