"""Stacks on layers: isolation, caches, strengths, precision, and what hosts and compilers see of them."""

from __future__ import annotations

import copy
import hashlib
import threading
import weakref

import adapter_samples as samples
import oracle
import pytest
import torch
from adapter_samples import Sampler, make_input, make_layer, patch_of, run
from conftest import TORCH
from graft.kernels import AdapterError, by_name
from graft.ops import factors, layers, residual
from graft.ops.adapters import Diff, Patch, Region, from_host
from graft.ops.factors import RANK_BUCKET, FactorCache
from graft.ops.kinds import merge as kinds_merge
from graft.ops.packed import PackedTensor
from graft.ops.residual import ResidualStack

one_thread = pytest.fixture(autouse=True)(samples.one_thread)

SHAPE = (48, 32)
CPU = torch.device("cpu")


@pytest.fixture
def r() -> Sampler:
    return Sampler(11)


def stack_of(*patches: Patch, bias: tuple[Patch, ...] = ()) -> ResidualStack:
    return ResidualStack({"layer.weight": list(patches), "layer.bias": list(bias)})


def lora(r: Sampler, s: float = 0.5, rank: int = 4, region: Region | None = None) -> Patch:
    part = SHAPE if region is None else tuple(region.within(SHAPE))
    return patch_of(samples.lora(r, part, rank=rank), SHAPE, s, region)


def output(layer, x, stack: ResidualStack, cache: FactorCache | None = None) -> torch.Tensor:
    stack.build({"layer": layer}, cache or FactorCache())
    with stack.active({"layer": layer}, x.device):
        return layer(x)


def test_branches_share_a_layer_and_nothing_else(r: Sampler) -> None:
    layer, x, cache = make_layer(SHAPE, r(*SHAPE, scale=1.0)), make_input(SHAPE, r), FactorCache()
    a, b = stack_of(lora(r), patch_of(samples.oft(r, SHAPE), SHAPE, 0.7)), stack_of(lora(r))
    plain, first = layer(x), output(layer, x, a, cache)
    second = output(layer, x, b, cache)
    assert not torch.equal(first, second)
    assert torch.equal(output(layer, x, a, cache), first)
    assert torch.equal(layer(x), plain)


def test_blocks_nest_and_survive_an_exception(r: Sampler) -> None:
    layer, x = make_layer(SHAPE, r(*SHAPE, scale=1.0)), make_input(SHAPE, r)
    a, b, named = stack_of(lora(r)), stack_of(lora(r)), {"layer": layer}
    wanted = output(layer, x, a)
    a.build(named, FactorCache()), b.build(named, FactorCache())
    with a.active(named, CPU):
        with pytest.raises(ZeroDivisionError), b.active(named, CPU):
            raise ZeroDivisionError
        assert torch.equal(layer(x), wanted)
    assert layer.residual is None


def test_a_block_within_another_has_its_own_adapters_alone(r: Sampler) -> None:
    named = {name: make_layer(SHAPE, r(*SHAPE, scale=1.0)) for name in "ab"}
    x, cache = make_input(SHAPE, r), FactorCache()
    stacks = [ResidualStack({f"{name}.weight": [lora(r)] for name in names}) for names in ("ab", "b", "")]

    def outputs() -> list[torch.Tensor]:
        return [layer(x) for layer in named.values()]

    wanted = []
    for stack in stacks:
        stack.build(named, cache)
        with stack.active(named, CPU):
            wanted.append(outputs())
    for outer in (0, 1, 2):
        for inner in (0, 1, 2):
            with stacks[outer].active(named, CPU):
                with stacks[inner].active(named, CPU):
                    assert all(map(torch.equal, outputs(), wanted[inner]))
                assert all(map(torch.equal, outputs(), wanted[outer]))
    assert all(layer.residual is None for layer in named.values())


def test_blocks_that_overlap_leave_nothing(r: Sampler) -> None:
    """As when two samplers take turns: the one entered last counts until it is left itself."""
    named = {name: make_layer(SHAPE, r(*SHAPE, scale=1.0)) for name in "ab"}
    x, cache = make_input(SHAPE, r), FactorCache()
    a, b = (ResidualStack({f"{name}.weight": [lora(r)] for name in names}) for names in ("ab", "b"))
    wanted = {}
    for stack in (a, b):
        stack.build(named, cache)
        with stack.active(named, CPU):
            wanted[id(stack)] = [layer(x) for layer in named.values()]
    for first, second in ((a, b), (b, a), (a, a)):
        blocks = [stack.active(named, CPU) for stack in (first, second)]
        for block in blocks:
            block.__enter__()
        blocks[0].__exit__(None, None, None)
        assert all(map(torch.equal, (layer(x) for layer in named.values()), wanted[id(second)]))
        blocks[1].__exit__(None, None, None)
        assert all(layer.residual is None for layer in named.values())


