"""Five kinds of activations on which int8 is judged: `[M, K]`, seeded. `import activations` from any test."""

from __future__ import annotations

import torch


def gaussian(m: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


def with_channels(m: int, k: int, factor: float) -> torch.Tensor:
    """Eight channels that are always large."""
    x = gaussian(m, k)
    x[:, torch.randperm(k, generator=torch.Generator().manual_seed(1))[:8]] *= factor
    return x


def with_tokens(m: int, k: int) -> torch.Tensor:
    """A few rows that are large as a whole."""
    x = gaussian(m, k)
    x[::50] *= 300
    return x


def with_spikes(m: int, k: int) -> torch.Tensor:
    """In every row a number or two that are large, anywhere."""
    g = torch.Generator().manual_seed(2)
    return gaussian(m, k) * torch.where(torch.rand(m, k, generator=g) < 1.5 / k, 300.0, 1.0)


KINDS = {
    "gaussian": gaussian,
    "channels ×20": lambda m, k: with_channels(m, k, 20),
    "channels ×300": lambda m, k: with_channels(m, k, 300),
    "tokens ×300": with_tokens,
    "spikes ×300": with_spikes,
}
