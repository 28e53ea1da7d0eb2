"""A whole checkpoint in one GGUF file against the host's own loader on the same weights, dequantized."""

from __future__ import annotations

import comfy.sd
import folder_paths
import gguf
import nodes
import pytest
import torch
from generation import WITHOUT_DYNAMIC, distance, sample
from gguf_samples import encode
from small import SD3, sd3, small_vae  # noqa: F401  (fixture)
from text_encoders import clip_l_weights, small

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


def test_a_file_of_a_diffusion_model_alone(sd3, pack, folders):  # noqa: F811
    with pytest.raises(Exception, match="with a loader of its own: it is no checkpoint of a diffusion model, text"):
        pack("nodes.checkpoint").load_checkpoint(str(folders / "unet_gguf" / "sd3-Q4_K.gguf"))
    node = nodes.NODE_CLASS_MAPPINGS["GraftCheckpointLoader"]
    assert node.VALIDATE_INPUTS("gone.gguf").startswith("gone.gguf is not there: put it into the checkpoints folder")
    assert "whole.gguf" not in folder_paths.get_filename_list("checkpoints")
