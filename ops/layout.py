"""Where a layer keeps its channels, so that an adapter's form is written once for Linear and Conv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..kernels import scratch

if TYPE_CHECKING:
    from .layers import PackedLayer
    from .strengths import RowStrengths

# of a block-diagonal product; its blocks are read again for the next rows
LEAST_ROWS = 192
_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

Operator = Callable[[torch.Tensor], torch.Tensor]
"""The layer so far, without its bias."""


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

    def run_on(
        self, f: Operator, x: torch.Tensor, change: Callable[[torch.Tensor | None], torch.Tensor]
    ) -> torch.Tensor:
        """``F(x')``.

        Args:
            change: makes x' of x in the memory that it is given, or in fresh memory if that is None.
        """
        if not scratch.reuses(x) or x.nbytes > scratch.LENT_BYTES:
            return f(change(None))
        with scratch.lent(x) as memory:
            return f(change(memory))

    def plus_mixed(
        self, x: torch.Tensor, t: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x + mix(t, matrix)``, in one pass over x where it is a matmul; x is left as it is."""
        if self.kernel or x.dim() < 2:
            return torch.add(x, self.mix(t, matrix), out=out)
        rows = None if out is None else out.flatten(0, -2)
        return torch.addmm(x.flatten(0, -2), t.flatten(0, -2), matrix.to(x).t(), out=rows).view(x.shape)

    def add_mixed(self, y: torch.Tensor, t: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """y with ``mix(t, matrix)`` added to it, in one pass over y where it is a matmul into whole rows."""
        if self.kernel or not _is_rows(y):
            return y.add_(self.mix(t, matrix))
        y.flatten(0, -2).addmm_(t.flatten(0, -2), matrix.to(y).t())
        return y

    def turn(self, y: torch.Tensor, blocks: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """``y + s·yB`` over y's channels, in place; B is block-diagonal.

        Args:
            blocks: ``[number, b, b]``.
            s: one strength, or one for each position of y.
        """
        each = self._flat(s, y) if s.dim() else None
        blocks = blocks.to(y) if s.dim() else blocks.to(y) * s.to(y)

        def turn(rows: torch.Tensor, which: slice) -> None:
            parts = rows.unflatten(1, (len(blocks), -1))
            change = torch.bmm(parts.transpose(0, 1), blocks).transpose(0, 1)
            parts.add_(change if each is None else change * each[which, None])

        return self._by_rows(y, y.dtype, turn)

    def turn_through(self, y: torch.Tensor, products: Sequence[torch.Tensor], s: torch.Tensor) -> torch.Tensor:
        """``y + s·(y P₁P₂… − y)`` over y's channels, in place.

        Args:
            products: of each P ``[c, k, g, h, h, g]``: it mixes channels over g and h, seen as ``[c, g, k, h]``. The
                next one's c is this one's divided by the next one's g, its k this one's times this one's g.
        """
        # what lies between two products is not rounded to less than fp32
        wide = torch.promote_types(y.dtype, torch.float32)
        products, s = [product.to(y.device, wide) for product in products], s.to(y.device, wide)

        def turn(rows: torch.Tensor, which: slice) -> None:
            turned = rows.to(wide)
            _turn_through(turned, products, s)
            if turned is not rows:
                rows.copy_(turned)

        return self._by_rows(y, wide, turn)

    def _flat(self, s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Strengths for each position of y as ``[n, 1]``, in the order in which `_by_rows` walks."""
        return s.to(y).movedim(self.axis, -1).expand(*y.movedim(self.axis, -1).shape[:-1], 1).reshape(-1, 1)

    def _by_rows(
        self, y: torch.Tensor, wide: torch.dtype, change: Callable[[torch.Tensor, slice], None]
    ) -> torch.Tensor:
        """Call `change` on pieces ``[n, C]`` of y that it changes in place, with what it needs beside them in cache.

        It is told which of all positions they are.
        """
        last = y.movedim(self.axis, -1)
        # also where the channels of a map lie together, or it is of a single pixel
        in_place = last.is_contiguous() or (not self.kernel and _is_rows(y))
        rows = (last if in_place else last.contiguous()).view(-1, last.shape[-1])
        # an eighth of the scratch: beside them lie as many three times over, before and after a product
        step = max(LEAST_ROWS, scratch.rows_per_chunk(y.device, 8 * rows.shape[1], wide))
        for start in range(0, rows.shape[0], step):
            which = slice(start, start + step)
            change(rows[which], which)
        return y if in_place else y.copy_(rows.view(last.shape).movedim(-1, self.axis))

    def spread(self, vector: torch.Tensor, x: torch.Tensor, s: torch.Tensor | None = None) -> torch.Tensor:
        """``[C]`` in x's dtype and place, to multiply x's channels with; times `s`, one or one for each position."""
        if s is not None and not s.dim():
            vector, s = vector.to(x.device) * s, None
        spread = vector.to(x).reshape(-1, *(1,) * len(self.kernel))
        return spread if s is None else spread * s

    def lead(self, x: torch.Tensor) -> torch.Size:
        """The shape of the layer's output on x without its channels: ``[...]`` for Linear, ``[B, *space]`` for Conv."""
        if not self.kernel:
            return x.shape[:-1]
        layer: Any = self.layer
        if x.dim() == len(self.kernel) + 1:
            return self.lead(x.unsqueeze(0))[1:]
        if layer.padding == "same":
            return torch.Size((x.shape[0], *x.shape[2:]))
        padding = (0,) * len(self.kernel) if layer.padding == "valid" else layer.padding
        sizes = zip(x.shape[2:], self.kernel, layer.stride, padding, layer.dilation, strict=True)
        return torch.Size((x.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)))

    def by_row(self, strengths: RowStrengths, x: torch.Tensor) -> torch.Tensor:
        """Strengths for each position of the output on x, their slots where its channels are."""
        return strengths.on(x, self.lead(x), bool(self.kernel)).movedim(-1, self.axis)

    def narrow(self, x: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """A view of some of x's channels."""
        return x.narrow(self.axis, start, length)

    def grouped(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """``[..., c · d] -> [..., c, d]``, or ``[B, c · d, *space] -> [B · c, d, *space]``, for `own` and `mix`."""
        if not self.kernel:
            return x.unflatten(-1, (groups, -1))
        return x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])

    def across(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """``[n, c]`` over the groups of a `grouped` x: ``[..., c, b] -> [..., n, b]``, or the same with space."""
        groups = matrix.shape[1]
        if not self.kernel:
            return torch.matmul(matrix.to(x), x)
        rest = x.shape[1:]
        mixed = torch.matmul(matrix.to(x), x.reshape(x.shape[0] // groups, groups, rest.numel()))
        return mixed.reshape(mixed.shape[0] * mixed.shape[1], *rest)

    def joined(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """The reverse of `grouped`."""
        if not self.kernel:
            return x.flatten(-2)
        return x.reshape(x.shape[0] // groups, groups * x.shape[1], *x.shape[2:])


def _is_rows(y: torch.Tensor) -> bool:
    """Whether all dimensions but the last can be walked through as one, so that y is a matrix in its own memory."""
    return y.dim() > 1 and all(y.stride(i) == y.stride(i + 1) * y.shape[i + 1] for i in range(y.dim() - 2))


def _turn_through(rows: torch.Tensor, products: Sequence[torch.Tensor], s: torch.Tensor) -> None:
    """`Layout.turn_through` on ``[n, C]``.

    Between two products channels come before rows, so that the blocks of one become those of the next at once and in
    runs of n, however narrow they are; into the first product and out of the last one rows come first.
    """
    n = rows.shape[0]
    before, after = _buffers(rows)
    c, k, g, h = products[0].shape[:4]
    turned = rows.t()
    for i, product in enumerate(products):
        if i:
            k_before, g_before = k, g
            c, k, g = product.shape[:3]
            turned = turned.view(c, g, k_before, h, g_before, n).permute(0, 4, 2, 1, 3, 5)
            turned = turned if before is None else before.view(turned.shape).copy_(turned)
        blocks, turned = product.view(c * k, g * h, h * g), turned.reshape(c * k, g * h, n)
        if i < len(products) - 1:
            turned = torch.bmm(blocks.mT, turned, out=None if after is None else after.view(turned.shape))
        else:
            turned = torch.bmm(turned.mT, blocks, out=None if after is None else after.view(c * k, n, h * g))
    turned = turned.view(c, k, n, h, g).permute(2, 0, 1, 3, 4)
    # in order first, so that what is left is to transpose k·h by g within a row: many short runs cost more than a copy
    turned = turned if before is None else before.view(turned.shape).copy_(turned)
    rows.view(n, c, g, k, h).lerp_(turned.permute(0, 1, 4, 2, 3), s)


def _buffers(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Two of rows' size, where there is memory to reuse."""
    if not scratch.reuses(rows):
        return None, None
    n, channels = rows.shape
    first, second = (scratch.take(rows.device, n, channels, rows.dtype, slot) for slot in ("turn from", "turn to"))
    return first, second
