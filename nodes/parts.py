"""Parts of a model that are neither diffusion model nor text encoder, in GGUF: VAEs, ControlNets, model patches.

They are decoded when they are loaded, and are the host's own from there on: a VAE runs once a picture, and a ControlNet
or a patch has no LoRAs to keep apart from its weights.
"""

from __future__ import annotations

import logging
import threading
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import comfy
import comfy.controlnet
import comfy.sd
import comfy.utils
import torch

from ..kernels import CorruptFile, UnsupportedFormat
from ..ops.files.completeness import missing_within
from ..ops.files.contents import CONTROLNET, MODEL_PATCH, VAE, OtherKind, other_kind
from ..ops.files.gguf import GGUFFile, describe, open_gguf
from ..ops.files.scales import weights_of
from ..ops.files.shapes import with_inputs_apart
from ..ops.packed import PackedTensor
from ..ops.report import examples
from . import node
from .host_errors import Asked, is_about_files, refusal
from .model_files import find, listed

log = logging.getLogger(__name__)

VAES, CONTROLNETS, MODEL_PATCHES = "graft_vae_gguf", "graft_controlnet_gguf", "graft_model_patch_gguf"
"""Keys of our own for GGUF files in folders that hosts list no such files from."""

_VAE_PREFIXES = ("first_stage_model.", "vae.")


def load_vae(path: str) -> tuple[Any, str]:
    """The host's VAE on a GGUF file's weights, and a line on the file.

    Raises:
        CorruptFile: the file is damaged or is no GGUF file.
        UnsupportedFormat: it is no VAE, or one that the host does not know.
    """
    file = _opened(path, VAE)
    state = with_inputs_apart({name.removeprefix(_prefix_of(name)): w for name, w in _decoded(file).items()})
    vae = _made(lambda: comfy.sd.VAE(sd=state, metadata=file.metadata.texts()), path)
    if vae.first_stage_model is None:
        raise UnsupportedFormat(f"this ComfyUI does not know the VAE in this file: update ComfyUI ({path})")
    return vae, describe(file)


def load_controlnet(path: str) -> tuple[Any, str]:
    """The host's ControlNet on a GGUF file's weights, and a line on the file.

    Raises:
        CorruptFile: the file is damaged or is no GGUF file.
        UnsupportedFormat: it is no ControlNet, or one that the host does not know.
    """
    file = _opened(path, CONTROLNET)
    control = _made(lambda: comfy.controlnet.load_controlnet_state_dict(_decoded(file)), path)
    if control is None:
        raise UnsupportedFormat(f"this ComfyUI does not know the ControlNet in this file: update ComfyUI ({path})")
    return control, describe(file)


def load_model_patch(path: str) -> tuple[Any, str]:
    """The host's patch for a model on a GGUF file's weights, quantized ones as fp16, and a line on the file.

    Raises:
        CorruptFile: the file is damaged or is no GGUF file.
        UnsupportedFormat: it is no model patch, or one that the host does not know.
    """
    file = _opened(path, MODEL_PATCH)
    try:
        from comfy_extras.nodes_model_patch import ModelPatchLoader
    except ImportError:
        raise UnsupportedFormat(f"this ComfyUI has no model patches: update ComfyUI ({path})") from None
    load = _on_state_dict(ModelPatchLoader.load_model_patch, _decoded(file, torch.float16), file.metadata.texts())
    try:
        return _made(lambda: load(ModelPatchLoader(), path)[0], path), describe(file)
    except UnboundLocalError as error:  # where none of the kinds that it knows fits
        raise UnsupportedFormat(
            f"this ComfyUI does not know the model patch in this file: update ComfyUI ({path})"
        ) from error


