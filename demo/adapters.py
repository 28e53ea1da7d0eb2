"""Trainable adapters for the demo model, each saved in a dialect that people meet in the wild."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # of every picture block
_DIFFUSERS = {
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a layer's weight that one entry of the adapter's file is about."""

    layer: str
    key: str
    rows: int
    columns: int


def kohya_parts(weights: dict[str, Tensor]) -> list[Part]:
    """One part a layer, its native path flattened: ``lora_unet_joint_blocks_0_x_block_attn_qkv``."""
    return [
        Part(layer, "lora_unet_" + layer.replace(".", "_"), *weights[layer + ".weight"].shape)
        for layer, _, _ in _targets(weights)
    ]


def diffusers_parts(weights: dict[str, Tensor]) -> list[Part]:
    """Diffusers' names, which split the fused qkv: ``transformer.transformer_blocks.0.attn.to_q``."""
    parts = []
    for layer, block, target in _targets(weights):
        rows, columns = weights[layer + ".weight"].shape
        names = _DIFFUSERS[target]
        prefix = f"transformer.transformer_blocks.{block}."
        parts += [Part(layer, prefix + name, rows // len(names), columns) for name in names]
    return parts


def _targets(weights: dict[str, Tensor]) -> list[tuple[str, int, str]]:
    """(layer, block, target) of every layer that adapters change."""
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("joint_blocks."))
    return [(f"joint_blocks.{i}.x_block.{target}", i, target) for i in range(depth) for target in TARGETS]


class Adapter(nn.Module):
    """A change to some weights of a frozen model."""

    parts: list[Part]

    def delta(self, index: int) -> Tensor:
        """The change of part `index`, ``[rows, columns]``."""
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
        """The changed weights by parameter name; parts of one layer follow one another in its rows."""
        deltas: dict[str, list[Tensor]] = {}
        for index, part in enumerate(self.parts):
            deltas.setdefault(part.layer + ".weight", []).append(self.delta(index))
        return {name: weights[name] + strength * torch.cat(delta) for name, delta in deltas.items()}


class LoRA(Adapter):
    """``B A``, both of a small rank: kohya's dialect with alpha, or diffusers' without."""

    def __init__(self, weights: dict[str, Tensor], rank: int, diffusers: bool) -> None:
        super().__init__()
        self.diffusers, self.rank = diffusers, rank
        self.parts = (diffusers_parts if diffusers else kohya_parts)(weights)
        self.down = nn.ParameterList(torch.randn(rank, part.columns) / part.columns**0.5 for part in self.parts)
        self.up = nn.ParameterList(torch.zeros(part.rows, rank) for part in self.parts)
        self.alpha = float(rank if diffusers else 2 * rank)

    def delta(self, index: int) -> Tensor:
        return self.alpha / self.rank * self.up[index] @ self.down[index]

    def factors(self) -> dict[str, nn.Parameter]:
        down, up = ("lora_A", "lora_B") if self.diffusers else ("lora_down", "lora_up")
        factors = {f"{part.key}.{down}.weight": a for part, a in zip(self.parts, self.down, strict=True)}
        return factors | {f"{part.key}.{up}.weight": b for part, b in zip(self.parts, self.up, strict=True)}

    def constants(self) -> dict[str, Tensor]:
        return {} if self.diffusers else {part.key + ".alpha": torch.tensor(self.alpha) for part in self.parts}


class LoKr(Adapter):
    """``w1 ⊗ w2``, both in full, in LyCORIS' dialect; w1 is small and square."""

    def __init__(self, weights: dict[str, Tensor], factor: int) -> None:
        super().__init__()
        self.parts = kohya_parts(weights)
        self.w1 = nn.ParameterList(torch.randn(factor, factor) / factor**0.5 for _ in self.parts)
        self.w2 = nn.ParameterList(torch.zeros(part.rows // factor, part.columns // factor) for part in self.parts)

    def delta(self, index: int) -> Tensor:
        return torch.kron(self.w1[index], self.w2[index])

    def factors(self) -> dict[str, nn.Parameter]:
        factors = {part.key + ".lokr_w1": w1 for part, w1 in zip(self.parts, self.w1, strict=True)}
        return factors | {part.key + ".lokr_w2": w2 for part, w2 in zip(self.parts, self.w2, strict=True)}

    def constants(self) -> dict[str, Tensor]:
        return {part.key + ".alpha": torch.tensor(1.0) for part in self.parts}  # ignored: both factors are full


def adapter_for(style: str, weights: dict[str, Tensor]) -> Adapter:
    """The kind of adapter that each style is trained as."""
    if style == "neon":
        return LoRA(weights, rank=16, diffusers=False)
    if style == "blueprint":
        return LoRA(weights, rank=16, diffusers=True)
    if style == "linocut":
        return LoKr(weights, factor=4)
    raise ValueError(f"there is no adapter for the style {style!r}: choose neon, blueprint or linocut")
