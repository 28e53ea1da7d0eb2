"""Scales that files keep beside weights: read, carried along packed, applied by every layer; or refused by name."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from conftest import TORCH
from graft.kernels import CorruptFile, LowRank, UnsupportedFormat, by_name, scratch
from graft.ops import layers
from graft.ops.adapters import Patch
from graft.ops.factors import FactorCache
from graft.ops.files.gguf import diffusion_tensors, open_gguf
from graft.ops.files.scales import weights_of
from graft.ops.kinds import Diff
from graft.ops.packed import PackedTensor, convert_rows
from graft.ops.residual import ResidualStack
from graft.tests.gguf_samples import write_gguf
from torch import nn

ROWS, COLUMNS = 6, 512
NVFP4 = by_name("NVFP4")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scale_for(count, seed=7):
    """Far from 1, as those of NVFP4 are."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 1e-3 + 1e-4


def scaled(shape=(ROWS, COLUMNS), count=1, fmt=NVFP4, seed=0):
    """A packed weight with `count` scales, and its weights in fp32."""
    data = oracle.random_blocks(fmt, torch.Size(shape).numel() // fmt.block_size, seed)
    scale = scale_for(count)
    dense = oracle.oracle(data, fmt).reshape(shape) * scale.view(-1, *[1] * (len(shape) - 1))
    return PackedTensor(data, fmt, shape, scale=scale), dense


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


# On the way into a layer

OF_ROWS = {
    "slice": lambda t: t[1:4],
    "empty slice": lambda t: t[6:],
    "all of it, twice": lambda t: t[:, :],
    "narrow": lambda t: t.narrow(0, 2, 3),
    "chunk": lambda t: t.chunk(3)[1],
    "split by sizes": lambda t: t.split([1, 0, 2, 3])[2],
    "slice of a slice": lambda t: t[1:5][1:3],
    "index_select": lambda t: t.index_select(0, torch.tensor([4, 0, 4])),
    "cat": lambda t: torch.cat([t[3:], t, t[:1]]),
    "unsqueeze at the end": lambda t: t.unsqueeze(-1),
    "view of columns": lambda t: t.view(ROWS, 2, -1),
    "some of the columns": lambda t: t.view(ROWS, 2, -1)[:, 1:],
    "rows by step": lambda t: t[1::2],
    "clone": lambda t: t.clone(),
    "to its own dtype": lambda t: t.to(t.dtype),
    "deepcopy": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)) if isinstance(t, PackedTensor) else t,
}
OF_OTHER_ROWS = {
    "view of rows": lambda t: t.view(3, -1),
    "flatten": lambda t: t.flatten(),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "columns": lambda t: t[:, 250:],
    "cat of columns": lambda t: torch.cat([t.view(ROWS, 2, -1), t.view(ROWS, 2, -1)], dim=1),
}


@pytest.mark.parametrize("count", [1, ROWS])
@pytest.mark.parametrize("operation", OF_ROWS)
def test_it_goes_where_its_rows_go(operation, count):
    tensor, dense = scaled(count=count)
    got, want = OF_ROWS[operation](tensor), OF_ROWS[operation](dense)
    assert isinstance(got, PackedTensor) and got.shape == want.shape
    assert oracle.same_bits(got.dequantize(torch.float32), want.contiguous())
    assert torch.equal(got.dequantize(torch.bfloat16), want.bfloat16()), "rounded once"


@pytest.mark.parametrize("count", [1, ROWS])
@pytest.mark.parametrize("operation", OF_OTHER_ROWS)
def test_where_rows_are_no_rows_any_more_the_weights_are_right(operation, count):
    tensor, dense = scaled(count=count)
    got, want = OF_OTHER_ROWS[operation](tensor), OF_OTHER_ROWS[operation](dense)
    assert isinstance(got, PackedTensor) == (count == 1 and "columns" not in operation)
    assert torch.equal(got.dequantize(torch.float32) if isinstance(got, PackedTensor) else got, want)


def test_weights_with_scales_of_their_own_are_joined_packed():
    parts = [scaled(seed=0), scaled(count=ROWS, seed=1), scaled(seed=2)]
    parts[2] = (PackedTensor(parts[2][0].packed, NVFP4, (ROWS, COLUMNS)), parts[2][1] / scale_for(1))
    joined = torch.cat([tensor for tensor, _ in parts])
    assert isinstance(joined, PackedTensor)
    torch.testing.assert_close(joined.dequantize(torch.float32), torch.cat([dense for _, dense in parts]))


def test_a_hosts_conversion_takes_it_along():
    state = {name: scaled(seed=seed)[0] for seed, name in enumerate(("to_q", "to_k"))}

    def convert(left):
        return {"qk": torch.cat([left.pop("to_k"), left.pop("to_q")])}

    converted = convert_rows(state, convert)
    assert converted is not None and isinstance(converted["qk"], PackedTensor)
    want = torch.cat([state[name].dequantize(torch.float32) for name in ("to_k", "to_q")])
    assert torch.equal(converted["qk"].dequantize(torch.float32), want)


