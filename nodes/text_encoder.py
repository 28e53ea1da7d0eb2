"""Loading text encoders from GGUF: a CLIP whose LoRAs run beside the packed weights."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import nodes as host_nodes
import torch

from .. import kernels
from ..kernels import CorruptFile, GraftError, UnsupportedFormat
from ..ops.gguf_file import PROJECTOR, GGUFFile, describe, open_gguf, other_kind
from ..ops.layers import EmbeddingMath, LinearMath, packed_layers, unpack_leftovers
from ..ops.text_encoders import check_text_encoder, projector_beside, projector_files, text_encoder_tensors
from . import node
from .ops import HostLayer, TextEncoderOps
from .patcher import Graft, adopt

log = logging.getLogger(__name__)

FOLDER = "clip_gguf"
"""The key under which packs for GGUF share their list of text encoders; never replaced where one is there."""

ALL_FILES = "text_encoders"
"""The host's own key: a GGUF may need another encoder beside it that is none, such as Flux's CLIP-L."""

NONE = "None"
FILES = 4
REMEDY = "put it into models/text_encoders, or choose another file"
DEVICES = ("default", "cpu")
READ = ("position_embedding", "position_embeddings", "token_type_embeddings")
"""Small tables whose weight the host adds as a whole: those of CLIP, of SigLIP in Gemma 3, of BERT."""

# beside fp8 weights, as the host called them and calls them now
_SCALES = ("scale_weight", "weight_scale")
_FP8_SETTINGS = ("comfy_quant", "scaled_fp8", "scale_input", "input_scale")


def encoder_files() -> list[str]:
    """What the loader lists: GGUF files first."""
    return node.files(FOLDER, ALL_FILES)


def encoder_path(name: str) -> str | None:
    """Where a listed file lies, or None if it is gone."""
    return node.file_path(name, FOLDER, ALL_FILES)


def types() -> list[str]:
    """What the host's own loaders offer: how one, or two, text encoders are to be used."""
    loaders = host_nodes.CLIPLoader, host_nodes.DualCLIPLoader
    return list(dict.fromkeys(name for loader in loaders for name in loader.INPUT_TYPES()["required"]["type"][0]))


