"""Trainable adapters for the demo model, each saved in a dialect that people meet in the wild."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def targets(weights: dict[str, Tensor]) -> list[str]:
    """The layers that adapters change: every linear one of the blocks, and the head."""
    return [
        name.removesuffix(".weight")
        for name, weight in weights.items()
        if name.startswith(("blocks.", "head.")) and name.endswith(".weight") and weight.dim() == 2
    ]


def kohya(layer: str) -> str:
    """``lora_unet_blocks_0_self_attn_q``."""
    return "lora_unet_" + layer.replace(".", "_")


def peft(layer: str) -> str:
    """``diffusion_model.blocks.0.self_attn.q``, as most trainers for Wan write."""
    return "diffusion_model." + layer


class Adapter(nn.Module):
    """A change to some weights of a frozen model."""

    layers: list[str]

    def delta(self, index: int) -> Tensor:
        """The change of the weight of layer `index`."""
        raise NotImplementedError

    def factors(self) -> dict[str, nn.Parameter]:
        """What learns, by its name in the file."""
        raise NotImplementedError

    def constants(self) -> dict[str, Tensor]:
        """What else the file holds."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The file, by name."""
        return {name: factor.detach() for name, factor in self.factors().items()} | self.constants()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take the factors from a file's tensors."""
        with torch.no_grad():
            for name, factor in self.factors().items():
                factor.copy_(tensors[name])

    def changed(self, weights: dict[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
        """The changed weights by parameter name."""
        names = [layer + ".weight" for layer in self.layers]
        return {name: weights[name] + strength * self.delta(index) for index, name in enumerate(names)}


class LoRA(Adapter):
    """``B A``, both of a small rank: kohya's dialect with alpha, or PEFT's without."""

    def __init__(self, weights: dict[str, Tensor], rank: int, dialect: str) -> None:
        super().__init__()
        self.layers, self.rank, self.dialect = targets(weights), rank, dialect
        shapes = [weights[layer + ".weight"].shape for layer in self.layers]
        # the same start for both: what alpha does in one dialect lies in the factors of the other
        start = 1 if dialect == "kohya" else 2
        self.down = nn.ParameterList(torch.randn(rank, columns) * start / columns**0.5 for _, columns in shapes)
        self.up = nn.ParameterList(torch.zeros(rows, rank) for rows, _ in shapes)
        self.alpha = float(2 * rank if dialect == "kohya" else rank)

    def delta(self, index: int) -> Tensor:
        return self.alpha / self.rank * self.up[index] @ self.down[index]

    def factors(self) -> dict[str, nn.Parameter]:
        name, down, up = (kohya, "lora_down", "lora_up") if self.dialect == "kohya" else (peft, "lora_A", "lora_B")
        factors = {f"{name(layer)}.{down}.weight": a for layer, a in zip(self.layers, self.down, strict=True)}
        return factors | {f"{name(layer)}.{up}.weight": b for layer, b in zip(self.layers, self.up, strict=True)}

    def constants(self) -> dict[str, Tensor]:
        if self.dialect != "kohya":
            return {}
        return {kohya(layer) + ".alpha": torch.tensor(self.alpha) for layer in self.layers}


class LoKr(Adapter):
    """``w1 ⊗ w2``, both in full, in LyCORIS' dialect; w1 is small and square."""

    def __init__(self, weights: dict[str, Tensor], factor: int) -> None:
        super().__init__()
        self.layers = targets(weights)
        shapes = [weights[layer + ".weight"].shape for layer in self.layers]
        self.w1 = nn.ParameterList(torch.randn(factor, factor) / factor**0.5 for _ in shapes)
        self.w2 = nn.ParameterList(torch.zeros(rows // factor, columns // factor) for rows, columns in shapes)

    def delta(self, index: int) -> Tensor:
        return torch.kron(self.w1[index], self.w2[index])

    def factors(self) -> dict[str, nn.Parameter]:
        factors = {kohya(layer) + ".lokr_w1": w1 for layer, w1 in zip(self.layers, self.w1, strict=True)}
        return factors | {kohya(layer) + ".lokr_w2": w2 for layer, w2 in zip(self.layers, self.w2, strict=True)}

    def constants(self) -> dict[str, Tensor]:
        return {kohya(layer) + ".alpha": torch.tensor(1.0) for layer in self.layers}  # ignored: both factors are full


def adapter_for(style: str, weights: dict[str, Tensor]) -> Adapter:
    """The kind of adapter that each style is trained as."""
    if style == "neon":
        return LoRA(weights, rank=16, dialect="kohya")
    if style == "blueprint":
        return LoRA(weights, rank=16, dialect="peft")
    if style == "linocut":
        return LoKr(weights, factor=4)
    raise ValueError(f"there is no adapter for the style {style!r}: choose neon, blueprint or linocut")
