"""Saving any model as GGUF: what lies in it, what it is called and made from, and where it goes."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ..kernels import GraftError, UnsupportedFormat
from ..ops.files.architectures import architecture_named
from ..ops.files.checkpoint import notes_of
from ..ops.files.contents import OWN_NAMES
from ..ops.files.gguf import diffusion_tensors, open_gguf
from ..ops.files.text_encoder_writer import WrittenEncoder, text_encoder_in_a_file
from ..ops.files.writer import Value, check_place
from ..ops.make import VERSION, Importance, Plan, check_weights, plan_model, provenance, write_model
from ..ops.merged import MergedTensor
from ..ops.packed import PackedTensor, as_weight, in_fp32
from ..ops.recipes import NAMES, parse_rules, recipe_named
from ..ops.report import size_text
from . import node
from .architectures import name_of
from .hashes import digest_of
from .loader import load_diffusion_model
from .lora import rows_on
from .model_files import find
from .ops import plain_key
from .patcher import GraftPatcher, runs_bypassed

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."
FOLDERS = ("diffusion_models", "output")
CLIP_FOLDERS = ("text_encoders", "output")
_PROJECTION = "text_embedding_projection."
"""LTX-2's, behind its text encoder, which hosts load from a file of its own."""
_SEES = "the part that sees pictures is not in the file: keep the vision projector (mmproj) beside it"
_TRANSFORMER = ".transformer."
"""Between the name of a text encoder in a host's CLIP and those of its tensors."""
_POOLED = "text_projection.weight"
_LARGEST_PROJECTION = 100.0  # far above trained ones
DEFAULT_NAME = "my-model"
_MOST_NAME = 200

_KNOWN_UNDER = {"PixelDiTT2I": "core."}
"""What hosts cut off the names of a model when they load it, and know it by."""

_SCALES = re.compile(
    r"(?:query_norm|key_norm|distilled_guidance_layer\.norms\.\d+|nerf_(?:blocks\.\d+|final_layer\w*)\.norm)\.weight$"
)

_BESIDE = {
    "cc_projection.": "cc_projection.",
    "seconds_start_embedder.": "conditioner.conditioners.seconds_start.",
    "seconds_total_embedder.": "conditioner.conditioners.seconds_total.",
    "padding_embedding": "conditioner.conditioners.prompt.padding_embedding",
}
"""Parts that hosts make outside of the diffusion model, of tensors in its file: Stable Zero123's and Stable Audio's."""

_MODEL_INPUTS = {"unet_name": ("diffusion_models", "unet_gguf", "graft_demo"), "ckpt_name": ("checkpoints",)}
"""Inputs of loaders that name a file, and the host's keys of the folders that it may lie in."""