# In a layer

LAYERS = {
    "linear": (lambda: layers.Linear(256, 12), nn.functional.linear, (3, 256)),
    "conv": (lambda: layers.Conv2d(64, 12, 3), nn.functional.conv2d, (2, 64, 5, 4)),
    "grouped": (lambda: layers.Conv1d(128, 12, 1, groups=2), partial(nn.functional.conv1d, groups=2), (2, 128, 5)),
}


@pytest.fixture(params=[1, 1 << 20], ids=["one row", "whole"])
def budget(request, monkeypatch):
    scratch.release()
    monkeypatch.setattr(scratch, "CPU_BYTES", request.param)
    yield
    scratch.release()


@pytest.mark.parametrize("fmt", [NVFP4, by_name("Q4_K")], ids=str)
@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_applies_it(name, count, fmt, budget):
    make, function, shape = LAYERS[name]
    layer = make()
    weight, dense = scaled(tuple(layer.logical_shape), count, fmt)
    bias, x = normal(12, seed=1), normal(*shape, seed=2)
    layer.load_state_dict({"weight": weight, "bias": bias})
    want = function(x.double(), dense.double(), bias.double())
    assert relative(layer(x), want) < 1e-6
    assert torch.equal(layer.dequantized(), dense)
    assert torch.equal(torch.cat([w.clone() for _, w in layer.chunks(layer.weight, torch.float32)]), dense.flatten(1))
    assert list(layer.state_dict()) == ["weight", "bias"], "it is no parameter of the model"
    again = make()
    again.load_state_dict({"weight": layer.packed_weight(), "bias": bias})
    assert torch.equal(again(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    again.load_weight(again.dequantized())
    assert relative(again(x), want) < 1e-6, "decoded weights have it in them already"


def test_it_needs_no_room_in_fp16():
    """Before its scale the product of NVFP4 is beyond what fp16 holds."""
    layer = layers.Linear(2048, 4, bias=False)
    weight = PackedTensor(oracle.random_blocks(NVFP4, 4 * 2048 // 64), NVFP4, (4, 2048), scale=torch.tensor([1e-4]))
    layer.load_state_dict({"weight": weight})
    x = normal(3, 2048, seed=2, dtype=torch.float16) * 100
    unscaled = x.double() @ PackedTensor(weight.packed, NVFP4, (4, 2048)).dequantize(torch.float32).double().T
    assert unscaled.abs().max() > 1e5
    assert relative(layer(x), unscaled * 1e-4) < 2e-3


@pytest.mark.parametrize("count", [1, 20])
def test_a_table_applies_it_to_the_rows_that_are_looked_up(count):
    table = layers.Embedding(20, 256)
    weight, dense = scaled((20, 256), count)
    table.load_state_dict({"weight": weight})
    indices = torch.tensor([[0, 19, 4], [4, 4, 7]])
    assert torch.equal(table(indices), dense[indices])


@pytest.mark.parametrize("count", [1, 12])
def test_adapters_are_not_scaled(count):
    """Neither a LoRA nor a second model's weight, with a scale of its own, beside a scaled weight."""
    layer = layers.Linear(256, 12, bias=False)
    weight, dense = scaled((12, 256), count)
    layer.load_state_dict({"weight": weight})
    x, down, up = normal(5, 256, seed=2), normal(4, 256, seed=3), normal(12, 4, seed=4)
    second, other = scaled((12, 256), 12, seed=5)
    term = LowRank(down, torch.full((4,), 0.5), ((0, 0, up),))
    want = x.double() @ (dense + 0.5 * up @ down).double().T
    assert relative(layer.compute(x, layer.weight, None, term), want) < 1e-6
    stack = ResidualStack()
    stack.add("proj.weight", Patch(0.7, Diff(second)))
    stack.build({"proj": layer}, FactorCache())
    with stack.active({"proj": layer}, torch.device("cpu")):
        assert relative(layer(x), x.double() @ (dense + 0.7 * other).double().T) < 1e-6


def test_a_gradient_passes_through_it():
    layer = layers.Linear(256, 12, bias=False)
    weight, dense = scaled((12, 256), 12)
    layer.load_state_dict({"weight": weight})
    x = normal(5, 256).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(5, -1))


@pytest.mark.skipif(TORCH < (2, 4), reason="torch before 2.4 breaks graphs where autocast is asked for")
@pytest.mark.parametrize("count", [1, 12])
def test_it_goes_into_a_traced_graph(count):
    layer = layers.Linear(256, 12)
    weight, _ = scaled((12, 256), count)
    layer.load_state_dict({"weight": weight, "bias": normal(12)})
    x = normal(5, 256, seed=2)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-7)


# In a file

WEIGHT = normal(ROWS, COLUMNS).numpy()
NAMES = ("scale", "weight.scale", "weight_scale", "scale_weight")


def read(tmp_path, tensors, metadata=None):
    file = open_gguf(write_gguf(tmp_path / "a.gguf", tensors, metadata=metadata))
    return weights_of(diffusion_tensors(file), file)


def one(value):
    return (np.array([value], np.float32), "F32")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16", "F32", "I32"])
@pytest.mark.parametrize("name", NAMES)
def test_each_name_of_a_scale(name, kind, prefix, tmp_path):
    values = np.round(WEIGHT * 50) if kind == "I32" else WEIGHT
    plain = read(tmp_path, {f"{prefix}a.weight": (values, kind)})["a.weight"].to(torch.float32, copy=True)
    state = read(tmp_path, {f"{prefix}a.weight": (values, kind), f"{prefix}a.{name}": one(0.5)})
    assert list(state) == ["a.weight"]
    assert isinstance(state["a.weight"], PackedTensor) == kind.startswith("Q")
    assert torch.equal(state["a.weight"].to(torch.float32), plain * 0.5)


@pytest.mark.parametrize("name", ["input_scale", "weight.input_scale", "scale_input"])
def test_the_scale_of_x_is_left_out(name, tmp_path):
    state = read(tmp_path, {"a.weight": (WEIGHT, "Q8_0"), f"a.{name}": one(3), "scaled_fp8": one(0)})
    assert list(state) == ["a.weight"] and state["a.weight"].scale is None


def test_the_scale_of_a_norm_is_its_parameter(tmp_path):
    vector = np.ones(ROWS, np.float32)
    tensors = {"a.norm.scale": (vector, "F32"), "b.weight": (vector, "F32"), "b.scale": (vector, "F32")}
    assert list(read(tmp_path, tensors)) == list(tensors)


@pytest.mark.parametrize("columns", [COLUMNS, 33], ids=["", "columns that fill no block"])
def test_int8_rows_stay_a_byte_a_weight(columns, tmp_path):
    codes = np.random.default_rng(0).integers(-128, 128, (ROWS, columns)).astype(np.float32)
    scale = scale_for(ROWS).numpy()[:, None]
    note = {"comfy.gguf.quant.a.weight": json.dumps({"format": "int8_tensorwise", "convrot": True, "per_row": True})}
    tensors = {"a.weight": (codes, "I8"), "a.weight_scale": (scale, "F32")}
    weight = read(tmp_path, tensors, note)["a.weight"]
    assert isinstance(weight, PackedTensor) == (columns == COLUMNS)
    assert columns != COLUMNS or weight.packed.numel() == ROWS * COLUMNS * 34 // 32
    assert torch.equal(weight.to(torch.float32), torch.from_numpy(codes * scale))


REFUSED = {
    "rotated": ({"a.weight_scale": one(1)}, {"format": "int8_tensorwise", "convrot": True, "weight_rotated": True},
                "a.weight is rotated (ConvRot)"),
    "another format": ({"a.weight_scale": one(1)}, {"format": "int4_cr"}, "comfy.gguf.quant.a.weight in the metadata"),
    "no format": ({"a.weight_scale": one(1)}, [1], "comfy.gguf.quant.a.weight in the metadata says how"),
    "no scale": ({}, {"format": "int8_tensorwise"}, "a.weight needs a.weight_scale, which is missing"),
    "two scales": ({"a.scale": one(1), "a.weight_scale": one(1)}, None, "a.weight_scale says how a.weight is"),
    "blocks": ({"a.weight_scale": (np.ones((ROWS, 8), np.float32), "F32")}, None, "a.weight_scale is [6, 8]"),
    "columns": ({"a.scale": (np.ones((1, ROWS), np.float32), "F32")}, None, "a.scale is [1, 6]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(case, tmp_path):
    beside, note, message = REFUSED[case]
    metadata = None if note is None else {"comfy.gguf.quant.a.weight": json.dumps(note)}
    with pytest.raises((UnsupportedFormat, CorruptFile)) as caught:
        read(tmp_path, {"a.weight": (np.round(WEIGHT), "I8"), **beside}, metadata)
    assert str(caught.value).startswith(message) and str(caught.value).endswith(".gguf)")


@pytest.mark.parametrize(
    "name",
    [
        *("weight_scale_2", "weight_scale_inv", "comfy_quant", "pre_quant_scale", "weight.absmax", "weight.quant_map"),
        *("weight.quant_state.bitsandbytes__nf4", "weight_zero_point", "qzeros", "g_idx", "wscales", "SCB"),
    ],
)
def test_companions_of_other_formats_are_refused_by_name(name, tmp_path):
    with pytest.raises(UnsupportedFormat, match=rf"^a\.{name} says how a\.weight is quantized, in a way that Graft"):
        read(tmp_path, {"a.weight": (WEIGHT, "Q8_0"), f"a.{name}": one(1)})


@pytest.mark.parametrize(
    "name", ["a.bias", "a.scale_shift_table", "a.norm.weight", "a.logit_scale", "a.attn_scale", "scale_shift_table"]
)
def test_parameters_of_models_are_no_companions(name, tmp_path):
    assert list(read(tmp_path, {"a.weight": (WEIGHT, "Q8_0"), name: one(1)})) == ["a.weight", name]
