"""A whole checkpoint in one GGUF file against the host's own loader on the same weights, dequantized."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import folder_paths
import gguf
import nodes
import numpy as np
import pytest
import torch
from generation import WITHOUT_DYNAMIC, distance, forget, sample
from gguf_samples import encode
from small import SD3, drawn, sd3, small_vae  # noqa: F401  (fixture)
from sweep import output_of, sizes_of
from text_encoders import clip_l_weights, clip_weights, encoded, furthest, lora_error, small
from tiny_models import MODELS

VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
VAE |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
"""That of Stable Diffusion, a quarter as wide."""

OLD = {"text_encoders.clip_l.": "cond_stage_model."}  # as stable-diffusion.cpp calls them


def quantized(weight: torch.Tensor) -> tuple[object, gguf.GGMLQuantizationType, torch.Tensor]:
    """Bytes, their type, and what they stand for; convolutions are folded into rows of 256, as converters do."""
    if weight.dim() < 2 or len(weight) > 4096 or weight.numel() % 256:
        weight = weight.half().float()
        return weight.half().numpy(), gguf.GGMLQuantizationType.F16, weight
    kind = gguf.GGMLQuantizationType.Q8_0
    data = encode((weight if weight.dim() == 2 else weight.reshape(-1, 256)).numpy(), kind)
    return data, kind, torch.from_numpy(gguf.dequantize(data, kind).reshape(weight.shape).copy())


@pytest.fixture(scope="module")
def checkpoint(pack, sd3, folders):  # noqa: F811
    """``(path, weights)`` of a small SD3 with a CLIP-L and the small VAE."""
    vae = small_vae()
    with small(clip_layers=3):
        others = {f"text_encoders.clip_l.transformer.{name}": weight for name, weight in clip_l_weights().items()}
    others |= {f"first_stage_model.{name}": weight if weight.dim() else weight[None] for name, weight in vae.items()}
    path = folders / "unet_gguf" / "whole.gguf"
    writer, weights = gguf.GGUFWriter(str(path), "sd3"), {}
    model = gguf.GGUFReader(str(folders / "unet_gguf" / "sd3-Q4_K.gguf"))
    file = pack("ops.files.gguf").open_gguf(folders / "unet_gguf" / "sd3-Q4_K.gguf")
    for tensor in model.tensors:
        name, shape = f"model.diffusion_model.{tensor.name}", file.tensors[tensor.name].shape
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
        if shape != tuple(reversed(tensor.shape.tolist())):
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
        read = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        weights[name] = torch.from_numpy(read.astype("float32"))
    for name, weight in others.items():
        data, kind, weights[name] = quantized(weight.float())
        stored = next((old + name[len(new) :] for new, old in OLD.items() if name.startswith(new)), name)
        writer.add_tensor(stored, data, raw_dtype=kind)
        if weight.dim() == 4:
            writer.add_array(f"comfy.gguf.orig_shape.{stored}", list(weight.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


@pytest.fixture(scope="module")
def loaded(checkpoint):
    with small(clip_layers=3):
        ours = nodes.NODE_CLASS_MAPPINGS["GraftCheckpointLoader"]().load("whole.gguf", compute_dtype="fp32")
        options = {"dtype": torch.float32}
        theirs = comfy.sd.load_state_dict_guess_config(
            dict(checkpoint[1]), model_options=options, te_model_options=options, **WITHOUT_DYNAMIC
        )
    return ours, theirs


def test_model_text_encoder_and_vae(loaded):
    ours, theirs = loaded
    model, clip, vae = ours["result"]
    assert distance(sample(model, SD3), sample(theirs[0], SD3)) < 1e-5
    got, want = (it.encode_from_tokens(it.tokenize("a fox"), return_dict=True) for it in (clip, theirs[1]))
    assert distance(got["cond"], want["cond"]) < 1e-5 and distance(got["pooled_output"], want["pooled_output"]) < 1e-5
    assert any(layer.fmt.name == "Q8_0" for layer in clip.cond_stage_model.graft.layers.values())
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    picture = vae.decode(latent)
    assert torch.equal(picture, theirs[2].decode(latent)) and picture.std() > 0.01
    assert "Stable Diffusion 3" in ours["ui"]["text"][0] and "no VAE" not in ours["ui"]["text"][0]


def test_a_lora_on_both(loaded):
    clip = loaded[0]["result"][1]
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    g = torch.Generator().manual_seed(5)
    lora = {f"{key}.lora_down.weight": torch.randn(4, 768, generator=g) / 768**0.5}
    lora[f"{key}.lora_up.weight"] = torch.randn(3072, 4, generator=g) / 4
    conds = []
    for it in (clip, loaded[1][1]):
        branch = comfy.sd.load_lora_for_models(None, it, lora, 0, 0.8)[1]
        base, with_lora = (c.encode_from_tokens(c.tokenize("a fox"), return_dict=True)["cond"] for c in (it, branch))
        conds.append(with_lora - base)
    assert distance(*conds) < 1e-4 and conds[1].abs().max() > 0.01


CLIP_G = {
    "final_layer_norm.": "ln_final.", "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight", "encoder.layers.": "transformer.resblocks.",
    ".self_attn.in_proj.": ".attn.in_proj_", ".self_attn.out_proj.": ".attn.out_proj.", ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.", ".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj.",
}  # fmt: skip
"""From transformers' names, without the prefix, to those of SDXL's checkpoints."""

FORMS = ("SD15", "SDXL", "SDXL with split queries", "SDXL with joined queries", "SDXL of parts with split queries")


def parts_of(form: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Text encoders and a VAE as they lie in a checkpoint, and what a file of this form calls otherwise."""
    other: dict[str, str] = {}
    vae = comfy.sd.AutoencoderKL(ddconfig=VAE, embed_dim=4).state_dict()
    state = {f"first_stage_model.{name}": weight for name, weight in drawn(vae, seed=2).items()}
    l_prefix = "cond_stage_model." if form == "SD15" else "conditioner.embedders.0."
    l_names = {name: f"{l_prefix}transformer.{name}" for name in clip_l_weights()}
    state |= {l_names[name]: weight for name, weight in clip_l_weights().items()}
    if form == "SD15":
        return state, other
    g_state = clip_weights("clip_config_bigg.json", seed=9)
    projection = g_state.pop("text_projection.weight")
    state["conditioner.embedders.1.model.text_projection"] = projection.t().contiguous()
    other["conditioner.embedders.1.model.text_projection"] = "cond_stage_model.1.transformer.text_model.text_projection"
    other |= {name: f"cond_stage_model.{name.removeprefix(l_prefix)}" for name in l_names.values()}
    for name, weight in g_state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            weight = torch.cat([g_state[name.replace(".q_", f".{part}_")] for part in "qkv"])
            name = name.replace(".q_proj.", ".in_proj.")
        here = name.removeprefix("text_model.")
        for old, new in CLIP_G.items():
            here = here.replace(old, new)
        state[f"conditioner.embedders.1.model.{here}"] = weight
        other[f"conditioner.embedders.1.model.{here}"] = f"cond_stage_model.1.transformer.{name}"
    if "parts" in form:  # that were in files of their own
        for name, called in other.items():
            called = called.replace("cond_stage_model.1.", "text_encoders.clip_g.")
            called = called.replace("text_model.text_projection", "text_projection")
            other[name] = called.replace("cond_stage_model.", "text_encoders.clip_l.")
            if called.endswith("text_projection"):
                other[name] += ".weight"
        other |= {name: name.replace("first_stage_model.", "vae.") for name in state if "first_stage" in name}
    return state, {} if form == "SDXL" else other