def load_text_encoders(
    paths: Sequence[str], kind: str = "stable_diffusion", device: str = "default", backend: str = "auto",
    disable_dynamic: bool = False,
) -> GraftCLIP:  # fmt: skip
    """Load one to four text encoders, GGUF or not, as the host's loaders do.

    Args:
        paths: the files. A projector (mmproj) among them goes to the encoder that it belongs to; one that lies beside
            its encoder is found.
        kind: the host's name for what they are used for (`types`).
        device: ``default`` or ``cpu``.
        backend: ``auto``, ``triton``, ``cpu`` or ``torch``.
        disable_dynamic: the host's wish for a patcher without dynamic VRAM.

    Raises:
        CorruptFile: a file is damaged or is no GGUF file.
        UnsupportedFormat: a file is not a text encoder, or none that a host knows, or this host has no such type.
        NoBackend: the backend cannot run here.
    """
    known = types()
    if kind not in known:
        raise UnsupportedFormat(f"this ComfyUI has no type {kind} of text encoders: choose one of {', '.join(known)}")
    lines: list[str] = []
    unreadable: list[GraftError] = []
    states = _read(paths, lines, unreadable)
    options: dict[str, Any] = {
        "custom_operations": TextEncoderOps,
        "initial_device": comfy.model_management.text_encoder_offload_device(),
        # of what is no layer of ours: norms, which files hold in fp32 and hosts would round to fp16
        "dtype": torch.float32,
    }
    load_device = comfy.model_management.text_encoder_device()
    if device == "cpu":
        load_device = options["load_device"] = options["offload_device"] = torch.device("cpu")
    choice = kernels.choose(torch.device(load_device), None, backend)
    clip = comfy.sd.load_text_encoder_state_dicts(
        states,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        # the host's own nodes list types, such as sdxl, that are no CLIPType
        clip_type=getattr(comfy.sd.CLIPType, kind.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
        model_options=options,
        **({"disable_dynamic": True} if disable_dynamic else {}),
    )
    clip.__class__ = GraftCLIP
    model = clip.cond_stage_model
    unpack_leftovers(model)
    _decode_heads(model)
    _check_files(model, kind, paths)
    _complete(model, unreadable)
    _decode_tables(model)
    model.graft = Graft(model, "\n".join([*lines, str(choice)]), backend)
    for module in model.modules():
        if hasattr(module, "encode_token_weights"):
            # not kept for the next: the host makes some of these classes anew for each model
            module.__class__ = type(type(module).__name__, (_Encoder, type(module)), {})
    clip.patcher.cached_patcher_init = (_load_patcher, (tuple(paths), kind, device, backend))
    adopt(clip.patcher)
    return clip


def _load_patcher(*args: Any, **kwargs: Any) -> Any:
    return load_text_encoders(*args, **kwargs).patcher


def _read(paths: Sequence[str], lines: list[str], unreadable: list[GraftError]) -> list[dict[str, torch.Tensor]]:
    """A state dict of each text encoder, and of each file a line for the report.

    Args:
        unreadable: takes what is wrong with files beside them that may be their projectors.
    """
    gguf = {path: open_gguf(path) for path in paths if path.lower().endswith(".gguf")}
    projectors = [file for file in gguf.values() if other_kind(file) is PROJECTOR]
    states, used = [], []
    for path in paths:
        name = os.path.basename(path)
        if path not in gguf:
            states.append(_without_fp8(comfy.utils.load_torch_file(path, safe_load=True), path))
            lines.append(name)
        elif gguf[path] not in projectors:
            projector = _projector_for(gguf[path], projectors, unreadable)
            states.append(text_encoder_tensors(gguf[path], projector))
            used.append(projector)
            seeing = "" if projector is None else f" · sees with {projector.path.name}"
            lines.append(f"{name}: {describe(gguf[path])}{seeing}")
    unused = [file.path.name for file in projectors if file not in used]
    lines += [f"{name}: not used, none of these text encoders sees with it" for name in unused]
    lines += [f"the vision projector cannot be read: {error}" for error in unreadable]
    if projectors and not states:
        check_text_encoder(projectors[0])
    return states


def _projector_for(file: GGUFFile, chosen: list[GGUFFile], unreadable: list[GraftError]) -> GGUFFile | None:
    if file.architecture != "qwen2vl":
        return None
    return chosen[0] if chosen else projector_beside(file, unreadable)


def _without_fp8(state: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """fp8 weights times their scales, in bf16: the host's own layers for them cannot stand beside ours."""
    plain = {}
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        if last in (*_SCALES, *_FP8_SETTINGS):
            continue
        if last == "weight" and tensor.element_size() == 1:
            tensor = _scaled(tensor, module, state, path)
        narrow = tensor.is_floating_point() and tensor.element_size() == 1
        plain[name] = tensor.to(torch.bfloat16) if narrow else tensor
    return plain


def _scaled(weight: torch.Tensor, module: str, state: dict[str, torch.Tensor], path: str) -> torch.Tensor:
    """An fp8 weight times its scale, one for all of it or one a row; other formats have scales for blocks of a row."""
    scale = next((state[f"{module}.{name}"] for name in _SCALES if f"{module}.{name}" in state), None)
    if scale is None and f"{module}.comfy_quant" not in state:
        return weight
    plain = scale is None or scale.numel() == 1 or scale.shape[0] == scale.numel() == weight.shape[0]
    if not (plain and weight.is_floating_point()):
        raise UnsupportedFormat(
            f"{module} is in a format that ComfyUI cannot read beside a GGUF: choose the text encoder in fp16, fp8 or "
            f"as GGUF ({path})"
        )
    if scale is None:
        return weight
    return (weight.float() * scale.float().view(-1, *[1] * (weight.dim() - 1))).to(torch.bfloat16)


def _check_files(model: torch.nn.Module, kind: str, paths: Sequence[str]) -> None:
    """The host takes any files for any type; one that fits nowhere would show only when words are encoded."""
    found: dict[str, bool] = {}
    for path, layer in packed_layers(model).items():
        encoder = path.partition(".")[0]
        found[encoder] = found.get(encoder, False) or layer.weight is not None
    missing = ", ".join(encoder for encoder, has_weights in found.items() if not has_weights)
    if missing:
        raise UnsupportedFormat(
            f"none of these files is the {missing} that ComfyUI wants for {len(paths)} of the type {kind}: choose "
            f"others or another type ({', '.join(map(os.path.basename, paths))})"
        )


def _complete(model: torch.nn.Module, unreadable: list[GraftError]) -> None:
    """What files lack on purpose: CLIP-L's projection where only its tokens are read, eyes in a file of their own."""
    found = f"; one lies there, but {unreadable[0]}" if unreadable else ""
    for path, layer in packed_layers(model).items():
        if layer.weight is None and path.endswith(".text_projection"):
            layer.load_weight(torch.eye(*layer.logical_shape))
        elif layer.weight is None and ".visual." in path:
            folder = "to read pictures, put the vision projector (mmproj) of this text encoder into its folder"
            layer.remedy = folder + found
        elif layer.weight is None and (".vision_model." in path or ".multi_modal_projector." in path):
            # Gemma 3's, whose projector has its tensors in another layout
            layer.remedy = "to read pictures, take this text encoder as safetensors"


def _decode_tables(model: torch.nn.Module) -> None:
    """Give tables of which the host reads the weight, and calls no layer, to the host: it patches them as its own."""
    for module in list(model.modules()):
        for name, table in module.named_children():
            if name in READ and isinstance(table, EmbeddingMath) and table.weight is not None:
                plain = comfy.ops.manual_cast.Embedding(*table.logical_shape, device="meta")
                plain.weight = torch.nn.Parameter(table.dequantized(), requires_grad=False)
                setattr(module, name, plain)


def _decode_heads(model: torch.nn.Module) -> None:
    """Where a host writes text with a text encoder it multiplies by the weight of the head, or of the embedding."""
    for module in model.modules():
        inner = getattr(module, "model", None)
        if hasattr(module, "logits") and isinstance(getattr(inner, "embed_tokens", None), EmbeddingMath):
            module.logits = functools.partial(_logits, inner)


def _logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The scores of the next token, ``[B, T, width] -> [B, 1, vocabulary]``."""
    last = x[:, -1:]
    head = getattr(model, "lm_head", None)
    if head is not None:
        return head(last)
    table, tied = model.embed_tokens, LinearMath()
    for name in ("weight", "fmt", "logical_shape", "backend"):
        setattr(tied, name, getattr(table, name))
    data, _, release = table.fetch(last)
    try:
        # the table's adapters are the head's
        return tied.compute(last, data) if table.residual is None else table.residual(last, tied, data, None)
    finally:
        release()


class _Encoder:
    """Mixed into the host's classes: the adapters of the branch that it loaded run beside the layers.

    Into those of encoders inside of others, too, since some nodes call them.
    """

    def encode_token_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _grafted(self):
            return super().encode_token_weights(*args, **kwargs)  # type: ignore[misc]

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _grafted(self):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _grafted(encoder: torch.nn.Module) -> Iterator[None]:
    """The adapters are put on once, by the outermost encoder that is called."""
    # its layers know the owner of the whole model, in a copy of the model that of the copy
    layer = next((module for module in encoder.modules() if isinstance(module, HostLayer)), None)
    owner = None if layer is None else layer.owner()
    patcher = None if owner is None or owner.encoding else owner.loaded()
    if patcher is None:
        yield
        return
    owner.encoding = True
    try:
        with patcher.grafted(patcher.load_device):
            yield
    finally:
        owner.encoding = False


class GraftCLIP(comfy.sd.CLIP):
    """The host's CLIP, which is saved with its weights and not with their packed bytes."""

    def clone(self, *args: Any, **kwargs: Any) -> GraftCLIP:
        clone = super().clone(*args, **kwargs)
        clone.__class__ = GraftCLIP
        # of a clone without dynamic VRAM the host puts the patcher on another copy of the model, and not the CLIP
        clone.cond_stage_model = clone.patcher.model
        return clone

    def get_sd(self) -> dict[str, Any]:
        return super().get_sd() | self.patcher.merged_state_dict(prefix="")


class GraftCLIPLoader:
    """Load CLIP (GGUF, Graft)."""

    DESCRIPTION = (
        "Loads text encoders from GGUF, alone or beside others: what Flux, SD3, Wan, Qwen-Image and others read your "
        "words with. LoRAs run beside the quantized weights."
    )
    SEARCH_ALIASES = ["gguf", "clip loader gguf", "dual clip loader gguf", "t5", "umt5", "qwen"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS = ("The text encoders; every node for prompts and LoRAs takes them.",)
    FUNCTION = "load"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        files = encoder_files()
        more = {
            f"clip_name{number}": (
                [NONE, *files],
                {"default": NONE, "tooltip": f"File {number}, for models with as many text encoders: Flux has two."},
            )
            for number in range(2, FILES + 1)
        }
        return {
            "required": {
                "clip_name1": (files, {"tooltip": "A .gguf or .safetensors file in models/text_encoders."}),
                "type": (types(), {"tooltip": "The model that they are for; with three or four files it is known."}),
            },
            "optional": more
            | {
                "device": (list(DEVICES), {"default": "default", "tooltip": "Where they run."}),
                "backend": node.BACKEND,
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> Any:
        paths = [encoder_path(name) for name in _names(inputs)]
        beside = [file for path in paths if path is not None for file in projector_files(path)]
        return [node.file_state(path) for path in [*paths, *map(str, beside)]]

    @classmethod
    def VALIDATE_INPUTS(cls, clip_name1: str | None) -> bool | str:
        # of the first file alone, since the host repeats this on every input that is named here, and checks the others
        if clip_name1 is not None and encoder_path(clip_name1) is None:
            return node.missing(clip_name1, REMEDY)
        return True

    def load(self, clip_name1: str, type: str, device: str = "default", backend: str = "auto", **names: str) -> dict:
        paths = []
        for name in _names({"clip_name1": clip_name1, **names}):
            path = encoder_path(name)
            if path is None:
                raise CorruptFile(node.missing(name, REMEDY))
            paths.append(path)
        clip = load_text_encoders(paths, type, device, backend)
        text = clip.cond_stage_model.graft.summary
        log.info("%s", text)
        return node.result((clip,), text)


def _names(inputs: dict[str, Any]) -> list[str]:
    """The files that are chosen; until the node runs, what comes through a link is None."""
    chosen = (inputs.get(f"clip_name{number}") for number in range(1, FILES + 1))
    return [name for name in chosen if name and name != NONE]
