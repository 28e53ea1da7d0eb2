"""The way back through a frozen weight.

    y = x Wᵀ          ∂x = ∂y W          W: decoded on the way there, and again on the way back

What torch saves for a product is its weight: of a whole model that would be every layer decoded at once. Here nothing
of it is kept. The layer fetches its packed bytes a second time, since hosts that offload weights lend their memory to
the next layer, and decodes them in the same chunks as on the way there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from .layers import PackedLayer


def is_wanted(x: torch.Tensor, data: torch.Tensor) -> bool:
    """Whether a gradient has to pass through a layer to x, and its weight learns nothing itself."""
    return torch.is_grad_enabled() and x.requires_grad and not data.requires_grad and not torch.compiler.is_compiling()


def frozen(x: torch.Tensor, layer: PackedLayer, data: torch.Tensor) -> torch.Tensor:
    """What the layer makes of x, without its bias.

    Args:
        data: its weight as it was fetched.
    """
    return _Frozen.apply(x, layer, data)


class _Frozen(torch.autograd.Function):
    """The product of a layer, and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLayer, data: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        y = layer.product(x, data)
        # torch lets nobody add to a view that was made in here
        base = y._base
        return y if base is None else base if base.shape == y.shape else y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        from .layers import without_autocast

        layer: PackedLayer = ctx.layer
        data, _, release = layer.fetch(grad)
        try:
            with without_autocast(grad.device):
                return layer.input_gradient(grad, data, ctx.shape), None, None
        finally:
            release()


__all__ = ["frozen", "is_wanted"]
