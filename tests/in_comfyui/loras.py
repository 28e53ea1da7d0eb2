"""LoRA files for a model, in the names that trainers give, made from ComfyUI's own key map."""

from __future__ import annotations

import math

import comfy.lora
import torch

DIALECTS = {
    "native": "diffusion_model.",
    "kohya": "lora_unet_",
    "diffusers": ("transformer.", "unet."),
    "onetrainer": "lora_transformer_",
}
FACTOR_NAMES = {
    "native": ("lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "diffusers": ("lora_A.weight", "lora_B.weight"),
    "onetrainer": ("lora_down.weight", "lora_up.weight"),
}


def targets(model, dialect: str, within: tuple[str, ...]) -> dict[str, tuple[str, tuple | None]]:
    """``{name in the file: (key of the model, slice of it)}`` of the layers of `model` that lie in `within`."""
    found = {}
    for name, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        key, region = (target, None) if isinstance(target, str) else (target[0], target[1])
        inside = key.removeprefix("diffusion_model.").startswith(within) and key.endswith(".weight")
        if name.startswith(DIALECTS[dialect]) and inside:
            found[name] = (key, region)
    return found


def make_lora(
    model, shapes: dict[str, torch.Size], dialect: str, within: tuple[str, ...], rank: int = 8, seed: int = 0,
    scale: float = 0.3, dtype: torch.dtype = torch.float16,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A LoRA on every weight matrix within `within`, whose ΔW is `scale` times as large as the weight."""
    g = torch.Generator().manual_seed(seed)
    down_name, up_name = FACTOR_NAMES[dialect]
    state = {}
    for name, (key, region) in targets(model, dialect, within).items():
        # ComfyUI's map also names layers that this variant of the architecture does not have
        if len(shapes.get(key, ())) < 2:
            continue
        shape = list(shapes[key])
        if region is not None:
            shape[region[0]] = region[2]
        fan_in = math.prod(shape[1:])
        down = torch.randn(rank, *shape[1:], generator=g)
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=g)
        size = scale / (fan_in * rank) ** 0.5
        state[f"{name}.{down_name}"] = (down * size**0.5).to(dtype)
        state[f"{name}.{up_name}"] = (up * size**0.5).to(dtype)
        if dialect in ("kohya", "onetrainer"):
            state[f"{name}.alpha"] = torch.tensor(rank / 2.0)
    return state
