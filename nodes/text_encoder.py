"""Loading text encoders from GGUF: a CLIP whose LoRAs run beside the packed weights."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import nodes as host_nodes
import torch

from .. import kernels
from ..kernels import CorruptFile, GraftError, UnsupportedFormat
from ..ops.files.contents import CONNECTORS, PROJECTOR, other_kind
from ..ops.files.gguf import GGUFFile, describe, open_gguf
from ..ops.files.projectors import PROJECTORS, fits, projector_beside, projector_files
from ..ops.files.scales import weights_of
from ..ops.files.text_encoders import architecture_of, check_text_encoder, is_t5, is_umt5, text_encoder_tensors
from ..ops.layers import EmbeddingMath, LinearMath, packed_layers, unpack_leftovers
from ..ops.questions import answer_questions
from . import node
from .host_errors import Asked, is_about_files, refusal
from .model_files import Found, all_present, find, listed
from .ops import HostLayer, TextEncoderOps
from .patcher import Graft, adopt

log = logging.getLogger(__name__)

FOLDER = "clip_gguf"
"""The key under which packs for GGUF share their list of text encoders; never replaced where one is there."""

ALL_FILES = "text_encoders"
"""The host's own key: a GGUF may need another encoder beside it that is none, such as Flux's CLIP-L."""

NONE = "None"
FILES = 4
HOME = "the text_encoders folder"
DEVICES = ("default", "cpu")

_QWEN3VL_MARK = "model.visual.deepstack_merger_list.0.norm.weight"
_QWEN3VL_OUTPUT = "model.visual.merger.linear_fc2.weight"
"""By whose rows a host tells its sizes apart."""

_READ_UMT5 = ("wan", "ace")

_OF_ONE_MODEL = {
    "wan": ("wan",), "sd3": ("sd3_clip",), "pixart": ("pixart_t5",), "chroma": ("pixart_t5",),
    "cogvideox": ("cogvideo",), "hidream": ("hidream",), "hunyuan_image": ("hunyuan_image",),
    "longcat_image": ("longcat_image",), "pixeldit": ("pixeldit",), "boogu": ("boogu",), "krea2": ("krea2",),
    "joyimage": ("joyimage",), "ideogram4": ("ideogram4", "qwen3vl"),
}  # fmt: skip
"""Types by which the host chooses between models that read with the same text encoder, and in which of its modules the
right ones are. To other types it pays no attention, or people use them for several models, as templates do."""

# beside fp8 weights, as the host called them and calls them now
_SCALES = ("scale_weight", "weight_scale")
_FP8_SETTINGS = ("comfy_quant", "scaled_fp8", "scale_input", "input_scale")


def encoder_files() -> list[str]:
    """What the loader lists: GGUF files first."""
    return listed(FOLDER, ALL_FILES)


def encoder_file(name: str) -> Found:
    """The file that a workflow calls so."""
    return find(name, FOLDER, ALL_FILES)


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
    files: list[GGUFFile] = []
    states = _read(paths, lines, unreadable, files)
    if kind == "wan" and any(is_t5(state) and not is_umt5(state) for state in states):
        names = ", ".join(map(os.path.basename, paths))
        raise UnsupportedFormat(
            f"Wan reads with a UMT5, and this text encoder is another T5: choose a umt5_xxl ({names})"
        )
    options = encoder_options()
    load_device = comfy.model_management.text_encoder_device()
    if device == "cpu":
        load_device = options["load_device"] = options["offload_device"] = torch.device("cpu")
    choice = kernels.choose(torch.device(load_device), None, backend)
    try:
        clip = comfy.sd.load_text_encoder_state_dicts(
            states,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            # the host's own nodes list types, such as sdxl, that are no CLIPType
            clip_type=getattr(comfy.sd.CLIPType, kind.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
            model_options=options,
            **({"disable_dynamic": True} if disable_dynamic else {}),
        )
    except Exception as error:
        if not is_about_files(error):
            raise
        raise refusal(error, Asked({}), ", ".join(paths)) from error
    model = clip.cond_stage_model
    _check_type(model, states, kind, paths)
    _check_files(model, kind, paths)
    again = (_load_patcher, (tuple(paths), kind, device, backend))
    return as_graft(clip, "\n".join([*lines, str(choice)]), backend, files, again, unreadable)


def encoder_options() -> dict[str, Any]:
    """What the host is to build text encoders from."""
    return {
        "custom_operations": TextEncoderOps,
        "initial_device": comfy.model_management.text_encoder_offload_device(),
        # of what is no layer of ours: norms, which files hold in fp32 and hosts would round to fp16
        "dtype": torch.float32,
    }


def as_graft(
    clip: Any, summary: str, backend: str, files: list[GGUFFile], again: tuple, unreadable: Sequence[GraftError] = ()
) -> GraftCLIP:
    """The host's CLIP, built from our layers, with LoRAs beside them.

    Args:
        summary: what is said of it.
        again: the function by which the host makes another copy of its patcher, and its arguments.
        unreadable: what is wrong with files that may be projectors.
    """
    clip.__class__ = GraftCLIP
    model = clip.cond_stage_model
    unpack_leftovers(model)
    _decode_heads(model)
    _complete(model, unreadable)
    answer_questions(model, lambda layer: torch.float32)
    model.graft = Graft(model, summary, backend, files)
    for module in model.modules():
        if hasattr(module, "encode_token_weights"):
            # not kept for the next: the host makes some of these classes anew for each model
            module.__class__ = type(type(module).__name__, (_Encoder, type(module)), {})
    clip.patcher.cached_patcher_init = again
    adopt(clip.patcher)
    return clip


def _load_patcher(*args: Any, **kwargs: Any) -> Any:
    return load_text_encoders(*args, **kwargs).patcher


def _read(
    paths: Sequence[str], lines: list[str], unreadable: list[GraftError], files: list[GGUFFile]
) -> list[dict[str, torch.Tensor]]:
    """A state dict of each text encoder, and of each file a line for the report.

    Args:
        unreadable: takes what is wrong with files beside them that may be their projectors.
        files: takes the GGUF files that the tensors lie in.
    """
    gguf = {path: open_gguf(path) for path in paths if path.lower().endswith(".gguf")}
    kinds = {path: other_kind(file) for path, file in gguf.items()}
    projectors = [file for path, file in gguf.items() if kinds[path] is PROJECTOR]
    states, used = [], []
    # of two files hosts take the tokenizer of the first one, which is the text encoder
    for path in sorted(paths, key=lambda path: kinds.get(path) is CONNECTORS):
        name = os.path.basename(path)
        if kinds.get(path) is CONNECTORS:
            states.append(weights_of(gguf[path].tensors, gguf[path]))
            files.append(gguf[path])
            lines.append(f"{name}: {describe(gguf[path])}")
        elif path not in gguf:
            states.append(_without_fp8(comfy.utils.load_torch_file(path, safe_load=True), path))
            lines.append(name)
        elif gguf[path] not in projectors:
            state, projector = _with_projector(gguf[path], projectors, unreadable)
            states.append(state)
            used.append(projector)
            files += [gguf[path]] if projector is None else [gguf[path], projector]
            seeing = "" if projector is None else f" · sees with {projector.path.name}"
            lines.append(f"{name}: {describe(gguf[path])}{seeing}")
    unused = [file.path.name for file in projectors if file not in used]
    lines += [f"{name}: not used, none of these text encoders sees with it" for name in unused]
    lines += [f"the vision projector cannot be read: {error}" for error in unreadable]
    if projectors and not states:
        check_text_encoder(projectors[0])
    return states


def _with_projector(
    file: GGUFFile, chosen: list[GGUFFile], unreadable: list[GraftError]
) -> tuple[dict[str, torch.Tensor], GGUFFile | None]:
    """A text encoder's state dict, and the projector that is in it, if any.

    One that was only found beside it and is damaged must not stop a good text encoder.
    """
    check_text_encoder(file)
    architecture = architecture_of(file)
    if architecture not in PROJECTORS:
        return text_encoder_tensors(file), None
    own = next((projector for projector in chosen if fits(projector, file, architecture)), None)
    if own is not None:
        return _Marked.of(text_encoder_tensors(file, own), architecture), own
    found = projector_beside(file, architecture, unreadable)
    plain = _Marked.of(text_encoder_tensors(file), architecture)
    try:
        return _Marked.of(text_encoder_tensors(file, found), architecture), found
    except CorruptFile as error:
        unreadable.append(error)
        return plain, None


class _Marked(dict):
    """A state dict that says yes where a host asks for a tensor by which it tells Qwen3-VL from Qwen3.

    That one is in the projector, which may be missing; without it the host would take the text model for another one,
    whose rotary embedding and layers differ.

    Attributes:
        asked: whether a host asked for it, and so knows of Qwen3-VL.
    """

    asked = False

    @classmethod
    def of(cls, state: dict[str, torch.Tensor], architecture: str) -> dict[str, torch.Tensor]:
        return cls(state) if architecture == "qwen3vl" else state

    def __contains__(self, name: object) -> bool:
        if name != _QWEN3VL_MARK:
            return super().__contains__(name)
        self.asked = True
        return True

    def __missing__(self, name: str) -> torch.Tensor:
        if name != _QWEN3VL_OUTPUT:
            raise KeyError(name)
        return torch.empty(self["model.layers.0.input_layernorm.weight"].shape[0], 0)


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


def _check_type(model: torch.nn.Module, states: Sequence[dict], kind: str, paths: Sequence[str]) -> None:
    """Refuse a type that does not fit the files: the host would take one for another, as wide or not."""
    reader = _reader(model)
    names = ", ".join(map(os.path.basename, paths))
    if any(isinstance(state, _Marked) and not state.asked for state in states):
        raise UnsupportedFormat(f"this ComfyUI does not know Qwen3-VL: update ComfyUI ({names})")
    if reader not in _OF_ONE_MODEL.get(kind, (reader,)):
        raise UnsupportedFormat(
            f"the type {kind} does not fit this text encoder, which ComfyUI reads as that of {reader}: choose the text "
            f"encoder of {kind}, or another type ({names})"
        )
    if reader not in _READ_UMT5 and any(is_umt5(state) for state in states):
        raise UnsupportedFormat(f"this text encoder is a UMT5, which ComfyUI reads only for Wan: choose wan ({names})")


def _reader(model: torch.nn.Module) -> str:
    """Of which model the host's class for text encoders is, by its module's name: ``z_image``."""
    return type(model).__module__.rpartition(".")[2]


def _check_files(model: torch.nn.Module, kind: str, paths: Sequence[str]) -> None:
    """The host takes any files for any type; one that fits nowhere would show only when words are encoded."""
    found: dict[str, bool] = {}
    for path, layer in packed_layers(model).items():
        encoder = path.partition(".")[0]
        found[encoder] = found.get(encoder, False) or layer.weight is not None
    missing = ", ".join(encoder for encoder, has_weights in found.items() if not has_weights)
    if missing:
        raise UnsupportedFormat(
            f"none of these files is the {missing} that ComfyUI wants: choose other files, or another type than "
            f"{kind}, for these {len(paths)}: {', '.join(map(os.path.basename, paths))}"
        )


def _complete(model: torch.nn.Module, unreadable: Sequence[GraftError]) -> None:
    """What files lack on purpose: CLIP-L's projection where only its tokens are read, eyes in a file of their own."""
    found = f"; one lies there, but {unreadable[0]}" if unreadable else ""
    for path, layer in packed_layers(model).items():
        if layer.weight is None and path.endswith(".text_projection"):
            layer.load_weight(torch.eye(*layer.logical_shape))
        elif layer.weight is None and ".visual." in path:
            folder = "to read pictures, put the vision projector (mmproj) of this text encoder into its folder"
            layer.remedy = folder + found
        elif layer.weight is None and (part := _SENSES.search(path)):
            # Gemma's, whose projector has its tensors in another layout
            _refuse(
                model.get_submodule(path[: part.end()]),
                f"{_REMEDIES[part[1][:5]]}, take this text encoder as safetensors",
            )


