"""Layers on packed weights against torch's own layers on the decoded ones."""

from __future__ import annotations

import copy
import hashlib

import oracle
import pytest
import torch
from conftest import TORCH
from graft.kernels import LowRank, UnsupportedFormat, by_name, cpu
from graft.ops import layers
from graft.ops.packed import PackedTensor
from rounding import assert_rounded
from torch import nn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

formats = pytest.mark.parametrize("fmt", [by_name(n) for n in ("Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "NVFP4")], ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# our class, its arguments, the shape of its input
LINEAR = (layers.Linear, (256, 12), {}, (5, 256))
CONVOLUTIONS = {
    "1d": (layers.Conv1d, (256, 12, 3), {"padding": 1}, (2, 256, 7)),
    "2d": (layers.Conv2d, (64, 12, 3), {"padding": 1}, (2, 64, 6, 5)),
    "2d, stride 2": (layers.Conv2d, (64, 12, 3), {"padding": 1, "stride": 2}, (2, 64, 6, 5)),
    "2d, 1x1": (layers.Conv2d, (256, 12, 1), {}, (2, 256, 4, 4)),
    "2d, dilated": (layers.Conv2d, (64, 12, (3, 1)), {"dilation": 2}, (1, 64, 7, 5)),
    "2d, padding same": (layers.Conv2d, (64, 12, 3), {"padding": "same"}, (1, 64, 5, 5)),
    "2d, reflected": (layers.Conv2d, (64, 12, 3), {"padding": 1, "padding_mode": "reflect"}, (1, 64, 5, 5)),
    "2d, groups": (layers.Conv2d, (128, 12, 3), {"groups": 2}, (1, 128, 5, 5)),
    "2d, no batch": (layers.Conv2d, (64, 12, 3), {}, (64, 5, 5)),
    "3d": (layers.Conv3d, (32, 12, (2, 2, 2)), {"padding": (1, 0, 0)}, (1, 32, 3, 4, 4)),
    "3d, patches": (layers.Conv3d, (64, 12, (1, 2, 2)), {"stride": (1, 2, 2)}, (2, 64, 2, 4, 4)),
}
BASES = {
    layers.Linear: nn.Linear, layers.Conv1d: nn.Conv1d, layers.Conv2d: nn.Conv2d, layers.Conv3d: nn.Conv3d,
}  # fmt: skip
every_convolution = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
every_layer = pytest.mark.parametrize("case", [LINEAR, *CONVOLUTIONS.values()], ids=["linear", *CONVOLUTIONS.keys()])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_for(layer, fmt, seed=0):
    """A weight of the layer's shape as a state dict holds it, and the same in fp32."""
    shape = layer.logical_shape
    if not fmt.is_quantized:
        weight = normal(*shape, seed=seed, dtype=fmt.dtype)
        return weight, weight.float()
    data = oracle.random_blocks(fmt, shape.numel() // fmt.block_size, seed)
    return PackedTensor(data, fmt, shape), oracle.oracle(data, fmt).reshape(shape)


def loaded(case, fmt, bias=True, **settings):
    """Our layer of this case with a weight in `fmt`; torch's in fp64 with the same weight and bias."""
    cls, arguments, options, _ = case
    layer = cls(*arguments, bias=bias, **options)
    weight, dense = weight_for(layer, fmt)
    state = {"weight": weight} | ({"bias": normal(12, seed=1)} if bias else {})
    layer.load_state_dict(state)
    layer.__dict__.update(settings)
    twin = BASES[cls](*arguments, bias=bias, **options, dtype=torch.float64)
    twin.weight.data.copy_(dense)
    if bias:
        twin.bias.data.copy_(state["bias"])
    return layer, twin.requires_grad_(False)


def in_dtype(twin, dtype):
    """The twin with weight and bias rounded as the layer rounds them."""
    for parameter in twin.parameters():
        parameter.copy_(parameter.to(dtype))
    return twin


def magnitude(twin, x):
    """The sum of the magnitudes in each output of the twin."""
    positive = copy.deepcopy(twin)
    for parameter in positive.parameters():
        parameter.abs_()
    return positive(x.double().abs())


def assert_same(got, twin, x, extra=0.0, extra_size=0.0):
    terms = twin.weight[0].numel()
    size = magnitude(twin, x)
    bias = twin.bias.abs().max() if twin.bias is not None else 0.0
    assert_rounded(got, twin(x.double()) + extra, size, terms, bias + extra_size)


# Layers in every type


@pytest.mark.parametrize("fmt", [*oracle.QUANTIZED, *(by_name(n) for n in ("F32", "F16", "BF16", "F64"))], ids=str)
@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_linear(fmt, dtype, bias):
    layer, twin = loaded(LINEAR, fmt, bias)
    x = normal(2, 5, 256, seed=3, dtype=dtype)
    got = layer(x)
    assert got.dtype == dtype and layer.fmt is fmt
    assert_same(got, in_dtype(twin, dtype), x)


def _needs_mirrors(case, dtype) -> None:
    if TORCH < (2, 4) and dtype == torch.float16 and "padding_mode" in case[2]:
        pytest.skip("torch before 2.4 mirrors no fp16 on a CPU")


@formats
@every_convolution
@every_dtype
def test_convolutions(case, fmt, dtype):
    _needs_mirrors(case, dtype)
    layer, twin = loaded(case, fmt)
    x = normal(*case[-1], seed=3, dtype=dtype)
    got = layer(x)
    assert got.dtype == dtype
    assert_same(got, in_dtype(twin, dtype), x)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@every_convolution
@every_dtype
def test_convolutions_in_floats(case, name, dtype):
    _needs_mirrors(case, dtype)
    layer, twin = loaded(case, by_name(name))
    x = normal(*case[-1], seed=3, dtype=dtype)
    assert_same(layer(x), in_dtype(twin, dtype), x)


@every_convolution
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_convolutions_that_the_processor_has_not_run_in_fp32(case, dtype, monkeypatch):
    layer, _ = loaded(case, by_name("Q4_K"))
    x = normal(*case[-1], seed=3, dtype=dtype)
    monkeypatch.setattr(cpu, "SLOW_DTYPES", frozenset([dtype]))
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


@pytest.mark.parametrize("fmt", [*oracle.QUANTIZED, *(by_name(n) for n in ("F32", "F16", "BF16"))], ids=str)
def test_embedding(fmt):
    layer = layers.Embedding(20, 256)
    weight, dense = weight_for(layer, fmt)
    layer.load_state_dict({"weight": weight})
    indices = torch.tensor([[0, 19, 4], [4, 4, 7]])
    assert torch.equal(layer(indices), dense[indices])
    for dtype in DTYPES:
        assert torch.equal(layer(indices, out_dtype=dtype), dense[indices].to(dtype))
    assert layer(indices).dtype == torch.float32, "one call's dtype stays with that call"


@formats
@every_layer
@pytest.mark.parametrize("budget", [1, 5000], ids=["one row", "some rows"])
def test_chunked(case, fmt, budget, monkeypatch):
    from graft.kernels import scratch

    layer, twin = loaded(case, fmt)
    scratch.release()
    monkeypatch.setattr(scratch, "CPU_BYTES", budget)
    x = normal(*case[-1], seed=3)
    assert_same(layer(x), twin, x)
    scratch.release()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@every_layer
def test_backends_give_the_same_bits(case, backend):
    layer, _ = loaded(case, by_name("Q4_K"))
    x = normal(*case[-1], seed=3)
    want = layer(x)
    layer.backend = backend
    assert torch.equal(layer(x), want)


@every_dtype
def test_a_folded_weight(dtype):
    """Rows of 96 in blocks of 256: what converters make of shapes that do not fit."""
    fmt = by_name("Q4_K")
    data = oracle.random_blocks(fmt, 3)
    layer = layers.Linear(96, 8, bias=False)
    layer.load_state_dict({"weight": PackedTensor(data, fmt, (8, 96))})
    twin = nn.Linear(96, 8, bias=False, dtype=torch.float64).requires_grad_(False)
    twin.weight.copy_(oracle.oracle(data, fmt).reshape(8, 96))
    x = normal(5, 96, dtype=dtype)
    assert_same(layer(x), in_dtype(twin, dtype), x)


# What a layer holds


@every_layer
def test_the_bytes_are_the_files_own(case):
    layer, _ = loaded(case, by_name("Q4_K"))
    packed, _ = weight_for(layer, by_name("Q4_K"))
    layer.load_state_dict({"weight": packed, "bias": normal(12)})
    assert layer.weight.dtype == torch.uint8 and layer.weight.data_ptr() == packed.packed.data_ptr()
    assert isinstance(layer.weight, nn.Parameter) and type(layer.weight.data) is torch.Tensor
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    before = hashlib.sha256(layer.weight.numpy()).digest()
    layer(normal(*case[-1]))
    layer.dequantized().zero_()
    assert hashlib.sha256(layer.weight.numpy()).digest() == before


def test_float_weights_are_held_as_they_come():
    layer = layers.Linear(256, 12)
    weight = normal(12, 256, dtype=torch.float16)
    layer.load_state_dict({"weight": weight, "bias": normal(12)})
    assert layer.weight.dtype == torch.float16 and layer.weight.data_ptr() == weight.data_ptr()
    assert layer.dequantized().dtype == torch.float32
    layer.dequantized(dtype=torch.float16).zero_()
    assert torch.equal(layer.weight, weight)


def test_a_packed_bias_becomes_numbers():
    layer = layers.Linear(256, 32)
    weight, _ = weight_for(layer, by_name("Q4_K"))
    data = oracle.random_blocks(by_name("Q8_0"), 1)
    layer.load_state_dict({"weight": weight, "bias": PackedTensor(data, by_name("Q8_0"), (32,))})
    assert torch.equal(layer.bias, oracle.oracle(data, by_name("Q8_0")).flatten())


@every_layer
def test_an_empty_layer_takes_no_memory(case):
    cls, arguments, options, _ = case
    layer = cls(*arguments, **options)
    assert layer.weight is None and list(layer.logical_shape) == list(BASES[cls](*arguments, **options).weight.shape)
    assert repr(layer).endswith("empty)")


def test_repr_names_shape_and_type():
    layer, _ = loaded(LINEAR, by_name("Q4_K"))
    assert repr(layer) == "Linear([12, 256], Q4_K)"


@formats
@every_layer
def test_dequantized_is_the_logical_weight(case, fmt):
    layer, twin = loaded(case, fmt)
    for dtype in DTYPES:
        assert torch.equal(layer.dequantized(dtype=dtype), twin.weight.float().to(dtype))


def test_packed_weight_goes_back_into_a_state_dict():
    layer, _ = loaded(LINEAR, by_name("Q4_K"))
    other = layers.Linear(256, 12)
    other.load_state_dict({"weight": layer.packed_weight(), "bias": layer.bias})
    x = normal(3, 256)
    assert torch.equal(other(x), layer(x))
    plain, _ = loaded(LINEAR, by_name("F16"))
    assert plain.packed_weight().dtype == torch.float16 and type(plain.packed_weight()) is torch.Tensor


def test_copies_of_a_layer_compute_the_same():
    layer, _ = loaded(LINEAR, by_name("Q4_K"))
    other = copy.deepcopy(layer)
    x = normal(3, 256)
    assert torch.equal(other(x), layer(x)) and other.weight.data_ptr() != layer.weight.data_ptr()
    joined = torch.cat([layer.packed_weight(), other.packed_weight()])
    assert isinstance(joined, PackedTensor) and joined.shape == (24, 256)


@pytest.mark.parametrize("name", ["Q4_K", "F16", "F32"])
def test_hosts_may_move_and_cast_a_model(name):
    """Bytes survive a cast of the model, floats follow it."""
    layer, twin = loaded(LINEAR, by_name(name))
    x = normal(3, 256)
    for cast in (nn.Module.half, nn.Module.float, lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")):
        cast(layer)
        assert layer.weight.dtype == (torch.uint8 if name == "Q4_K" else layer.bias.dtype)
    dense = layer.dequantized()
    twin.weight.copy_(dense)
    twin.bias.copy_(layer.bias)
    assert_same(layer(x), twin, x)


def test_a_host_may_wrap_the_parameter_anew():
    layer, _ = loaded(LINEAR, by_name("Q4_K"))
    x = normal(3, 256)
    want = layer(x)
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert torch.equal(layer(x), want)


def test_weights_that_a_host_has_decoded_are_used_as_they_are():
    """Hosts that apply their own functions to a weight hand in the result."""
    layer, _ = loaded(LINEAR, by_name("Q4_K"))
    x = normal(3, 256)
    for dtype in DTYPES:
        data = layer.dequantized(dtype=dtype) * 2
        got = layer.compute(x, data, layer.bias)
        want = nn.functional.linear(x.double(), data.double(), layer.bias.double())
        size = nn.functional.linear(x.double().abs(), data.double().abs())
        assert_rounded(got, want, size, 256, layer.bias.abs().max().double())
        assert torch.equal(layer.dequantized(data), data.float())


@every_layer
def test_under_autocast_a_layer_computes_as_torchs_own_does(case):
    layer, twin = loaded(case, by_name("Q4_K"))
    x = normal(*case[-1], seed=3)
    for dtype in DTYPES:
        with torch.autocast("cpu", torch.bfloat16):
            got, wanted = layer(x.to(dtype)), twin.to(dtype)(x.to(dtype))
        assert got.dtype == wanted.dtype == torch.bfloat16
        assert torch.equal(got, layer(x.to(dtype).bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert twin.double()(x.double()).dtype == torch.float64
        assert torch.equal(layer(x.double()), layer.compute(x.double(), layer.weight.data, layer.bias))


@pytest.mark.filterwarnings("ignore:torch.is_autocast_cpu_enabled")
def test_autocast_under_the_names_that_torch_2_3_has_for_it(monkeypatch):
    """The torch that Forge installs; what it lacks is taken away here."""
    for name in ("get_autocast_dtype", "set_autocast_dtype"):
        monkeypatch.delattr(torch, name, raising=False)
    monkeypatch.setattr(layers, "_ASKS_BY_DEVICE", False)
    x = torch.zeros(1)
    assert layers.autocast_dtype(x) is None and layers.autocast_dtype(torch.zeros(1, device="meta")) is None
    monkeypatch.setattr(torch, "is_autocast_cpu_enabled", lambda: True)
    monkeypatch.setattr(torch, "get_autocast_cpu_dtype", lambda: torch.bfloat16)
    assert layers.autocast_dtype(x) == torch.bfloat16 and layers.autocast_dtype(x.double()) == torch.float64


@pytest.mark.filterwarnings("ignore:`torch.library.impl_abstract` was renamed")
def test_operators_of_a_torch_without_custom_op(monkeypatch):
    from graft.kernels import compiled

    monkeypatch.delattr(torch.library, "custom_op", raising=False)
    double = compiled.operator("graft_double(Tensor x) -> Tensor")(lambda x: x * 2)
    double.register_fake(lambda x: torch.empty_like(x))
    assert torch.equal(torch.ops.graft.graft_double(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.ops.graft.graft_double(torch.ones(2, device="meta")).shape == (2,)


def test_autocast_leaves_an_embedding_as_it_is():
    layer = layers.Embedding(12, 256)
    weight, dense = weight_for(layer, by_name("Q4_K"))
    layer.load_state_dict({"weight": weight})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(torch.tensor([3, 7])), dense[[3, 7]])


# Loading


def test_a_model_loads_from_a_mixed_state_dict():
    model = nn.Sequential(layers.Linear(256, 512), nn.LayerNorm(512), layers.Linear(512, 12, bias=False))
    first, _ = weight_for(model[0], by_name("Q4_K"))
    last, _ = weight_for(model[2], by_name("Q8_0"))
    state = {"0.weight": first, "0.bias": normal(512), "1.weight": normal(512), "1.bias": normal(512), "2.weight": last}
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    assert sorted(layers.packed_layers(model, "net.")) == ["net.0", "net.2"]
    assert [m.fmt.name for m in layers.packed_layers(model).values()] == ["Q4_K", "Q8_0"]
    assert torch.isfinite(model(normal(3, 256))).all()
    model.load_state_dict(state)  # and again


@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64", "F64"])
def test_weights_and_biases_in_types_that_torch_has(name):
    """Integers are held in floats with all their digits, on an embedding as on others."""
    fmt = by_name(name)
    weight, bias = ((normal(*shape, seed=4) * 20).to(fmt.dtype) for shape in ((12, 256), (12,)))
    linear, embedding = layers.Linear(256, 12), layers.Embedding(12, 256)
    linear.load_state_dict({"weight": weight, "bias": bias})
    embedding.load_state_dict({"weight": weight})
    for tensor in (linear.weight, linear.bias, linear.packed_weight(), embedding.weight):
        assert tensor.is_floating_point()
    assert torch.equal(linear.weight, weight.to(linear.weight.dtype)) and torch.equal(linear.bias.to(fmt.dtype), bias)
    indices = torch.tensor([[0, 11], [4, 4]])
    assert torch.equal(embedding(indices), weight.float()[indices])
    twin = nn.Linear(256, 12, dtype=torch.float64).requires_grad_(False)
    twin.weight.copy_(weight), twin.bias.copy_(bias)
    x = normal(3, 256, seed=3)
    assert_same(linear(x), in_dtype(twin, torch.float32), x)


def test_integers_keep_their_digits():
    layer = layers.Embedding(2, 2)
    layer.load_weight(torch.tensor([[2**24 + 1, 1], [-(2**31), 2**31 - 1]], dtype=torch.int32))
    layer.dtype = torch.float64
    assert layer(torch.tensor([0, 1])).tolist() == [[2**24 + 1, 1], [-(2**31), 2**31 - 1]]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.bool], ids=str)
def test_a_dtype_that_gguf_does_not_have_is_refused(dtype):
    kind = str(dtype).removeprefix("torch.")
    for layer in (layers.Linear(256, 12), layers.Embedding(12, 256)):
        with pytest.raises(UnsupportedFormat, match=rf"a weight is {kind}, which is no type of GGUF: convert it to"):
            layer.load_weight(torch.ones(12, 256).to(dtype))


def test_missing_and_unexpected_keys_are_reported():
    model = nn.ModuleDict({"a": layers.Linear(256, 12), "b": layers.Linear(256, 12, bias=False)})
    weight, _ = weight_for(model["a"], by_name("Q4_K"))
    got = model.load_state_dict({"a.weight": weight, "b.scale": normal(1), "c": normal(1)}, strict=False)
    assert got.missing_keys == ["a.bias", "b.weight"]
    assert sorted(got.unexpected_keys) == ["b.scale", "c"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "a.bias", "b.weight"'):
        model.load_state_dict({"a.weight": weight})


@every_layer
def test_a_bias_that_the_layer_was_declared_without_is_unexpected(case):
    layer, _ = loaded(case, by_name("Q4_K"), bias=False)
    x = normal(*case[-1], seed=3)
    want = layer(x)
    got = layer.load_state_dict({"weight": layer.packed_weight(), "bias": normal(12)}, strict=False)
    assert got.unexpected_keys == ["bias"] and not got.missing_keys
    assert layer.bias is None and torch.equal(layer(x), want)


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_size_mismatches_name_layer_and_shapes(name):
    model = nn.ModuleDict({"proj": layers.Linear(512, 12)})
    weight, _ = weight_for(layers.Linear(256, 12), by_name(name))
    with pytest.raises(RuntimeError, match=r"for proj.weight: the file has \(12, 256\), the model \(12, 512\)"):
        model.load_state_dict({"proj.weight": weight, "proj.bias": normal(12)})
    weight, _ = weight_for(model["proj"], by_name(name))
    with pytest.raises(RuntimeError, match=r"size mismatch for proj.bias: the file has \(11,\), the model \(12,\)"):
        model.load_state_dict({"proj.weight": weight, "proj.bias": normal(11)})


def test_a_bias_is_cast_once():
    """Again for another dtype, for another bias in its place, and where it has moved; never into a state dict."""
    own, _ = loaded(LINEAR, by_name("Q8_0"))
    own.bias = nn.Parameter(normal(12), requires_grad=False)
    names = set(own.state_dict())
    cast = own.bias_in(own.bias, torch.bfloat16)
    assert torch.equal(cast, own.bias.bfloat16()) and own.bias_in(own.bias, torch.bfloat16) is cast
    assert own.bias_in(own.bias, torch.float32) is own.bias and own.bias_in(None, torch.bfloat16) is None
    assert own.bias_in(own.bias, torch.float16).dtype == torch.float16
    other = normal(12, seed=1)
    assert torch.equal(own.bias_in(other, torch.bfloat16), other.bfloat16())
    own.bias = nn.Parameter(other, requires_grad=False)
    assert torch.equal(own.bias_in(own.bias, torch.bfloat16), other.bfloat16())
    assert set(own.state_dict()) == names
    x = normal(5, 256, dtype=torch.bfloat16)
    assert torch.equal(copy.deepcopy(own)(x), own(x))


def test_leftovers_become_numbers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(256)
            self.table = nn.Parameter(torch.zeros(2, 256))
            self.register_buffer("positions", torch.zeros(256))
            self.layer = layers.Linear(256, 12, bias=False)

    model = Model()
    data = oracle.random_blocks(by_name("Q4_K"), 3)
    table = PackedTensor(data[:2], by_name("Q4_K"), (2, 256))
    scale = PackedTensor(data[2:], by_name("Q4_K"), (256,))
    weight, _ = weight_for(model.layer, by_name("Q4_K"))
    state = {"norm.weight": scale, "norm.bias": normal(256), "table": table, "layer.weight": weight, "positions": scale}
    model.load_state_dict(state, assign=True)
    layers.unpack_leftovers(model, lambda module, name: torch.bfloat16 if name == "positions" else torch.float32)
    decoded = oracle.oracle(data, by_name("Q4_K"))
    for parameter, want in ((model.table, decoded[:2]), (model.norm.weight, decoded[2])):
        assert isinstance(parameter, nn.Parameter) and type(parameter.data) is torch.Tensor
        assert torch.equal(parameter, want)
    assert type(model.positions) is torch.Tensor and torch.equal(model.positions, decoded[2].to(torch.bfloat16))
    assert model.layer.weight.dtype == torch.uint8


# Low-rank terms beside a layer


def low_rank(layer, parts, tokens=(), dtype=torch.float32):
    """A term of `parts` (first output row, rows, rank) for `layer`."""
    rank, width = sum(r for _, _, r in parts), layer.logical_shape[1:].numel()
    ups, first = [], 0
    for start, rows, r in parts:
        ups.append((start, first, normal(rows, r, seed=7 + first, dtype=dtype)))
        first += r
    return LowRank(normal(rank, width, seed=6, dtype=dtype), normal(*tokens, rank, seed=5), tuple(ups))


def difference(term, shape):
    """ΔW = Σ B · diag(S) · A in fp64, of the weight's shape, and the sum of the magnitudes in it."""
    delta, size = torch.zeros(shape, dtype=torch.float64).flatten(1), torch.zeros(shape, dtype=torch.float64).flatten(1)
    for start, first, up in term.ups:
        ranks = slice(first, first + up.shape[1])
        down = term.scale[ranks].double().unsqueeze(1) * term.down[ranks].double()
        delta[start : start + len(up)] += up.double() @ down
        size[start : start + len(up)] += up.double().abs() @ down.abs()
    return delta.reshape(shape), size.reshape(shape)


PARTS = {
    "whole": [(0, 12, 5)],
    "slices": [(0, 4, 3), (4, 8, 2)],
    "a slice": [(3, 6, 4)],
    "overlapping": [(0, 12, 2), (2, 5, 3)],
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("case", [c for c in [LINEAR, *CONVOLUTIONS.values()] if "groups" not in c[2]], ids=str)
@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_low_rank_terms_are_a_difference_of_the_weight(case, parts, name):
    layer, twin = loaded(case, by_name(name))
    x = normal(*case[-1], seed=3)
    term = low_rank(layer, PARTS[parts])
    delta, delta_size = difference(term, layer.logical_shape)
    got = layer.compute(x, layer.weight.data, layer.bias, term)
    base, only = copy.deepcopy(twin), copy.deepcopy(twin)
    only.weight.copy_(delta_size)
    only.bias = None
    extra_size = only(x.double().abs())
    only.weight.copy_(delta)
    assert_same(got, base, x, only(x.double()), extra_size)


@pytest.mark.parametrize("parts", PARTS)
def test_low_rank_terms_on_an_embedding(parts):
    layer = layers.Embedding(12, 256)
    weight, dense = weight_for(layer, by_name("Q4_K"))
    layer.load_state_dict({"weight": weight})
    term = low_rank(layer, PARTS[parts])
    delta, size = difference(term, layer.logical_shape)
    indices = torch.tensor([[0, 3, 11], [5, 5, 8]])
    got = layer.compute(indices, layer.weight.data, None, term)
    assert_rounded(got, (dense.double() + delta)[indices], size[indices], 8, dense.double().abs()[indices])


def test_strength_per_token():
    layer, twin = loaded(LINEAR, by_name("Q4_K"))
    x = normal(5, 256, seed=3)
    term = low_rank(layer, PARTS["whole"], tokens=(5,))
    got = layer.compute(x, layer.weight.data, layer.bias, term)
    for token in range(5):
        one = LowRank(term.down, term.scale[token], term.ups)
        delta, size = difference(one, layer.logical_shape)
        row = x[token : token + 1]
        extra, extra_size = row.double() @ delta.t(), row.double().abs() @ size.t()
        assert_same(got[token : token + 1], twin, row, extra, extra_size)


def test_a_residual_runs_in_place_of_the_plain_layer():
    layer, _ = loaded(LINEAR, by_name("Q4_K"))
    x = normal(3, 256)
    plain = layer(x)
    seen = []

    def residual(x, layer, data, bias):
        seen.append((data.data_ptr(), bias.data_ptr()))
        return layer.compute(x, data, bias) + 1

    layer.residual = residual
    assert torch.equal(layer(x), plain + 1)
    layer.residual = None
    assert torch.equal(layer(x), plain)
    assert seen == [(layer.weight.data_ptr(), layer.bias.data_ptr())]


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_fetched_is_released(fails):
    """Hosts that offload weights have to get them back, whatever happens in between."""
    released = []

    class Offloading(layers.Linear):
        def fetch(self, x):
            return self.weight, self.bias, lambda: released.append(self)

    layer = Offloading(256, 12)
    weight, _ = weight_for(layer, by_name("Q4_K"))
    layer.load_state_dict({"weight": weight, "bias": normal(12)})
    if fails:
        with pytest.raises(ValueError, match="x has 255 columns, but the Q4_K weight has 256"):
            layer(normal(3, 255))
    else:
        layer(normal(3, 256))
    assert released == [layer]


@pytest.mark.parametrize("load, call", [(True, False), (False, True), (True, True)])
def test_inference_mode(load, call):
    """ComfyUI loads and runs in it, Forge outside of it, and some nodes mix the two."""
    with torch.inference_mode(load):
        models = [loaded(case, by_name("Q4_K")) for case in (LINEAR, CONVOLUTIONS["2d"])]
    for (layer, twin), shape in zip(models, (LINEAR[-1], CONVOLUTIONS["2d"][-1]), strict=True):
        with torch.inference_mode(call):
            x = normal(*shape, seed=3)
            got = layer(x)
        with torch.inference_mode():
            assert_same(got, twin, x)


@pytest.mark.parametrize("case", [LINEAR, CONVOLUTIONS["2d"]], ids=["linear", "convolution"])
@pytest.mark.parametrize("name", ["Q4_K", "F16", "F32"])
def test_gradients_reach_the_input(case, name):
    """Guidance and LoRA training differentiate through the model; the base is frozen.

    All layers of a model pass through one scratch, so that by the way back it holds another layer's weight.
    """
    layer, twin = loaded(case, by_name(name))
    term = low_rank(layer, PARTS["slices"])
    x = normal(*case[-1], seed=3).requires_grad_()
    y = layer.compute(x, layer.weight.data, layer.bias, term)
    other, _ = loaded(case, by_name("Q8_0"))
    other(x.detach())
    y.sum().backward()
    delta, size = difference(term, layer.logical_shape)
    wide = x.detach().double().requires_grad_()
    twin.weight.add_(delta)
    twin(wide).sum().backward()
    # the gradient is the sum of the weights that an input meets
    positive = wide.detach().requires_grad_()
    twin.weight.abs_().add_(2 * size)
    twin(positive).sum().backward()
    assert_rounded(x.grad, wide.grad, positive.grad, twin.weight[:, 0].numel())
