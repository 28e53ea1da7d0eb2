"""Whole checkpoints in one GGUF file: a diffusion model, its text encoders and its VAE under their prefixes.

stable-diffusion.cpp's `convert` keeps the names that a checkpoint has, and where it was given the parts in files of
their own it calls them ``model.diffusion_model.``, ``text_encoders.clip_l.transformer.`` and ``vae.``. With
``--convert-name``, and always in its older versions, text encoders are under ``cond_stage_model.``, with a number
behind it for the second and third, whatever the model, and CLIP-G has transformers' names
(src/name_conversion.cpp), with queries, keys and values in three tensors or in one. A host looks under prefixes that
differ from model to model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .gguf import DIFFUSION_PREFIXES, GGUFFile, GGUFTensor

_VAES = ("first_stage_model.", "vae.")
_TEXT_ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder.", "te.")
_NUMBERED = {
    "text_encoders.": {
        "cond_stage_model.transformer.": "text_encoders.clip_l.transformer.",
        "cond_stage_model.1.transformer.": "text_encoders.clip_g.transformer.",
        "cond_stage_model.2.transformer.": "text_encoders.t5xxl.transformer.",
    },
    "conditioner.": {
        "cond_stage_model.transformer.": "conditioner.embedders.0.transformer.",
        "cond_stage_model.1.transformer.text_model.text_projection": "conditioner.embedders.1.model.text_projection",
        "cond_stage_model.1.transformer.": "conditioner.embedders.1.model.transformer.",
        "cond_stage_model.1.model.": "conditioner.embedders.1.model.",
        "text_encoders.clip_l.transformer.": "conditioner.embedders.0.transformer.",
        "text_encoders.clip_g.transformer.": "conditioner.embedders.1.model.transformer.",
    },
    "cond_stage_model.": {"text_encoders.clip_l.transformer.": "cond_stage_model.transformer."},
}

_JOINED = re.compile(
    r"^(conditioner\.embedders\.1\.model\.transformer)\.text_model\.encoder\.layers\.(\d+)\.self_attn\.in_proj\."
)
"""Queries, keys and values in one: hosts take them apart under OpenCLIP's name."""


def other_tensors(file: GGUFFile) -> dict[str, GGUFTensor]:
    """Text encoders and VAE of a checkpoint, under the file's own names."""
    return {name: tensor for name, tensor in file.tensors.items() if name.startswith((*_VAES, *_TEXT_ENCODERS))}


def has_diffusion_model(file: GGUFFile) -> bool:
    """Whether a file holds a diffusion model under a prefix, as checkpoints do."""
    return any(name.startswith(DIFFUSION_PREFIXES) for name in file.tensors)


def host_names(names: Mapping[str, object], encoder_prefix: str, vae_prefix: str) -> dict[str, str]:
    """What a host calls the tensors of a checkpoint, by their names in the file.

    Args:
        encoder_prefix: under which the host looks for text encoders.
        vae_prefix: under which it looks for the VAE.
    """
    several = any(name.startswith(("cond_stage_model.1.", "text_encoders.clip_g.")) for name in names)
    # hosts give the same prefix for SDXL
    wanted = "conditioner." if several and encoder_prefix == "cond_stage_model." else encoder_prefix
    table = _NUMBERED.get(wanted, {})
    prefixes = {**table, **dict.fromkeys(_VAES, vae_prefix)}

    def renamed(name: str) -> str:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        name = prefixes[prefix] + name[len(prefix) :] if prefix else name
        return _JOINED.sub(r"\1.resblocks.\2.attn.in_proj_", name)

    return {name: renamed(name) for name in names}


__all__ = ["has_diffusion_model", "host_names", "other_tensors"]
