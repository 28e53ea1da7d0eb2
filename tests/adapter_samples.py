"""Adapters of every kind with random factors, as hosts hold them, their merges in full, and layers to run them beside.

The merges are written from the papers and the trainers' own code, not from `graft.ops.kinds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from graft.ops import layers
from graft.ops.adapters import Patch, Region, from_host
from graft.ops.factors import FactorCache
from graft.ops.residual import ResidualStack

Value = tuple
Shape = tuple[int, ...]

_RANK = 4

FIELDS = {
    "lora": ("lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", "dora_scale", "reshape_weight"),
    "loha": ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale"),
    "lokr": ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
             "dora_scale"),
    "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha", "dora_scale"),
    "oft": ("oft_blocks", "rescale", "alpha"),
    "boft": ("oft_blocks", "rescale", "alpha"),
    "diff": ("diff",),
    "set": ("set_weight",),
}  # fmt: skip
"""What a kind's values are called in a file, behind the layer's name, in the order in which hosts hold them."""


class Sampler:
    """Random factors of one seed and dtype, small enough that ΔW is a few percent of a unit weight."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, scale: float = 0.3) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(self.dtype)

    def pick(self, options: list) -> object:
        return options[int(torch.randint(len(options), (), generator=self.generator))]


def lora(r: Sampler, shape: Shape, rank: int = _RANK, alpha: float | None = 2.0, dora=None, reshape=None) -> Value:
    wide = tuple(reshape or shape)
    up = r(wide[0], rank, *(1 for _ in wide[2:]))
    return ("lora", (up, r(rank, *wide[1:]), alpha, None, dora, reshape))


def tucker(r: Sampler, shape: Shape, rank: int = _RANK) -> Value:
    ones = (1,) * len(shape[2:])
    return ("lora", (r(shape[0], rank, *ones), r(rank, shape[1], *ones), 2.0, r(rank, rank, *shape[2:]), None, None))


def loha(r: Sampler, shape: Shape, rank: int = 2, dora=None) -> Value:
    columns = math.prod(shape[1:])
    w1_a, w1_b, w2_a, w2_b = r(shape[0], rank), r(rank, columns), r(shape[0], rank), r(rank, columns)
    return ("loha", (w1_a, w1_b, 1.0, w2_a, w2_b, None, None, dora))


def loha_tucker(r: Sampler, shape: Shape, rank: int = 2) -> Value:
    halves = [(r(rank, shape[0]), r(rank, shape[1]), r(rank, rank, *shape[2:], scale=2.0)) for _ in range(2)]
    (w1_a, w1_b, t1), (w2_a, w2_b, t2) = halves
    return ("loha", (w1_a, w1_b, 1.0, w2_a, w2_b, t1, t2, None))


def lokr(r: Sampler, shape: Shape, form: str = "whole", dora=None) -> Value:
    a, c = 4, 2
    b, d, kernel = shape[0] // a, shape[1] // c, shape[2:]
    w1: dict = {"w1": r(a, c)} if form != "both low rank" else {"w1_a": r(a, 2), "w1_b": r(2, c)}
    if form == "whole":
        w2: dict = {"w2": r(b, d, *kernel)}
    elif form == "core":
        w2 = {"w2_a": r(3, b), "w2_b": r(3, d), "t2": r(3, 3, *kernel)}
    else:
        w2 = {"w2_a": r(b, 3), "w2_b": r(3, d * math.prod(kernel))}
    f = {**w1, **w2}
    names = ("w1_a", "w1_b", "w2_a", "w2_b", "t2")
    return ("lokr", (f.get("w1"), f.get("w2"), 1.5, *(f.get(n) for n in names), dora))


def glora(r: Sampler, shape: Shape, rank: int = _RANK, dora=None) -> Value:
    ones = (1,) * len(shape[2:])
    a1, a2 = r(shape[1], rank, *ones, scale=0.1), r(rank, shape[1], *ones, scale=0.1)
    return ("glora", (a1, a2, r(shape[0], rank, *ones), r(rank, *shape[1:]), 2.0, dora))


def glora_old(r: Sampler, shape: Shape, rank: int = _RANK) -> Value:
    a2, a1 = r(shape[1], rank, scale=0.1), r(rank, shape[1], scale=0.1)
    return ("glora", (a1, a2, r(rank, shape[1]), r(shape[0], rank), 2.0, None))


