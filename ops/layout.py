"""Where a layer keeps its channels, so that an adapter's form is written once for Linear and Conv."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .layers import PackedLayer

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Layout:
    """The activations of one layer: ``[..., K]`` for Linear, ``[B, C, *space]`` for Conv1d/2d/3d.

    Attributes:
        axis: which one holds the channels, counted from the end.
        kernel: the layer's kernel size; empty for Linear.
    """

    def __init__(self, layer: PackedLayer) -> None:
        self.layer = layer
        self.kernel = tuple(layer.logical_shape[2:])
        self.axis = -1 - len(self.kernel)

    def own(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The layer's own operation (its stride, padding, dilation) with ``[n, C · k]`` weights, any C."""
        return self.layer.compute_dense(x, weight.to(x).reshape(weight.shape[0], -1, *self.kernel))

    def mix(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """``[n, C]`` over the channels: a matmul, or a 1×1 convolution."""
        if not self.kernel:
            return F.linear(x, matrix.to(x))
        return _CONVS[len(self.kernel)](x, matrix.to(x).reshape(*matrix.shape, *(1,) * len(self.kernel)))

    def add_mixed(self, y: torch.Tensor, t: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """y with ``mix(t, matrix)`` added, in one pass over y where it is a matmul; y may be written to."""
        if self.kernel or y.dim() < 2:
            return y.add_(self.mix(t, matrix))
        return y.flatten(0, -2).addmm_(t.flatten(0, -2), matrix.to(y).t()).view(y.shape)

    def add_in_blocks(self, y: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """y with its channels times a block-diagonal ``[number, b, b]`` added; y may be written to."""
        last = y.movedim(self.axis, -1)
        flat = last.reshape(-1, *blocks.shape[:2])
        change = torch.bmm(flat.transpose(0, 1), blocks.to(y)).transpose(0, 1)
        if not self.kernel:
            return flat.add_(change).view(y.shape)
        return y.add_(change.reshape(last.shape).movedim(-1, self.axis))

    def spread(self, vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``[C]`` in x's dtype and place, to multiply x's channels with."""
        return vector.to(x).reshape(-1, *(1,) * len(self.kernel))

    def narrow(self, x: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """A view of some of x's channels."""
        return x.narrow(self.axis, start, length)

    def grouped(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """``[..., c · d] -> [..., c, d]``, or ``[B, c · d, *space] -> [B · c, d, *space]``, for `own` and `mix`."""
        if not self.kernel:
            return x.unflatten(-1, (groups, -1))
        return x.reshape(x.shape[0] * groups, -1, *x.shape[2:])

    def across(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """``[n, c]`` over the groups of a `grouped` x: ``[..., c, b] -> [..., n, b]``, or the same with space."""
        groups = matrix.shape[1]
        if not self.kernel:
            return torch.matmul(matrix.to(x), x)
        rest = x.shape[1:]
        mixed = torch.matmul(matrix.to(x), x.reshape(-1, groups, rest.numel()))
        return mixed.reshape(-1, *rest)

    def joined(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """The reverse of `grouped`."""
        if not self.kernel:
            return x.flatten(-2)
        return x.reshape(-1, groups * x.shape[1], *x.shape[2:])
