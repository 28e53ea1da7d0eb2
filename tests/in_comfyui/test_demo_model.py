"""The demo model in ComfyUI: the same numbers and the same picture as `demo/` computes without it."""

from __future__ import annotations

import comfy.lora
import nodes
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from conftest import ROOT
from generation import dense_model, distance
from graft.demo import pictures
from graft.demo.wan import Wan
from safetensors.torch import load_file

MODEL = ROOT / "demo" / "graft-demo-Q8_0.gguf"
TEXT = "a red star and a blue ring on mint"
ADAPTERS = sorted((ROOT / "demo").glob("*.safetensors"))


@pytest.fixture(scope="module")
def host(pack):
    return dense_model(pack, MODEL)


@pytest.fixture(scope="module")
def ours(host):
    weights = host.model.diffusion_model.state_dict()
    model = Wan.like({name: weight.shape for name, weight in weights.items()})
    model.load_state_dict(weights)
    return model.eval()


def test_it_is_wan(host):
    assert type(host.model.model_config).__name__ == "WAN21_T2V"


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@torch.no_grad()
def test_one_forward(host, ours, size):
    x = pictures.beside_places(pictures.noise(3, 2, *size))
    times = torch.tensor([1000.0, 333.25])
    context = pictures.prompts([TEXT, ""])
    want = host.model.diffusion_model(x, times, context=context)
    assert distance(ours(x, times, context), want) < 1e-5


def test_one_picture(pack, host, ours):
    """The prompt node and KSampler (euler, simple, shift 3) against `pictures.sample`: the same pixels."""
    prompt, decode = pack("nodes.demo").GraftDemoPrompt(), pack("nodes.demo").GraftDemoDecode()
    (model,) = ModelSamplingSD3().patch(host, pictures.SHIFT)
    latent = {"samples": torch.zeros(1, 16, 1, 16, 16)}
    positive, negative = prompt.encode(TEXT)[0], prompt.encode("")[0]
    got = nodes.common_ksampler(model, 1, 20, 3.0, "euler", "simple", positive, negative, latent)[0]
    # 40 forwards in fp32 that agree within 1e-5 each; a level of 8 bits is 4e-3
    torch.testing.assert_close(decode.decode(got)[0], pictures.sample(ours, [TEXT], seed=1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_every_tensor_of_an_adapter_finds_its_layer(host, path, caplog):
    tensors = load_file(path)
    keys = comfy.lora.model_lora_keys_unet(host.model, {})
    patches = comfy.lora.load_lora(tensors, keys)
    assert "not loaded" not in caplog.text
    entries = {name.split(".lora_")[0].split(".lokr_")[0].removesuffix(".alpha") for name in tensors}
    assert len(patches) == len(entries)
    assert len(host.clone().add_patches(patches)) == len(entries)
