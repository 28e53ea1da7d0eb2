"""Writes a toy CLIP text encoder and a toy VAE for Forge's Flux, with Forge's own classes; run by Forge's own Python.

    python toys.py FOLDER
"""

from __future__ import annotations

from pathlib import Path

import bootstrap
import torch
from backend.nn.clip import IntegratedCLIP
from backend.nn.vae import IntegratedAutoencoderKL
from safetensors.torch import save_file
from toy_extension.sizes import CLIP, VAE
from transformers import CLIPTextConfig, CLIPTextModel

FOLDER = Path(bootstrap.ARGUMENTS[0])
FLUX = Path("backend/huggingface/black-forest-labs/FLUX.1-dev")


def save(state: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous().clone() for k, v in state.items()}, str(path))


def main() -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig.from_pretrained(str(FLUX / "text_encoder"))
    config.update(CLIP)
    clip = IntegratedCLIP(CLIPTextModel, config, add_text_projection=True).state_dict()
    text = {k.removeprefix("transformer."): v for k, v in clip.items() if k.startswith("transformer.text_model.")}
    save(text, FOLDER / "text_encoder" / "toy-clip.safetensors")
    vae = IntegratedAutoencoderKL.from_config({**IntegratedAutoencoderKL.load_config(str(FLUX / "vae")), **VAE})
    save(vae.state_dict(), FOLDER / "VAE" / "toy-vae.safetensors")


main()
