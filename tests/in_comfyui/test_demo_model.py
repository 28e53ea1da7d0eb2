"""The demo model in ComfyUI: the same numbers and the same picture as `demo/` computes without it."""

from __future__ import annotations

import comfy.lora
import nodes
import pytest
import torch
from conftest import ROOT
from generation import dense_model, distance
from graft.demo import pictures
from graft.demo.mmdit import MMDiT
from safetensors.torch import load_file

MODEL = ROOT / "demo" / "graft-demo-Q4_K_M.gguf"
TEXT = "a red star and a blue ring on mint"
ADAPTERS = sorted((ROOT / "demo").glob("*.safetensors"))


@pytest.fixture(scope="module")
def host(pack):
    return dense_model(pack, MODEL)


@pytest.fixture(scope="module")
def ours(host):
    weights = host.model.diffusion_model.state_dict()
    model = MMDiT.like({name: weight.shape for name, weight in weights.items()})
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@torch.no_grad()
def test_one_forward(host, ours, size):
    x = pictures.noise(3, 2, *size)
    times = torch.tensor([1000.0, 333.25])
    context, y = pictures.prompts([TEXT, ""])
    want = host.model.diffusion_model(x, times, context=context, y=y)
    assert distance(ours(x, times, context, y), want) < 1e-5


def test_one_picture(host, ours):
    """KSampler, euler, simple, against `pictures.sample`: the same pixels."""
    (context, y), (nothing, no_y) = pictures.prompt(TEXT), pictures.prompt("")
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    got = nodes.common_ksampler(
        host, 1, 20, 3.0, "euler", "simple",
        [[context, {"pooled_output": y}]], [[nothing, {"pooled_output": no_y}]], latent,
    )[0]["samples"]  # fmt: skip
    seen = (pictures.decode(got) * 255).round()
    assert (seen - pictures.sample(ours, [TEXT], seed=1).float()).abs().max() <= 1


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_every_tensor_of_an_adapter_finds_its_layer(host, path, caplog):
    tensors = load_file(path)
    keys = comfy.lora.model_lora_keys_unet(host.model, {})
    patches = comfy.lora.load_lora(tensors, keys)
    assert "not loaded" not in caplog.text
    entries = {name.split(".lora_")[0].split(".lokr_")[0].removesuffix(".alpha") for name in tensors}
    assert len(patches) == len(entries)
    assert len(host.clone().add_patches(patches)) == len(entries)
