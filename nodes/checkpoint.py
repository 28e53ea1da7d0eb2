"""Loading a whole checkpoint from one GGUF file: MODEL, CLIP and VAE."""

from __future__ import annotations

import logging
import os
from typing import Any

import comfy.sd
import folder_paths
import torch

from .. import kernels
from ..kernels import UnsupportedFormat
from ..ops.files.gguf import GGUFFile, diffusion_tensors, open_gguf
from ..ops.files.scales import weights_of
from ..ops.files.shapes import with_leading_ones
from ..ops.files.whole_checkpoints import has_diffusion_model, host_names, other_tensors
from ..ops.packed import PackedTensor
from . import loader, node
from .host_errors import Asked, is_about_files, refusal
from .model_files import Found, find, listed
from .ops import GraftOps
from .text_encoder import GraftCLIP, as_graft, encoder_options

log = logging.getLogger(__name__)

FOLDER = "graft_checkpoints_gguf"
"""A key of our own for GGUF files in the folders of checkpoints, which hosts list no such files from."""

HOME = "the checkpoints folder"
_PREFIX = "model.diffusion_model."


def checkpoint_files() -> list[str]:
    """What the loader lists: also what lies among diffusion models, since nobody can tell by the name."""
    return listed(FOLDER, loader.FOLDER)


def checkpoint_file(name: str) -> Found:
    """The file that a workflow calls so."""
    return find(name, FOLDER, loader.FOLDER)


def load_checkpoint(
    path: str, compute_dtype: str = "auto", backend: str = "auto"
) -> tuple[Any, GraftCLIP | None, Any]:
    """Load a diffusion model, its text encoders and its VAE.

    Returns:
        MODEL, CLIP and VAE, as the host's own loader of checkpoints returns them: what the file does not have is
        None, or a VAE that says so when it is used. The VAE is decoded, since it runs once and its weights are few.

    Raises:
        CorruptFile: the file is damaged or is no GGUF file.
        UnsupportedFormat: the host does not know the model, or the file is no checkpoint.
    """
    file = open_gguf(path)
    if not has_diffusion_model(file) or not other_tensors(file):
        raise UnsupportedFormat(
            "load what this file holds with a loader of its own: it is no checkpoint of a diffusion model, text "
            f"encoders and a VAE ({path})"
        )
    model = loader.load_diffusion_model(path, compute_dtype, backend)
    clip, vae = _load_others(file, path, model.model.model_config, backend, {})
    return model, clip, vae


def _load_others(
    file: GGUFFile, path: str, config: Any, backend: str, extra: dict[str, Any]
) -> tuple[GraftCLIP | None, Any]:
    state = _state(file, config)
    try:
        _, clip, vae, _ = comfy.sd.load_state_dict_guess_config(
            state,
            output_model=False,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            model_options={"custom_operations": GraftOps},
            te_model_options=encoder_options(),
            **extra,
        )
    except Exception as error:
        if not is_about_files(error):
            raise
        raise refusal(error, Asked({}), path) from error
    if clip is None:
        return None, vae
    choice = kernels.choose(torch.device(clip.patcher.load_device), None, backend)
    again = _load_patcher, (path, backend)
    return as_graft(clip, f"{os.path.basename(path)} · {choice}", backend, [file], again), vae


def _load_patcher(path: str, backend: str, **extra: Any) -> Any:
    """The text encoders' patcher once more, as the host asks for it."""
    model = loader.load_diffusion_model(path, backend=backend)
    clip, _ = _load_others(open_gguf(path), path, model.model.model_config, backend, extra)
    assert clip is not None
    return clip.patcher


def _state(file: GGUFFile, config: Any) -> dict[str, torch.Tensor]:
    """All of the file, as the host's loader of checkpoints looks for it."""
    diffusion = with_leading_ones(weights_of(diffusion_tensors(file), file))
    vae_prefix = config.vae_key_prefix[0]
    names = host_names(other_tensors(file), config.text_encoder_key_prefix[0], vae_prefix)
    state = {_PREFIX + name: weight for name, weight in diffusion.items()}
    for name, weight in weights_of(other_tensors(file), file).items():
        is_vae = names[name].startswith(vae_prefix)
        state[names[name]] = weight.dequantize(torch.float32) if is_vae and isinstance(weight, PackedTensor) else weight
    return state


class GraftCheckpointLoader:
    """Load Whole Checkpoint (GGUF, Graft)."""

    DESCRIPTION = (
        "Loads a whole checkpoint from one GGUF file: diffusion model, text encoders and VAE, as stable-diffusion.cpp "
        "writes it. LoRAs run next to the quantized weights."
    )
    SEARCH_ALIASES = ["gguf", "checkpoint loader gguf", "load checkpoint gguf", "sdxl gguf"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The diffusion model.",
        "The text encoders; empty if the file has none.",
        "The VAE, decoded when it is loaded.",
    )
    FUNCTION = "load"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {"ckpt_name": (checkpoint_files(), {"tooltip": "A .gguf file in models/checkpoints."})},
            "optional": {"compute_dtype": loader.COMPUTE_DTYPE, "backend": node.BACKEND},
        }

    @classmethod
    def IS_CHANGED(cls, ckpt_name: str | None, **_: Any) -> Any:
        return node.UNKNOWN if ckpt_name is None else node.file_state(checkpoint_file(ckpt_name).path)

    @classmethod
    def VALIDATE_INPUTS(cls, ckpt_name: str | None = None) -> bool | str:
        return ckpt_name is None or checkpoint_file(ckpt_name).valid(HOME)

    def load(self, ckpt_name: str, compute_dtype: str = "auto", backend: str = "auto") -> dict:
        found = checkpoint_file(ckpt_name)
        model, clip, vae = load_checkpoint(found.present(HOME), compute_dtype, backend)
        text = model.graft.summary
        if clip is None:
            text += "\nno text encoder in this file: use Load CLIP Text Encoders (GGUF, Graft)"
        if getattr(vae, "first_stage_model", None) is None:
            text += "\nno VAE in this file: use Load VAE"
        log.info("%s: %s", ckpt_name, text)
        return node.result((model, clip, vae), text, *loader.running(model, backend), found.note)
