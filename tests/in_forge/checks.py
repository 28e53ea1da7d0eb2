"""Contract checks against Forge's real backend, one function each; run by Forge's own Python.

    python checks.py LAYERS.gguf REPORT.json

LAYERS.gguf holds a weight of each type, ``[ROWS, COLUMNS]`` under the type's name, and biases. The report
gives the traceback of each check that failed, or an empty string.
"""

from __future__ import annotations

import copy
import hashlib
import json
import traceback
from collections.abc import Callable
from typing import Any

import bootstrap
import gguf
import numpy as np
import torch
from backend import memory_management, operations, operations_gguf
from backend.patcher.base import ModelPatcher
from backend.patcher.lora import merge_lora_to_weight
from graft.scripts.forge.engine import Engine, Settings, state_of
from graft.scripts.forge.host import detect
from graft.scripts.forge.layout import BAKED
from torch import nn

FILE, REPORT = bootstrap.ARGUMENTS
ROWS, COLUMNS = 64, 512
CPU = torch.device("cpu")
TENSORS = {tensor.name: tensor for tensor in gguf.GGUFReader(FILE).tensors}
ORIGINAL_FORWARD = operations.ForgeOperationsGGUF.Linear.forward
ENGINE = Engine(detect())
QUANTIZED = [t.name for t in operations_gguf.quants_mapping if t.name != "BF16"]
# Forge decodes in 16 bits. With a min beside the scale a weight is the small difference of two numbers that were
# rounded by 2^-12 (fp16) or 2^-9 (bf16); the 512 terms of a sum average that out
HALF = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


# a model of one layer, as Forge builds one


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(COLUMNS, ROWS)
        self.norm = nn.LayerNorm(ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def build(kind: str, bias: str = "bias.F32", dtype: torch.dtype = torch.float32) -> ModelPatcher:
    """A model whose weight is of type `kind`, loaded from the file by Forge's own code."""
    with operations.using_forge_operations(device=CPU, dtype=dtype, bnb_dtype="gguf"):
        model = OneLayer()
    parameters = (operations_gguf.ParameterGGUF(TENSORS[name]) for name in (kind, bias))
    state = dict(zip(("linear.weight", "linear.bias"), parameters, strict=True))
    state |= {"norm.weight": torch.ones(ROWS), "norm.bias": torch.zeros(ROWS)}
    model.load_state_dict(state)
    return ModelPatcher(model, CPU, CPU)


def load(patcher: ModelPatcher) -> nn.Module:
    """What Forge does when a model goes to the device: re-lay the bytes out, then refresh the LoRAs."""
    memory_management.bake_gguf_model(patcher.model)
    patcher.refresh_loras()
    return patcher.model


def decoded(kind: str) -> torch.Tensor:
    """The weight in fp32, by the reference decode of Forge's vendored gguf."""
    tensor = TENSORS[kind]
    if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
        return torch.from_numpy(np.array(tensor.data, np.float32))
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))


def activations(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 5, COLUMNS, generator=torch.Generator().manual_seed(seed))


def lora(rank: int = 4, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed + 100)
    up, down = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return "lora", (up * 0.05, down * 0.05, float(rank), None, None)


def with_lora(patcher: ModelPatcher, patches: dict, strength: float = 0.8, online: bool = False) -> ModelPatcher:
    clone = patcher.clone()
    clone.add_patches(filename="a.safetensors", patches=patches, strength_patch=strength, online_mode=online)
    return clone


def merged(kind: str, *patches: tuple[float, Any, tuple | None]) -> torch.Tensor:
    """Forge's own merge into the decoded weight, in fp32: what its online mode computes with."""
    listed = [[strength, value, 1.0, offset, None] for strength, value, offset in patches]
    return merge_lora_to_weight(listed, decoded(kind), "reference", computation_dtype=torch.float32)


