"""PackedTensor: stays packed where blocks stay whole, is an ordinary tensor in fp32 everywhere else, never writes."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle

import oracle
import pytest
import torch
from graft.kernels import CorruptFile, by_name
from graft.ops.files.gguf import open_gguf
from graft.ops.layers import unpack_leftovers
from graft.ops.packed import PackedTensor, as_weight, convert_rows
from graft.tests.gguf_samples import write_gguf
from safetensors.torch import load_file, save_file
from torch import nn

ROWS, COLUMNS = 6, 512

some_types = pytest.mark.parametrize("fmt", [by_name(n) for n in ("Q8_0", "Q4_K", "IQ3_S", "MXFP4")], ids=str)


def packed(fmt="Q4_K", shape=(ROWS, COLUMNS), seed=0, dtype=torch.bfloat16):
    """A PackedTensor of random blocks, and its weights in fp32."""
    fmt = by_name(fmt) if isinstance(fmt, str) else fmt
    count = torch.Size(shape).numel()
    data = oracle.random_blocks(fmt, count // fmt.block_size, seed)
    return PackedTensor(data, fmt, shape, dtype), oracle.oracle(data, fmt).reshape(shape)


@pytest.fixture(params=[False, True], ids=["", "inference_mode"])
def modes(request):
    """ComfyUI runs its nodes in inference mode, Forge and this test outside of it."""
    with torch.inference_mode(request.param):
        yield


def check(got, weights):
    """`got` is packed and stands for exactly these fp32 weights."""
    assert isinstance(got, PackedTensor)
    assert got.packed.dtype == torch.uint8 and got.packed.dim() == 1
    assert got.shape == weights.shape
    assert oracle.same_bits(got.dequantize(torch.float32), weights.contiguous())


@some_types
def test_it_shows_a_float_tensor(fmt):
    tensor, weights = packed(fmt)
    assert isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((ROWS, COLUMNS), torch.bfloat16, "cpu")
    assert (tensor.dim(), tensor.numel(), len(tensor), tensor.size(-1)) == (2, ROWS * COLUMNS, ROWS, COLUMNS)
    assert tensor.is_contiguous() and tensor.stride() == (COLUMNS, 1) and not tensor.requires_grad
    assert repr(tensor) == str(tensor) == f"PackedTensor({fmt.name}, [6, 512], torch.bfloat16, cpu)"
    check(tensor, weights)


@some_types
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_rounded_once(fmt, dtype):
    """From fp32, whatever is shown: not from what has been rounded to the shown dtype."""
    tensor, weights = packed(fmt, dtype=torch.float16)
    assert torch.equal(tensor.dequantize(dtype), weights.to(dtype))
    assert torch.equal(tensor.to(dtype).dequantize() if dtype == torch.float16 else tensor.to(dtype), weights.to(dtype))
    assert tensor.dequantize().dtype == torch.float16


KEEPS_PACKED = {
    "slice": lambda t: t[1:4],
    "slice from the end": lambda t: t[-2:],
    "empty slice": lambda t: t[6:],
    "slice beyond the end": lambda t: t[4:100],
    "all of it": lambda t: t[:],
    "all of it, twice": lambda t: t[:, :],
    "rows of all columns": lambda t: t[2:3, :],
    "narrow": lambda t: t.narrow(0, 2, 3),
    "torch.narrow, negative dim": lambda t: torch.narrow(t, -2, 2, 3),
    "view": lambda t: t.view(3, 2, COLUMNS),
    "view with -1": lambda t: t.view(3, -1),
    "view_as": lambda t: t.view_as(torch.empty(2, 3, COLUMNS)),
    "reshape": lambda t: t.reshape(2, -1, COLUMNS),
    "flatten": lambda t: t.flatten(),
    "unflatten": lambda t: t.unflatten(0, (2, 3)),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "unsqueeze at the end": lambda t: t.unsqueeze(-1),
    "None": lambda t: t[None],
    "squeeze": lambda t: t.view(1, ROWS, 1, COLUMNS).squeeze(),
    "squeeze a dim": lambda t: t.view(1, ROWS, 1, COLUMNS).squeeze(2),
    "squeeze dims": lambda t: t.view(1, ROWS, 1, COLUMNS).squeeze((0, -2)),
    "squeeze a dim that is not 1": lambda t: t.squeeze(0),
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
    "contiguous": lambda t: t.contiguous(),
    "to its own dtype": lambda t: t.to(t.dtype),
    "to its own device": lambda t: t.to("cpu"),
    "to, as a copy": lambda t: t.to("cpu", t.dtype, copy=True),
    "cpu": lambda t: t.cpu(),
    "data": lambda t: t.data,
    "deepcopy": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)) if isinstance(t, PackedTensor) else t,
    "slice of a slice": lambda t: t[1:5][1:3],
    "view of a slice": lambda t: t[2:4].view(1, 2, COLUMNS),
    "index_select": lambda t: t.index_select(0, torch.tensor([4, 0, 4])),
    "index_select, negative dim": lambda t: torch.index_select(t, -2, torch.tensor([5, 1])),
    "cat": lambda t: torch.cat([t[3:], t, t[:1]]),
    "cat, negative dim": lambda t: torch.cat([t, t], dim=-2),
    "vstack": lambda t: torch.vstack([t, t]),
    "cat of three dims": lambda t: torch.cat([t.view(3, 2, COLUMNS), t.view(3, 2, COLUMNS)]),
    "rows by step": lambda t: t[::2],
    "in the middle": lambda t: t.view(2, 3, COLUMNS)[:, 1:],
    "in the middle, by step": lambda t: t.view(2, 3, COLUMNS)[:, ::2],
    "in the middle, reshaped": lambda t: t.view(2, 3, COLUMNS)[:, :2].reshape(4, COLUMNS).contiguous(),
    "chunk in the middle": lambda t: t.view(2, 3, COLUMNS).chunk(3, dim=1)[1],
    "split in the middle": lambda t: t.view(2, 3, COLUMNS).split([1, 2], dim=-2)[1],
    "index_select in the middle": lambda t: t.view(2, 3, COLUMNS).index_select(1, torch.tensor([2, 0])),
    "cat in the middle": lambda t: torch.cat([t.view(2, 3, COLUMNS), t.view(2, 3, COLUMNS)[:, :1]], dim=1),
}


@some_types
@pytest.mark.parametrize("operation", KEEPS_PACKED)
def test_stays_packed(operation, fmt, modes):
    tensor, weights = packed(fmt)
    check(KEEPS_PACKED[operation](tensor), KEEPS_PACKED[operation](weights))


SPLITS = {
    "chunk": lambda t: t.chunk(3),
    "chunk unevenly": lambda t: torch.chunk(t, 4, dim=0),
    "chunk, negative dim": lambda t: t.chunk(2, dim=-2),
    "split": lambda t: t.split(4),
    "split by sizes": lambda t: t.split([1, 0, 2, 3]),
    "split, negative dim": lambda t: torch.split(t, 2, dim=-2),
    "tensor_split": lambda t: t.tensor_split(4),
    "tensor_split at": lambda t: t.tensor_split((1, 4)),
}


@some_types
@pytest.mark.parametrize("operation", SPLITS)
def test_parts_stay_packed_and_share_the_bytes(operation, fmt, modes):
    tensor, weights = packed(fmt)
    parts, want = SPLITS[operation](tensor), SPLITS[operation](weights)
    assert len(parts) == len(want)
    for part, rows in zip(parts, want, strict=True):
        check(part, rows)
        if rows.numel():
            assert part.packed.untyped_storage().data_ptr() == tensor.packed.untyped_storage().data_ptr()


IS_ORDINARY = {
    "a row": lambda t: t[2],
    "columns": lambda t: t[:, 3:9],
    "narrow columns": lambda t: t.narrow(1, 256, 256),
    "chunk columns": lambda t: t.chunk(2, dim=1)[1],
    "rows by index": lambda t: t[torch.tensor([4, 0])],
    "index_select of columns": lambda t: t.index_select(1, torch.tensor([4, 0])),
    "unbind": lambda t: t.unbind()[1],
    "transpose": lambda t: t.transpose(0, 1),
    "t": lambda t: t.t(),
    "T": lambda t: t.T,
    "permute": lambda t: t.view(2, 3, COLUMNS).permute(2, 0, 1),
    "expand": lambda t: t[None].expand(2, -1, -1),
    "repeat": lambda t: t.repeat(2, 1),
    "flip": lambda t: t.flip(0),
    "cat of columns": lambda t: torch.cat([t, t], dim=1),
    "stack": lambda t: torch.stack([t, t]),
    "pad": lambda t: nn.functional.pad(t, (0, 1)),
    "where": lambda t: torch.where(t > 0, t, 0),
    "add": lambda t: t + 1,
    "multiply from the left": lambda t: 2 * t,
    "abs": torch.abs,
    "sum": lambda t: t.sum(),
    "add another": lambda t: t + torch.ones(COLUMNS, dtype=torch.bfloat16),
    "float": lambda t: t.float(),
    "type": lambda t: t.type(torch.float64),
    "to, as tensors": lambda t: t.to(torch.empty(0, dtype=torch.float16)),
    "matmul": lambda t: torch.ones(2, ROWS) @ t,
}


@pytest.mark.parametrize("operation", IS_ORDINARY)
def test_any_other_operation_sees_the_weights(operation, modes):
    """In fp32 or the dtype that was asked for, and never by way of the one that is shown."""
    tensor, weights = packed(shape=(ROWS, COLUMNS))
    got, want = IS_ORDINARY[operation](tensor), IS_ORDINARY[operation](weights)
    assert type(got) is torch.Tensor
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


PRODUCTS = {
    "matmul": lambda t, dtype: torch.ones(2, ROWS, dtype=dtype) @ t,
    "matmul from the left": lambda t, dtype: t @ torch.ones(COLUMNS, 2, dtype=dtype),
    "mm": lambda t, dtype: torch.mm(torch.ones(2, ROWS, dtype=dtype), t),
    "linear": lambda t, dtype: nn.functional.linear(torch.ones(2, COLUMNS, dtype=dtype), t),
    "linear, by name": lambda t, dtype: nn.functional.linear(input=torch.ones(2, COLUMNS, dtype=dtype), weight=t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_is_in_the_dtype_of_what_it_is_with(product, dtype, modes):
    tensor, weights = packed()
    got, want = PRODUCTS[product](tensor, dtype), PRODUCTS[product](weights.to(dtype), dtype)
    assert type(got) is torch.Tensor and got.dtype == dtype
    assert torch.equal(got, want)


def test_predicates_see_the_weights():
    tensor, weights = packed()
    assert torch.equal(tensor, tensor) and torch.equal(tensor, weights)
    assert torch.allclose(tensor.float(), weights, rtol=0, atol=0)
    assert bool((tensor == tensor).all())
    assert tensor.sum(dtype=torch.float64).item() == weights.sum(dtype=torch.float64).item()
    assert len(list(tensor)) == ROWS


def test_mixed_formats_join_as_weights():
    a, wa = packed("Q4_K")
    b, wb = packed("Q6_K", seed=1)
    got = torch.cat([a, b])
    assert type(got) is torch.Tensor and torch.equal(got, torch.cat([wa, wb]))
    got = torch.cat([a, torch.zeros(1, COLUMNS)])
    assert type(got) is torch.Tensor and got.shape == (ROWS + 1, COLUMNS)


def test_room_for_weights_is_ordinary_memory(modes):
    tensor, _ = packed()
    for like in (torch.empty_like, torch.zeros_like, torch.ones_like, torch.rand_like):
        got = like(tensor)
        assert type(got) is torch.Tensor and (got.shape, got.dtype) == (tensor.shape, torch.bfloat16)
    assert torch.empty_like(tensor, dtype=torch.float32, device="meta").device.type == "meta"
    assert torch.count_nonzero(torch.zeros_like(tensor)) == 0
    assert type(tensor.new_zeros(3)) is torch.Tensor


# Rows that end inside a block


@pytest.mark.parametrize("shape", [(4, 3, 64), (4, 320), (2, 3, 3, 128), (768,), (2, 2, 256)])
def test_a_reshaped_tensor_is_whole_or_ordinary(shape, modes):
    """Converters fold such tensors; cutting their rows would cut blocks."""
    tensor, weights = packed(shape=shape)
    check(tensor, weights)
    check(tensor.view(-1), weights.view(-1))
    whole = torch.Size(shape[1:]).numel() % 256 == 0
    for part, want in zip(tensor.split(1), weights.split(1), strict=True):
        assert isinstance(part, PackedTensor) == whole
        assert torch.equal(part.to(torch.float32), want)
    joined = torch.cat([tensor, tensor])
    assert isinstance(joined, PackedTensor) == whole and joined.shape == (2 * shape[0], *shape[1:])


# Wrong use


BAD_SHAPES = {
    "view": lambda t: t.view(4, COLUMNS),
    "view with -1": lambda t: t.view(-1, 500),
    "reshape": lambda t: t.reshape(7, 7),
    "two times -1": lambda t: t.view(-1, -1),
    "split": lambda t: t.split([1, 2]),
    "split too far": lambda t: t.split([4, 4]),
    "narrow": lambda t: t.narrow(0, 4, 3),
    "cat": lambda t: torch.cat([t, t.view(3, 2 * COLUMNS)]),
}


@pytest.mark.parametrize("operation", BAD_SHAPES)
def test_wrong_shapes_are_refused_as_by_torch(operation, modes):
    tensor, weights = packed()
    for one in (tensor, weights):
        with pytest.raises(RuntimeError):
            BAD_SHAPES[operation](one)


WRITES = {
    "copy_": lambda t: t.copy_(torch.zeros(ROWS, COLUMNS)),
    "copy_ a packed one": lambda t: t.copy_(packed(seed=1)[0]),
    "mul_": lambda t: t.mul_(2),
    "zero_": lambda t: t.zero_(),
    "fill_": lambda t: t.fill_(1),
    "normal_": lambda t: t.normal_(),
    "masked_fill_": lambda t: t.masked_fill_(torch.ones(ROWS, COLUMNS, dtype=torch.bool), 0),
    "add_ a packed one": lambda t: t.add_(t),
    "a row": lambda t: t.__setitem__(0, 1.0),
    "some rows": lambda t: t[1:3].zero_(),
    "out": lambda t: torch.add(torch.zeros(ROWS, COLUMNS), 1, out=t),
    "an initializer": lambda t: nn.init.zeros_(t),
}


@pytest.mark.parametrize("operation", WRITES)
def test_nothing_writes_to_it(operation, modes):
    """An operation that a host means to change the weights must not end silently without an effect."""
    tensor, weights = packed()
    before = hashlib.sha256(tensor.packed.numpy()).digest()
    with pytest.raises(TypeError, match="packed weights are read-only"):
        WRITES[operation](tensor)
    assert hashlib.sha256(tensor.packed.numpy()).digest() == before
    check(tensor, weights)


# On the way into a module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_it_can_be_copied_from(dtype, modes):
    tensor, weights = packed()
    want = weights.to(dtype)
    assert torch.equal(torch.empty(ROWS, COLUMNS, dtype=dtype).copy_(tensor), want)
    strided = torch.empty(COLUMNS, ROWS, dtype=dtype).t()
    assert torch.equal(strided.copy_(tensor), want)
    assert torch.equal(torch.empty(2, ROWS, COLUMNS, dtype=dtype).copy_(tensor), want.expand(2, -1, -1))
    whole = torch.zeros(ROWS + 2, COLUMNS, dtype=dtype)
    whole[1:-1] = tensor
    assert torch.equal(whole[1:-1], want) and not whole[0].any() and not whole[-1].any()


@pytest.mark.parametrize("assign", [False, True])
def test_an_ordinary_module_takes_the_weights(assign):
    tensor, weights = packed()
    module = nn.Linear(COLUMNS, ROWS, bias=False)
    module.load_state_dict({"weight": tensor}, assign=assign)
    unpack_leftovers(module)
    assert type(module.weight.data) is torch.Tensor
    assert torch.equal(module.weight.data, weights)
    module(torch.zeros(1, COLUMNS, dtype=module.weight.dtype))


def test_as_a_parameter_it_stays_packed(modes):
    tensor, weights = packed()
    parameter = nn.Parameter(tensor, requires_grad=False)
    assert isinstance(parameter, nn.Parameter)
    check(parameter, weights)
    check(parameter.detach(), weights)


def test_safetensors_says_what_to_do(tmp_path):
    tensor, weights = packed()
    with pytest.raises(TypeError, match=r"dequantize\(\) them first"):
        save_file({"a": tensor}, tmp_path / "a.safetensors")
    save_file({"a": tensor.dequantize(torch.float32)}, tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], weights)


def test_copies_are_independent():
    tensor, weights = packed()
    for other in (tensor.clone(), copy.deepcopy(tensor), tensor.to("cpu", copy=True)):
        other.packed.zero_()
        check(tensor, weights)
    assert tensor.detach().packed.data_ptr() == tensor.packed.data_ptr()


def test_saved_and_loaded_by_torch():
    tensor, weights = packed()
    file = io.BytesIO()
    torch.save({"w": tensor}, file)
    file.seek(0)
    got = torch.load(file, weights_only=False)["w"]
    check(got, weights)
    assert got.fmt == tensor.fmt and got.dtype == tensor.dtype


def test_moves_carry_the_bytes():
    """`meta` stands for another device: the packed bytes move, not the weights."""
    tensor, _ = packed()
    for moved in (tensor.to("meta"), tensor.to("meta", torch.bfloat16), tensor.to(device="meta", non_blocking=True)):
        assert isinstance(moved, PackedTensor) and moved.device.type == "meta"
        assert moved.packed.device.type == "meta" and moved.packed.numel() == tensor.packed.numel()
    assert type(tensor.to("meta", torch.float32)) is torch.Tensor


def test_a_tensor_made_in_inference_mode_lives_on():
    with torch.inference_mode():
        tensor, weights = packed()
        weights = weights.clone()
    check(tensor[1:3], weights[1:3])
    check(torch.cat(tensor.chunk(2)), weights)
    x = torch.ones(1, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    nn.functional.linear(x, tensor).sum().backward()
    assert torch.equal(x.grad[0], weights.to(torch.bfloat16).sum(0))


def test_weights_of_a_file(tmp_path):
    values = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).numpy()
    path = write_gguf(tmp_path / "m.gguf", {t: (values, t) for t in ("Q4_K", "F16", "BF16", "F32")})
    file = open_gguf(path)
    weights = {name: as_weight(tensor) for name, tensor in file.tensors.items()}
    assert isinstance(weights["Q4_K"], PackedTensor) and weights["Q4_K"].fmt is by_name("Q4_K")
    assert weights["Q4_K"].packed.data_ptr() == file.tensors["Q4_K"].data.data_ptr()
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)):
        assert type(weights[name]) is torch.Tensor
        assert torch.equal(weights[name], torch.from_numpy(values).to(dtype))


# A host's conversion of names


def joining(state):
    """Joins q, k and v and swaps the halves of a modulation, in memory made for the part that comes first."""
    if "q" not in state and "k" not in state:
        return None
    made = {}
    for name, start in (("q", 0), ("k", ROWS), ("v", 2 * ROWS)):
        if name in state:
            part = state.pop(name)
            old = made.get("qkv", torch.empty_like(part))
            made["qkv"] = torch.empty(max(len(old), start + len(part)), *part.shape[1:], dtype=part.dtype)
            made["qkv"][: len(old)] = old
            made["qkv"].narrow(0, start, len(part))[:] = part
    made["plain"] = state.pop("norm")
    shift, scale = state.pop("mod").chunk(2)
    made["swapped"] = torch.cat([scale, shift])
    return made


def test_a_hosts_conversion_moves_packed_rows():
    parts = {name: packed(seed=i) for i, name in enumerate(("q", "k", "v", "mod"))}
    norm = torch.rand(())
    state = {name: tensor for name, (tensor, _) in parts.items()} | {"norm": norm, "left": torch.rand(4)}
    got = convert_rows(state, joining)
    assert list(got) == ["qkv", "plain", "swapped"] and len(state) == 6
    assert isinstance(got["qkv"], PackedTensor) and isinstance(got["swapped"], PackedTensor)
    check(got["qkv"], torch.cat([parts[name][1] for name in "qkv"]))
    check(got["swapped"], parts["mod"][1].roll(ROWS // 2, 0))
    assert got["plain"] is norm


@pytest.mark.parametrize("other", ["Q6_K", "BF16", "rows that end inside a block"])
def test_a_hosts_conversion_rounds_nothing(other):
    (q, want_q), (k, want_k), (v, want_v), (mod, want_mod) = (packed(seed=i) for i in range(4))
    if other == "Q6_K":
        v, want_v = packed("Q6_K", seed=2)
    elif other == "BF16":
        v = want_v.to(torch.bfloat16)
        want_v = v.float()
    else:
        (q, want_q), (k, want_k), (v, want_v), (mod, want_mod) = (packed(shape=(ROWS, 128), seed=i) for i in range(4))
    got = convert_rows({"q": q, "k": k, "v": v, "mod": mod, "norm": torch.rand(4)}, joining)
    assert got["qkv"].dtype == torch.float32 and torch.equal(got["qkv"], torch.cat([want_q, want_k, want_v]))
    assert torch.equal(got["swapped"].to(torch.float32), want_mod.roll(ROWS // 2, 0))


def test_a_hosts_conversion_of_too_little():
    mod, norm = packed()[0], torch.rand(4)
    assert convert_rows({"mod": mod, "norm": norm}, joining) is None
    with pytest.raises(CorruptFile, match="incomplete"):
        convert_rows({"k": packed()[0], "mod": mod, "norm": norm}, joining)
    none = convert_rows({"q": packed()[0], "mod": mod, "norm": torch.empty(0, 4)}, joining)
    assert none["plain"].shape == (0, 4)


def test_a_parameter_is_added_to_without_gradients():
    """As optimizers and hosts' merges do: the weights are worked out in the mode that the caller is in."""
    tensor, weights = packed()
    target = nn.Parameter(torch.ones(ROWS, COLUMNS))
    with torch.no_grad():
        target.add_(tensor)
    assert torch.equal(target.detach(), 1 + weights)