_SENSES = re.compile(r"\.(vision_model|multi_modal_projector|audio_model|audio_projector)(?=\.)")
_REMEDIES = {"visio": "to read pictures", "multi": "to read pictures", "audio": "to hear sounds"}


def _refuse(part: torch.nn.Module, remedy: str) -> None:
    """Have a part that the file lacks say what to do, before its code asks an empty layer for its dtype."""

    def refuse(module: torch.nn.Module, args: Any) -> None:
        raise GraftError(f"this file cannot do that: {remedy}")

    if not part._forward_pre_hooks:
        part.register_forward_pre_hook(refuse)


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
    for name in ("logical_shape", "backend"):
        setattr(tied, name, getattr(table, name))
    tied.load_weight(table.packed_weight())
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
        with _with_adapters(self):
            return super().encode_token_weights(*args, **kwargs)  # type: ignore[misc]

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _with_adapters(self):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _with_adapters(encoder: torch.nn.Module) -> Iterator[None]:
    """The adapters are put on once, by the outermost encoder that is called."""
    # its layers know the owner of the whole model, in a copy of the model that of the copy
    layer = next((module for module in encoder.modules() if isinstance(module, HostLayer)), None)
    owner = None if layer is None else layer.owner()
    patcher = None if owner is None else owner.loaded()
    if patcher is None:
        yield
        return
    # with the lock, what is under way is of this thread
    with owner.calls.lock, nullcontext() if owner.calls.under_way else patcher.grafted(patcher.load_device):
        yield