def apart(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """Largest difference as a share of the largest value of `scale` (of `want` if there is none)."""
    return float((got - want).abs().max() / (want if scale is None else scale).abs().max())


def digest(layer: nn.Module) -> str:
    return hashlib.sha256(layer.weight.data.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def paths() -> dict[str, int]:
    """Layer calls by path since the last look."""
    found: dict[str, int] = {}
    for (path, _), count in ENGINE.counts.items():
        found[path] = found.get(path, 0) + count
    ENGINE.counts.clear()
    return found


# the numbers


@check
def base_is_the_files_weights() -> None:
    x = activations()
    for kind in [*QUANTIZED, "BF16", "F16", "F32"]:
        model = load(build(kind))
        want = torch.nn.functional.linear(x, decoded(kind), model.linear.bias.data)
        assert apart(model(x), want) <= 1e-5, kind
        assert paths() == {"base": 1}, kind


@check
def lora_effect_is_that_of_forges_online_mode() -> None:
    x = activations()
    for kind in [*QUANTIZED, "BF16", "F16", "F32"]:
        patcher = build(kind)
        base = load(patcher)(x)
        got = load(with_lora(patcher, {"linear.weight": lora()}))(x)
        effect = torch.nn.functional.linear(x, merged(kind, (0.8, lora(), None)) - decoded(kind))
        assert apart(got - base, effect) <= 1e-4, kind
        assert paths() == {"base": 1, "residual": 1}, kind


@check
def agrees_with_forges_own_forward() -> None:
    x = activations()
    for kind in QUANTIZED:
        for online in ({}, {"linear.weight": lora()}):
            patcher = build(kind)
            ours = load(with_lora(patcher, online))(x) if online else load(patcher)(x)
            ENGINE.uninstall()
            theirs = load(with_lora(build(kind), online, online=True) if online else build(kind))(x)
            ENGINE.install()
            assert apart(ours, theirs) <= HALF[torch.float16], (kind, bool(online))
    paths()


@check
def bytes_are_never_written() -> None:
    x = activations()
    for kind in [*QUANTIZED, "F16", "F32"]:
        patcher = build(kind)
        before, base = digest(patcher.model.linear), None
        for strength in (None, 1.0, -0.5, None):
            model = load(patcher if strength is None else with_lora(patcher, {"linear.weight": lora()}, strength))
            y = model(x)
            base = y if base is None else base
            assert digest(model.linear) == before, kind
        assert torch.equal(y, base), kind  # the LoRA is gone: the base, bit for bit


@check
def computes_in_half_precision() -> None:
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        x = activations()
        for kind in ("Q8_0", "Q4_K", "F16"):
            model = load(with_lora(build(kind, dtype=dtype), {"linear.weight": lora()}))
            got = model(x.to(dtype))
            want = torch.nn.functional.linear(x, merged(kind, (0.8, lora(), None)), model.linear.bias.data.float())
            assert got.dtype == dtype and apart(got.float(), want) <= limit, (kind, dtype)
    ENGINE.configure(Settings(dtype="fp32"))
    got = load(build("Q4_K"))(x.to(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    ENGINE.configure(Settings())
    paths()


# the two layouts


@check
def baked_bytes_come_back() -> None:
    x = activations()
    for kind in BAKED:
        for dtype in (torch.float16, torch.bfloat16):
            patcher = build(kind, dtype=dtype)
            layer = patcher.model.linear
            raw, base = digest(layer), load(patcher)(x)
            ENGINE.configure(Settings(mode="off"))
            theirs = load(patcher)(x)
            assert layer.weight.baked and paths() == {"base": 1, "forge": 1}, kind
            assert apart(theirs, base) <= HALF[dtype], kind
            ENGINE.configure(Settings())
            assert torch.equal(load(patcher)(x), base) and digest(layer) == raw, (kind, dtype)
            paths()


@check
def runs_what_forge_baked_before_graft_came() -> None:
    x = activations()
    for kind in BAKED:
        for dtype in (torch.float16, torch.bfloat16):
            ENGINE.uninstall()
            patcher = build(kind, dtype=dtype)
            theirs = load(patcher)(x)
            ENGINE.install()
            base = load(patcher)(x)
            # the same scales, decoded by us: apart by Forge's rounding of each product
            assert apart(base, theirs) <= HALF[dtype], (kind, dtype)
            got = load(with_lora(patcher, {"linear.weight": lora()}))(x)
            effect = torch.nn.functional.linear(x, merged(kind, (0.8, lora(), None)) - decoded(kind))
            assert apart(got - base, effect) <= 1e-4, (kind, dtype)
            assert paths() == {"base": 1, "residual": 1}


@check
def bytes_that_forge_merged_into_are_not_mistaken_for_the_files() -> None:
    x = activations()
    for dtype in (torch.float16, torch.bfloat16):
        for kind in ("Q8_0", "Q4_0"):
            patcher = build(kind, dtype=dtype)
            base = load(patcher)(x)
            ENGINE.configure(Settings(mode="off"))
            theirs = load(with_lora(patcher, {"linear.weight": lora(8)}, 3.0))(x)
            ENGINE.configure(Settings())
            # Graft is on again, but Forge has not yet taken its merge back
            assert apart(patcher.model(x), theirs) <= HALF[dtype], kind
            assert torch.equal(load(patcher)(x), base), kind
    paths()


@check
def uninstalling_leaves_a_model_that_forge_runs() -> None:
    x = activations()
    patchers = [build(kind) for kind in QUANTIZED]
    ours = [load(p)(x) for p in patchers]
    ENGINE.uninstall()
    assert operations.ForgeOperationsGGUF.Linear.forward is ORIGINAL_FORWARD
    for kind, patcher, y in zip(QUANTIZED, patchers, ours, strict=True):
        assert apart(patcher.model(x), y) <= 2e-3, kind
    ENGINE.install()
    hook = operations.ForgeOperationsGGUF.Linear.forward
    ENGINE.install()
    assert operations.ForgeOperationsGGUF.Linear.forward is hook
    for patcher, y in zip(patchers, ours, strict=True):
        assert torch.equal(patcher.model(x), y)
    paths()


# Forge #1223 and its relatives: LoRAs on what is not quantized


@check
def issue_1223_lora_on_float_tensors_of_a_gguf_file() -> None:
    x = activations()
    patches = {"linear.weight": lora(), "linear.bias": ("diff", (torch.full((ROWS,), 0.25),))}
    for kind in ("F16", "F32", "BF16"):
        for bias in ("bias.F32", "bias.F16"):
            for dtype in (torch.float32, torch.bfloat16):
                patcher = build(kind, bias, dtype)
                base = load(patcher)(x)
                got = load(with_lora(patcher, patches))(x)
                effect = torch.nn.functional.linear(x, merged(kind, (0.8, lora(), None)) - decoded(kind)) + 0.2
                assert apart(got - base, effect) <= 1e-4, (kind, bias, dtype)
                assert torch.equal(load(patcher)(x), base), (kind, bias, dtype)
    assert set(paths()) == {"base", "residual"}


@check
def issue_1223_unmodified_forge_fails_or_loses_the_effect() -> None:
    ENGINE.uninstall()
    try:
        x = activations()
        for kind, bias, key, value in (
            ("F16", "bias.F32", "linear.weight", lora()),
            ("F32", "bias.F16", "linear.bias", ("diff", (torch.full((ROWS,), 0.25),))),
        ):
            try:
                load(with_lora(build(kind, bias), {key: value}))
            except (AttributeError, RuntimeError) as error:
                assert "gguf_cls" in str(error) or "ParameterGGUF" in str(error)
            else:
                raise AssertionError(f"this Forge merges into {kind} / {bias}: tell the README")
        for kind in ("Q4_K", "Q5_K", "Q6_K", "Q4_1"):
            try:
                load(with_lora(build(kind), {"linear.weight": lora()}))
            except NotImplementedError:
                continue
            raise AssertionError(f"this Forge requantizes to {kind}: tell the README")
        patcher = build("Q4_0")
        base = load(patcher)(x)
        patched = load(with_lora(patcher, {"linear.weight": lora(rank=1, seed=3)}, 0.1))(x)
        effect = torch.nn.functional.linear(x, merged("Q4_0", (0.1, lora(rank=1, seed=3), None)) - decoded("Q4_0"))
        kept = float(((patched - base) * effect).sum() / (effect * effect).sum())
        assert kept < 0.7, kept
    finally:
        ENGINE.install()


@check
def a_parameter_that_lost_its_attributes_still_runs() -> None:
    x = activations()
    for kind in ("Q8_0", "Q4_K", "IQ4_XS", "F16"):
        patcher = build(kind)
        model = load(patcher)
        base = model(x)
        model.linear.weight = nn.Parameter(model.linear.weight.data, requires_grad=False)
        assert not hasattr(model.linear.weight, "gguf_cls")
        assert torch.equal(model(x), base), kind
        got = load(with_lora(patcher, {"linear.weight": lora()}))(x)
        assert apart(got - base, torch.nn.functional.linear(x, lora_delta(0.8))) <= 1e-4, kind
    paths()


def lora_delta(strength: float) -> torch.Tensor:
    up, down, alpha = lora()[1][:3]
    return strength * alpha / down.shape[0] * up @ down


# types that Forge cannot decode


@check
def types_that_forge_cannot_decode_load_through_graft() -> None:
    x = activations()
    known = {t.name for t in gguf.GGMLQuantizationType}
    foreign = ENGINE.added
    assert {"IQ4_XS", "IQ4_NL", "IQ3_S", "IQ2_XXS", "IQ1_S"} <= set(foreign) <= known
    for kind in foreign:
        patcher = build(kind)
        base = load(patcher)(x)
        assert apart(base, torch.nn.functional.linear(x, decoded(kind), patcher.model.linear.bias.data)) <= 1e-5, kind
        got = load(with_lora(patcher, {"linear.weight": lora()}))(x)
        assert apart(got - base, torch.nn.functional.linear(x, lora_delta(0.8))) <= 1e-4, kind
        ENGINE.configure(Settings(mode="off"))
        assert apart(load(patcher)(x), base) <= 2e-3, kind
        ENGINE.configure(Settings())
    paths()


# LoRAs of every form


@check
def stacks_slices_and_strengths() -> None:
    x = activations()
    slices = {
        "linear.weight": lora(4),
        ("linear.weight", (0, 16, 24)): lora(8, rows=24, seed=1),
        ("linear.weight", (1, 128, 256)): lora(2, columns=256, seed=2),
    }
    for kind in ("Q4_K", "Q8_0", "F16"):
        patcher = build(kind)
        base = load(patcher)(x)
        stack = with_lora(patcher, slices, 0.7)
        stack.add_patches(filename="b", patches={"linear.weight": lora(3, seed=4)}, strength_patch=-0.4)
        got = load(stack)(x)
        listed = [(0.7, v, k[1] if isinstance(k, tuple) else None) for k, v in slices.items()]
        want = merged(kind, *listed, (-0.4, lora(3, seed=4), None)) - decoded(kind)
        assert apart(got - base, torch.nn.functional.linear(x, want)) <= 1e-4, kind
        assert torch.equal(load(patcher)(x), base)
    assert set(paths()) == {"base", "residual"}


@check
def every_kind_of_adapter_has_forges_effect() -> None:
    r = torch.Generator().manual_seed(7)

    def n(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=r) * 0.3

    kinds = {
        "loha": ("loha", (n(ROWS, 3), n(3, COLUMNS), 2.0, n(ROWS, 3), n(3, COLUMNS), None, None, None)),
        "lokr": ("lokr", (n(8, 16), n(8, 32), None, None, None, None, None, None, None)),
        "lokr factors": ("lokr", (n(8, 16), None, 2.0, None, None, n(8, 4), n(4, 32), None, None)),
        "glora": ("glora", (n(COLUMNS, 4), n(4, COLUMNS), n(ROWS, 4), n(4, COLUMNS), 2.0, None)),
        "dora rows": ("lora", (*lora()[1][:4], n(ROWS, 1).abs() + 20)),
        "dora columns": ("lora", (*lora()[1][:4], n(1, COLUMNS).abs() + 8)),
        "diff": ("diff", (n(ROWS, COLUMNS),)),
        "diff, bare": (n(ROWS, COLUMNS),),
    }
    x = activations()
    for name, value in kinds.items():
        patcher = build("Q6_K")
        base = load(patcher)(x)
        got = load(with_lora(patcher, {"linear.weight": value}, 0.6))(x)
        want = torch.nn.functional.linear(x, merged("Q6_K", (0.6, copy.deepcopy(value), None)) - decoded("Q6_K"))
        assert apart(got - base, want) <= 1e-4, (name, paths())
        assert "forge" not in paths(), name


@check
def control_loras_with_other_channels() -> None:
    patcher = build("F16")
    x = activations()
    base = load(patcher)(x)
    narrow = lora(columns=256)
    got = load(with_lora(patcher, {"linear.weight": narrow}))(x)
    want = merged("F16", (0.8, copy.deepcopy(narrow), None)) - decoded("F16")
    assert apart(got - base, torch.nn.functional.linear(x, want)) <= 1e-4
    load(patcher)  # Forge tells LoRAs apart by file and strength
    wide = lora(columns=COLUMNS + 64)
    x = torch.randn(2, COLUMNS + 64, generator=torch.Generator().manual_seed(1))
    got = load(with_lora(patcher, {"linear.weight": wide}))(x)
    want = torch.nn.functional.linear(x, merged("F16", (0.8, copy.deepcopy(wide), None)), patcher.model.linear.bias)
    assert apart(got, want) <= 1e-4
    paths()


@check
def unknown_kinds_take_forges_own_merge_and_are_counted() -> None:
    from backend.patcher import lora as forge_lora

    def half(weight: torch.Tensor, strength: float, value: Any) -> torch.Tensor:
        return weight * value[0]

    forge_lora.extra_weight_calculators["shrink"] = half
    x = activations()
    patcher = build("Q4_K")
    base = load(patcher)(x)
    got = load(with_lora(patcher, {"linear.weight": ("shrink", (0.5,))}))(x)
    bias = patcher.model.linear.bias.data
    assert apart(got - bias, (base - bias) * 0.5) <= 1e-5
    assert ("exact", "adapter kind 'shrink' is unknown here") in ENGINE.counts
    paths()


@check
def patches_that_fit_nothing_are_left_out_and_named() -> None:
    x = activations()
    patcher = build("Q8_0")
    base = load(patcher)(x)
    model = load(with_lora(patcher, {"linear.weight": lora(rows=ROWS + 1)}))
    assert torch.equal(model(x), base)
    assert "made for another model" in state_of(model.linear).left_out[0]
    nan = lora()
    nan[1][0][0, 0] = float("nan")
    assert torch.equal(load(with_lora(patcher, {"linear.weight": nan}))(x), base)
    paths()


@check
def other_layers_keep_forges_way() -> None:
    patcher = build("Q8_0")
    diff = ("diff", (torch.full((ROWS,), 0.5),))
    clone = with_lora(patcher, {"linear.weight": lora(), "norm.weight": diff, "nowhere.weight": lora()}, 1.0)
    modes = {key[3]: set(p) for key, p in clone.lora_patches.items()}
    assert modes == {True: {"linear.weight"}, False: {"norm.weight"}}
    model = load(clone)
    assert torch.equal(model.norm.weight.data, torch.full((ROWS,), 1.5))
    load(patcher)
    assert torch.equal(model.norm.weight.data, torch.ones(ROWS))
    paths()


@check
def a_new_strength_keeps_the_factors() -> None:
    x = activations()
    patcher, value = build("Q8_0"), lora()
    state = state_of(patcher.model.linear)
    load(with_lora(patcher, {"linear.weight": value}, 0.3))(x)
    factors = state.residual.low_rank.down
    one = load(with_lora(patcher, {"linear.weight": value}, 0.9))(x)
    assert state.residual.low_rank.down is factors
    base = load(patcher)(x)
    assert apart(one - base, torch.nn.functional.linear(x, lora_delta(0.9))) <= 1e-4
    assert state.residual is None
    paths()


@check
def a_lora_of_enormous_rank_is_merged_in_auto_mode() -> None:
    x = activations()
    for key, value in (("linear.weight", lora(60)), (("linear.weight", (0, 16, 24)), lora(30, rows=24))):
        patcher = build("Q8_0")
        base = load(patcher)(x)
        got = {}
        for mode in ("auto", "on"):
            ENGINE.configure(Settings(mode=mode))
            got[mode] = load(with_lora(patcher, {key: value}))(x) - base
            load(patcher)
        ENGINE.configure(Settings())
        assert apart(got["auto"], got["on"]) <= 1e-4
        assert paths() == {"base": 1, "exact": 1, "residual": 1}, key


@check
def factors_are_let_go_between_images() -> None:
    x = activations()
    patcher = with_lora(build("Q8_0"), {"linear.weight": lora()})
    model = load(patcher)
    y, state = model(x), state_of(model.linear)
    ENGINE.release()
    assert state.residual is not None  # on the CPU there is nothing to gain
    state.release()
    assert state.residual is None and state.path == "residual"
    assert torch.equal(model(x), y)
    paths()


@check
def weights_elsewhere_come_by_forges_own_mover() -> None:
    layer = load(build("Q4_K")).linear
    meta = torch.device("meta")
    with ENGINE.host.on_device(layer.weight.data, layer.bias.data, meta) as (weight, bias):
        assert weight.device == bias.device == meta and weight.dtype == torch.uint8 and bias.dtype == torch.float32
    with ENGINE.host.on_device(layer.weight.data, None, CPU) as (weight, bias):
        assert weight.data_ptr() == layer.weight.data_ptr() and bias is None


@check
def functions_on_the_weight_of_unknown_kind_go_to_forge() -> None:
    x = activations()
    model = load(build("Q4_K"))
    base = model(x)
    model.linear.weight_function = [lambda weight: weight]
    assert apart(model(x), base) <= 2e-3
    assert ("forge", "function on the weight") in ENGINE.counts
    paths()


def main() -> None:
    torch.manual_seed(0)
    ENGINE.install()
    report = {}
    for name, function in CHECKS.items():
        ENGINE.configure(Settings())
        ENGINE.counts.clear()
        try:
            function()
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
            ENGINE.install()
    with open(REPORT, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
