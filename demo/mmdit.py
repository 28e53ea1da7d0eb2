"""Stable Diffusion 3's MMDiT at any size, with the parameter names that ComfyUI detects it by.

Written after the paper (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 4) with the query
and key norms of SD 3.5. Two streams of tokens, words and picture, each with its own weights, meet in one
attention per block; timestep and pooled prompt steer every block through adaptive layer norms.

The layers come from an `operations` namespace (``Linear``, ``Conv2d``), as in ComfyUI, so that layers which
hold quantized bytes can stand in for those of `torch.nn`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD = 64  # channels of an attention head: SD3 has as many heads as blocks, and 64 channels for each
FREQUENCIES = 256
EPS = 1e-6


def sinusoids(positions: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each ``[n, channels / 2]``, of `positions` ``[n]`` at wavelengths of 2π to 20000π."""
    rates = torch.exp(torch.arange(channels // 2, device=positions.device) * (-math.log(10000) / (channels // 2)))
    angles = positions[:, None].float() * rates
    return angles.cos(), angles.sin()


def position_grid(rows: int, columns: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Sinusoidal positions ``[rows * columns, channels]``; the shorter side spans 0..15 around 7.5.

    The same grid that ComfyUI computes for a file without `pos_embed`, so that pictures of any size work.
    """
    shorter = min(rows, columns)
    half_height, half_width = 7.5 * rows / shorter, 7.5 * columns / shorter
    y = torch.linspace(7.5 - half_height, 7.5 + half_height, rows, device=device)
    x = torch.linspace(7.5 - half_width, 7.5 + half_width, columns, device=device)
    cos_y, sin_y = sinusoids(y.repeat_interleave(columns), channels // 2)
    cos_x, sin_x = sinusoids(x.repeat(rows), channels // 2)
    return torch.cat([sin_x, cos_x, sin_y, cos_y], dim=1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of x ``[batch, tokens, hidden]`` with shift and scale ``[batch, hidden]`` for each picture."""
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


class RMSNorm(nn.Module):
    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), EPS)


class Attention(nn.Module):
    """One stream's share of the joint attention: what goes in and, unless it ends here, what comes out."""

    def __init__(self, hidden: int, last: bool, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.qkv = operations.Linear(hidden, 3 * hidden, **factory)
        if not last:
            self.proj = operations.Linear(hidden, hidden, **factory)
        self.ln_q = RMSNorm(HEAD, **factory)
        self.ln_k = RMSNorm(HEAD, **factory)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, each ``[batch, heads, tokens, HEAD]``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        return self.ln_q(q), self.ln_k(k), v


class Mlp(nn.Module):
    def __init__(self, hidden: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(hidden, 4 * hidden, **factory)
        self.fc2 = operations.Linear(4 * hidden, hidden, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class StreamBlock(nn.Module):
    """One stream in one block; `last`: its tokens are not needed afterwards, it only gives keys and values."""

    def __init__(self, hidden: int, last: bool, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.last = last
        self.parts = 2 if last else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(hidden, self.parts * hidden, **factory))
        self.attn = Attention(hidden, last, operations, **factory)
        if not last:
            self.mlp = Mlp(hidden, operations, **factory)

    def modulation(self, steer: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale[, gate] of the attention[; shift, scale, gate of the MLP], each ``[batch, hidden]``."""
        return self.adaLN_modulation(steer).chunk(self.parts, dim=1)

    def finish(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = parts
        x = x + gate[:, None] * self.attn.proj(attended)
        return x + mlp_gate[:, None] * self.mlp(modulated_norm(x, mlp_shift, mlp_scale))


class JointBlock(nn.Module):
    def __init__(self, hidden: int, last: bool, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.context_block = StreamBlock(hidden, last, operations, **factory)
        self.x_block = StreamBlock(hidden, False, operations, **factory)

    def forward(self, context: Tensor, x: Tensor, steer: Tensor) -> tuple[Tensor, Tensor]:
        words, picture = self.context_block, self.x_block
        word_parts, picture_parts = words.modulation(steer), picture.modulation(steer)
        from_words = words.attn.project(modulated_norm(context, *word_parts[:2]))
        from_picture = picture.attn.project(modulated_norm(x, *picture_parts[:2]))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(from_words, from_picture, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [batch, tokens, hidden]
        at_words, at_picture = attended.split([context.shape[1], x.shape[1]], dim=1)
        if not words.last:
            context = words.finish(context, at_words, word_parts)
        return context, picture.finish(x, at_picture, picture_parts)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, patch: int, hidden: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = operations.Conv2d(channels, hidden, kernel_size=patch, stride=patch, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [batch, tokens, hidden]


class VectorEmbed(nn.Module):
    def __init__(self, channels: int, hidden: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(channels, hidden, **factory), nn.SiLU(), operations.Linear(hidden, hidden, **factory)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, outputs: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.linear = operations.Linear(hidden, outputs, **factory)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(hidden, 2 * hidden, **factory))

    def forward(self, x: Tensor, steer: Tensor) -> Tensor:
        return self.linear(modulated_norm(x, *self.adaLN_modulation(steer).chunk(2, dim=1)))


class MMDiT(nn.Module):
    """The whole transformer: `depth` blocks, `depth` heads, ``64 * depth`` channels.

    Args:
        depth: blocks; ComfyUI deduces it as hidden / 64.
        channels: of the latent picture (SD3: 16).
        patch: side of the square of latent cells that makes a token.
        context_dim: channels of a word.
        pooled_dim: channels of the pooled prompt.
        operations: where `Linear` and `Conv2d` come from.
        factory: ``dtype`` and ``device`` for them.
    """

    def __init__(
        self,
        depth: int = 4,
        channels: int = 16,
        patch: int = 2,
        context_dim: int = 256,
        pooled_dim: int = 256,
        operations: Any = nn,
        **factory: Any,
    ) -> None:
        super().__init__()
        hidden = HEAD * depth
        self.patch, self.channels, self.hidden = patch, channels, hidden
        self.x_embedder = PatchEmbed(channels, patch, hidden, operations, **factory)
        self.t_embedder = VectorEmbed(FREQUENCIES, hidden, operations, **factory)
        self.y_embedder = VectorEmbed(pooled_dim, hidden, operations, **factory)
        self.context_embedder = operations.Linear(context_dim, hidden, **factory)
        self.joint_blocks = nn.ModuleList(
            JointBlock(hidden, last=i == depth - 1, operations=operations, **factory) for i in range(depth)
        )
        self.final_layer = FinalLayer(hidden, patch * patch * channels, operations, **factory)

    @classmethod
    def like(cls, shapes: Mapping[str, torch.Size | tuple[int, ...]], operations: Any = nn, **factory: Any) -> MMDiT:
        """The model whose parameters have these shapes, e.g. those of a GGUF file."""
        hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
        return cls(
            hidden // HEAD, channels, patch, shapes["context_embedder.weight"][1],
            shapes["y_embedder.mlp.0.weight"][1], operations, **factory,
        )  # fmt: skip

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Tensor:
        """The velocity, noise minus picture, like `x`.

        Args:
            x: noisy latent ``[batch, channels, height, width]``; height and width multiples of `patch`.
            timesteps: 1000 times the share of noise in `x`, ``[batch]``.
            context: words ``[batch, words, context_dim]``.
            y: pooled prompt ``[batch, pooled_dim]``.
        """
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        frequencies = torch.cat(sinusoids(timesteps, FREQUENCIES), dim=1).to(x.dtype)
        steer = self.t_embedder(frequencies) + self.y_embedder(y)
        tokens = self.x_embedder(x) + position_grid(rows, columns, self.hidden, x.device).to(x.dtype)
        words = self.context_embedder(context)
        for block in self.joint_blocks:
            words, tokens = block(words, tokens, steer)
        patches = self.final_layer(tokens, steer).unflatten(1, (rows, columns))
        patches = patches.unflatten(-1, (self.patch, self.patch, self.channels))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