class GraftCLIP(comfy.sd.CLIP):
    """The host's CLIP, which is saved with its weights and not with their packed bytes."""

    @property
    def cond_stage_model(self) -> Any:
        """That of the patcher, which hosts put on another copy of the model, for another device, and not the CLIP."""
        return self.patcher.model

    @cond_stage_model.setter
    def cond_stage_model(self, model: Any) -> None:
        """Where hosts hand on that of the CLIP that they clone."""

    def clone(self, *args: Any, **kwargs: Any) -> GraftCLIP:
        clone = super().clone(*args, **kwargs)
        clone.__class__ = GraftCLIP
        return clone

    def get_sd(self) -> dict[str, Any]:
        return super().get_sd() | self.patcher.merged_state_dict(prefix="")


class GraftCLIPLoader:
    """Load CLIP Text Encoders (GGUF, Graft)."""

    DESCRIPTION = (
        "Loads text encoders, which read your prompt for Flux, SD3, Wan, Qwen-Image and others. You can use GGUF and "
        "safetensors files together. LoRAs run next to the quantized weights."
    )
    SEARCH_ALIASES = ["gguf", "clip loader gguf", "dual clip loader gguf", "t5", "umt5", "qwen"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS = ("The text encoders, for all nodes for prompts and LoRAs.",)
    FUNCTION = "load"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        files = encoder_files()
        more = {
            f"clip_name{number}": (
                [NONE, *files],
                {
                    "default": NONE,
                    "tooltip": f"File {number}. Choose None if your model has fewer text encoders. Flux has two.",
                },
            )
            for number in range(2, FILES + 1)
        }
        return {
            "required": {
                "clip_name1": (files, {"tooltip": "A .gguf or .safetensors file in models/text_encoders."}),
                "type": (
                    types(), {"tooltip": "The model that they are for. Three files are for SD3, four for HiDream."}
                ),
            },
            "optional": more
            | {
                "device": (
                    list(DEVICES), {"default": "default", "tooltip": "Where they run. cpu keeps GPU memory free."}
                ),
                "backend": node.BACKEND,
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> Any:
        paths = [encoder_file(name).path for name in _names(inputs)]
        beside = [file for path in paths if path is not None for file in projector_files(path)]
        return [node.file_state(path) for path in [*paths, *map(str, beside)]]

    @classmethod
    def VALIDATE_INPUTS(
        cls, clip_name1: str | None = None, clip_name2: str | None = None, clip_name3: str | None = None,
        clip_name4: str | None = None,
    ) -> bool:  # fmt: skip
        """Raises what is to be said of missing files: a text the host would repeat on every input of these."""
        _found({"clip_name1": clip_name1, "clip_name2": clip_name2, "clip_name3": clip_name3, "clip_name4": clip_name4})
        return True

    def load(self, clip_name1: str, type: str, device: str = "default", backend: str = "auto", **names: str) -> dict:
        files = _found({"clip_name1": clip_name1, **names})
        clip = load_text_encoders([path for _, path in files], type, device, backend)
        text = clip.cond_stage_model.graft.summary
        log.info("%s", text)
        return node.result((clip,), text, *(file.note for file, _ in files))


def _names(inputs: dict[str, Any]) -> list[str]:
    """The files that are chosen; until the node runs, what comes through a link is None."""
    chosen = (inputs.get(f"clip_name{number}") for number in range(1, FILES + 1))
    return [name for name in chosen if name and name != NONE]


def _found(inputs: dict[str, Any]) -> list[tuple[Found, str]]:
    """The files that are chosen, and where they lie; CorruptFile that names all which are missing."""
    files = [encoder_file(name) for name in _names(inputs)]
    return list(zip(files, all_present(files, HOME), strict=True))
