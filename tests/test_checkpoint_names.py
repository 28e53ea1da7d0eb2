"""Names in checkpoints of one file, as stable-diffusion.cpp writes them and as hosts look for them."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_samples import write_gguf
from graft.ops.files.gguf import open_gguf
from graft.ops.files.whole_checkpoints import has_diffusion_model, host_names, other_tensors

INNER = "text_model.encoder.layers.0.mlp.fc1.weight"
NAMES = {
    "SD 1": ("cond_stage_model.", {f"cond_stage_model.transformer.{INNER}": f"cond_stage_model.transformer.{INNER}"}),
    "SDXL": (
        "cond_stage_model.",
        {
            f"cond_stage_model.transformer.{INNER}": f"conditioner.embedders.0.transformer.{INNER}",
            f"cond_stage_model.1.transformer.{INNER}": f"conditioner.embedders.1.model.transformer.{INNER}",
            "cond_stage_model.1.transformer.text_model.text_projection": (
                "conditioner.embedders.1.model.text_projection"
            ),
        },
    ),
    "SDXL with joined queries": (
        "cond_stage_model.",
        {
            "cond_stage_model.1.transformer.text_model.encoder.layers.7.self_attn.in_proj.bias": (
                "conditioner.embedders.1.model.transformer.resblocks.7.attn.in_proj_bias"
            ),
        },
    ),
    "SD 1 of parts": (
        "cond_stage_model.", {f"text_encoders.clip_l.transformer.{INNER}": f"cond_stage_model.transformer.{INNER}"}
    ),
    "SDXL of parts": (
        "cond_stage_model.",
        {
            f"text_encoders.clip_l.transformer.{INNER}": f"conditioner.embedders.0.transformer.{INNER}",
            f"text_encoders.clip_g.transformer.{INNER}": f"conditioner.embedders.1.model.transformer.{INNER}",
        },
    ),
    "SD 3": (
        "text_encoders.",
        {
            f"cond_stage_model.transformer.{INNER}": f"text_encoders.clip_l.transformer.{INNER}",
            f"cond_stage_model.1.transformer.{INNER}": f"text_encoders.clip_g.transformer.{INNER}",
            "cond_stage_model.2.transformer.shared.weight": "text_encoders.t5xxl.transformer.shared.weight",
        },
    ),
    "as the original": (
        "text_encoders.",
        {f"text_encoders.clip_l.transformer.{INNER}": f"text_encoders.clip_l.transformer.{INNER}"},
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vae", ["first_stage_model.", "vae."])
def test_names_are_where_hosts_look(name, vae):
    prefix, wanted = NAMES[name]
    wanted = wanted | {"first_stage_model.decoder.conv_in.weight": f"{vae}decoder.conv_in.weight"}
    assert host_names(wanted, prefix, vae) == wanted


def test_what_is_a_checkpoint(tmp_path):
    one = np.zeros((8, 8), np.float32), "F16"
    names = ("model.diffusion_model.a.weight", f"cond_stage_model.transformer.{INNER}", "vae.decoder.conv_in.weight")
    whole = open_gguf(write_gguf(tmp_path / "a.gguf", dict.fromkeys(names, one)))
    assert has_diffusion_model(whole) and list(other_tensors(whole)) == list(names[1:])
    plain = open_gguf(write_gguf(tmp_path / "b.gguf", {"double_blocks.0.a.weight": one}))
    assert not has_diffusion_model(plain) and not other_tensors(plain)