def write_as_stable_diffusion_cpp(path: Path, state: dict[str, torch.Tensor], form: str, names: dict[str, str]) -> dict:
    """Whole rows in Q8_0, convolutions as they are, in F16; returns what the file stands for, as `state` calls it."""
    writer, dense = gguf.GGUFWriter(str(path), ""), {}
    for name, weight in state.items():
        kind = gguf.GGMLQuantizationType.F32 if weight.dim() < 2 else gguf.GGMLQuantizationType.F16
        other = "embedding" in name or "text_projection" in name
        if weight.dim() == 2 and weight.shape[1] % 32 == 0 and not other:
            kind = gguf.GGMLQuantizationType.Q8_0
        data = encode(weight.float().numpy(), kind)
        dense[name] = torch.from_numpy(gguf.dequantize(data, kind).astype("float32").reshape(weight.shape))
        stored, parts = names.get(name, name), [data]
        if stored.endswith("text_projection.weight"):  # of a Linear
            parts = [np.ascontiguousarray(data.T)]
        if "split" in form and ".in_proj." in stored:
            parts = list(data.reshape(3, -1, *data.shape[1:]))
        for part, letter in zip(parts, "qkv", strict=False):
            called = stored.replace(".in_proj.", f".{letter}_proj.") if len(parts) > 1 else stored
            writer.add_tensor(called, part, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


@pytest.mark.parametrize("form", FORMS)
def test_stable_diffusion_cpps_names(form, folders, monkeypatch):
    """Of Stable Diffusion 1.5, and of SDXL as its checkpoint has them and as other versions rename them."""
    tiny, whole_vae = MODELS[form.partition(" ")[0]], comfy.sd.AutoencoderKL
    monkeypatch.setattr(comfy.sd, "AutoencoderKL", lambda **_: whole_vae(ddconfig=VAE, embed_dim=4))
    path, options = folders / "unet_gguf" / "cpp.gguf", {"dtype": torch.float32}
    with small(clip_layers=3, clip_width=64), sizes_of(tiny) as module:
        others, names = parts_of(form)
        model = {f"model.diffusion_model.{name}": w for name, w in drawn(module.state_dict(), seed=1).items()}
        dense = write_as_stable_diffusion_cpp(path, model | others, form, names)
        ours = nodes.NODE_CLASS_MAPPINGS["GraftCheckpointLoader"]().load("cpp.gguf", compute_dtype="fp32")["result"]
        theirs = comfy.sd.load_state_dict_guess_config(
            dense, model_options=options, te_model_options=options, **WITHOUT_DYNAMIC
        )
    assert type(theirs[0].model.model_config).__name__ == tiny.host_class
    assert distance(output_of(ours[0], tiny), output_of(theirs[0], tiny)) < 1e-5
    clips = ours[1], theirs[1]
    assert furthest(*(encoded(clip) for clip in clips)) < 1e-5 and lora_error(clips) < 1e-4
    layers = ours[1].cond_stage_model.graft.layers
    inside = {name: layer.fmt.name for name, layer in layers.items() if ".encoder.layers." in name}
    assert len(inside) == 3 * 6 * (1 if form == "SD15" else 2) and set(inside.values()) == {"Q8_0"}
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    picture = ours[2].decode(latent)
    assert torch.equal(picture, theirs[2].decode(latent)) and picture.std() > 0.01
    forget()


def test_a_file_of_a_diffusion_model_alone(sd3, pack, folders):  # noqa: F811
    with pytest.raises(Exception, match="with a loader of its own: it is no checkpoint of a diffusion model, text"):
        pack("nodes.checkpoint").load_checkpoint(str(folders / "unet_gguf" / "sd3-Q4_K.gguf"))
    node = nodes.NODE_CLASS_MAPPINGS["GraftCheckpointLoader"]
    assert node.VALIDATE_INPUTS("gone.gguf").startswith("gone.gguf is not there: put it into the checkpoints folder")
    assert "whole.gguf" not in folder_paths.get_filename_list("checkpoints")