def weights_of_model(model: Any, prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    """A model's weights by the names in a file of its own, with what is patched onto it, merged when it is read.

    Args:
        model: a patcher of the host's, or a Graft one.
        prefix: of the part that is meant.
    """
    if isinstance(model, GraftPatcher):
        state = model.weights_to_save(prefix)
        return _as_in_the_file(model, state) if prefix == PREFIX else state
    held = {key: value for key, value in model.model.state_dict().items() if key.startswith(prefix)}
    check_weights(held)  # of which newer hosts cannot list some
    found = model.get_key_patches(prefix)
    return {plain_key(key.removeprefix(prefix)): _weight(key, *entries) for key, entries in found.items()}


def in_a_file(model: Any) -> dict[str, torch.Tensor]:
    """What goes into a file of a diffusion model, by the names by which the host knows it again."""
    prefix = _prefix_in_a_file(model)
    weights = weights_of_model(model)
    scales = _named_scale(model, weights)
    state = {f"{prefix}{scales.get(name, name)}": weight for name, weight in weights.items()}
    for key, weight in model.model.state_dict().items():
        part = next((part for part in _BESIDE if key.startswith(part)), None)
        if part is not None and weight is not None:
            state[_BESIDE[part] + key.removeprefix(part)] = weight.detach()
    return state


def _prefix_in_a_file(model: Any) -> str:
    return _KNOWN_UNDER.get(type(model.model.model_config).__name__, "")


def _by_names_in_a_file(model: Any, importance: Importance | None) -> Importance | None:
    """What a calibration has seen, by its layers' names in the model, or what a file tells by its own."""
    prefix = _prefix_in_a_file(model)
    if importance is None or not prefix:
        return importance
    return {name if name.startswith(prefix) else prefix + name: importance[name] for name in importance}


def _named_scale(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The names of norms of Flux and its like, which files and their readers call ``scale``, newer hosts ``weight``."""
    called = {name: f"{name.removesuffix('.weight')}.scale" for name in names if _SCALES.search(name)}
    as_loaded = model.model.model_config.process_unet_state_dict(dict.fromkeys(called.values())) if called else {}
    return {name: scale for name, scale in called.items() if name in as_loaded}


def _as_in_the_file(model: GraftPatcher, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with what the host holds in fp32 in the type that the file has it in, where that is the same numbers."""
    path = next((file.path for file in model.graft.files), None)
    if path is None or not path.is_file():
        return state
    stored = diffusion_tensors(open_gguf(path))
    for name, tensor in state.items():
        held = stored.get(name) or stored.get(f"{name.removesuffix('.weight')}.scale")
        if isinstance(tensor, (PackedTensor, MergedTensor)) or held is None:
            continue
        own = as_weight(held)
        if own.dtype != tensor.dtype and own.shape == tensor.shape and torch.equal(in_fp32(own), in_fp32(tensor).cpu()):
            state[name] = own
    return state


def _weight(key: str, first: tuple[torch.Tensor, Callable], *patches: tuple) -> torch.Tensor:
    weight, convert = first
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        raise UnsupportedFormat(
            f"the weights are in a quantized format that cannot be saved as GGUF ({key} is a "
            f"{type(weight).__name__}): load the model in bf16 or fp16, or a GGUF with Graft's loader"
        )
    if not patches:
        return weight.detach()
    read = partial(_merged, key, weight.detach(), convert, patches)
    if any(_widens(patch[1]) for patch in patches):
        return read()
    return MergedTensor(read, weight.shape, weight.detach())


def _merged(key: str, weight: torch.Tensor, convert: Callable, patches: tuple) -> torch.Tensor:
    """The host's own merge, in fp32 and on the CPU."""
    converted = convert(in_fp32(weight).to("cpu", copy=True), inplace=True)
    return comfy.lora.calculate_weight(
        list(patches), converted, key, intermediate_dtype=torch.float32, original_weights={key: [(weight, convert)]}
    )


def _widens(value: Any) -> bool:
    """Whether a patch gives the weight another shape."""
    fields = getattr(value, "weights", value)
    if isinstance(fields, tuple) and len(fields) == 2 and fields[0] == "diff":
        return bool(len(fields[1]) > 1 and fields[1][1].get("pad_weight"))
    return getattr(value, "name", "") == "lora" and len(fields) > 5 and fields[5] is not None


def place_for(folder: str, prefix: str, recipe: str, kind: str = "diffusion_models") -> Path:
    """Where a file goes: ``<prefix>-<recipe>.gguf`` in the host's folder of models, or in that of its output.

    Raises:
        GraftError: that would be outside of it, or is no name.
    """
    if folder == "output":
        base = Path(folder_paths.get_output_directory())
    else:
        known = [Path(place) for place in folder_paths.get_folder_paths(kind)]
        base = next((place for place in known if place.name == kind), known[0])
    name = prefix.strip().replace("\\", "/")
    parts = [part for part in name.split("/") if part]
    if not parts or name.startswith("/") or ":" in name or any(part.strip(". ") == "" for part in parts):
        raise GraftError(f"{prefix!r} is no name for a file in {folder}: write a name, or folder/name")
    if re.search(r'[<>"|?*\x00-\x1f]', name) or len(parts[-1]) > _MOST_NAME:
        raise GraftError(f"{prefix!r} cannot be the name of a file: use letters, numbers, spaces, - and _")
    suffix = "" if parts[-1].lower().endswith(recipe.lower()) else f"-{recipe.replace(' ', '-')}"
    target = base.joinpath(*parts[:-1], f"{parts[-1].removesuffix('.gguf')}{suffix}.gguf")
    if not target.resolve().is_relative_to(base.resolve()):
        raise GraftError(f"{prefix!r} leads out of the folder {folder}: choose a name within it")
    return target


class Origin:
    """What a model was made from, as far as the graph before a node tells."""

    def __init__(self, model: Any, prompt: Mapping[str, Any] | None, unique_id: str | None) -> None:
        nodes = list(_before(prompt or {}, str(unique_id)))
        self.paths = [path for inputs in nodes for path in _model_paths(inputs)]
        if isinstance(model, GraftPatcher) and not self.paths:
            self.paths = [Path(file.path) for file in model.graft.files]
        self.loras = list(dict.fromkeys((*rows_on(model), *(row for inputs in nodes for row in _lora_rows(inputs)))))

    @property
    def name(self) -> str:
        """All files' names."""
        return ", ".join(dict.fromkeys(path.name for path in self.paths))

    def entries(self) -> dict[str, Value]:
        """What the first file says of itself that goes on."""
        return notes_of(self.paths[0]) if self.paths else {}

    def sha256(self) -> str:
        """Of the file, if it is one."""
        check = comfy.model_management.throw_exception_if_processing_interrupted
        return digest_of(self.paths[0], check) if len(set(self.paths)) == 1 else ""


def _before(prompt: Mapping[str, Any], node_id: str) -> Iterator[Mapping[str, Any]]:
    """The inputs of all nodes on which the model of one depends, the nearest last."""
    model = prompt.get(node_id, {}).get("inputs", {}).get("model")
    waiting, seen = _links([model], prompt), {node_id}
    found = []
    while waiting:
        link = waiting.pop(0)
        if link not in seen:
            seen.add(link)
            found.append(prompt[link].get("inputs", {}))
            waiting += _links(found[-1].values(), prompt)
    yield from reversed(found)


def _links(values: Iterable[Any], prompt: Mapping[str, Any]) -> list[str]:
    """The nodes that some inputs come from."""
    return [str(v[0]) for v in values if isinstance(v, list) and len(v) == 2 and str(v[0]) in prompt]


def _model_paths(inputs: Mapping[str, Any]) -> Iterator[Path]:
    for key, folders in _MODEL_INPUTS.items():
        name, known = inputs.get(key), [f for f in folders if f in folder_paths.folder_names_and_paths]
        path = find(name, *known).path if isinstance(name, str) else None
        if path is not None:
            yield Path(path)


def _lora_rows(inputs: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, name in inputs.items():
        number = key.removeprefix("lora_").removeprefix("name").lstrip("_")
        if not key.startswith("lora_") or not isinstance(name, str) or name == "None" or key == "lora_stack":
            continue
        strength = inputs.get(f"strength_{number}" if number else "strength_model", inputs.get("strength", 1.0))
        if inputs.get(f"enabled_{number}", True) and isinstance(strength, (int, float)) and strength:
            yield name, float(strength)


def saved(
    plan: Plan, target: Path, origin: Origin, rules: tuple, importance: Any, overwrite: bool,
    more: Mapping[str, Value] | None = None,
) -> str:  # fmt: skip
    """Write the file with progress on the node, until the host says to stop; what to say of it.

    Args:
        more: further entries of its metadata.
    """
    check_place(target, plan.nbytes, overwrite)
    started, bar, done = time.monotonic(), comfy.utils.ProgressBar(plan.weights), 0

    def progress(count: int) -> None:
        nonlocal done
        comfy.model_management.throw_exception_if_processing_interrupted()
        done += count
        bar.update_absolute(done, plan.weights)

    measured = "" if importance is None else ", ".join(getattr(importance, "datasets", ())) or "yes"
    metadata = provenance(VERSION, origin.name, origin.sha256(), origin.loras, rules, measured, origin.entries())
    size = write_model(target, plan, {**metadata, **(more or {})}, overwrite, progress)
    seconds = max(time.monotonic() - started, 0.01)
    lines = [f"saved {target.name}, {size_text(size)} in {seconds:.0f} s", plan.summary, *plan.notes, str(target)]
    return "\n".join(lines)


class GraftSaveGGUF:
    """Save Diffusion Model as GGUF (Graft)."""

    DESCRIPTION = (
        "Saves a diffusion model as a GGUF file of the type that you choose. LoRAs and merges on the model are merged "
        "in at full precision first. Graft, ComfyUI-GGUF and Forge load the file."
    )
    SEARCH_ALIASES = ["gguf", "quantize", "save gguf", "convert to gguf", "bake lora", "export gguf"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("MODEL", "report")
    OUTPUT_TOOLTIPS = (
        "The saved file, loaded if you connect this. With a sampler you see what the type changes in pictures.",
        "What was written: types, size, notes, and where the file is.",
    )
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Any diffusion model, from any loader, with or without LoRAs."}),
                "type": (
                    list(NAMES),
                    {
                        "default": "Q4_K_M",
                        "tooltip": "Q8_0 is nearly exact. Q4_K_M is half as large. Q3 and smaller need an importance "
                        "matrix to look good. 'as it is' keeps the types of a GGUF model.",
                    },
                ),
                "filename_prefix": (
                    "STRING",
                    {"default": DEFAULT_NAME, "tooltip": "The file is called <prefix>-<type>.gguf; folder/name works."},
                ),
                "folder": (
                    list(FOLDERS),
                    {"default": FOLDERS[0], "tooltip": "ComfyUI's folder for diffusion models, or its output folder."},
                ),
            },
            "optional": {
                "rules": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "",
                        "tooltip": "Your own types, one line each: part of a name = type, such as "
                        "img_attn.qkv = Q6_K. May stay empty.",
                    },
                ),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file of this name."}),
                "importance": (
                    "GRAFT_IMPORTANCE",
                    {"tooltip": "An importance matrix makes the error smaller at the same size. IQ1 and IQ2 need one."},
                ),
            },
            "hidden": {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"},
        }

    def save(
        self, model: Any, type: str, filename_prefix: str, folder: str, rules: str = "", overwrite: bool = False,
        importance: Importance | None = None, prompt: Mapping[str, Any] | None = None, unique_id: str | None = None,
    ) -> dict:  # fmt: skip
        own, recipe = parse_rules(rules), recipe_named(type)
        target = place_for(folder, filename_prefix, type)
        state = in_a_file(model)
        counts = _by_names_in_a_file(model, importance)
        plan = plan_model(state, recipe, _architecture_of(model, state), own, counts)
        log.info("%s -> %s", plan.summary, target)
        node.say(f"{plan.summary} → {target.name}", unique_id)
        text = saved(plan, target, Origin(model, prompt, unique_id), own, importance, overwrite)
        left_out = _left_out(model)
        text = f"{text}\n{left_out}" if left_out else text
        log.info("%s", text)
        _refresh()
        loaded = load_diffusion_model(str(target)) if _is_connected(prompt, unique_id) else None
        return node.result((loaded, text), text)


class GraftSaveCLIPGGUF:
    """Save CLIP Text Encoder as GGUF (Graft)."""

    DESCRIPTION = (
        "Saves the text encoders of a CLIP as GGUF files, one for each. LoRAs on them are merged in at full precision "
        "first. Graft loads all of them; ComfyUI-GGUF loads T5, UMT5, Llama 3, Qwen2.5-VL and Qwen3."
    )
    SEARCH_ALIASES = ["gguf", "quantize text encoder", "save clip gguf", "t5 gguf"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("What was written: types, size, notes, and where the file is.",)
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        inputs = GraftSaveGGUF.INPUT_TYPES()
        required, optional = inputs["required"], inputs["optional"]
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "A CLIP from any loader, with or without LoRAs."}),
                "type": (
                    list(NAMES),
                    {
                        "default": "Q8_0",
                        "tooltip": "Q8_0 is nearly exact. With Q5_K_M and smaller types you see a difference.",
                    },
                ),
                "filename_prefix": ("STRING", {**required["filename_prefix"][1], "default": "my-text-encoder"}),
                "folder": (
                    list(CLIP_FOLDERS),
                    {
                        "default": CLIP_FOLDERS[0],
                        "tooltip": "ComfyUI's folder for text encoders, or its output folder.",
                    },
                ),
            },
            "optional": {name: optional[name] for name in ("rules", "overwrite")},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def save(
        self, clip: Any, type: str, filename_prefix: str, folder: str, rules: str = "", overwrite: bool = False,
        unique_id: str | None = None,
    ) -> dict:  # fmt: skip
        own, recipe = parse_rules(rules), recipe_named(type)
        encoders, refused = _encoders(clip)
        if not encoders:
            raise UnsupportedFormat("; ".join(refused) or "this CLIP holds no text encoder")
        texts = []
        for name, encoder in encoders.items():
            prefix = filename_prefix if len(encoders) == 1 else f"{filename_prefix}-{name}"
            target = place_for(folder, prefix, type, CLIP_FOLDERS[0])
            plan = plan_model(encoder.state, recipe, encoder.architecture, own)
            node.say(f"{plan.summary} → {target.name}", unique_id)
            origin = Origin(clip.patcher, None, None)
            texts.append(saved(plan, target, origin, own, None, overwrite, encoder.metadata))
            texts += [_SEES] if encoder.left_out else []
            _refresh()
        text = "\n".join([*texts, *refused])
        log.info("%s", text)
        return node.result((text,), text)


