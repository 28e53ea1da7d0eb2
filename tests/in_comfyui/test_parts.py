"""VAEs, ControlNets and model patches in GGUF against the host's own on the same weights, dequantized."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import comfy.sd
import folder_paths
import nodes
import numpy as np
import pytest
import torch
from comfy_extras import nodes_model_patch
from gguf_samples import write_gguf
from small import small_vae


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    folder = folders / "parts"
    folder.mkdir()
    for key in ("graft_vae_gguf", "graft_controlnet_gguf", "graft_model_patch_gguf"):
        paths, extensions = folder_paths.folder_names_and_paths[key]
        folder_paths.folder_names_and_paths[key] = ([str(folder), *paths], extensions)
    return folder


def written(path: Path, state: dict[str, torch.Tensor], pack: Any) -> dict[str, torch.Tensor]:
    """A file in Q8_0, and what it stands for."""
    kinds = {name: "Q8_0" if weight.dim() > 1 else "F32" for name, weight in state.items()}
    stored = {name: (weight.reshape(weight.shape or (1,)).numpy(), kinds[name]) for name, weight in state.items()}
    write_gguf(path, stored, "pig")
    file = pack("ops.files.gguf").open_gguf(path)
    weights = pack("ops.files.scales").weights_of(file.tensors, file)
    assert any(hasattr(weight, "packed") for weight in weights.values())
    return {name: weight.to(torch.float32) for name, weight in weights.items()}


def test_a_vae(folder, pack):
    weights = written(folder / "vae.gguf", small_vae(), pack)
    node = nodes.NODE_CLASS_MAPPINGS["GraftVAELoader"]
    assert "vae.gguf" in node.INPUT_TYPES()["required"]["vae_name"][0]
    shown = node().load("vae.gguf")
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    picture = shown["result"][0].decode(latent)
    assert torch.equal(picture, comfy.sd.VAE(sd=weights).decode(latent)) and picture.std() > 0.01
    assert "Q8_0" in shown["ui"]["text"][0]


def test_incomplete_files_are_refused(folder, pack):
    """The host logs what is missing and runs on with whatever lies in that memory; an encoder may be left out."""
    state, load = small_vae(), nodes.NODE_CLASS_MAPPINGS["GraftVAELoader"]().load
    without = {name: weight for name, weight in state.items() if name != "taesd_decoder.3.conv.4.weight"}
    written(folder / "without.gguf", without, pack)
    with pytest.raises(Exception, match=r"incomplete.*lacks (?:first_stage_model\.)?taesd_decoder\.3\.conv\.4\.weight"):
        load("without.gguf")
    written(folder / "decoder.gguf", {n: w for n, w in state.items() if not n.startswith("taesd_encoder.")}, pack)
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    assert load("decoder.gguf")["result"][0].decode(latent).std() > 0.01
    assert torch.nn.Module.load_state_dict.__qualname__ == "Module.load_state_dict"


def test_a_controlnet(folder, pack):
    """The host's own, on the weights that the file stands for."""
    net = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, hint_channels=3, model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[1, 1], transformer_depth_middle=1, num_heads=8, use_spatial_transformer=True,
        context_dim=768, legacy=False, operations=comfy.ops.disable_weight_init, dtype=torch.float32, device="meta",
    )  # fmt: skip
    g = torch.Generator().manual_seed(5)
    state = {f"control_model.{k}": torch.randn(w.shape, generator=g) for k, w in net.state_dict().items()}
    weights = written(folder / "control.gguf", state, pack)
    (ours,) = nodes.NODE_CLASS_MAPPINGS["GraftControlNetLoader"]().load("control.gguf")["result"]
    theirs = comfy.controlnet.load_controlnet_state_dict(dict(weights))
    assert type(ours) is type(theirs)
    got, want = (control.control_model.state_dict() for control in (ours, theirs))
    assert got.keys() == want.keys() and len(want) > 100
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_model_patch(folder, pack, monkeypatch):
    """Qwen-Image's ControlNet, of which the host opens the file itself."""
    small = partial(nodes_model_patch.QwenImageBlockWiseControlNet, num_layers=2, dim=64)
    monkeypatch.setattr(nodes_model_patch, "QwenImageBlockWiseControlNet", small)
    made = small(operations=comfy.ops.disable_weight_init).state_dict()
    g = torch.Generator().manual_seed(6)
    weights = written(folder / "patch.gguf", {k: torch.randn(w.shape, generator=g) / 8 for k, w in made.items()}, pack)
    shown = nodes.NODE_CLASS_MAPPINGS["GraftModelPatchLoader"]().load("patch.gguf")
    held = shown["result"][0].model.state_dict()
    assert held.keys() == weights.keys() and held["img_in.weight"].dtype == torch.float16
    assert all(torch.equal(held[name].half(), weight.half()) for name, weight in weights.items())
    model = shown["result"][0].model
    x, y = (torch.randn(1, 4, 64, generator=g) for _ in "xy")
    assert model.control_block(x, y, 1).isfinite().all()
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
