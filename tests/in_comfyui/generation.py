"""Loading and sampling through ComfyUI's own functions, for the comparison of two models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import nodes
import torch
from architectures import Architecture, flux_as_wide_as_its_file, write_model

WITHOUT_DYNAMIC = {"disable_dynamic": True} if hasattr(comfy.model_patcher, "ModelPatcherDynamic") else {}
"""What references are loaded with: the plain run, also where all other models have dynamic VRAM."""


def dense_model(pack, path, disable_dynamic=True):
    """ComfyUI's own model on the dequantized weights, computing in fp32."""
    reader, scales = pack("ops.files.gguf"), pack("ops.files.scales")
    file = reader.open_gguf(path)
    weights = scales.weights_of(reader.diffusion_tensors(file), file)
    state = {name: weight.to(torch.float32) for name, weight in weights.items()}
    options = WITHOUT_DYNAMIC if disable_dynamic else {}
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32}, **options)
    model.cached_patcher_init = (dense_model, (pack, path))
    return model


@contextmanager
def both_models(
    pack: Any, architecture: Architecture, type_name: str, folder: Path
) -> Iterator[tuple[Architecture, Any, Any]]:
    """The architecture, a Graft model of a file of it in `type_name`, and ComfyUI's own; fp32, gone afterwards."""
    path = write_model(architecture, type_name, folder / f"{architecture.name}.gguf")
    with flux_as_wide_as_its_file():
        graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
        dense = dense_model(pack, path)
    yield architecture, graft, dense
    del graft, dense
    forget()
    path.unlink()


def sample(model, architecture: Architecture, steps: int = 1, cfg: float = 1.0, seed: int = 3) -> torch.Tensor:
    """A latent from ComfyUI's own KSampler."""
    latent = {"samples": torch.zeros(architecture.latent)}
    positive, negative = architecture.conditioning(1), architecture.conditioning(2)
    return nodes.common_ksampler(model, seed, steps, cfg, "euler", "simple", positive, negative, latent)[0]["samples"]


def sample_guided(guider, architecture: Architecture, steps: int = 1, seed: int = 3) -> torch.Tensor:
    """A latent from a guider that has its conditionings."""
    latent, model = torch.zeros(architecture.latent), guider.model_patcher
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    noise = comfy.sample.prepare_noise(latent, seed)
    return guider.sample(noise, latent, comfy.samplers.ksampler("euler"), sigmas)


def with_lora(model, lora: dict[str, torch.Tensor], strength: float = 1.0):
    """What the stock LoRA nodes do, without the file."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖ in fp64."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


def fingerprint(model) -> str:
    """SHA-256 of every parameter of a Graft model's layers, names included."""
    digest = hashlib.sha256()
    for name, layer in sorted(model.graft.layers.items()):
        for parameter in ("weight", "bias"):
            tensor = getattr(layer, parameter)
            if tensor is not None:
                digest.update(f"{name}.{parameter}".encode())
                digest.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def forget(*models) -> None:
    """Give the memory of these models back before the next ones are loaded."""
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models_gc()
