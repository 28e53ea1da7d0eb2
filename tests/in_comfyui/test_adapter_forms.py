"""Every kind of patch beside a layer against `comfy.lora.calculate_weight` on its decoded weight."""

from __future__ import annotations

import adapter_samples as samples
import comfy.lora
import comfy.utils
import comfy.weight_adapter
import pytest
import torch
from adapter_samples import CONV_KINDS, KINDS, LINEAR_KINDS, Sampler, Shape
from graft.ops import layers
from graft.ops.adapters import Patch, Region, from_host
from graft.ops.factors import FactorCache
from graft.ops.residual import ResidualStack

ALL_KINDS = KINDS | CONV_KINDS | LINEAR_KINDS
CLASSES = {cls.name: cls for cls in comfy.weight_adapter.adapters}
LINEAR, CONV2D = (48, 32), (16, 8, 3, 3)
CASES = [(name, shape) for name in KINDS for shape in (LINEAR, CONV2D)]
# the host itself fails on LoKr with a core, and leaves the weight as it is
CASES += [(name, CONV2D) for name in CONV_KINDS if name != "lokr core"] + [(name, LINEAR) for name in LINEAR_KINDS]


one_thread = pytest.fixture(autouse=True)(samples.one_thread)


def as_the_host_holds_it(value):
    """A sample in the class that the host's loader would have made of it."""
    return CLASSES[value[0]](set(), value[1]) if value[0] in CLASSES else value


def host_merge(weight: torch.Tensor, entries: list[tuple], dtype: torch.dtype | None = None) -> torch.Tensor:
    original = {"layer.weight": [(weight.clone(), lambda a, **kwargs: a)]}
    return comfy.lora.calculate_weight(
        entries, weight.clone(), "layer.weight", intermediate_dtype=dtype or weight.dtype, original_weights=original
    )


def our_output(layer, x: torch.Tensor, entries: list[tuple]) -> torch.Tensor:
    """The layer's output with the same entries of a patch list."""
    patches = []
    for strength, value, strength_model, offset, function in entries:
        region = None if offset is None else Region(*offset)
        adapter = from_host(value, layer.logical_shape, region, function)
        patches.append(Patch(strength, adapter, strength_model, region, None, (strength, value)))
    stack = ResidualStack({"layer.weight": patches})
    stack.build({"layer": layer}, FactorCache())
    assert stack.residuals["layer"].path == "residual", stack.residuals["layer"].reason
    assert not stack.residuals["layer"].rejected
    with stack.active({"layer": layer}, x.device):
        return layer(x)


def make_layer(weight: torch.Tensor):
    shape = weight.shape
    if weight.dim() == 2:
        layer = layers.Linear(shape[1], shape[0], bias=False)
    else:
        layer = layers.Conv2d(shape[1], shape[0], shape[2:], bias=False, padding=1)
    layer.load_weight(weight)
    return layer


def compare(
    r: Sampler, shape: Shape, entries: list[tuple], tolerance: float, wide: Shape | None = None,
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Our output and the host's merge agree; the error is measured against the effect."""
    weight = r(*shape, scale=1.0)
    inputs = (wide or shape)[1]
    x = r(3, inputs, scale=1.0) if len(shape) == 2 else r(2, inputs, 5, 5, scale=1.0)
    layer = make_layer(weight)
    got = our_output(layer, x, entries)
    wanted = layer.compute_dense(x, host_merge(weight, entries, dtype))
    plain = layer(x) if wide is None else torch.zeros_like(wanted)
    effect = (wanted - plain).norm()
    assert effect > 1e-3
    assert (got - wanted).norm() / effect < tolerance, float((got - wanted).norm() / effect)


def precision_of(names: list[str], dtype: torch.dtype) -> dict:
    """In fp32 the promise of the project; in fp64 the host fails on OFT's matrices, which it inverts in fp32."""
    if dtype == torch.float32 or any("oft" in name for name in names):
        return {"tolerance": 1e-4, "dtype": torch.float32}
    return {"tolerance": 1e-10}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda v: v if isinstance(v, str) else f"{len(v)}d")
def test_a_kind_is_the_hosts_merge(name: str, shape: Shape, dtype: torch.dtype) -> None:
    r = Sampler(7, dtype)
    value = as_the_host_holds_it(ALL_KINDS[name](r, shape))
    for s in (1.0, 0.6, -0.4):
        compare(r, shape, [(s, value, 1.0, None, None)], **precision_of([name], dtype))


