"""VAEs, ControlNets and model patches in GGUF against the host's own on the same weights, dequantized."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import comfy.ldm.wan.vae
import comfy.ops
import comfy.sd
import folder_paths
import gguf
import nodes
import numpy as np
import pytest
import torch
from comfy_extras import nodes_model_patch
from generation import dense_model, distance, forget
from gguf_samples import write_gguf
from safetensors.torch import save_file
from small import drawn, small_vae, weights_in, write_part
from sweep import output_of, sizes_of, write_tiny
from tiny_models import MODELS


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    folder = folders / "parts"
    folder.mkdir()
    for key in ("graft_vae_gguf", "graft_controlnet_gguf", "graft_model_patch_gguf", "model_patches"):
        paths, extensions = folder_paths.folder_names_and_paths[key]
        folder_paths.folder_names_and_paths[key] = ([str(folder), *paths], extensions)
    return folder


def test_a_vae(folder, pack):
    weights = write_part(folder / "vae.gguf", small_vae(), pack)
    assert any(tensor.tensor_type.name == "Q8_0" for tensor in gguf.GGUFReader(folder / "vae.gguf").tensors)
    node = nodes.NODE_CLASS_MAPPINGS["GraftVAELoader"]
    assert "vae.gguf" in node.INPUT_TYPES()["required"]["vae_name"][0]
    shown = node().load("vae.gguf")
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    picture = shown["result"][0].decode(latent)
    assert torch.equal(picture, comfy.sd.VAE(sd=weights).decode(latent)) and picture.std() > 0.01
    assert "Q8_0" in shown["ui"]["text"][0]


@pytest.fixture(scope="module")
def wan_vae() -> Iterator[dict[str, torch.Tensor]]:
    """Within this Wan's VAE, whose convolutions go over time, is narrow."""
    whole = comfy.ldm.wan.vae.WanVAE
    narrow = lambda **sizes: whole(**sizes | {"dim": 16})  # noqa: E731
    sizes = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.ldm.wan.vae, "WanVAE", narrow)
        yield drawn(narrow(**sizes).state_dict(), seed=3)


def write_vae(path: Path, state: dict[str, torch.Tensor], form: str, pack: Any) -> dict[str, torch.Tensor]:
    """With convolutions over time as converters write them, and what the file stands for."""
    if form == "rows of 256":
        return write_part(path, state, pack)
    stored = {}
    for name, weight in state.items():
        # stable-diffusion.cpp has four dimensions at most
        joined = weight.flatten(0, 1) if weight.dim() == 5 and form == "four dimensions" else weight
        stored[name] = joined.numpy(), "F16" if weight.dim() > 3 else "F32"
    write_gguf(path, stored, "wan" if form == "five dimensions" else "")
    return {name: weight.reshape(state[name].shape) for name, weight in weights_in(path, pack).items()}


@pytest.mark.parametrize("form", ["rows of 256", "five dimensions", "four dimensions"])
def test_a_vae_of_videos(form, folder, pack, wan_vae):
    weights = write_vae(folder / "wan.gguf", wan_vae, form, pack)
    assert sum(weight.dim() == 5 for weight in weights.values()) > 20
    ours, theirs = nodes.NODE_CLASS_MAPPINGS["GraftVAELoader"]().load("wan.gguf")["result"][0], comfy.sd.VAE(sd=weights)
    latent = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    picture = ours.decode(latent)
    assert picture.shape[-4:] == (5, 32, 32, 3) and picture.std() > 0.01
    assert torch.equal(picture, theirs.decode(latent))
    assert torch.equal(ours.encode(picture[0]), theirs.encode(picture[0]))


def test_incomplete_files_are_refused(folder, pack):
    """The host logs what is missing and runs on with whatever lies in that memory; an encoder may be left out."""
    state, load = small_vae(), nodes.NODE_CLASS_MAPPINGS["GraftVAELoader"]().load
    without = {name: weight for name, weight in state.items() if name != "taesd_decoder.3.conv.4.weight"}
    write_part(folder / "without.gguf", without, pack)
    with pytest.raises(Exception, match=r"incomplete.*lacks (?:first_stage_model\.)?taesd_decoder\.3\.conv\.4\.weight"):
        load("without.gguf")
    write_part(folder / "decoder.gguf", {n: w for n, w in state.items() if not n.startswith("taesd_encoder.")}, pack)
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    assert load("decoder.gguf")["result"][0].decode(latent).std() > 0.01
    assert torch.nn.Module.load_state_dict.__qualname__ == "Module.load_state_dict"


