"""Every kind of adapter beside a layer does what its merge into the weight would do."""

from __future__ import annotations

import adapter_samples as samples
import pytest
import torch
from adapter_samples import CONV_KINDS, KINDS, LINEAR_KINDS, Sampler, Shape, make_input, make_layer, patch_of, run
from graft.kernels import AdapterError, cpu, scratch
from graft.ops import layout
from graft.ops.adapters import Patch, Region, from_host
from graft.ops.kinds import InputOFT

# sums of some hundreds of products in fp64, in another order
TOLERANCE = 1e-12


def assert_same(got: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal, with the error measured against the adapter's effect."""
    effect = (wanted - base).abs().max()
    assert effect > 0
    assert (got - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max())), float(
        (got - wanted).abs().max() / effect
    )


one_thread = pytest.fixture(autouse=True)(samples.one_thread)

LINEAR, CONV1D, CONV2D, CONV3D = (48, 32), (16, 8, 3), (16, 8, 3, 3), (16, 8, 2, 3, 3)
CASES = [(name, shape) for name in KINDS for shape in (LINEAR, CONV1D, CONV2D, CONV3D)]
CASES += [(name, shape) for name in CONV_KINDS for shape in (CONV1D, CONV2D, CONV3D)]
CASES += [(name, LINEAR) for name in LINEAR_KINDS]
ALL_KINDS = KINDS | CONV_KINDS | LINEAR_KINDS


@pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda v: v if isinstance(v, str) else "×".join(map(str, v)))
def test_a_kind_is_its_merge(name: str, shape: Shape) -> None:
    r = Sampler(1)
    weight, bias, x = r(*shape, scale=1.0), r(shape[0]), make_input(shape, r)
    options = {} if len(shape) == 2 else {"stride": 2, "padding": 1}
    layer = make_layer(shape, weight, bias, **options)
    value = ALL_KINDS[name](r, shape)
    for s in (1.0, 0.75, -0.5):
        got = run(layer, x, [patch_of(value, shape, s)])
        wanted = layer.compute_dense(x, samples.merged(weight, value, s), bias)
        assert_same(got, wanted, layer(x))