def test_a_part_of_the_layers_has_its_own_block(r: Sampler) -> None:
    named = {name: make_layer(SHAPE, r(*SHAPE, scale=1.0)) for name in "ab"}
    x = make_input(SHAPE, r)
    outer, inner = (ResidualStack({f"{name}.weight": [lora(r)] for name in "ab"}) for _ in range(2))
    for stack in (outer, inner):
        stack.build(named, FactorCache())
    with outer.active(named, CPU):
        before = [layer(x) for layer in named.values()]
        with inner.active({"b": named["b"]}, CPU):
            assert torch.equal(named["a"](x), before[0]) and not torch.equal(named["b"](x), before[1])
        assert torch.equal(named["b"](x), before[1])
    assert all(layer.residual is None for layer in named.values())


def test_threads_take_turns_on_one_set_of_layers(r: Sampler) -> None:
    (layer, other), x, cache = (make_layer(SHAPE, r(*SHAPE)) for _ in range(2)), make_input(SHAPE, r), FactorCache()
    a, b = stack_of(lora(r)), stack_of(lora(r))
    wanted = [output(layer, x, stack, cache) for stack in (a, b)]
    outputs: list[torch.Tensor] = []
    waiting = threading.Thread(target=lambda: outputs.append(output(layer, x, b, cache)))
    elsewhere = threading.Thread(target=lambda: outputs.append(output(other, x, stack_of(lora(r)))))
    with a.active({"layer": layer}, CPU):
        elsewhere.start()
        elsewhere.join()
        waiting.start()
        waiting.join(0.05)
        assert len(outputs) == 1 and waiting.is_alive(), "another set of layers waits for nobody, this one does"
        with a.active({"layer": layer}, CPU):  # the same thread does not wait for itself
            assert torch.equal(layer(x), wanted[0])
    waiting.join()
    assert torch.equal(outputs[1], wanted[1]) and layer.residual is None


def test_a_copy_of_the_model_has_factors_and_calls_of_its_own(r: Sampler) -> None:
    """A module is on one device; hosts copy a model for another one, with its branches."""
    layer, x = make_layer(SHAPE, r(*SHAPE, scale=1.0)), make_input(SHAPE, r)
    stack, caches = stack_of(lora(r)), (FactorCache(), FactorCache())
    wanted = output(layer, x, stack, caches[0])
    twin, branch = copy.deepcopy(layer), stack.copy()
    assert torch.equal(output(twin, x, branch, caches[1]), wanted)
    mine, its = stack.build({"layer": layer}, caches[0]), branch.build({"layer": twin}, caches[1])
    assert list(mine) and not set(mine) & set(its)
    assert not {*map(id, mine.parameters())} & {*map(id, its.parameters())}
    assert twin.calls is not layer.calls
    with stack.active({"layer": layer}, CPU):
        assert twin.residual is None


def test_a_copy_is_independent(r: Sampler) -> None:
    layer, x = make_layer(SHAPE, r(*SHAPE, scale=1.0)), make_input(SHAPE, r)
    a = stack_of(lora(r))
    wanted = output(layer, x, a)
    b = a.copy()
    assert b.residuals is a.residuals  # built already
    b.add("layer.weight", lora(r))
    assert not torch.equal(output(layer, x, b), wanted)
    assert torch.equal(output(layer, x, a), wanted)


def test_no_adapters_or_strength_0_leave_the_base_bit_for_bit(r: Sampler) -> None:
    layer, x = make_layer(SHAPE, r(*SHAPE, scale=1.0), r(SHAPE[0])), make_input(SHAPE, r)
    plain = layer(x)
    idle = [patch_of(make(r, SHAPE), SHAPE, 0.0) for name, make in samples.KINDS.items() if name != "set"]
    stack = stack_of(*idle)
    assert torch.equal(output(layer, x, stack), plain)
    assert not list(stack.build({"layer": layer}, FactorCache()).parameters())


def test_a_set_and_a_base_scaled_to_nothing_count_at_strength_0(r: Sampler) -> None:
    layer, x = make_layer(SHAPE, r(*SHAPE, scale=1.0)), make_input(SHAPE, r)
    value = samples.set_(r, SHAPE)
    assert torch.equal(run(layer, x, [patch_of(value, SHAPE, 0.0)]), x @ value[1][0].t())
    assert not run(layer, x, [patch_of(samples.lora(r, SHAPE), SHAPE, 0.0, sm=0.0)]).any()


