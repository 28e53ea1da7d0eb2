"""What a model's code asks its layers for: found in the source, answered as by an unquantized layer."""

from __future__ import annotations

import ast

import oracle
import pytest
import torch
from graft.kernels import by_name
from graft.ops import layers
from graft.ops.packed import PackedTensor
from graft.ops.questions import DTYPE, SHAPE, VALUE, answer_questions, asked_layers, questions_in
from torch import nn

WIDTH = 256
Q8_0 = by_name("Q8_0")


def linear(kind: str = "Q8_0", bias: bool = True) -> layers.Linear:
    """A layer with seeded weights, packed or in a float dtype."""
    layer = layers.Linear(WIDTH, WIDTH, bias=bias)
    state = {"weight": _weight(kind, (WIDTH, WIDTH))}
    if bias:
        state["bias"] = torch.ones(WIDTH)
    layer.load_state_dict(state)
    return layer


def table(kind: str = "Q8_0") -> layers.Embedding:
    layer = layers.Embedding(8, WIDTH)
    layer.load_state_dict({"weight": _weight(kind, (8, WIDTH))})
    return layer


def _weight(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    fmt = by_name(kind)
    if fmt.is_quantized:
        return PackedTensor(oracle.random_blocks(fmt, torch.Size(shape).numel() // fmt.block_size, 0), fmt, shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(fmt.dtype)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = linear()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.fc(x) * self.weight  # its own parameter


class Passing(nn.Module):
    """Shows the weight of a layer inside as its own."""

    def __init__(self):
        super().__init__()
        self.linear = linear()

    @property
    def weight(self):
        return self.linear.weight


class Model(nn.Module):
    """Asks in each way that a host's models do."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(linear().weight.data)
        self.shape_only, self.cast, self.device_only, self.tested = (linear() for _ in range(4))
        self.mlp = nn.Sequential(linear(), nn.SiLU(), linear())
        self.first_of = Inner()
        self.blocks = nn.ModuleList(Inner() for _ in range(2))
        self.indexed = nn.ModuleList([linear(), linear()])
        self.by_name = nn.ModuleDict({"conv": linear(), "other": linear()})
        self.through_a_name, self.read, self.never, self.with_bias = (linear() for _ in range(4))
        self.passing, self.unasked = Passing(), Passing()
        self.table, self.called = table(), table()
        self.narrow = linear("F16")

    def forward(self, x, t):
        channels = self.shape_only.weight.shape[1] + self.narrow.weight.size(0)
        x = x.to(self.cast.weight.dtype).to(self.device_only.weight.device)
        if self.tested.weight is not None:
            t = t.type(self.mlp[0].weight.dtype)
        t = t.to(next(self.first_of.parameters()).dtype).to(next(iter(self.first_of.fc.parameters())).dtype)
        for i, block in enumerate(self.blocks):
            x = block(x.to(block.fc.weight.dtype)) + self.indexed[i].weight.ndim
        proj = self.through_a_name
        x = x.to(proj.weight.dtype) * torch.ones(1, dtype=self.passing.weight.dtype)
        x = nn.functional.linear(x, self.read.weight.to(x), self.with_bias.bias)
        return self.given(x, self.by_name) + self.table.weight[:1] + self.called(t.long()) + channels

    def given(self, x, layer):
        return x.to(layer["conv"].weight.dtype) + self.missing.weight.dtype if hasattr(self, "missing") else x

    def init_weights(self):
        nn.init.zeros_(self.never.weight)


ASKED = {
    "shape_only": {SHAPE}, "narrow": {SHAPE}, "cast": {DTYPE}, "mlp.0": {DTYPE}, "first_of.fc": {DTYPE},
    "blocks.0.fc": {DTYPE}, "blocks.1.fc": {DTYPE}, "indexed.0": {SHAPE}, "indexed.1": {SHAPE},
    "by_name.conv": {DTYPE}, "through_a_name": {DTYPE}, "passing.linear": {DTYPE}, "read": {VALUE},
    "with_bias": {VALUE}, "table": {VALUE},
}  # fmt: skip


def test_the_layers_that_are_asked_are_found():
    model = Model()
    paths = {layer: path for path, layer in layers.packed_layers(model).items()}
    assert {paths[layer]: kinds for layer, kinds in asked_layers(model).items()} == ASKED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_answer_as_unquantized_layers(dtype):
    model = Model()
    before = {path: layer.dequantized() for path, layer in layers.packed_layers(model).items()}
    answer_questions(model, lambda layer: dtype)
    for path, kinds in ASKED.items():
        layer, weight = model.get_submodule(path), before[path]
        exact = kinds == {SHAPE}
        # what is asked for its shape alone answers right already where it is of floats
        wanted = torch.float16 if path == "narrow" else torch.float32 if exact else dtype
        assert layer.weight.dtype == wanted and layer.weight.shape == weight.shape, path
        assert torch.equal(layer.weight.data, weight.to(wanted)), path
        if getattr(layer, "bias", None) is not None:
            assert layer.bias.dtype == (torch.float32 if exact else dtype), path
    for path, layer in layers.packed_layers(model).items():
        assert path in ASKED or layer.weight.dtype == torch.uint8, path


def test_who_does_not_call_a_layer_gets_one_of_the_hosts():
    """An adapter beside it would not be seen by who reads its numbers."""
    model = Model()
    answer_questions(model, lambda layer: torch.float32)
    assert type(model.table) is nn.Embedding and type(model.read) is nn.Linear
    assert isinstance(model.cast, layers.Linear) and isinstance(model.called, layers.Embedding)
    assert torch.equal(model.table(torch.tensor([3])), model.table.weight[3:4])


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_layers_round_nothing_that_follows(kind):
    """The host would round x to the dtype of the file."""

    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = linear(kind)

        def forward(self, x):
            return self.proj(x.to(self.proj.weight.dtype))

    model = Casting()
    plain = nn.Linear(WIDTH, WIDTH)
    plain.load_state_dict({"weight": model.proj.weight.data.float(), "bias": model.proj.bias.data.float()})
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    rounded = model(x)
    answer_questions(model, lambda layer: torch.float32)
    got, want = model(x), plain(x)
    assert got.dtype == torch.float32 and (got - want).norm() <= 1e-6 * want.norm()
    assert (rounded.float() - want).norm() > 1e-5 * want.norm()


def test_a_method_that_has_been_replaced_asks_no_more():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table()

        def logits(self, x):
            return nn.functional.linear(x, self.table.weight.to(x))

    model = Head()
    model.logits = lambda x: x
    assert asked_layers(model) == {}
    del model.logits
    assert asked_layers(model) == {model.table: {VALUE}}


@pytest.mark.parametrize(
    ("code", "can_be_followed"),
    [
        ("self.a.weight.dtype", True),
        ("layer['conv'].weight.dtype", True),
        ("given.fc1.weight.dtype", True),
        ("layer.weight.dtype", False),
        ("w = find(x)\nw.fc.weight.dtype", False),
        ("next(layer.parameters()).dtype", False),
        ("[b.weight for b in self.blocks]", True),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_known(code, can_be_followed):
    (question,) = questions_in(ast.parse(code))
    assert question.can_be_followed == can_be_followed