def merge_of(r: Sampler, shape: Shape) -> list:
    """As a node that merges two models leaves it: the other's weight, with a LoRA of its own."""
    inner = as_the_host_holds_it(samples.lora(r, shape))
    return [(r(*shape, scale=1.0), lambda a, **kwargs: a), (0.5, inner, 1.0, None, None)]


def merge_with_oft(r: Sampler, shape: Shape) -> list:
    inner = as_the_host_holds_it(samples.oft(r, shape))
    return [(r(*shape, scale=1.0), lambda a, **kwargs: a), (0.5, inner, 0.8, None, None)]


def random_entries(r: Sampler, shape: Shape, count: int) -> tuple[list[tuple], list[str]]:
    """Patches of random kinds, strengths, offsets and functions."""
    names = [name for name, s in CASES if s == shape] + ["merge", "merge with oft", "model_as_lora", "tuple"]
    entries, used = [], []
    for _ in range(count):
        offset = r.pick([None, None, None, (0, 16, 16), (1, 8, 16)]) if len(shape) == 2 else None
        part = tuple(Region(*offset).within(shape)) if offset else shape
        name = r.pick(names)
        function = r.pick([None, None, comfy.utils.swap_scale_shift])
        if name == "model_as_lora" and offset is not None:
            name = "lora"  # the host takes the whole of the original for it
        if name.startswith("merge"):
            value = (merge_of if name == "merge" else merge_with_oft)(r, part)
        elif name in ("model_as_lora", "tuple"):
            value = ("model_as_lora", (r(*part, scale=1.0),)) if name == "model_as_lora" else (r(*part),)
        else:
            value = as_the_host_holds_it(ALL_KINDS[name](r, part))
        if any(k in name for k in ("oft", "glora", "model_as_lora")):
            function = None  # these go through the host itself
        entries.append((r.pick([1.0, 0.5, -0.25]), value, r.pick([1.0, 1.0, 1.0, 0.5]), offset, function))
        used.append(name)
    return entries, used


@pytest.mark.parametrize("seed", range(200))
def test_a_random_stack_is_the_hosts_merge(seed: int) -> None:
    r = Sampler(100 + seed)
    shape = LINEAR if seed % 3 else CONV2D
    entries, names = random_entries(r, shape, 2 + seed % 5)
    compare(r, shape, entries, **precision_of(names, torch.float64))


def test_a_control_lora_pads_the_weight() -> None:
    r = Sampler(5)
    wide = (48, 64)
    control = as_the_host_holds_it(samples.lora(r, LINEAR, reshape=list(wide)))
    before = as_the_host_holds_it(samples.lora(r, LINEAR))
    after = as_the_host_holds_it(samples.lora(r, wide))
    entries = [(0.5, before, 1.0, None, None), (0.75, control, 1.0, None, None)]
    compare(r, LINEAR, entries, 1e-11, wide)
    padded = ("diff", (r(*wide), {"pad_weight": True}))
    compare(r, LINEAR, [(0.5, padded, 1.0, None, None)], 1e-11, wide)
    with pytest.raises(Exception, match="made for another model"):
        from_host(after, torch.Size(LINEAR))


def test_what_only_the_host_knows_runs_through_its_merge() -> None:
    r = Sampler(6)
    weight, x = r(*LINEAR, scale=1.0), r(3, 32, scale=1.0)
    lora = as_the_host_holds_it(samples.lora(r, LINEAR))
    entries = [(0.5, lora, 1.0, None, None), (0.5, lora, 1.0, None, torch.tanh), (0.5, lora, 1.0, None, None)]
    layer = make_layer(weight)

    def merge(patches, whole, key):
        return comfy.lora.calculate_weight([p.origin for p in patches], whole, key, intermediate_dtype=whole.dtype)

    patches = [Patch(e[0], from_host(e[1], LINEAR, None, e[4]), e[2], None, None, e) for e in entries]
    stack = ResidualStack({"layer.weight": patches}, merge)
    stack.build({"layer": layer}, FactorCache())
    residual = stack.residuals["layer"]
    assert (residual.path, residual.reason) == ("exact", "its difference passes through a function of the host")
    with stack.active({"layer": layer}, x.device):
        got = layer(x)
    wanted = layer.compute_dense(x, host_merge(weight, entries))
    # the decoded weight is fp32 there, as it is in the host
    assert (got - wanted).norm() / (wanted - layer(x)).norm() < 1e-5