def test_a_new_strength_finds_the_factors_that_are_there(r: Sampler) -> None:
    layer, cache = make_layer(SHAPE, r(*SHAPE, scale=1.0)), FactorCache()
    values = [samples.lora(r, SHAPE), samples.lokr(r, SHAPE), samples.oft(r, SHAPE)]
    modules = []
    for s in (0.3, 0.9):
        # hosts wrap a file's tensors anew on every run
        stack = stack_of(*(patch_of((kind, tuple(fields)), SHAPE, s) for kind, fields in values))
        modules.append(stack.build({"layer": layer}, cache))
    assert modules[0] is modules[1]
    other = stack_of(patch_of(samples.lora(r, SHAPE), SHAPE, 0.3)).build({"layer": layer}, cache)
    assert other is not modules[0]


def test_a_dropped_stack_leaves_memory_after_a_few_others(r: Sampler) -> None:
    layer, cache = make_layer(SHAPE, r(*SHAPE, scale=1.0)), FactorCache(keep=2)
    loaded = [lora(r) for _ in range(5)]
    members = [weakref.ref(stack_of(patch).build({"layer": layer}, cache)[0]) for patch in loaded]
    assert [member() is not None for member in members] == [False, False, False, True, True]


@pytest.mark.parametrize("kind", ["lora", "lokr", "oft", "diff"])
def test_the_next_branch_finds_what_a_dropped_one_has_left(r: Sampler, kind: str) -> None:
    layer, cache = make_layer(SHAPE, r(*SHAPE, scale=1.0)), FactorCache()
    value = samples.KINDS[kind](r, SHAPE)
    left = weakref.ref(stack_of(patch_of(value, SHAPE, 0.3)).build({"layer": layer}, cache)[0])
    assert left() is not None
    assert stack_of(patch_of(value, SHAPE, 0.9)).build({"layer": layer}, cache)[0] is left()


@pytest.mark.parametrize("kind", sorted(samples.KINDS))
def test_factors_go_with_the_adapters_that_they_were_made_of(r: Sampler, kind: str) -> None:
    layer, cache = make_layer(SHAPE, r(*SHAPE, scale=1.0)), FactorCache()

    def build(*values: tuple) -> factors.StackFactors:
        return stack_of(*(patch_of(value, SHAPE, 0.7) for value in values)).build({"layer": layer}, cache)

    first, second = samples.lora(r, SHAPE), samples.KINDS[kind](r, SHAPE)
    both, common = build(first, second), build(first)
    dropped = [weakref.ref(member) for member in both if member not in common]
    kept = weakref.ref(common[0])
    del both, common, second
    assert dropped and not any(member() for member in dropped)
    assert kept() is build(first)[0]
    del first
    assert kept() is None and not cache._members


def test_copied_layers_have_factors_of_their_own(r: Sampler) -> None:
    named, cache, stack = {"layer": make_layer(SHAPE, r(*SHAPE, scale=1.0))}, FactorCache(), stack_of(lora(r))
    first = stack.build(named, cache)
    copied_layers, copied_cache = copy.deepcopy((named, cache))
    second = stack_of(*stack.patches["layer.weight"]).build(copied_layers, copied_cache)
    assert second[0] is not first[0] and torch.equal(second[0].down, first[0].down)


def test_a_tensor_in_the_place_of_one_that_is_gone_is_another_one(r: Sampler) -> None:
    layer, cache = make_layer(SHAPE, r(*SHAPE, scale=1.0)), FactorCache()

    def build(diff: torch.Tensor) -> factors.Term:
        return stack_of(patch_of(("diff", (diff,)), SHAPE, 0.7)).build({"layer": layer}, cache)[0]

    gone = [r(*SHAPE) for _ in range(20)]
    members = {id(diff): build(diff) for diff in gone}  # as if a host were still moving them
    del gone
    made = [r(*SHAPE) for _ in range(500)]
    in_place = [diff for diff in made if id(diff) in members]
    assert in_place, "Python gives freed places to others"
    for diff in in_place:
        assert build(diff) is not members[id(diff)] and torch.equal(build(diff).weight, diff)


class Host:
    """What a host moves a set by."""

    detached = False

    def detach(self) -> None:
        self.detached = True


