"""What a row of the table of tiny models says."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Noise = Callable[..., torch.Tensor]
"""Seeded normal numbers of a shape."""


def nothing(noise: Noise) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class TinyModel:
    """One of the host's classes of models, a few blocks of it, a few numbers wide.

    Attributes:
        host_class: its name in ``comfy.supported_models``.
        config: arguments of the diffusion model, beside those by which the host knows the class. Sizes that the host
            takes for granted and does not read from a file are these, too.
        latent: shape of what it samples, or shapes, where that has several parts.
        context: tokens and width of the text, or None.
        brings: what else the conditioning holds.
        shown: what the host tells the class by where the file cannot show it: a size of the real model, too wide for
            a test, or what stands in the metadata.
        within: arguments of modules, by where they are found, to which the model gives sizes of its own.
        beside: shapes of tensors in the file that are not the diffusion model's.
        named: from the state dict of the host's module to that of a file, where these differ.
        cfg: 1, or more if it takes only both conditionings at once.
        called: how to run it if it samples nothing: of the diffusion model to what it gives.
    """

    host_class: str
    config: Mapping[str, Any]
    latent: tuple[Any, ...] = ()
    context: tuple[int, int] | None = None
    brings: Callable[[Noise], dict[str, Any]] = nothing
    shown: Mapping[str, Any] = field(default_factory=dict)
    within: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    named: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    cfg: float = 1.0
    called: Callable[[torch.nn.Module, Noise], Any] | None = None


def vision(noise: Noise, tokens: int, width: int) -> types.SimpleNamespace:
    """What CLIP vision gives."""
    states = noise(1, tokens, width)
    return types.SimpleNamespace(penultimate_hidden_states=states, last_hidden_state=states, image_embeds=states[:, 0])