def test_the_layer_is_as_it_was_once_the_block_is_left() -> None:
    r = Sampler(2)
    layer = make_layer(LINEAR, r(*LINEAR))
    x = make_input(LINEAR, r)
    before = layer(x)
    run(layer, x, [patch_of(samples.oft(r, LINEAR), LINEAR, 1.0)])
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(("shape", "products"), [((1536, 8), 3), ((768, 4, 3), 3)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("s", [1.0, -0.5])
def test_bofts_stages_are_multiplied_a_few_at_a_time(shape: Shape, products: int, s: float) -> None:
    r = Sampler(3)
    layer, x = make_layer(shape, r(*shape, scale=1.0), r(shape[0])), make_input(shape, r)
    value = samples.boft(r, shape, rescale=True)
    stages, count, size, _ = value[1][0].shape
    assert (size, 2 ** (stages - 1)) == (6, count)
    patch = patch_of(value, shape, s)
    wide = {name: factor.shape[3] * factor.shape[2] for name, factor in patch.adapter.tensors(None).items()}
    # all stages at once would be as wide as the output
    assert len(wide) == products and max(wide.values()) <= 48
    wanted = layer.compute_dense(x, samples.merged(layer.weight.data, value, s), layer.bias)
    assert_same(run(layer, x, [patch]), wanted, layer(x))
    assert_same(layer.compute_dense(x, patch.adapter.merged(layer.weight.data, s), layer.bias), wanted, layer(x))


@pytest.mark.parametrize(("name", "shape"), [c for c in CASES if len(c[1]) in (2, 4)], ids=str)
def test_any_strides_and_a_gradient(name: str, shape: Shape) -> None:
    """An x that is a transposed view, as patch embeddings get it, and what autograd makes of the layer."""
    r = Sampler(4)
    layer, x = make_layer(shape, r(*shape, scale=1.0), r(shape[0])), make_input(shape, r)
    patches = [patch_of(ALL_KINDS[name](r, shape), shape, 0.5)]
    if len(shape) == 2 and shape[0] % 4 == 0:
        rows = (shape[0] // 2, shape[1])
        patches.append(patch_of(ALL_KINDS[name](r, rows), shape, 0.5, Region(0, shape[0] // 4, rows[0])))
    wanted = run(layer, x, patches)
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(run(layer, strided, patches), wanted, rtol=1e-12, atol=1e-12)
    watched = x.clone().requires_grad_()
    y = run(layer, watched, patches)
    torch.testing.assert_close(y.detach(), wanted, rtol=1e-12, atol=1e-12)
    y.sum().backward()
    # the layer is linear in x
    torch.testing.assert_close((watched.grad * x).sum(), (wanted - run(layer, x * 0, patches)).sum())


def test_pefts_oft_turns_an_x_of_any_strides() -> None:
    r, shape = Sampler(7), (24, 16)
    layer, x = make_layer(shape, r(*shape, scale=1.0)), make_input(shape, r)
    adapter = InputOFT(r(4, 6, scale=0.1))
    wanted = layer.compute_dense(x, adapter.merged(layer.weight.data, 0.5))
    assert_same(run(layer, x, [patch_of(adapter, shape, 0.5)]), wanted, layer(x))
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_same(run(layer, strided, [patch_of(adapter, shape, 0.5)]), wanted, layer(x))


@pytest.mark.parametrize("name", ["oft", "boft", "boft rescaled"])
@pytest.mark.parametrize("batch", [1, 2])
def test_turns_of_a_single_pixel(name: str, batch: int) -> None:
    """Its channels lie together, as rows of a matrix do, whatever the strides say."""
    r, shape = Sampler(7), (16, 4, 3, 3)
    weight, value = r(*shape, scale=1.0), KINDS[name](r, shape)
    layer, x = make_layer(shape, weight), r(batch, 4, 3, 3, scale=1.0)
    wanted = layer.compute_dense(x, samples.merged(weight, value, 0.5))
    assert wanted.shape == (batch, 16, 1, 1)
    assert_same(run(layer, x, [patch_of(value, shape, 0.5)]), wanted, layer(x))


def test_lokr_of_factors_of_any_strides() -> None:
    r, shape = Sampler(7), (16, 8)
    kind, (w1, w2, *rest) = KINDS["lokr"](r, shape)
    turned = w1.t().contiguous().t(), w2.t().contiguous().t()
    adapter = from_host((kind, (*turned, *rest)), torch.Size(shape))
    assert torch.equal(adapter.delta(r(*shape)), from_host((kind, (w1, w2, *rest)), torch.Size(shape)).delta(r(*shape)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("name", ["oft", "boft", "boft rescaled"])
def test_turns_go_through_the_scratch_in_chunks(name: str, dtype: torch.dtype, monkeypatch) -> None:
    shape = (1536, 8)
    r = Sampler(5)
    layer, x = make_layer(shape, r(*shape, scale=1.0).to(dtype)), make_input(shape, r).to(dtype)
    rows = (768, 8)
    patches = [
        patch_of(KINDS[name](r, shape), shape, 0.5), patch_of(KINDS[name](r, rows), shape, 0.7, Region(0, 384, 768)),
    ]  # fmt: skip
    whole = run(layer, x, patches)
    monkeypatch.setattr(scratch, "CPU_BYTES", 4 * 3 * 4 * shape[0])
    monkeypatch.setattr(layout, "LEAST_ROWS", 1)
    in_chunks = run(layer, x, patches)
    if dtype == torch.float64:
        torch.testing.assert_close(in_chunks, whole, rtol=1e-12, atol=1e-12)
    wanted = merge_stack(layer.weight.data.double(), [
        (KINDS[name](r2, s), 0.5 if s == shape else 0.7, 1.0, None if s == shape else Region(0, 384, 768))
        for r2 in [again(5, shape)] for s in (shape, rows)
    ])  # fmt: skip
    exact = x.double() @ wanted.t()
    # y is rounded once before and once after each of both, turns to 8 bits
    bits = 2 * torch.finfo(dtype).eps
    assert (in_chunks.double() - exact).abs().max() <= 4 * bits * exact.abs().max() + 1e-11


@pytest.mark.parametrize("shape", [LINEAR, CONV2D], ids=["linear", "conv2d"])
def test_adapters_that_change_x_do_not_change_each_others(shape: Shape, monkeypatch) -> None:
    r = Sampler(8)
    layer, x = make_layer(shape, r(*shape, scale=1.0), r(shape[0])), make_input(shape, r)
    stack = [(ALL_KINDS[name](r, shape), 0.5, 1.0, None) for name in ("dora in", "lora", "glora", "dora in", "lokr")]
    patches = [patch_of(value, shape, s) for value, s, _, _ in stack]
    before, slots, take = x.clone(), [], scratch.take
    monkeypatch.setattr(scratch, "take", lambda *args: slots.append(args[-1]) or take(*args))
    got = run(layer, x, patches)
    assert len({slot for slot in slots if slot.startswith("lent")}) == 3
    assert torch.equal(x, before)
    wanted = layer.compute_dense(x, merge_stack(layer.weight.data, stack), layer.bias)
    assert_same(got, wanted, layer(x), tolerance=1e-11)
    slots.clear()
    monkeypatch.setattr(scratch, "LENT_BYTES", x.nbytes - 1)
    assert torch.equal(run(layer, x, patches), got)
    assert not any(slot.startswith("lent") for slot in slots), "what is too large would stay in memory"


def again(seed: int, shape: Shape) -> Sampler:
    """The sampler of `seed` behind a layer's weight and input."""
    r = Sampler(seed)
    r(*shape), make_input(shape, r)
    return r


@pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda v: v if isinstance(v, str) else "×".join(map(str, v)))
def test_a_dtype_that_the_processor_lacks_runs_in_fp32(name: str, shape: Shape, monkeypatch) -> None:
    r = Sampler(6, torch.float32)
    layer, x = make_layer(shape, r(*shape, scale=1.0), r(shape[0])), make_input(shape, r).bfloat16()
    patches = [patch_of(ALL_KINDS[name](r, shape), shape, 0.5)]
    monkeypatch.setattr(cpu, "SLOW_DTYPES", frozenset([torch.bfloat16]))
    assert torch.equal(run(layer, x, patches), run(layer, x.float(), patches).bfloat16())


def random_stack(r: Sampler, shape: Shape, count: int) -> list[tuple]:
    """``(value, s, strength_model, region)`` of random kinds."""
    kinds = [k for k in ALL_KINDS if (k, shape) in CASES]
    found = []
    for _ in range(count):
        region = r.pick([None, None, None, Region(0, 16, 16), Region(1, 8, 16)]) if len(shape) == 2 else None
        part = shape if region is None else region.within(shape)
        value = ALL_KINDS[r.pick(kinds)](r, tuple(part))
        found.append((value, r.pick([1.0, 0.5, -0.25]), r.pick([1.0, 1.0, 1.0, 0.5]), region))
    return found


def merge_stack(weight: torch.Tensor, stack: list[tuple]) -> torch.Tensor:
    weight = weight.clone()
    for value, s, sm, region in stack:
        part = weight if region is None else weight.narrow(*region)
        part = samples.merged(part * sm, value, s)
        if region is None:
            weight = part
        else:
            weight.narrow(*region).copy_(part)
    return weight


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("shape", [LINEAR, CONV2D], ids=["linear", "conv2d"])
def test_a_stack_composes_in_the_hosts_order(shape: Shape, seed: int) -> None:
    r = Sampler(1000 + seed)
    weight, bias, x = r(*shape, scale=1.0), r(shape[0]), make_input(shape, r)
    stack = random_stack(r, shape, 2 + seed % 5)
    layer = make_layer(shape, weight, bias)
    got = run(layer, x, [patch_of(value, shape, s, region, sm) for value, s, sm, region in stack])
    wanted = layer.compute_dense(x, merge_stack(weight, stack), bias)
    assert_same(got, wanted, layer(x), tolerance=1e-11)


FUSED = (48, 32)
# of parts as they come: equal or not, and of sizes that groups and blocks divide or not
PARTS = {"divided": (24, 12, 12), "across": (20, 14, 14)}
APART = [(name, "divided") for name in KINDS if "boft" not in name and "dora in" not in name]
APART += [(name, "across") for name, _ in APART if not name.startswith("oft")]


@pytest.mark.parametrize(("name", "parts"), APART)
def test_an_adapter_of_a_fused_layer_on_its_parts(name: str, parts: str) -> None:
    r = Sampler(21)
    weight, x = r(*FUSED, scale=1.0), make_input(FUSED, r)
    value = KINDS[name](r, FUSED)
    adapter, start = from_host(value, FUSED), 0
    for s in (1.0, -0.5):
        wanted, start = samples.merged(weight, value, s), 0
        for rows in PARTS[parts]:
            own = slice(start, start + rows)
            layer = make_layer((rows, FUSED[1]), weight[own])
            got = run(layer, x, [Patch(s, from_host(adapter.rows(start, rows), (rows, FUSED[1])))])
            assert_same(got, layer.compute_dense(x, wanted[own]), layer(x))
            part = adapter.rows(start, rows).merged(weight[own].clone(), s)
            torch.testing.assert_close(part, wanted[own], rtol=TOLERANCE, atol=TOLERANCE)
            start += rows


@pytest.mark.parametrize("name", CONV_KINDS)
def test_a_convolutions_adapter_on_its_parts(name: str) -> None:
    r, shape = Sampler(22), (48, 8, 3, 3)
    value = CONV_KINDS[name](r, shape)
    adapter, weight = from_host(value, shape), r(*shape, scale=1.0)
    wanted = samples.merged(weight, value, 0.75)
    for start, rows in ((0, 20), (20, 28)):
        own = slice(start, start + rows)
        layer, x = make_layer((rows, *shape[1:]), weight[own]), make_input(shape, r)
        got = run(layer, x, [Patch(0.75, adapter.rows(start, rows))])
        assert_same(got, layer.compute_dense(x, wanted[own]), layer(x))


REFUSED_APART = {
    "boft": (24, "its blocks mix 48 rows of the fused layer"),
    "oft": (22, "its blocks mix 4 rows of the fused layer"),
    "dora in": (24, "norms are over all rows of the fused layer"),
    "dora in over glora": (24, "norms are over all rows of the fused layer"),
}


@pytest.mark.parametrize("name", REFUSED_APART)
def test_what_needs_the_fused_layer_is_refused(name: str) -> None:
    rows, reason = REFUSED_APART[name]
    with pytest.raises(AdapterError, match=reason):
        from_host(KINDS[name](Sampler(23), FUSED), FUSED).rows(0, rows)


def test_butterflies_that_stay_within_the_parts() -> None:
    """Two stages on blocks of four mix eight rows with each other."""
    r = Sampler(24)
    value = ("boft", (r(2, 12, 4, 4), 1 + r(48, 1, scale=0.1), 0.5, None))
    weight, adapter = r(*FUSED, scale=1.0), from_host(value, FUSED)
    wanted = samples.merged(weight, value, 0.75)
    for start, rows in ((0, 32), (32, 16)):
        got = adapter.rows(start, rows).at_strength(0.75).merged(weight[start : start + rows], 0.75)
        torch.testing.assert_close(got, wanted[start : start + rows], rtol=TOLERANCE, atol=TOLERANCE)


def test_pefts_oft_turns_the_inputs_of_all_parts() -> None:
    adapter = InputOFT(Sampler(25)(4, 28))
    assert adapter.rows(16, 8) is adapter
