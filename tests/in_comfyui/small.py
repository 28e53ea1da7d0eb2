"""A small SD3 model in both forms, loaded once for the tests that ask about behaviour and not about numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.taesd.taesd
import pytest
import torch
from architectures import ARCHITECTURES, write_model
from generation import dense_model
from gguf_samples import write_gguf

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


def drawn(shapes: dict[str, torch.Tensor], seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Seeded weights of these shapes, scaled by their inputs; those of norms are near 1."""
    g, state = torch.Generator().manual_seed(seed), {}
    for name, like in shapes.items():
        weight = torch.randn(like.shape, generator=g)
        flat = weight.dim() < 2 or "gamma" in name
        one = flat and name.endswith(("weight", "gamma", "scale"))
        state[name] = weight * scale / (10 if flat else weight[0].numel() ** 0.5) + one
    return state


def write_part(path: Path, state: dict[str, torch.Tensor], pack: Any) -> dict[str, torch.Tensor]:
    """A file in Q8_0, rows that fill no blocks folded into rows of 256, and what it stands for."""
    kinds = {name: "Q8_0" if weight.dim() > 1 else "F32" for name, weight in state.items()}
    stored = {name: (weight.reshape(weight.shape or (1,)).numpy(), kinds[name]) for name, weight in state.items()}
    write_gguf(path, stored, "pig")
    return weights_in(path, pack)


def weights_in(path: Path, pack: Any) -> dict[str, torch.Tensor]:
    """What a file stands for, in fp32."""
    file = pack("ops.files.gguf").open_gguf(path)
    weights = pack("ops.files.scales").weights_of(file.tensors, file)
    return {name: weight.to(torch.float32) for name, weight in weights.items()}