def _encoders(clip: Any) -> tuple[dict[str, WrittenEncoder], list[str]]:
    """The text encoders of a CLIP as they lie in files, by the host's names for them; and why any is refused."""
    model = clip.patcher.model
    names = dict.fromkeys(key.partition(_TRANSFORMER)[0] for key in model.state_dict() if _TRANSFORMER in key)
    found, refused = {}, []
    for name in names:
        state = weights_of_model(clip.patcher, name + _TRANSFORMER)
        if not _has_projection(model.get_submodule(name), state.get(_POOLED)):
            state.pop(_POOLED, None)
        try:
            found[name] = text_encoder_in_a_file(name, state, _tokenizer_of(clip, name), _heads_of(model, name))
        except GraftError as error:
            refused.append(f"{name}: {error}")
    projection = weights_of_model(clip.patcher, _PROJECTION) if hasattr(model, _PROJECTION.rstrip(".")) else {}
    if projection:
        state = {_PROJECTION + key: weight for key, weight in projection.items()}
        found[_PROJECTION.rstrip(".")] = WrittenEncoder(OWN_NAMES, state, {})
    return found, refused


def _has_projection(encoder: torch.nn.Module, weight: torch.Tensor | None) -> bool:
    """Whether a CLIP's projection came from a file: where there was none, hosts have whatever lay in that memory."""
    if weight is None or not getattr(encoder, "return_projected_pooled", True):
        return False  # nobody reads it
    largest = in_fp32(weight).abs().max()  # NaN if one is
    return bool((largest > 0) & (largest < _LARGEST_PROJECTION))