def two_stacks_with_a_part_in_common(r: Sampler, cache: FactorCache) -> tuple[ResidualStack, ResidualStack, dict]:
    """The first on two layers, the second like it on one of them."""
    named = {name: make_layer(SHAPE, r(*SHAPE, scale=1.0)) for name in ("a", "b")}
    first = ResidualStack({f"{name}.weight": [lora(r)] for name in named})
    second = first.copy()
    second.add("b.weight", lora(r))
    return first, second, named


def test_each_factor_lies_in_one_set(r: Sampler) -> None:
    cache = FactorCache(keep=0)
    first, second, named = two_stacks_with_a_part_in_common(r, cache)
    (whole,) = cache.sets(first.build(named, cache))
    assert list(whole.module) == list(first.build(named, cache))
    host = whole.host = Host()
    common, own = cache.sets(second.build(named, cache))
    assert host.detached and whole.host is None and common.host is None
    assert list(common.module) + list(own.module) == list(second.build(named, cache))
    again = cache.sets(first.build(named, cache))
    assert [list(s.module) for s in again] == [[member] for member in first.build(named, cache)]
    assert again[0] is common and own not in again


def test_a_divided_set_leaves_memory_with_the_stacks_that_need_it(r: Sampler) -> None:
    cache = FactorCache(keep=0)
    first, second, named = two_stacks_with_a_part_in_common(r, cache)
    for stack in (first, second):
        cache.sets(stack.build(named, cache))
    common, own = (weakref.ref(member) for member in first.build(named, cache))
    del first, stack
    assert own() is None and common() is not None
    del second
    assert common() is None


def test_as_long_as_a_stack_its_sets_stay(r: Sampler) -> None:
    layer, cache = make_layer(SHAPE, r(*SHAPE, scale=1.0)), FactorCache(keep=1)
    loaded = [lora(r) for _ in range(4)]
    stacks = [stack_of(patch) for patch in loaded]
    sets = [weakref.ref(cache.sets(stack.build({"layer": layer}, cache))[0]) for stack in stacks]
    assert all(s() for s in sets), "a host would no longer count what is still there"
    copy = stacks[0].copy()
    del stacks
    assert [s() is not None for s in sets] == [True, False, False, True]
    assert cache.sets(copy.build({"layer": layer}, cache)) == [sets[0]()]


def test_hosts_see_leaf_modules_with_every_factor(r: Sampler) -> None:
    layer = make_layer(SHAPE, r(*SHAPE, scale=1.0))
    patches = [lora(r), patch_of(samples.lokr(r, SHAPE), SHAPE, 1.0), patch_of(samples.glora(r, SHAPE), SHAPE, 1.0)]
    module = stack_of(*patches).build({"layer": layer}, FactorCache(), torch.bfloat16)
    for member in module:
        assert not list(member.children()) and list(member.parameters())
        assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in member.parameters())
    floats = sum(p.numel() for p in module.parameters())
    a, b = RANK_BUCKET * (48 + 32), 4 * 2 + 12 * 16
    assert floats == a + b + 4 * (32 + 32 + 48 + 32)


def test_ranks_are_concatenated_and_padded(r: Sampler) -> None:
    layer = make_layer(SHAPE, r(*SHAPE, scale=1.0))
    rows, columns = Region(0, 16, 16), Region(1, 8, 16)
    patches = [lora(r, rank=4), lora(r, 0.2, 8, rows), lora(r, 0.3, 5, columns), lora(r, 0.4, 3, rows)]
    stack = stack_of(*patches)
    (factors,) = stack.build({"layer": layer}, FactorCache())
    assert factors.down.shape == (32, 32) and factors.rank == 20
    assert factors.places == ((0, 0), (16, 9)) and factors.up1.shape == (16, 11)
    x, merged = make_input(SHAPE, r), layer.weight.data.clone()
    for patch in patches:
        part = merged if patch.region is None else merged.narrow(*patch.region)
        part += patch.strength * patch.adapter.delta(part)
    torch.testing.assert_close(output(layer, x, stack), x @ merged.t(), rtol=1e-12, atol=1e-12)


def test_norms_of_the_base_are_worked_out_once(r: Sampler, monkeypatch) -> None:
    layer, x, cache = make_layer(SHAPE, r(*SHAPE, scale=1.0)), make_input(SHAPE, r), FactorCache()
    decoded = []
    walk = factors.LayerWeight.chunks
    monkeypatch.setattr(factors.LayerWeight, "chunks", lambda weight: decoded.append(1) or walk(weight))
    values = [samples.lora(r, SHAPE, dora=samples.magnitudes(r, SHAPE, 0)) for _ in range(2)]
    for value in values:
        for s in (0.25, 0.5, 1.0):
            output(layer, x, stack_of(patch_of(value, SHAPE, s)), cache)
    assert len(decoded) == 1


