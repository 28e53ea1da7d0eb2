"""A small SD3 model in both forms, loaded once for the tests that ask about behaviour and not about numbers."""

from __future__ import annotations

import comfy.taesd.taesd
import pytest
import torch
from architectures import ARCHITECTURES, write_model
from generation import dense_model

SD3 = ARCHITECTURES["sd3"]


@pytest.fixture(scope="module")
def sd3(pack, folders):
    """``(graft, dense)`` of one Q4_K file, computing in fp32."""
    path = write_model(SD3, "Q4_K", folders / "unet_gguf" / "sd3-Q4_K.gguf")
    return pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32"), dense_model(pack, path)


@pytest.fixture(scope="module")
def stock(pack, sd3, folders):
    """ComfyUI's own model as it loads any: with dynamic VRAM where that is on."""
    return dense_model(pack, folders / "unet_gguf" / "sd3-Q4_K.gguf", disable_dynamic=False)


@pytest.fixture(scope="module")
def loras(sd3):
    """Two LoRAs of different rank, dtype and naming."""
    from loras import make_lora

    shapes = {key: value.shape for key, value in sd3[1].model.state_dict().items()}
    return (
        make_lora(sd3[1].model, shapes, "native", SD3.lora_layers, rank=8, seed=1),
        make_lora(sd3[1].model, shapes, "kohya", SD3.lora_layers, rank=20, seed=2, dtype=torch.bfloat16),
    )


def small_vae() -> dict[str, torch.Tensor]:
    """Seeded weights of the small VAE for previews, for SD3's latents."""
    g = torch.Generator().manual_seed(2)
    state = comfy.taesd.taesd.TAESD(latent_channels=16).state_dict()
    for weight in state.values():
        if weight.dim():
            weight.copy_(torch.randn(weight.shape, generator=g) / max(1, weight[0].numel()) ** 0.5)
    return state