def _tokenizer_of(clip: Any, name: str) -> dict[str, torch.Tensor]:
    """What the host keeps of a text encoder's tokenizer in files; most of them it has itself."""
    own = getattr(clip.tokenizer, name, clip.tokenizer)
    return own.state_dict() if hasattr(own, "state_dict") else {}


def _heads_of(model: torch.nn.Module, name: str) -> tuple[int, int] | None:
    """How many heads of queries and of keys the host's attention has, where it says so."""
    for module in model.get_submodule(name + _TRANSFORMER.rstrip(".")).modules():
        if hasattr(module, "num_kv_heads"):
            return module.num_heads, module.num_kv_heads
    return None


def _architecture_of(model: Any, state: Mapping[str, torch.Tensor]) -> str:
    """``general.architecture``; of what is in no table, the host's own name for it."""
    found = architecture_named(state)
    return found or re.sub(r"\W+", "_", name_of(model.model.model_config).lower()).strip("_")


def _left_out(model: Any) -> str:
    """What runs on the model and is in no weight, in a sentence."""
    hooks = bool(getattr(model, "hook_patches", None)) or bool(getattr(model, "hook_residuals", None))
    varying = isinstance(model, GraftPatcher) and model.residuals.varies
    said = (
        (varying, "LoRAs by region or step are merged in at their full strength, for all of the picture and all steps"),
        (hooks, "LoRAs that hooks schedule are not merged in"),
        (runs_bypassed(model), "LoRAs of Load LoRA (Bypass) are not merged in: put them on with another LoRA node"),
    )
    return "\n".join(text for is_so, text in said if is_so)


def _is_connected(prompt: Mapping[str, Any] | None, unique_id: str | None) -> bool:
    """Whether a node takes the saved model."""
    link = [str(unique_id), 0]
    values = (value for entry in (prompt or {}).values() for value in entry.get("inputs", {}).values())
    return any(isinstance(v, list) and len(v) == 2 and [str(v[0]), v[1]] == link for v in values)


def _refresh() -> None:
    """Let the host's lists show a new file at once."""
    cache = getattr(folder_paths, "filename_list_cache", None)
    if isinstance(cache, dict):
        for key in ("unet_gguf", "diffusion_models", "clip_gguf", "text_encoders"):
            cache.pop(key, None)


__all__ = ["GraftSaveCLIPGGUF", "GraftSaveGGUF", "Origin", "place_for", "weights_of_model"]