def _on_state_dict(function: Callable, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> Callable:
    """A function of the host's that opens a file itself, on a state dict in its place."""

    def load_torch_file(*args: Any, return_metadata: bool = False, **kwargs: Any) -> Any:
        return (state, metadata) if return_metadata else state

    utils = types.SimpleNamespace(**vars(comfy.utils) | {"load_torch_file": load_torch_file})
    known = {
        "comfy": types.SimpleNamespace(**vars(comfy) | {"utils": utils}),
        "folder_paths": types.SimpleNamespace(get_full_path_or_raise=lambda key, name: name),
    }
    return types.FunctionType(function.__code__, function.__globals__ | known, function.__name__)


def _opened(path: str, wanted: OtherKind) -> GGUFFile:
    file = open_gguf(path)
    kind = other_kind(file)
    if kind is not wanted:
        what = "a diffusion model" if kind is None else kind.what
        remedy = "use Load Diffusion Model (GGUF, Graft)" if kind is None else kind.remedy
        raise UnsupportedFormat(f"this is {what}, not {wanted.what}: {remedy} ({path})")
    return file


def _decoded(file: GGUFFile, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """All weights, quantized ones in `dtype`."""
    weights = weights_of(file.tensors, file)
    return {k: w.dequantize(dtype) if isinstance(w, PackedTensor) else w.clone() for k, w in weights.items()}


def _prefix_of(name: str) -> str:
    return next((prefix for prefix in _VAE_PREFIXES if name.startswith(prefix)), "")


def _made(make: Callable[[], Any], path: str) -> Any:
    """What a function of the host's makes of a file, if the file has all of it."""
    try:
        with _missing_noted() as noted:
            made = make()
    except Exception as error:
        if not is_about_files(error):
            raise
        raise refusal(error, Asked({}), path) from error
    absent = [name for model, missing in noted for name in _needed(model, missing)]
    if absent:
        raise CorruptFile(f"the file is incomplete: get it from another source: it lacks {examples(absent)} ({path})")
    return made


@contextmanager
def _missing_noted() -> Iterator[list[tuple[torch.nn.Module, list[str]]]]:
    """Within this, each model that this thread gives weights, with those that were missing, which hosts only log."""
    noted: list[tuple[torch.nn.Module, list[str]]] = []
    load, thread = torch.nn.Module.load_state_dict, threading.get_ident()

    def load_state_dict(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(module, *args, **kwargs)
        if threading.get_ident() == thread:
            noted.append((module, list(result.missing_keys)))
        return result

    torch.nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield noted
    finally:
        torch.nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _needed(model: torch.nn.Module, missing: Collection[str]) -> list[str]:
    """Those that are missing from within a part that is there: an encoder may be left out as a whole."""
    parameters = {name for name, _ in model.named_parameters()}
    layers = [name for name, module in model.named_modules() if hasattr(module, "comfy_cast_weights")]
    gone = [name for name in missing if name in parameters]
    return missing_within(gone, parameters.difference(gone), layers)


class _PartLoader:
    """What all of these nodes do with the file that is chosen."""

    CATEGORY = node.CATEGORY
    FUNCTION = "load"
    HAS_INTERMEDIATE_OUTPUT = True
    KEY = NAME = FOLDER = ""

    @classmethod
    def _home(cls) -> str:
        return f"the {cls.FOLDER} folder"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {cls.NAME: (listed(cls.KEY), {"tooltip": f"A .gguf file in models/{cls.FOLDER}."})}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> Any:
        name = inputs.get(cls.NAME)
        return node.UNKNOWN if name is None else node.file_state(find(name, cls.KEY).path)

    @classmethod
    def VALIDATE_INPUTS(cls, **inputs: Any) -> bool | str:
        name = inputs.get(cls.NAME)
        return name is None or find(name, cls.KEY).valid(cls._home())


class GraftVAELoader(_PartLoader):
    """Load VAE Picture Decoder (GGUF, Graft)."""

    DESCRIPTION = (
        "Loads a VAE from GGUF. It is decoded when it is loaded, so it takes as much memory as a safetensors file."
    )
    SEARCH_ALIASES = ["gguf", "vae loader gguf"]  # noqa: RUF012
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("The VAE.",)
    KEY, NAME, FOLDER = VAES, "vae_name", "vae"

    def load(self, vae_name: str) -> dict:
        found = find(vae_name, self.KEY)
        vae, text = load_vae(found.present(self._home()))
        return node.result((vae,), text, found.note)


class GraftControlNetLoader(_PartLoader):
    """Load ControlNet Model (GGUF, Graft)."""

    DESCRIPTION = (
        "Loads a ControlNet from GGUF. It is decoded when it is loaded, so it takes as much memory as any other."
    )
    SEARCH_ALIASES = ["gguf", "controlnet loader gguf"]  # noqa: RUF012
    RETURN_TYPES = ("CONTROL_NET",)
    OUTPUT_TOOLTIPS = ("The ControlNet, for Apply ControlNet.",)
    KEY, NAME, FOLDER = CONTROLNETS, "control_net_name", "controlnet"

    def load(self, control_net_name: str) -> dict:
        found = find(control_net_name, self.KEY)
        control, text = load_controlnet(found.present(self._home()))
        return node.result((control,), text, found.note)


class GraftModelPatchLoader(_PartLoader):
    """Load Model Patch ControlNet (GGUF, Graft)."""

    DESCRIPTION = (
        "Loads a model patch from GGUF, such as a ControlNet for Qwen-Image or Z-Image. It is decoded to fp16 when it "
        "is loaded."
    )
    SEARCH_ALIASES = ["gguf", "model patch gguf", "controlnet gguf"]  # noqa: RUF012
    RETURN_TYPES = ("MODEL_PATCH",)
    OUTPUT_TOOLTIPS = ("The patch, for the nodes that apply it to a model.",)
    KEY, NAME, FOLDER = MODEL_PATCHES, "name", "model_patches"

    def load(self, name: str) -> dict:
        found = find(name, self.KEY)
        patch, text = load_model_patch(found.present(self._home()))
        return node.result((patch,), text, found.note)