def test_dora_divides_by_the_norm_that_is_asked_for(r: Sampler) -> None:
    weight, x = r(*SHAPE, scale=1.0), make_input(SHAPE, r)
    layer = make_layer(SHAPE, weight)
    value = samples.lora(r, SHAPE, dora=samples.magnitudes(r, SHAPE, 0))
    for norm in ("comfy", "merged"):
        patch = Patch(0.6, from_host(value, SHAPE, norm=norm))
        wanted = x @ samples.merged(weight, value, 0.6, norm).t()
        torch.testing.assert_close(run(layer, x, [patch]), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(patch.adapter.merged(weight, 0.6), samples.merged(weight, value, 0.6, norm))


def test_bias_differences_are_added_in_fp32(r: Sampler) -> None:
    bias = torch.full((48,), 100.0)
    layer = make_layer(SHAPE, torch.zeros(SHAPE), bias)
    x = torch.zeros(1, 32)
    small = Patch(0.5, Diff(torch.full((48,), 2e-5)))
    sliced = Patch(1.0, from_host(("diff", (torch.ones(16),)), (48,), Region(0, 16, 16)), region=Region(0, 16, 16))
    wanted = bias + 1e-5
    wanted[16:32] += 1
    assert torch.equal(run(layer, x, [], [small, sliced])[0], wanted)
    assert torch.equal(layer.bias, bias)
    halved = Patch(1.0, from_host(("diff", (torch.ones(48),)), (48,)), 0.5)
    assert torch.equal(run(layer, x, [], [halved])[0], bias / 2 + 1)
    bare = make_layer(SHAPE, torch.zeros(SHAPE))
    assert torch.equal(run(bare, x, [], [small])[0], torch.full((48,), 1e-5))


def test_a_padded_weight_takes_older_adapters_on_its_old_columns(r: Sampler) -> None:
    weight, bias, wide = r(*SHAPE, scale=1.0), r(48), (56, 64)
    layer, x = make_layer(SHAPE, weight, bias), r(3, 64, scale=1.0)
    control, old = samples.lora(r, SHAPE, reshape=wide), samples.lora(r, (48, 32))
    patches = [patch_of(control, SHAPE, 0.5), patch_of(samples.oft(r, wide), wide, 0.7)]
    turned = patches[1].adapter.merged(samples.merged(weight, control, 0.5), 0.7)
    got = run(layer, x, patches)
    torch.testing.assert_close(got[:, :48], (x @ turned.t())[:, :48] + bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[:, 48:], (x @ turned.t())[:, 48:], rtol=1e-12, atol=1e-12)
    same_rows = samples.lora(r, SHAPE, reshape=(48, 64))
    got = run(layer, x, [patch_of(same_rows, SHAPE, 0.5), patch_of(old, SHAPE, 0.25)])
    whole = samples.merged(weight, same_rows, 0.5)
    whole[:, :32] = samples.merged(whole[:, :32], old, 0.25)
    torch.testing.assert_close(got, x @ whole.t() + bias, rtol=1e-12, atol=1e-12)


def test_what_no_longer_fits_a_padded_weight_is_left_out(r: Sampler) -> None:
    layer = make_layer(SHAPE, r(*SHAPE, scale=1.0))
    patches = [patch_of(samples.lora(r, SHAPE, reshape=(56, 64)), SHAPE, 0.5), lora(r)]
    stack = stack_of(*patches)
    stack.build({"layer": layer}, FactorCache())
    assert ["made for another model" in why for why in stack.residuals["layer"].rejected] == [True]


def test_a_merged_model_keeps_its_adapters_apart(r: Sampler) -> None:
    weight, other, x = r(*SHAPE, scale=1.0), r(*SHAPE, scale=1.0), make_input(SHAPE, r)
    inner = samples.lora(r, SHAPE)
    value = [(other, lambda w, **kwargs: w), (0.5, inner, 1.0, None, None)]
    layer, stack = make_layer(SHAPE, weight), stack_of(patch_of(value, SHAPE, 0.4, sm=0.6))
    wanted = x @ (0.6 * weight + 0.4 * samples.merged(other, inner, 0.5)).t()
    torch.testing.assert_close(output(layer, x, stack), wanted, rtol=1e-12, atol=1e-12)
    assert [type(member).__name__ for member in stack.build({"layer": layer}, FactorCache())] == [
        "Term", "LayerFactors", "Term",
    ]  # fmt: skip


def test_a_packed_model_is_merged_from_its_bytes(r: Sampler) -> None:
    fmt = by_name("Q8_0")
    weight, other = r(*SHAPE, scale=1.0).float(), r(*SHAPE, scale=1.0).float()
    packed = PackedTensor(oracle.quantize(other, fmt), fmt, SHAPE)
    layer, x = make_layer(SHAPE, weight), make_input(SHAPE, r).float()
    stack = stack_of(patch_of([(packed, lambda w, **kwargs: w)], SHAPE, 0.4, sm=0.6))
    wanted = x @ (0.6 * weight + 0.4 * packed.dequantize(torch.float32)).t()
    torch.testing.assert_close(output(layer, x, stack), wanted, rtol=1e-5, atol=1e-5)
    assert torch.uint8 in {p.dtype for p in stack.build({"layer": layer}, FactorCache()).parameters()}


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ3_S"])
@pytest.mark.parametrize("kind", sorted(samples.KINDS))
def test_beside_packed_weights_the_effect_is_that_of_the_merge(name: str, kind: str) -> None:
    fmt, shape = by_name(name), (64, 256)
    data = oracle.quantized(fmt, *shape)
    weight, r = oracle.oracle(data, fmt), Sampler(21, torch.float32)
    layer = layers.Linear(shape[1], shape[0], bias=False)
    layer.load_weight(PackedTensor(data, fmt, shape))
    value, x = samples.KINDS[kind](r, shape), make_input(shape, r)
    before = hashlib.sha256(layer.weight.data.numpy().tobytes()).digest()
    got = run(layer, x, [patch_of(value, shape, 0.8)])
    wanted = x.double() @ samples.merged(weight.double(), value, 0.8).t()
    plain = x.double() @ weight.double().t()
    # fp32: an effect of a percent keeps four digits
    assert (got - wanted).norm() / (wanted - plain).norm() < 1e-4
    assert hashlib.sha256(layer.weight.data.numpy().tobytes()).digest() == before


def test_in_bf16_the_effect_before_rounding_keeps_three_digits(r: Sampler) -> None:
    shape, rank = (256, 512), 16
    value = samples.lora(r, shape, rank=rank)
    layer = make_layer(shape, torch.zeros(shape, dtype=torch.bfloat16))
    x = make_input(shape, r).bfloat16()
    got = run(layer, x, [patch_of(value, shape, 0.8)], dtype=torch.bfloat16).double()
    wanted = x.double() @ samples.merged(torch.zeros(shape), value, 0.8).t()
    # factors, the ranks' activations and the output are each rounded to 8 bits: 2^-9/sqrt(3) on average
    assert (got - wanted).norm() / wanted.norm() < 0.005


def test_an_embedding_runs_low_rank_and_merges_the_rest(r: Sampler) -> None:
    shape = (48, 32)
    weight = r(*shape, scale=1.0)
    layer = layers.Embedding(*shape)
    layer.load_weight(weight)
    layer.dtype = torch.float64
    x = torch.tensor([[0, 3, 3], [47, 9, 20]])
    for name in ("lora", "loha", "lokr", "oft", "dora out", "dora in", "diff", "set", "glora"):
        value = samples.KINDS[name](r, shape)
        stack = stack_of(patch_of(value, shape, 0.7))
        got = output(layer, x, stack)
        path = "residual" if name in ("lora", "loha") else "exact"
        assert stack.residuals["layer"].path == path
        # the exact path decodes to fp32
        tolerance = 1e-10 if path == "residual" else 1e-4
        torch.testing.assert_close(got, samples.merged(weight, value, 0.7)[x], rtol=tolerance, atol=tolerance)


def test_a_grouped_convolution_takes_the_exact_path_and_says_so(r: Sampler) -> None:
    shape = (16, 4, 3, 3)
    weight, x = r(*shape, scale=1.0), make_input(shape, r, groups=2)
    layer = make_layer(shape, weight, groups=2, padding=1)
    value = samples.lora(r, shape)
    stack = stack_of(patch_of(value, shape, 0.7))
    got = output(layer, x, stack)
    wanted = layer.compute_dense(x, samples.merged(weight, value, 0.7))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (stack.residuals["layer"].path, stack.residuals["layer"].reason) == ("exact", "a grouped convolution")


@pytest.mark.parametrize("kind", ["lora", "lokr", "oft", "boft", "dora in", "glora"])
def test_a_convolution_without_a_batch(r: Sampler, kind: str) -> None:
    shape = (16, 8, 3, 3)
    layer, x = make_layer(shape, r(*shape, scale=1.0), r(16), padding=1), make_input(shape, r)
    patches = [patch_of(samples.KINDS[kind](r, shape), shape, 0.7)]
    torch.testing.assert_close(run(layer, x[0], patches), run(layer, x, patches)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", sorted(samples.KINDS))
@pytest.mark.parametrize("shape", [(48, 32), (16, 8, 3, 3)], ids=["linear", "conv"])
def test_an_empty_batch_stays_empty(r: Sampler, kind: str, shape) -> None:
    layer, x = make_layer(shape, r(*shape, scale=1.0), r(shape[0])), make_input(shape, r)[:0]
    assert run(layer, x, [patch_of(samples.KINDS[kind](r, shape), shape, 0.7)]).shape == layer(x).shape


@pytest.mark.parametrize("kind", sorted(samples.KINDS))
@pytest.mark.parametrize("shape", [(48, 32), (16, 8, 3, 3)], ids=["linear", "conv"])
def test_a_gradient_passes_through_factors_that_were_built_in_inference_mode(r: Sampler, kind: str, shape) -> None:
    weight = r(*shape, scale=1.0)
    layer, x = make_layer(shape, weight, r(shape[0])), make_input(shape, r)
    with torch.inference_mode():
        value = samples.KINDS[kind](r, shape)
        bias = (Patch(0.5, Diff(r(shape[0]))),)
        stack = stack_of(patch_of(value, shape, 0.7), bias=bias)
        output(layer, x, stack)
    got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    with stack.active({"layer": layer}, CPU):
        y = layer(got)
    toward = r(*y.shape)
    y.backward(toward)
    layer.compute_dense(want, samples.merged(weight, value, 0.7).clone()).backward(toward)
    torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-10)


def test_a_gradient_passes_through_factors_that_a_host_has_moved_in_inference_mode(r: Sampler) -> None:
    layer = make_layer(SHAPE, r(*SHAPE, scale=1.0))
    stack = stack_of(lora(r), patch_of(samples.lokr(r, SHAPE), SHAPE, 1.0))
    factors = stack.build({"layer": layer}, FactorCache())
    with torch.inference_mode():
        for member in factors:
            for name, p in list(member.named_parameters()):
                # on a CPU a move to it would be none
                member.register_parameter(name, torch.nn.Parameter(p.clone(), requires_grad=False))
    x = make_input(SHAPE, r).requires_grad_()
    with stack.active({"layer": layer}, CPU):
        layer(x).sum().backward()
    weight = layer.weight.data
    for patch in stack.patches["layer.weight"]:
        weight = patch.adapter.merged(weight, patch.strength)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(x.shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", sorted(samples.KINDS))
@pytest.mark.parametrize("shape", [(48, 32), (16, 8, 3, 3)], ids=["linear", "conv"])
def test_under_autocast_adapters_run_in_its_dtype(kind: str, shape) -> None:
    r = Sampler(11, torch.float32)
    layer, x = make_layer(shape, r(*shape, scale=1.0), r(shape[0])), make_input(shape, r)
    value, bias = samples.KINDS[kind](r, shape), (Patch(0.5, Diff(r(shape[0]))),)
    wanted = run(layer, x.bfloat16(), [patch_of(value, shape, 0.7)], bias)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(run(layer, x.to(dtype), [patch_of(value, shape, 0.7)], bias), wanted)
        got = x.clone().requires_grad_()
        run(layer, got, [patch_of(value, shape, 0.7)], bias).sum().backward()
    assert got.grad.dtype == torch.float32 and got.grad.any()


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_under_autocast_an_embedding_keeps_its_precision(kind: str) -> None:
    r = Sampler(11, torch.float32)
    layer, x = layers.Embedding(*SHAPE), torch.tensor([[0, 3, 3], [47, 9, 20]])
    layer.load_weight(r(*SHAPE, scale=1.0))
    patch = patch_of(samples.KINDS[kind](r, SHAPE), SHAPE, 0.7)
    wanted = run(layer, x, [patch])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(layer, x, [patch]), wanted)


@pytest.mark.parametrize("kind", sorted(samples.KINDS))
def test_factors_that_were_built_under_autocast_keep_their_digits(kind: str) -> None:
    r = Sampler(11, torch.float32)
    layer, value = make_layer(SHAPE, r(*SHAPE, scale=1.0)), samples.KINDS[kind](r, SHAPE)
    built = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            built.append(stack_of(patch_of(value, SHAPE, 0.7)).build({"layer": layer}, FactorCache()))
    for plain, cast in zip(*(module.parameters() for module in built), strict=True):
        assert torch.equal(plain, cast)


def test_an_unknown_kind_without_a_host_is_an_error(r: Sampler) -> None:
    layer, x = make_layer(SHAPE, r(*SHAPE, scale=1.0)), make_input(SHAPE, r)
    with pytest.raises(AdapterError, match=r"layer.weight: adapter kind 'new' is unknown here, and there is no host"):
        run(layer, x, [patch_of(("new", ()), SHAPE, 1.0)])


def test_what_is_dear_says_so(r: Sampler) -> None:
    stack = stack_of(patch_of(samples.loha(r, SHAPE, rank=12), SHAPE, 1.0))
    stack.build({"layer": make_layer(SHAPE, r(*SHAPE))}, FactorCache())
    found = stack.residuals["layer"]
    assert (found.path, found.reason) == ("residual", "LoHa of rank 12 costs as much as a second weight")


def test_factors_that_are_elsewhere_come_along(r: Sampler) -> None:
    layer = make_layer(SHAPE, r(*SHAPE, scale=1.0))
    stack = stack_of(lora(r))
    stack.build({"layer": layer}, FactorCache())
    moved = residual._moved(stack.running({"layer": layer}, CPU)["layer"].low_rank, torch.device("meta"))
    assert {t.device.type for t in (moved.down, moved.scale, moved.ups[0][2])} == {"meta"}


@pytest.mark.skipif(TORCH < (2, 4), reason="torch before 2.4 breaks graphs where autocast is asked for")
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("kind", ["", "lora", "lokr", "oft", "boft rescaled", "dora out", "dora in", "glora", "loha"])
@pytest.mark.parametrize("shape", [(48, 32), (16, 8, 3, 3)], ids=["linear", "conv"])
def test_a_layer_is_one_graph(kind: str, shape, autocast: bool) -> None:
    r = Sampler(5, torch.float32)
    layer, x, cache = make_layer(shape, r(*shape, scale=1.0), r(shape[0])), make_input(shape, r), FactorCache()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    value = samples.KINDS[kind](r, shape) if kind else None
    for s in (0.5, 0.25, -1.0):
        stack = stack_of(*([patch_of(value, shape, s)] if kind else []))
        stack.build({"layer": layer}, cache)
        with stack.active({"layer": layer}, CPU), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-4)
    # a strength is data; older compilers watch the object that holds it, and compile again for another one
    assert len(graphs) == (1 if TORCH >= (2, 9) else 3)