def oft(r: Sampler, shape: Shape, constraint: float | None = None) -> Value:
    return ("oft", (r(shape[0] // 4, 4, 4), None, constraint, None))


def boft(r: Sampler, shape: Shape, rescale: bool = False) -> Value:
    ones, rows = (1,) * (len(shape) - 1), shape[0]
    # LyCORIS's smallest blocks: an even number, of which there are a power of two, in stages that reach over all rows
    size = max(4, 2 * rows // (rows & -rows))
    blocks = r((rows // size).bit_length(), rows // size, size, size)
    return ("boft", (blocks, None if not rescale else 1 + r(rows, *ones, scale=0.1), 0.5, None))


def magnitudes(r: Sampler, shape: Shape, axis: int) -> torch.Tensor:
    """As `dora_scale` holds them; about the norm of a unit weight's rows or columns."""
    size = math.prod(shape) // shape[axis]
    ones = (1,) * (len(shape) - 2)
    m = math.sqrt(size) * (1 + r(shape[axis], scale=0.1))
    return m.reshape((-1, 1, *ones) if axis == 0 else (1, -1, *ones))


def diff(r: Sampler, shape: Shape) -> Value:
    return ("diff", (r(*shape),))


def set_(r: Sampler, shape: Shape) -> Value:
    return ("set", (r(*shape, scale=1.0),))


def _dora(make: Callable[..., Value], axis: int, **options) -> Callable[[Sampler, Shape], Value]:
    return lambda r, shape: make(r, shape, dora=magnitudes(r, shape, axis), **options)


KINDS: dict[str, Callable[[Sampler, Shape], Value]] = {
    "lora": lora,
    "lora without alpha": lambda r, shape: lora(r, shape, alpha=None),
    "loha": loha,
    "loha of high rank": lambda r, shape: loha(r, shape, rank=12),
    "lokr": lokr,
    "lokr w2 low rank": lambda r, shape: lokr(r, shape, "low rank"),
    "lokr both low rank": lambda r, shape: lokr(r, shape, "both low rank"),
    "glora": glora,
    "oft": oft,
    "oft constrained": lambda r, shape: oft(r, shape, 0.5),
    "boft": boft,
    "boft rescaled": lambda r, shape: boft(r, shape, True),
    "dora out": _dora(lora, 0),
    "dora in": _dora(lora, 1),
    "dora out over loha": _dora(loha, 0),
    "dora out over lokr": _dora(lokr, 0),
    "dora in over lokr": _dora(lokr, 1),
    "dora out over glora": _dora(glora, 0),
    "dora in over glora": _dora(glora, 1),
    "diff": diff,
    "set": set_,
}
"""On a weight of any number of dimensions with at least two."""

CONV_KINDS: dict[str, Callable[[Sampler, Shape], Value]] = {
    "tucker": tucker,
    "loha tucker": loha_tucker,
    "lokr core": lambda r, shape: lokr(r, shape, "core"),
}
LINEAR_KINDS: dict[str, Callable[[Sampler, Shape], Value]] = {"glora of old lycoris": glora_old}


def merged(weight: torch.Tensor, value: Value, s: float, norm: str = "comfy") -> torch.Tensor:
    """`weight` with one adapter merged in, in fp64, as a new tensor."""
    kind, fields = value
    if kind in ("oft", "boft"):
        return _turned(weight, kind, fields, s)
    if kind == "set":
        return fields[0].double().clone()
    if kind == "diff":
        return weight + s * fields[0].double()
    magnitude = fields[{"lora": 4, "loha": 7, "lokr": 8, "glora": 5}[kind]]
    if kind == "lora" and fields[5] is not None:
        wide = torch.zeros(fields[5], dtype=torch.float64)
        wide[tuple(slice(n) for n in weight.shape)] = weight
        weight = wide
    delta = difference(weight, kind, fields)
    if magnitude is None:
        return weight + s * delta
    return weight + s * (_scaled(weight, delta, magnitude.double(), norm) - weight)


def _scaled(weight: torch.Tensor, delta: torch.Tensor, m: torch.Tensor, norm: str) -> torch.Tensor:
    """DoRA: the finished weight with its magnitudes."""
    whole = weight + delta
    axis = 0 if m.shape[0] == weight.shape[0] else 1
    source = weight if axis == 0 and norm == "comfy" else whole
    norms = source.movedim(axis, 0).flatten(1).norm(dim=1) + torch.finfo(torch.float64).eps
    shape = [1] * weight.dim()
    shape[axis] = -1
    return whole * (m.flatten() / norms).reshape(shape)


def difference(weight: torch.Tensor, kind: str, fields: tuple) -> torch.Tensor:
    """ΔW with alpha."""
    f = [t.double() if isinstance(t, torch.Tensor) else t for t in fields]
    if kind == "lora":
        up, down, alpha, mid = f[:4]
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        if mid is not None:
            down = torch.einsum("ij...,jc->ic...", mid, down.flatten(1))
        return (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * scale
    if kind == "loha":
        w1_a, w1_b, alpha, w2_a, w2_b, t1, t2 = f[:7]
        if t1 is None:
            product = (w1_a @ w1_b) * (w2_a @ w2_b)
        else:
            first = torch.einsum("ij...,ip,jr->pr...", t1, w1_a, w1_b)
            product = first * torch.einsum("ij...,ip,jr->pr...", t2, w2_a, w2_b)
        return product.reshape(weight.shape) * (alpha / w1_b.shape[0])
    if kind == "lokr":
        w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2 = f[:8]
        scale = 1.0
        if w1 is None:
            w1, scale = w1_a @ w1_b, alpha / w1_b.shape[0]
        if w2 is None:
            w2 = w2_a @ w2_b if t2 is None else torch.einsum("ij...,ip,jr->pr...", t2, w2_a, w2_b)
            scale = alpha / w2_b.shape[0]
        return torch.kron(w1, w2.flatten(1)).reshape(weight.shape) * scale
    a1, a2, b1, b2, alpha = f[:5]
    a1, a2, b1, b2 = (t.flatten(1) for t in (a1, a2, b1, b2))
    if b2.shape[0] == weight.shape[0] and b2.shape[1] == a1.shape[0] == _RANK:  # the factors' names of old LyCORIS
        a1, a2, b1, b2 = a2, a1, b2, b1
    through = torch.einsum("oi...,ij->oj...", weight, a1 @ a2)
    return (through + (b1 @ b2).reshape(weight.shape)) * (alpha / a1.shape[1])


def _turned(weight: torch.Tensor, kind: str, fields: tuple, s: float) -> torch.Tensor:
    blocks, rescale, constraint = fields[:3]
    q = blocks.double() - blocks.double().transpose(-1, -2)
    if constraint and q.norm() + 1e-8 > constraint:
        q = q * constraint / (q.norm() + 1e-8)
    identity = torch.eye(q.shape[-1], dtype=torch.float64)
    turn = (identity + q) @ torch.linalg.inv(identity - q)
    matrix = weight.flatten(1)
    if kind == "oft":
        change = torch.block_diag(*turn).t() - torch.eye(len(matrix))
        return (matrix + s * s * (change @ matrix)).reshape(weight.shape)
    product, rows, half = matrix, torch.arange(len(matrix)), turn.shape[-1] // 2
    for stage in range(len(turn)):
        k = 2**stage * half
        order = rows.reshape(-1, 2, k).transpose(1, 2).reshape(-1)
        permutation = torch.eye(len(matrix), dtype=torch.float64)[order]
        step = torch.block_diag(*(s * turn[stage] + (1 - s) * identity))
        product = permutation.t() @ step @ permutation @ product
    if rescale is not None:
        product = product * rescale.double().reshape(-1, 1)
    return (matrix + s * (product - matrix)).reshape(weight.shape)


def one_thread() -> Iterator[None]:
    """A fixture: for tiny tensors the threads' own cost is the larger one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_layer(
    shape: Shape, weight: torch.Tensor, bias: torch.Tensor | None = None, **options: Any
) -> layers.PackedLayer:
    """A Graft layer of `shape` with these weights."""
    if len(shape) == 2:
        layer = layers.Linear(shape[1], shape[0], bias=bias is not None)
    else:
        kind = {3: layers.Conv1d, 4: layers.Conv2d, 5: layers.Conv3d}[len(shape)]
        groups = options.get("groups", 1)
        layer = kind(shape[1] * groups, shape[0], shape[2:], bias=bias is not None, **options)
    layer.load_weight(weight)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


def make_input(shape: Shape, r: Sampler, groups: int = 1) -> torch.Tensor:
    """A batch of two for such a layer."""
    if len(shape) == 2:
        return r(2, 5, shape[1], scale=1.0)
    return r(2, shape[1] * groups, *(7 for _ in shape[2:]), scale=1.0)


def run(
    layer: layers.PackedLayer, x: torch.Tensor, patches: Sequence[Patch], bias: Sequence[Patch] = (),
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """The layer's output with a stack of these patches."""
    stack = ResidualStack({"layer.weight": list(patches), "layer.bias": list(bias)})
    stack.build({"layer": layer}, FactorCache(), dtype)
    with stack.active({"layer": layer}, x.device):
        return layer(x)


def patch_of(
    value: Any, shape: Shape, s: float, region: Region | None = None, sm: float = 1.0, function: Any = None
) -> Patch:
    """A host's value as a patch of a weight of `shape`."""
    return Patch(s, from_host(value, torch.Size(shape), region, function), sm, region)
