"""int8 products on packed bytes: errors of a layer, what stays as it is, and the demo's pictures."""

from __future__ import annotations

import types
from dataclasses import replace

import activations
import adapter_samples as samples
import oracle
import pytest
import torch
import torch.nn.functional as F
from activations import gaussian
from graft.demo import pictures
from graft.demo.grafted import Grafted, load_model, shipped
from graft.kernels import LowRank, by_name, cpu, dequantize, int8, linear
from graft.ops.int8 import FINER, RULES, Rule, kept_finer, report, use_int8
from graft.ops.layers import Linear, packed_layers
from graft.ops.packed import PackedTensor
from graft.ops.quantize import needs_importance

CPU = torch.device("cpu")
SMALL = Rule(columns=256, rows=256, finer=frozenset())
needs_int8 = pytest.mark.skipif(int8.unavailable(CPU) is not None, reason=str(int8.unavailable(CPU)))


@pytest.fixture
def few_rows(monkeypatch):
    """int8 for as few rows as a test has."""
    monkeypatch.setattr(int8, "LEAST_ROWS", 1)
    monkeypatch.setattr(int8, "LEAST_ROWS_BF16", 1)


@pytest.fixture
def kitchen(monkeypatch):
    """comfy_kitchen's `int8_linear` as it documents it, in plain torch; returns the calls."""
    calls = []

    def int8_linear(x, weight, weight_scale, bias=None, out_dtype=None, convrot=False, convrot_groupsize=256):
        assert weight.dtype == torch.int8 and weight.is_contiguous() and weight_scale.dtype == torch.float32
        assert convrot and convrot_groupsize == 256 and (bias is None or bias.dtype == x.dtype)
        calls.append(weight.shape[0])
        h = torch.kron(int8.hadamard(CPU), int8.hadamard(CPU))
        rotated = (x.float().view(len(x), -1, 256) @ h).view(x.shape)
        scales = rotated.abs().amax(1, keepdim=True) / 127
        sums = (rotated / scales).round().double() @ weight.double().t()
        y = sums * scales * weight_scale.view(-1)
        return (y if bias is None else y + bias).to(out_dtype)

    library = types.ModuleType("comfy_kitchen")
    library.int8_linear = int8_linear
    monkeypatch.setattr(int8, "_kitchen", lambda: library)
    return calls


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def weight(name: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed bytes of a random matrix, and it before it was quantized."""
    original = gaussian(rows, columns, seed=7) / columns**0.5
    return oracle.quantize(original, by_name(name)), original


def test_the_rotation_is_its_own_inverse_and_keeps_lengths():
    x = gaussian(5, 768)
    rows, spare = x.clone(), torch.empty_like(x)
    once = int8.rotate_(rows, spare).clone()
    torch.testing.assert_close(once.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(int8.rotate_(rows, spare), x)
    assert (once[:, :256] - x[:, :256]).abs().max() > 0.5


@needs_int8
@pytest.mark.parametrize("kind", activations.KINDS)
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_error_of_a_layer(kind, name, few_rows):
    """At most 1.5 % on every kind of activations, and less than what the type itself costs; else it is left out."""
    n, k = 96, 3072
    data, original = weight(name, n, k)
    scales, of_weight = int8.prepare(data, name, (n, k))
    assert 0.005 < of_weight < 0.011
    x = activations.KINDS[kind](64, k)
    got = int8.linear(x, data, name, scales)
    want = F.linear(x, dequantize(data, name, (n, k)))
    assert 0.005 < error(got, want) <= 0.015
    costs_less = error(got, want) < error(want, F.linear(x, original))
    assert costs_less == (name not in RULES["int8"].finer)


@pytest.mark.parametrize("name", [fmt.name for fmt in oracle.QUANTIZED if not needs_importance(fmt)])
def test_types_that_are_left_out_are_those_that_round_less_than_int8(name):
    """A rotated row, scaled by its largest number, is off by 0.8 % in int8; so is x."""
    original = gaussian(64, 3072, seed=7)
    own = error(dequantize(oracle.quantize(original, by_name(name)), name, original.shape), original)
    assert (own < 0.012) == (name in RULES["int8"].finer), own


@needs_int8
@pytest.mark.parametrize("fmt", oracle.QUANTIZED, ids=str)
def test_codes_of_every_type(fmt):
    """Those of an exact rotation, rounded."""
    n, k = 7, 512
    data = oracle.random_blocks(fmt, n * k // fmt.block_size, seed=3).view(n, -1)
    h = torch.kron(int8.hadamard(CPU), int8.hadamard(CPU)).double()
    want = (oracle.oracle(data, fmt).double().view(n, -1, 256) @ h).view(n, k)
    scales, _ = int8.prepare(data, fmt, (n, k))
    torch.testing.assert_close(scales.double(), want.abs().amax(1, keepdim=True) / 127, rtol=1e-5, atol=0)
    codes = torch.empty(n, k, dtype=torch.int8)
    int8.encode(data, fmt, scales, codes, "cpu")
    off = (codes - (want / scales)).abs()
    assert off.max() < 0.5 + 1e-3
    assert (codes.abs().amax(1) == 127).all()


@needs_int8
def test_rows_of_zeros_give_zeros(few_rows):
    data, _ = weight("Q8_0", 96, 512)
    data = data.view(96, -1).clone()
    data[5] = 0
    x = gaussian(64, 512)
    x[3] = 0
    scales, _ = int8.prepare(data, "Q8_0", (96, 512))
    y = int8.linear(x, data, "Q8_0", scales)
    assert not y[3].any() and not y[:, 5].any() and torch.isfinite(y).all() and y[4, 6] != 0


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bias_scale_and_low_rank_terms(dtype, few_rows):
    n, k, m = 400, 512, 70
    data, _ = weight("Q5_K", n, k)
    scales, _ = int8.prepare(data, "Q5_K", (n, k))
    x, bias, scale = gaussian(m, k).to(dtype), gaussian(1, n).view(n), torch.rand(n) + 0.5
    up = gaussian(n, 16, seed=4)
    terms = LowRank(gaussian(16, k, seed=5), torch.full((16,), 0.1), ((0, 0, up[:, :8]), (100, 8, up[100:300, 8:])))
    got = int8.linear(x.view(7, 10, k), data, "Q5_K", scales, bias, terms, scale=scale)
    want = linear(x, data, "Q5_K", bias, terms, scale=scale)
    assert got.shape == (7, 10, n) and got.dtype == dtype
    bare = linear(x, data, "Q5_K", scale=scale)
    # only the product by the weight is rounded to int8; sums are to the dtype, both ways, before the terms and after
    of_dtype = 4 * torch.finfo(dtype).eps / 2 * want.double().norm()
    assert (got.view(m, n) - want).double().norm() <= 0.015 * bare.double().norm() + of_dtype


@needs_int8
def test_few_rows_gradients_and_other_devices_take_the_usual_way():
    n, k = 64, 512
    data, _ = weight("Q8_0", n, k)
    scales, _ = int8.prepare(data, "Q8_0", (n, k))
    for rows, same in ((int8.LEAST_ROWS - 1, True), (int8.LEAST_ROWS, False)):
        x = gaussian(rows, k)
        assert torch.equal(int8.linear(x, data, "Q8_0", scales), linear(x, data, "Q8_0")) == same
    x = gaussian(int8.LEAST_ROWS, k).requires_grad_()
    int8.linear(x, data, "Q8_0", scales).sum().backward()
    torch.testing.assert_close(x.grad[0], dequantize(data, "Q8_0", (n, k)).sum(0))
    assert int8.unavailable(torch.device("mps")) == "there are no int8 kernels for mps"


@needs_int8
@pytest.mark.parametrize("native", [True, False])
def test_how_many_rows_it_takes_is_told_by_what_it_is_measured_against(native, monkeypatch):
    """Native bf16 products take half the time of fp32; where torch would take more, x is multiplied in fp32."""
    monkeypatch.setattr(cpu, "SLOW_DTYPES", frozenset() if native else frozenset([torch.bfloat16]))
    fmt = by_name("Q8_0")
    for dtype, least in ((torch.float32, 384), (torch.bfloat16, 512 if native else 384)):
        taken = [rows for rows in (383, 384, 511, 512) if int8.pays(gaussian(rows, 256).to(dtype), 256, fmt)]
        assert taken[0] == least


def test_a_processor_with_tiles_is_told_to_take_bf16(monkeypatch):
    """AMX: bf16 products are too fast there for what encoding takes."""
    monkeypatch.setattr(cpu, "_features", lambda: frozenset(("avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")))
    assert int8._unavailable_on_cpu() == "this processor is faster in bf16 (AMX): choose bf16"
    monkeypatch.setattr(cpu, "_features", lambda: frozenset(("avx2",)))
    assert int8._unavailable_on_cpu() == "this processor has no fast int8 products (VNNI)"


@needs_int8
def test_numbers_that_are_none_stay_visible(few_rows):
    data, _ = weight("Q8_0", 32, 256)
    scales, _ = int8.prepare(data, "Q8_0", (32, 256))
    x = gaussian(3, 256)
    x[1, 5] = float("nan")
    y = int8.linear(x, data, "Q8_0", scales)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    zero = int8.linear(torch.zeros(2, 256), data, "Q8_0", scales)
    assert torch.equal(zero, torch.zeros(2, 32))


def test_comfy_kitchen_takes_over_with_its_own_rotation(kitchen, monkeypatch):
    n, k, m = 300, 512, 40
    data, _ = weight("Q4_K", n, k)
    scales, _ = int8.prepare(data, "Q4_K", (n, k))
    monkeypatch.setattr(int8.scratch, "GPU_BYTES", 1 << 16)
    monkeypatch.setattr(int8.scratch, "CPU_BYTES", 1 << 16)
    x, bias, scale = gaussian(m, k), gaussian(1, n).view(n), torch.rand(n) + 0.5
    terms = LowRank(gaussian(8, k, seed=5), torch.full((8,), 0.1), ((0, 0, gaussian(n, 8, seed=4)),))
    got = int8._by_kitchen(x, data, by_name("Q4_K"), scales, bias, terms, "auto", scale)
    assert kitchen == [128, 128, 44]
    want, bare = (linear(x, data, "Q4_K", b, t, scale=scale) for b, t in ((bias, terms), (None, None)))
    assert (got - want).norm() <= 0.015 * bare.norm()


def packed_linear(name: str, rows: int, columns: int) -> Linear:
    layer = Linear(columns, rows, bias=False)
    data, _ = weight(name, rows, columns)
    layer.load_weight(PackedTensor(data, by_name(name), torch.Size((rows, columns)), torch.float32))
    return layer


def test_the_rule_and_what_names_say_against_it():
    found = {
        "img_in": packed_linear("Q8_0", 256, 256),
        "blocks.0.attn": packed_linear("Q8_0", 256, 256),
        "blocks.1.attn": packed_linear("Q8_0", 256, 256),
        "blocks.1.small": packed_linear("Q8_0", 64, 256),
        "blocks.1.odd": packed_linear("Q8_0", 256, 288),
        "final_layer.adaLN_modulation.1": packed_linear("Q8_0", 256, 256),
    }
    found["blocks.1.kept"] = Linear(256, 256)
    found["blocks.1.kept"].load_weight(gaussian(256, 256))

    def taking_part(names: str = "") -> list[str]:
        use_int8(found, names, SMALL)
        return [path for path, layer in found.items() if layer.int8_bound is not None]

    assert taking_part() == ["blocks.0.attn", "blocks.1.attn"]
    assert report(found) == [
        "2 layers in int8, where there are many tokens",
        "2 layers not in int8 (before or behind the blocks): img_in, final_layer.adaLN_modulation.1",
        "1 layer not in int8 (smaller than 256×256): blocks.1.small",
        "1 layer not in int8 (inputs not a multiple of 256): blocks.1.odd",
        "1 layer not in int8 (not quantized): blocks.1.kept",
    ]
    assert taking_part("-blocks.1, img_in, odd") == ["img_in", "blocks.0.attn"]
    use_int8(found, rule=replace(SMALL, finer=RULES["int8"].finer))
    assert kept_finer(found) == 2
    assert f"2 layers not in int8 ({FINER}): blocks.0.attn, blocks.1.attn" in report(found)
    use_int8(found, "blocks.1.attn", replace(SMALL, finer=RULES["int8"].finer))
    assert [path for path, layer in found.items() if layer.int8_bound is not None] == ["blocks.1.attn"]
    assert taking_part("small") == ["blocks.0.attn", "blocks.1.attn", "blocks.1.small"]
    assert report({"a": packed_linear("Q8_0", 256, 256)}) == []


@needs_int8
def test_a_weight_that_int8_changes_too_much_stays():
    fmt, original = by_name("Q8_0"), gaussian(256, 4096)
    # the rotation mends no block that is larger than the others as a whole, and a row has one scale
    original[:, 256:512] *= 30
    layer = Linear(4096, 256, bias=False)
    layer.load_weight(PackedTensor(oracle.quantize(original, fmt), fmt, original.shape, torch.float32))
    use_int8({"blocks.0.a": layer}, rule=replace(RULES["int8_all"], rows=256))
    x = gaussian(int8.LEAST_ROWS, 4096)
    assert torch.equal(layer(x), linear(x, layer.weight, "Q8_0", rows=256))
    assert layer.int8_reason == "weights off by 2.7%"
    assert report({"blocks.0.a": layer}) == [
        "0 layers in int8, where there are many tokens", "1 layer not in int8 (weights off by 2.7%): blocks.0.a",
    ]  # fmt: skip
    use_int8({"blocks.0.a": layer}, "blocks.0", Rule(rows=256))
    assert 0.01 < error(layer(x), linear(x, layer.weight, "Q8_0", rows=256)) < 0.05


@needs_int8
def test_scales_are_kept_with_the_layer_and_no_part_of_its_state():
    layer = packed_linear("Q8_0", 256, 256)
    use_int8({"blocks.0.a": layer}, rule=SMALL)
    few, many = gaussian(3, 256), gaussian(int8.LEAST_ROWS, 256)
    assert torch.equal(layer(few), linear(few, layer.weight, "Q8_0", rows=256)) and layer.int8_scales is None
    before = layer.weight.clone()
    y = layer(many)
    assert layer.int8_scales.shape == (256, 1) and list(layer.state_dict()) == ["weight"]
    assert torch.equal(layer(many), y) and torch.equal(layer.weight, before)
    layer.load_weight(gaussian(256, 256))
    assert layer.int8_scales is None
    # another order of 256 additions, each of which rounds by 2^-24 of what there is
    assert error(layer(many), F.linear(many, layer.weight)) < 256 * 2**-24


@needs_int8
@pytest.mark.parametrize("kind", {**samples.KINDS, **samples.LINEAR_KINDS})
def test_every_kind_of_adapter_runs_beside_it(kind, few_rows):
    """Also those that run the layer on another x: off by what the layer is, and not by more."""
    r = samples.Sampler(1, torch.float32)
    plain, quick = packed_linear("Q6_K", 256, 512), packed_linear("Q6_K", 256, 512)
    use_int8({"blocks.0.a": quick}, rule=SMALL)
    patch = samples.patch_of({**samples.KINDS, **samples.LINEAR_KINDS}[kind](r, (256, 512)), (256, 512), 0.75)
    x = r(40, 512, scale=1.0)
    base = quick(x)
    got, want = samples.run(quick, x, [patch]), samples.run(plain, x, [patch])
    assert error(got, want) < 0.02 and error(want, plain(x)) > 1e-3
    assert kind == "set" or not torch.equal(got, want)
    assert torch.equal(quick(x), base)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * torch.log10((a - b).square().mean()).item()


@needs_int8
@torch.inference_mode()
def test_the_demo(few_rows):
    """A picture at 45 dB or more from fp32's, a LoRA's effect kept, and the base as it was."""
    plain, quick = load_model(shipped("Q4_K_M.gguf")), load_model(shipped("Q4_K_M.gguf"))
    use_int8(packed_layers(quick), rule=SMALL)
    inputs = (
        pictures.beside_places(pictures.noise(7, 2)), torch.full((2,), 750.0),
        pictures.prompts(["a red star and a blue ring on mint", ""]),
    )  # fmt: skip
    base, exact = quick(*inputs), plain(*inputs)
    assert 1e-3 < error(base, exact) < 0.05
    lora = {"neon": 1.0}
    effect = Grafted(quick, lora)(*inputs) - base
    true = Grafted(plain, lora)(*inputs) - exact
    kept = ((effect * true).sum() / true.square().sum()).item()
    assert 0.99 <= kept <= 1.01
    assert torch.equal(quick(*inputs), base)
    drawn = [
        pictures.sample(model, ["a red star and a blue ring on mint"], seed=7, steps=4) for model in (quick, plain)
    ]
    assert 45 <= psnr(*drawn) < 70