def test_a_model_patch(folder, pack, wan_vae, monkeypatch, tmp_path):
    """Qwen-Image's ControlNet, of which the host opens the file itself: loaded and sampled as the host's own."""
    tiny = MODELS["QwenImage"]
    with sizes_of(tiny) as module:
        path = write_tiny(tiny, module, "weights", tmp_path / "qwen.gguf")
        graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
        dense = dense_model(pack, path)
        width = module.img_in.weight.shape[0]
    small = partial(nodes_model_patch.QwenImageBlockWiseControlNet, num_layers=2, dim=width)
    monkeypatch.setattr(nodes_model_patch, "QwenImageBlockWiseControlNet", small)
    made = drawn(small(operations=comfy.ops.disable_weight_init).state_dict(), seed=6)
    weights = write_part(folder / "patch.gguf", made, pack)
    halves = {name: weight.half() if weight.dim() > 1 else weight for name, weight in weights.items()}
    save_file(halves, folder / "patch.safetensors")
    (ours,) = nodes.NODE_CLASS_MAPPINGS["GraftModelPatchLoader"]().load("patch.gguf")["result"]
    (theirs,) = nodes_model_patch.ModelPatchLoader().load_model_patch("patch.safetensors")
    held, wanted = ours.model.state_dict(), theirs.model.state_dict()
    assert held.keys() == wanted.keys() and held["img_in.weight"].dtype == torch.float16
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)

    vae = comfy.sd.VAE(sd=write_vae(folder / "beside.gguf", wan_vae, "five dimensions", pack))
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(7))
    apply = nodes_model_patch.QwenImageDiffsynthControlnet().diffsynth_controlnet
    pictures = [
        output_of(apply(model, patch, vae, picture, 0.5)[0], tiny) for model, patch in ((graft, ours), (dense, theirs))
    ]
    plain = output_of(dense, tiny)
    assert distance(*pictures) < 1e-5 and distance(pictures[1], plain) > 0.01
    forget()
    # the host's own loader is as it was
    with pytest.raises(FileNotFoundError):
        nodes_model_patch.ModelPatchLoader().load_model_patch("gone.safetensors")
    write_gguf(folder / "newer.gguf", {"control_layers.0.a.weight": (np.ones((8, 8), np.float32), "F16")}, "pig")
    with pytest.raises(Exception, match=r"does not know the model patch in this file: update ComfyUI \("):
        nodes.NODE_CLASS_MAPPINGS["GraftModelPatchLoader"]().load("newer.gguf")


def test_what_is_neither(folder, pack):
    write_gguf(folder / "model.gguf", {"double_blocks.0.a.weight": (np.ones((8, 8), np.float32), "F16")})
    wanted_by = {"VAE": "a VAE", "ControlNet": "a ControlNet", "ModelPatch": "a model patch"}
    for name, wanted in ((f"Graft{part}Loader", wanted) for part, wanted in wanted_by.items()):
        node = nodes.NODE_CLASS_MAPPINGS[name]()
        with pytest.raises(Exception, match=f"this is a diffusion model, not {wanted}: use Load Diffusion Model"):
            node.load("model.gguf")
        with pytest.raises(Exception, match=r"gone.gguf is not there: put it into the "):
            node.load("gone.gguf")
        assert node.VALIDATE_INPUTS(**{node.NAME: "MODEL.gguf"}) is True and node.VALIDATE_INPUTS() is True
        assert "gone.gguf is not there" in node.VALIDATE_INPUTS(**{node.NAME: "gone.gguf"})
    write_gguf(folder / "odd.gguf", {"decoder.conv_in.weight": (np.ones((8, 8, 3, 3), np.float32), "F16")}, "pig")
    with pytest.raises(Exception, match=r"\(.*odd.gguf\)"):
        nodes.NODE_CLASS_MAPPINGS["GraftVAELoader"]().load("odd.gguf")