MIXED_SHAPES = ((48, 32), (32, 16, 3, 3))
MIXED = [
    pytest.param(shape, kind, id=f"{kind}, {len(shape)} dimensions")
    for shape in MIXED_SHAPES
    for kind in sorted(samples.KINDS | (samples.LINEAR_KINDS if len(shape) == 2 else samples.CONV_KINDS))
]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=["own", "fp32", "bf16"])
@pytest.mark.parametrize("shape, kind", MIXED)
def test_factors_of_several_dtypes_run_and_merge(r: Sampler, shape, kind: str, dtype) -> None:
    """Files hold factors of one layer in fp16, bf16 and fp32 side by side, and a hand-made one in fp64 and fp8."""
    exact, rounded = (torch.float16, torch.float32, torch.bfloat16, torch.float64), torch.float8_e4m3fn
    make = (samples.KINDS | samples.LINEAR_KINDS | samples.CONV_KINDS)[kind]
    weight, x = r(*shape, scale=1.0), make_input(shape, r)
    name, fields = make(r, shape)
    for turn in range(5):
        kinds = [(*exact, rounded)[(turn + 3 * i) % 5] for i in range(len(fields))]
        narrow = [f.to(k) if isinstance(f, torch.Tensor) else f for f, k in zip(fields, kinds, strict=True)]
        value = (name, tuple(narrow))
        layer, patch = make_layer(shape, weight.float()), patch_of(value, shape, 0.7)
        wanted = make_layer(shape, samples.merged(weight, value, 0.7))(x)
        got = run(layer, x.float(), [patch], dtype=dtype).double()
        # bf16 keeps 8 bits of each factor, of which up to four are multiplied; a whole weight ("set") is one
        tolerance = 2**-8 * 4 if dtype == torch.bfloat16 else 1e-5
        assert (got - wanted).norm() <= tolerance * wanted.norm()
        merged = kinds_merge(weight.float(), [patch]).double()
        assert torch.allclose(merged, samples.merged(weight, value, 0.7), rtol=1e-4, atol=1e-4)
