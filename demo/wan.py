"""Wan 2.1's diffusion transformer at any size, with the parameter names that ComfyUI detects it by.

Written after the report (Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models",
section 4) and the names of its released weights. One stream of picture tokens: self-attention with rotary
positions, cross-attention to the words, MLP. The timestep steers every block through one shared projection
and a small table of the block's own. A picture is a video of one frame.

The layers come from an `operations` namespace (``Linear``, ``Conv3d``), as in ComfyUI, so that layers which
hold quantized bytes can stand in for those of `torch.nn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD = 128  # channels of an attention head
PATCH = 2  # latent cells on a side of a token
FREQUENCIES = 256  # channels of the timestep's sinusoids
WORD = 4096  # channels of a word, as UMT5-XXL has them
EPS = 1e-6


def sinusoids(timesteps: Tensor) -> Tensor:
    """Cosines, then sines ``[n, FREQUENCIES]`` of `timesteps` ``[n]`` at wavelengths from 2π to 20000π."""
    half = FREQUENCIES // 2
    rates = 10000 ** -(torch.arange(half, device=timesteps.device, dtype=torch.float32) / half)
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@cache
def rotations(frames: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, each ``[frames * rows * columns, HEAD / 2]``.

    A third of a head's pairs of channels, rounded down, turns with the row, as many with the column, the rest
    with the frame; pair i of p turns by ``10000^(-i/p)`` a position.
    """
    third = HEAD // 2 // 3
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).view(-1, 3).double()
    angles = torch.cat(
        [
            grid[:, axis, None] * 10000 ** -(torch.arange(pairs).double() / pairs)
            for axis, pairs in enumerate((HEAD // 2 - 2 * third, third, third))
        ],
        dim=1,
    )
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbouring channels of x ``[batch, heads, tokens, HEAD]`` by its angle."""
    cos, sin = turn
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of x ``[batch, tokens, width]`` with shift and scale ``[batch, 1, width]``."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


class Attention(nn.Module):
    """Attention of x ``[batch, tokens, width]`` to itself or to a context, with RMS norms on queries and keys."""

    def __init__(self, width: int, operations: Any) -> None:
        super().__init__()
        self.q = operations.Linear(width, width)
        self.k = operations.Linear(width, width)
        self.v = operations.Linear(width, width)
        self.o = operations.Linear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=EPS)
        self.norm_k = nn.RMSNorm(width, eps=EPS)

    def forward(self, x: Tensor, context: Tensor | None = None, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for y in (self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source))
        )
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; the first and the last modulated and gated by the timestep."""

    def __init__(self, width: int, mlp: int, operations: Any) -> None:
        super().__init__()
        self.self_attn = Attention(width, operations)
        self.norm3 = nn.LayerNorm(width, eps=EPS)
        self.cross_attn = Attention(width, operations)
        self.ffn = nn.Sequential(
            operations.Linear(width, mlp), nn.GELU(approximate="tanh"), operations.Linear(mlp, width)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, width))

    def forward(self, x: Tensor, steer: Tensor, context: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """One more time over x ``[batch, tokens, width]``, steered by ``[batch, 6, width]``."""
        shift, scale, gate, shift2, scale2, gate2 = (self.modulation + steer).chunk(6, dim=1)
        x = torch.addcmul(x, self.self_attn(modulated_norm(x, shift, scale), turn=turn), gate)
        x = x + self.cross_attn(self.norm3(x), context)
        return torch.addcmul(x, self.ffn(modulated_norm(x, shift2, scale2)), gate2)


class Head(nn.Module):
    """From tokens ``[batch, tokens, width]`` to patches ``[batch, tokens, PATCH * PATCH * channels]``."""

    def __init__(self, width: int, channels: int, operations: Any) -> None:
        super().__init__()
        self.head = operations.Linear(width, PATCH * PATCH * channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, width))

    def forward(self, x: Tensor, steer: Tensor) -> Tensor:
        shift, scale = (self.modulation + steer[:, None]).chunk(2, dim=1)
        return self.head(modulated_norm(x, shift, scale))


class Wan(nn.Module):
    """The transformer.

    Args:
        width: channels of a token, a multiple of HEAD: ComfyUI takes as many heads as go into it.
        mlp: channels inside an MLP.
        depth: blocks.
        channels_in: channels of a latent with what is laid beside it.
        channels: channels of the velocity.
        operations: where layers come from.
    """

    def __init__(
        self,
        width: int = 256,
        mlp: int = 512,
        depth: int = 4,
        channels_in: int = 32,
        channels: int = 16,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        self.patch_embedding = operations.Conv3d(channels_in, width, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(
            operations.Linear(WORD, width), nn.GELU(approximate="tanh"), operations.Linear(width, width)
        )
        self.time_embedding = nn.Sequential(
            operations.Linear(FREQUENCIES, width), nn.SiLU(), operations.Linear(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, mlp, operations) for _ in range(depth))
        self.head = Head(width, channels, operations)

    @classmethod
    def like(cls, shapes: Mapping[str, Sequence[int]], operations: Any = nn) -> Wan:
        """The model that parameters of these shapes belong to."""
        width, channels_in = shapes["patch_embedding.weight"][:2]
        depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        channels = shapes["head.head.weight"][0] // PATCH**2
        return cls(width, shapes["blocks.0.ffn.0.weight"][0], depth, channels_in, channels, operations)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The velocity ``[batch, channels, frames, rows, columns]`` of a noisy latent.

        Args:
            x: ``[batch, channels_in, frames, rows, columns]``, rows and columns multiples of PATCH.
            timesteps: ``[batch]``, 1000 times the share of noise.
            context: ``[batch, words, WORD]``.
        """
        tokens = self.patch_embedding(x)
        frames, rows, columns = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        time = self.time_embedding(sinusoids(timesteps).to(x.dtype))
        steer = self.time_projection(time).unflatten(1, (6, -1))
        context, turn = self.text_embedding(context), rotations(frames, rows, columns)
        for block in self.blocks:
            tokens = block(tokens, steer, context, turn)
        patches = self.head(tokens, time).view(len(x), frames, rows, columns, PATCH, PATCH, -1)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), -1, frames, PATCH * rows, PATCH * columns)
