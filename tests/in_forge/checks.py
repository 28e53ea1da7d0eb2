"""Contract checks against the real backend of Forge or Forge Neo, one function each; run by its own Python.

    python checks.py FOLDER REPORT.json

FOLDER/layers.gguf holds a weight of each type, ``[ROWS, COLUMNS]`` under the type's name, and biases; beside it lie
text encoders as ``ARCHITECTURE.gguf``. The report gives the traceback of each check that failed, or an empty string.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bootstrap
import numpy as np
import torch
from backend import memory_management, operations, utils
from backend.operations_gguf import gguf  # the vendored one
from backend.patcher import lora as forge_lora
from backend.patcher.base import ModelPatcher
from backend.patcher.lora import merge_lora_to_weight
from graft.kernels import GraftError, dequantize
from graft.ops.files.gguf import open_gguf
from graft.ops.make import plan_model, write_model
from graft.ops.packed import as_weight, in_fp32
from graft.ops.recipes import parse_rules, recipe_named
from graft.scripts.forge import patches
from graft.scripts.forge.engine import Engine, Settings
from graft.scripts.forge.host import detect
from graft.scripts.forge.layers import state_of
from graft.scripts.forge.layout import BAKED
from graft.scripts.forge.strengths import Told, taken_from
from torch import nn

FOLDER, REPORT = map(Path, bootstrap.ARGUMENTS)
FILE = str(FOLDER / "layers.gguf")
ROWS, COLUMNS = 64, 512
CPU = torch.device("cpu")
IS_NEO = bootstrap.IS_NEO
TENSORS = open_gguf(FILE).tensors
ORIGINAL_FORWARD = operations.ForgeOperationsGGUF.Linear.forward
ENGINE = Engine(detect())
QUANTIZED = [t.name for t in ENGINE.host.types if t.name != "BF16"]
# Forge decodes in 16 bits. With a min beside the scale a weight is the small difference of two numbers that were
# rounded by 2^-12 (fp16) or 2^-9 (bf16); the 512 terms of a sum average that out
HALF = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def on_master(function: Callable[[], None]) -> Callable[[], None]:
    return function if IS_NEO else check(function)


def on_neo(function: Callable[[], None]) -> Callable[[], None]:
    return check(function) if IS_NEO else function


# a model of one layer, as Forge builds one


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(COLUMNS, ROWS)
        self.norm = nn.LayerNorm(ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@functools.cache
def state_dict() -> dict[str, torch.Tensor]:
    """The file, as the loader of this Forge gives it with Graft."""
    return utils.load_torch_file(FILE)


def parameter(name: str) -> torch.Tensor:
    """A tensor of the file whose bytes nobody else holds."""
    made = state_dict()[name]
    return made.copy_with_data(made.data.clone()) if hasattr(made, "copy_with_data") else made


def build(kind: str, bias: str = "bias.F32", dtype: torch.dtype = torch.float32) -> ModelPatcher:
    """A model whose weight is of type `kind`, loaded from the file by Forge's own code."""
    with operations.using_forge_operations(device=CPU, dtype=dtype, bnb_dtype="gguf"):
        model = OneLayer()
    state = {"linear.weight": parameter(kind), "linear.bias": parameter(bias)}
    state |= {"norm.weight": torch.ones(ROWS), "norm.bias": torch.zeros(ROWS)}
    model.load_state_dict(state)
    return ModelPatcher(model, CPU, CPU)


def load(patcher: ModelPatcher) -> nn.Module:
    """What Forge does when a model goes to the device: move it, re-lay its bytes out, see to the LoRAs."""
    if IS_NEO:
        patcher.partially_load(CPU, 1e32)
        memory_management.bake_gguf_model(patcher.model)
    else:
        memory_management.bake_gguf_model(patcher.model)
        patcher.refresh_loras()
    return patcher.model


def decoded(kind: str) -> torch.Tensor:
    """The weight in fp32, by the reference decode of Forge's vendored gguf, or by ours where that has none."""
    tensor = TENSORS[kind]
    if tensor.fmt.dtype is not None:
        return tensor.data.view(tensor.fmt.dtype).view(tensor.shape).float().clone()
    try:
        number = gguf.GGMLQuantizationType(tensor.fmt.ggml_type)
    except ValueError:
        return dequantize(tensor.data, tensor.fmt, tensor.shape, torch.float32, "torch")
    rows = tensor.data.numpy().reshape(tensor.shape[0], -1)
    return torch.from_numpy(np.array(gguf.dequantize(rows, number)))


def activations(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 5, COLUMNS, generator=torch.Generator().manual_seed(seed))


def lora(rank: int = 4, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed + 100)
    up, down = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return "lora", (up * 0.05, down * 0.05, float(rank), None, None)


def native(value: Any) -> Any:
    """A value as the loader of this Forge makes it: Neo has classes for what master holds in tuples."""
    if not IS_NEO or not isinstance(value, tuple) or len(value) != 2 or value[0] == "diff":
        return value
    from backend.patcher.lora import weight_adapter

    kind, fields = value
    found = [cls for cls in weight_adapter.adapters if cls.name == kind]
    return found[0](set(), fields if kind != "lora" else (*fields, None)[:6]) if found else value


def with_lora(patcher: ModelPatcher, patches: dict, strength: float = 0.8, online: bool = IS_NEO) -> ModelPatcher:
    """A clone with one more LoRA; Neo keeps all LoRAs of GGUF models online."""
    clone = patcher.clone()
    values = {key: native(value) for key, value in patches.items()}
    clone.add_patches(filename="a.safetensors", patches=values, strength_patch=strength, online_mode=online)
    return clone


def merged(kind: str, *patches: tuple[float, Any, tuple | None]) -> torch.Tensor:
    """Forge's own merge into the decoded weight, in fp32: what its online mode computes with."""
    listed = [[strength, native(value), 1.0, offset, None] for strength, value, offset in patches]
    return merge_lora_to_weight(listed, decoded(kind), "reference", computation_dtype=torch.float32)


def apart(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """Largest difference as a share of the largest value of `scale` (of `want` if there is none)."""
    return float((got - want).abs().max() / (want if scale is None else scale).abs().max())


def digest(layer: nn.Module) -> str:
    """Of the bytes of its weight."""
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


@on_master
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
def a_file_that_graft_made_reads_the_same() -> None:
    path = FOLDER / "made.gguf"
    made, state = open_gguf(path).tensors, utils.load_torch_file(str(path))
    assert state.keys() == made.keys()
    for name, tensor in made.items():
        found = state[name]
        assert tuple(found.shape) == tensor.shape, name
        if tensor.fmt.decode is None:
            want = tensor.data.view(tensor.fmt.dtype).view(tensor.shape).float()
        else:
            want = dequantize(tensor.data, tensor.fmt, tensor.shape, torch.float32, "torch")
        is_packed = getattr(found, "gguf_cls", None) is not None
        read = found.dequantize_as_pytorch_parameter() if is_packed else found.data
        assert apart(read.detach().float().reshape(tensor.shape), want) <= HALF[torch.float16], name


@check
def a_vae_in_gguf_is_one_of_safetensors() -> None:
    """Decoded when it is read: chosen beside a model, as Forge's lists show it, it decodes the same picture."""
    from backend import loader
    from backend.nn.vae import IntegratedAutoencoderKL
    from huggingface_guess import model_list

    sizes = {"block_out_channels": (32, 64), "latent_channels": 4}
    with operations.using_forge_operations(device=CPU, dtype=torch.float32):
        models = [IntegratedAutoencoderKL(**sizes) for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    state = {
        name: 1.0 * torch.randn(value.shape, generator=g) / max(1, value[0].numel() if value.dim() > 1 else 8) ** 0.5
        for name, value in models[0].state_dict().items()
    }
    path = FOLDER / "vae.gguf"
    write_model(path, plan_model(state, recipe_named("Q8_0"), "vae", parse_rules("*weight = Q8_0")))
    tensors = open_gguf(path).tensors
    assert {tensor.fmt.name for tensor in tensors.values()} >= {"Q8_0", "F32"}
    want = {name: in_fp32(as_weight(tensor)) for name, tensor in tensors.items()}
    read = utils.load_torch_file(str(path))
    guess = object.__new__(model_list.SD15)
    named = [str(path)] if "path" in inspect.signature(loader.replace_state_dict).parameters else []
    placed = loader.replace_state_dict({}, read, guess, *named)
    prefix = guess.vae_key_prefix[0]
    pictures = []
    for model, weights in zip(models, ({k.removeprefix(prefix): v for k, v in placed.items()}, want), strict=True):
        model.load_state_dict(weights)
        pictures.append(model.decode(torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))))
    assert torch.equal(*pictures) and pictures[0].std() > 0.01


@check
def types_that_forge_cannot_decode_load_through_graft() -> None:
    x = activations()
    known = {t.name for t in gguf.GGMLQuantizationType}
    assert {"IQ4_XS", "IQ4_NL", "IQ3_S", "IQ2_XXS", "IQ1_S"} <= set(ENGINE.added) <= known
    unknown = set(TENSORS) - known - {"bias.F32", "bias.F16"}
    assert unknown == {"TQ1_0", "TQ2_0", "MXFP4", "NVFP4"}
    for kind in (*ENGINE.added, *sorted(unknown)):
        patcher = build(kind)
        base = load(patcher)(x)
        assert apart(base, torch.nn.functional.linear(x, decoded(kind), patcher.model.linear.bias.data)) <= 1e-5, kind
        got = load(with_lora(patcher, {"linear.weight": lora()}))(x)
        assert apart(got - base, torch.nn.functional.linear(x, lora_delta(0.8))) <= 1e-4, kind
        ENGINE.configure(Settings(mode="off"))
        assert apart(load(patcher)(x), base) <= 2e-3, kind
        ENGINE.configure(Settings())
    paths()


@check
def a_scale_beside_a_weight_is_applied() -> None:
    x = activations()
    for name in ("one", "rows"):
        path = str(FOLDER / f"scaled-{name}.gguf")
        scale = open_gguf(path).tensors["linear.scale"].data.view(torch.float32).view(-1, 1)
        state = utils.load_torch_file(path)
        assert set(state) == {"linear.weight", "linear.bias"}
        with operations.using_forge_operations(device=CPU, dtype=torch.float32, bnb_dtype="gguf"):
            model = OneLayer()
        model.load_state_dict(state | {"norm.weight": torch.ones(ROWS), "norm.bias": torch.zeros(ROWS)})
        patcher = ModelPatcher(model, CPU, CPU)
        base, weight = load(patcher)(x), scale * decoded("NVFP4")
        assert apart(base, torch.nn.functional.linear(x, weight, model.linear.bias.data)) <= 1e-5, name
        got = load(with_lora(patcher, {"linear.weight": lora()}))(x)
        assert apart(got - base, torch.nn.functional.linear(x, lora_delta(0.8))) <= 1e-4, name
        ENGINE.configure(Settings(mode="off"))
        assert apart(load(patcher)(x), base) <= HALF[torch.float16], name
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
        more = {"linear.weight": native(lora(3, seed=4))}
        stack.add_patches(filename="b", patches=more, strength_patch=-0.4)
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
    up, down = (0.8 * lora(columns=256)[1][0], lora(columns=256)[1][1])
    got = load(with_lora(patcher, {"linear.weight": lora(columns=256)}))(x)
    assert apart(got - base, x[..., :256] @ down.t() @ up.t()) <= 1e-4
    load(patcher)  # master tells LoRAs apart by file and strength
    wide = lora(columns=COLUMNS + 64)
    x = torch.randn(2, COLUMNS + 64, generator=torch.Generator().manual_seed(1))
    got = load(with_lora(patcher, {"linear.weight": wide}))(x)
    want = torch.nn.functional.linear(x[..., :COLUMNS], decoded("F16"), patcher.model.linear.bias)
    assert apart(got, want + 0.8 * x @ wide[1][1].t() @ wide[1][0].t()) <= 1e-4
    paths()


@check
def unknown_kinds_take_forges_own_merge_and_are_counted() -> None:
    if IS_NEO:

        class Shrink(forge_lora.weight_adapter.WeightAdapterBase):
            name, weights, loaded_keys = "shrink", (0.5,), frozenset()

            def calculate_weight(self, weight: torch.Tensor, *args: Any) -> torch.Tensor:
                return weight * self.weights[0]

        value: Any = Shrink()
    else:
        forge_lora.extra_weight_calculators["shrink"] = lambda weight, strength, fields: weight * fields[0]
        value = ("shrink", (0.5,))
    x = activations()
    patcher = build("Q4_K")
    base = load(patcher)(x)
    got = load(with_lora(patcher, {"linear.weight": value}))(x)
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
    lost = {"nowhere.weight": lora(), "linear.nowhere": lora()}
    for online in (False, True):
        clone = with_lora(patcher, {"linear.weight": lora(), "norm.weight": diff, **lost}, 1.0, online)
        (added,) = patches.carried(clone)
        assert set(added.ours) == {"linear.weight"} and added.others == ("norm.weight",)
        theirs = clone.patches if IS_NEO else {k: v for p in clone.lora_patches.values() for k, v in p.items()}
        assert set(theirs) == {"norm.weight"}
        model = load(clone)
        y = model.norm(activations()[..., :ROWS])
        want = torch.nn.functional.layer_norm(activations()[..., :ROWS], (ROWS,), torch.full((ROWS,), 1.5))
        assert apart(y, want) <= 1e-5
        assert torch.equal(load(patcher).norm.weight.data, torch.ones(ROWS))
        assert apart(1.5 * model.norm(activations()[..., :ROWS]), want) <= 1e-5
    paths()


# files of LoRAs, as Forge's own loader is called for them


class Attention(nn.Module):
    """Queries, keys and values in three layers, and in one of two keys and values."""

    config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        attn = nn.ModuleDict({name: nn.Linear(COLUMNS, ROWS) for name in ("wq", "wk", "wv")})
        cross = nn.ModuleDict({"kv": nn.Linear(COLUMNS, ROWS), "out": nn.Linear(COLUMNS, ROWS, bias=False)})
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": attn, "cross": cross})])


class Whole(nn.Module):
    """What Forge puts around a diffusion model."""

    config = SimpleNamespace(huggingface_repo="toy")
    LAYERS = ("attn.wq", "attn.wk", "attn.wv", "cross.kv", "cross.out")

    def __init__(self, kind: str) -> None:
        super().__init__()
        with operations.using_forge_operations(device=CPU, dtype=torch.float32, bnb_dtype="gguf"):
            self.diffusion_model = Attention()
        state = {f"blocks.0.{path}.weight": parameter(kind) for path in self.LAYERS}
        state |= {f"blocks.0.{path}.bias": parameter("bias.F32") for path in self.LAYERS[:-1]}
        self.diffusion_model.load_state_dict(state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.diffusion_model.get_submodule(f"blocks.0.{path}")(x) for path in self.LAYERS], -1)


def load_lora_for_models(model: Any, clip: Any, lora: dict, strength_model: float, strength_clip: float,
                         filename: str = "default", online_mode: bool = False) -> tuple:  # fmt: skip
    """The order in which Forge's extension of that name calls its backend."""
    names = NETWORKS.model_lora_keys_unet(model.model)
    patches, _ = NETWORKS.load_lora(lora, names)
    clone = model.clone()
    options = {"filename": filename, "online_mode": online_mode}
    taken = clone.add_patches(patches=patches, strength_patch=strength_model, **options)
    lost = [key for key in patches if key not in taken]
    return (model if lost or not patches else clone), clip


NETWORKS = SimpleNamespace(
    model_lora_keys_unet=forge_lora.model_lora_keys_unet, model_lora_keys_clip=forge_lora.model_lora_keys_clip,
    load_lora=forge_lora.load_lora, load_lora_for_models=load_lora_for_models,
)  # fmt: skip
ENGINE.host.networks = NETWORKS


def from_file(patcher: ModelPatcher, state: dict[str, torch.Tensor], strength: float = 0.8) -> ModelPatcher:
    """A clone with the LoRA of a file."""
    loaded, _ = NETWORKS.load_lora_for_models(patcher, None, state, strength, strength, "file.safetensors", IS_NEO)
    return loaded


def tensors(module: str, rows: int, seed: int = 0, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    up, down, alpha = lora(rows=rows, seed=seed)[1][:3]
    fields = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha), **more}
    return {f"diffusion_model.blocks.0.{module}.{name}": value for name, value in fields.items()}


def delta(rows: int, seed: int = 0) -> torch.Tensor:
    up, down = lora(rows=rows, seed=seed)[1][:2]
    return up @ down


@check
def modules_that_fuse_layers_and_parts_of_fused_ones_reach_their_rows() -> None:
    x, bias = activations(), 0.1 * torch.arange(3 * ROWS) / ROWS
    half, difference = ROWS // 2, delta(ROWS, seed=5)
    state = tensors("attn.qkv", 3 * ROWS, diff_b=bias) | tensors("cross.v", half, seed=1, diff_b=bias[:half])
    state |= tensors("cross.out", ROWS, seed=2, diff=difference, diff_b=bias[:ROWS])
    want = torch.nn.functional.linear(x, torch.cat([
        delta(3 * ROWS), torch.zeros(half, COLUMNS), delta(half, seed=1), delta(ROWS, seed=2) + difference,
    ]), torch.cat([bias, torch.zeros(half), bias[:half], bias[:ROWS]]))  # fmt: skip
    for kind in ("Q8_0", "Q4_K", "F16"):
        patcher = ModelPatcher(Whole(kind), CPU, CPU)
        base = load(patcher)(x)
        loaded = from_file(patcher, state)
        assert apart(load(loaded)(x) - base, 0.8 * want) <= 1e-4, kind
        assert set(paths()) == {"base", "residual"}, kind
        report = ENGINE.fates["file.safetensors"].report
        assert (report.matched, report.total, report.missing, report.rejected) == (3, 3, (), {})
        # layers that go back to Forge keep all of it, where they have a bias
        for path in Whole.LAYERS[:-1]:
            state_of(loaded.model.diffusion_model.get_submodule(f"blocks.0.{path}")).refused = "a test"
        assert apart(loaded.model(x) - base, 0.8 * want, base) <= HALF[torch.float16], kind
        paths()


@check
def with_graft_off_forge_gets_what_it_can_merge() -> None:
    x = activations()
    state = tensors("attn.qkv", 3 * ROWS) | tensors("cross.v", ROWS // 2, seed=1, diff_b=torch.ones(ROWS // 2))
    patcher = ModelPatcher(Whole("Q8_0"), CPU, CPU)
    base = load(patcher)(x)
    ENGINE.configure(Settings(mode="off"))
    got = load(from_file(patcher, state))(x) - base
    want = torch.nn.functional.linear(x, torch.cat([delta(3 * ROWS), torch.zeros(ROWS // 2, COLUMNS),
                                                    delta(ROWS // 2, seed=1)]))  # fmt: skip
    want[..., -ROWS // 2 :] += 1
    # master requantizes what it merges
    assert apart(got[..., :-ROWS], 0.8 * want, base) <= (HALF[torch.float16] if IS_NEO else 0.1)
    ENGINE.configure(Settings())
    assert torch.equal(load(patcher)(x), base)
    paths()


@check
def what_forges_loader_cannot_read_costs_neither_the_file_nor_the_count() -> None:
    x = activations()
    ranks = tensors("attn.wq", ROWS) | {"diffusion_model.blocks.0.attn.wq.alpha": torch.full((4,), 4.0)}
    broken = {k: v for k, v in tensors("attn.wk", ROWS).items() if "up" not in k}
    foreign = tensors("attn.wv", ROWS + 2, seed=1)
    file = ranks | broken | foreign | tensors("cross.kv", ROWS, seed=2) | tensors("elsewhere.kv", ROWS)
    patcher = ModelPatcher(Whole("Q6_K"), CPU, CPU)
    base = load(patcher)(x)
    got = load(from_file(patcher, file))(x) - base
    want = torch.zeros(5 * ROWS, COLUMNS)
    want[:ROWS], want[3 * ROWS : 4 * ROWS] = delta(ROWS), delta(ROWS, seed=2)
    assert apart(got, 0.8 * torch.nn.functional.linear(x, want)) <= 1e-4
    report = ENGINE.fates["file.safetensors"].report
    assert (report.matched, report.total, len(report.missing)) == (3, 5, 1)
    assert list(report.rejected) == ["diffusion_model.blocks.0.attn.wk"]
    wrong = state_of(patcher.model.diffusion_model.blocks[0].attn["wv"]).left_out
    assert "66" in wrong[0] and not state_of(patcher.model.diffusion_model.blocks[0].attn["wq"]).left_out
    load(patcher)
    paths()


# strengths that are data


class Streams(nn.Module):
    """Four layers of Flux by name: of the picture, of the words, of both, and of neither."""

    LAYERS = (
        "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv", "single_blocks.0.linear1",
        "double_blocks.0.img_mod.lin",
    )  # fmt: skip
    WORDS = 3
    storage_dtype = computation_dtype = torch.float32

    def __init__(self, kind: str) -> None:
        super().__init__()
        with operations.using_forge_operations(device=CPU, dtype=torch.float32, bnb_dtype="gguf"):
            for path in self.LAYERS:
                owner: nn.Module = self
                *parents, name = path.split(".")
                for parent in parents:
                    if parent not in dict(owner.named_children()):
                        owner.add_module(parent, nn.Module())
                    owner = owner.get_submodule(parent)
                owner.add_module(name, nn.Linear(COLUMNS, ROWS))
        state = {f"{path}.weight": parameter(kind) for path in self.LAYERS}
        self.load_state_dict(state | {f"{path}.bias": parameter("bias.F32") for path in self.LAYERS})

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        batch, _, rows, columns = x.shape
        cells = x.view(batch, -1, rows // 2, 2, columns // 2, 2)
        tokens = cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, COLUMNS)
        picture, words, both, neither = map(self.get_submodule, self.LAYERS)
        outputs = picture(tokens), words(context), both(torch.cat([context, tokens], 1)), neither(tokens.mean(1))
        return torch.cat([y.reshape(batch, -1, ROWS) for y in outputs], 1)


def streams(kind: str) -> ModelPatcher:
    """`Streams` in Forge's own class around a diffusion model."""
    from backend.modules.k_model import KModel

    model = KModel.__new__(KModel)
    nn.Module.__init__(model)
    model.storage_dtype = model.computation_dtype = torch.float32
    model.predictor = SimpleNamespace(
        calculate_input=lambda sigma, x: x, timestep=lambda t: t, calculate_denoised=lambda sigma, y, x: y
    )
    model.diffusion_model = Streams(kind)
    return ModelPatcher(model, CPU, CPU)


def on_streams(*paths: str, seed: int = 0) -> dict[str, Any]:
    return {f"diffusion_model.{path}.weight": lora(seed=seed) for path in paths or Streams.LAYERS}


def call(patcher: ModelPatcher, rows: int = 4, columns: int = 8, batch: int = 1, step: int = 0) -> torch.Tensor:
    """One call of four of the whole model, as a sampler makes it."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(batch, COLUMNS // 4, rows, columns, generator=generator)
    words = torch.randn(batch, Streams.WORDS, COLUMNS, generator=generator)
    ENGINE.step = (step, 4)
    return load(patcher).apply_model(x, torch.ones(batch), c_crossattn=words, transformer_options={})


def told(text: str, strength: float = 0.8) -> Any:
    """A strength with the arguments of a prompt."""
    items = ["name", "1", *text.split(":")]
    params = SimpleNamespace(items=items, positional=items[:2], named=dict(item.split("=", 1) for item in items[2:]))
    plain, when, _ = taken_from(params)
    assert plain.items == items[:2] and when is not None
    return Told(strength, when, text)


def places(rows: int, columns: int, inside: Callable[[int, int], bool]) -> torch.Tensor:
    """For each row of what `Streams` gives, whether it is of a token inside."""
    picture = [inside(row, column) for row in range(rows // 2) for column in range(columns // 2)]
    none = [False] * Streams.WORDS
    return torch.tensor([*picture, *none, *none, *picture, False])


@check
def a_region_is_the_lora_in_its_tokens_and_the_base_elsewhere() -> None:
    cases: dict[str, Callable[[int, int], bool]] = {
        "region=left": lambda row, column: column < 2, "region=right": lambda row, column: column >= 2,
        "region=bottom": lambda row, column: row >= 1,
        "region=0.5,0,1,0.5": lambda row, column: column >= 2 and row < 1,
        "region=not top-left": lambda row, column: column >= 2 or row >= 1,
        "region=0,0,1,1": lambda row, column: True, "region=not 0,0,1,1": lambda row, column: False,
    }  # fmt: skip
    for kind in ("Q8_0", "Q4_K"):
        patcher = streams(kind)
        base, plain = call(patcher), call(with_lora(patcher, on_streams()))
        for text, inside in cases.items():
            got = call(with_lora(patcher, on_streams(), told(text)))
            want = torch.where(places(4, 8, inside).view(1, -1, 1), plain, base)
            assert torch.equal(got, want), (kind, text)
        assert torch.equal(call(patcher), base)
    assert set(paths()) == {"base", "residual"}


@check
def regions_of_several_loras_add_in_one_pass_at_any_size_and_in_batches() -> None:
    patcher = streams("Q6_K")
    both = with_lora(with_lora(patcher, on_streams(), told("region=left")), on_streams(), told("region=right", -0.4))
    three = with_lora(both, on_streams(seed=1), 0.5)
    for rows, columns, batch in ((4, 8, 1), (8, 16, 2), (4, 8, 3)):
        base = call(patcher, rows, columns, batch)
        one, other = (call(with_lora(patcher, on_streams(), s), rows, columns, batch) - base for s in (0.8, -0.4))
        third = call(with_lora(patcher, on_streams(seed=1), 0.5), rows, columns, batch) - base
        half = columns // 4
        left = places(rows, columns, lambda row, column, half=half: column < half).view(1, -1, 1)
        right = places(rows, columns, lambda row, column, half=half: column >= half).view(1, -1, 1)
        paths()
        assert apart(call(three, rows, columns, batch) - base, one * left + other * right + third) <= 1e-4
        assert paths() == {"residual": 4}
    assert [added.when for added in patches.carried(three)] == ["region=left", "region=right", ""]


@check
def a_tile_of_a_picture_has_no_region_and_all_of_a_schedule() -> None:
    """Forge's MultiDiffusion calls the model with tiles, and does not say with which."""
    patcher = streams("Q8_0")
    ENGINE.canvas = (8, 8)  # of which a call draws the upper half
    try:
        assert not torch.equal(call(with_lora(patcher, on_streams(), told("end=0.5"))), call(patcher))
        try:
            call(with_lora(patcher, on_streams(), told("region=left")))
        except GraftError as error:
            assert "draws the picture in parts" in str(error)
        else:
            raise AssertionError("the region was laid over a tile")
    finally:
        ENGINE.canvas = ()
    paths()


@check
def a_schedule_is_the_lora_in_its_steps_and_the_base_in_all_others() -> None:
    patcher = streams("Q4_K")
    base, plain = call(patcher), call(with_lora(patcher, on_streams()))
    for text, steps in (("start=0:end=0.25", {0}), ("start=0.5", {2, 3}), ("start=0.25:end=0.75", {1, 2})):
        patched = with_lora(patcher, on_streams(), told(text))
        for step in range(4):
            got = call(patched, step=step)
            assert torch.equal(got, plain if step in steps else base), (text, step)
        assert torch.equal(call(patched, step=0), plain if 0 in steps else base)  # a second pass begins anew
    weighed = call(with_lora(patcher, on_streams(), told("blocks=double=0.5, single=0")))
    half = call(with_lora(patcher, on_streams(), 0.4))
    single = torch.zeros(base.shape[1], dtype=torch.bool)
    single[8 + Streams.WORDS : -1] = True
    assert apart(weighed, torch.where(single.view(1, -1, 1), base, half)) <= 1e-6
    both = call(with_lora(patcher, on_streams(), told("end=0.5:region=left")), step=1)
    inside = places(4, 8, lambda row, column: column < 2).view(1, -1, 1)
    assert torch.equal(both, torch.where(inside, plain, base))
    paths()


@check
def what_cannot_have_a_place_has_none_and_is_told() -> None:
    patcher = streams("Q8_0")
    base, plain = call(patcher), call(with_lora(patcher, on_streams()))
    region = told("region=left")
    whole = Whole("Q8_0")
    possible, why = ENGINE.possible(whole, told("region=left:end=0.5").when)
    assert possible.mask is None and possible.curve is not None and "mask" in why
    ENGINE.configure(Settings(mode="off"))
    assert ENGINE.possible(patcher.model, region.when) == (None, "Graft is off")
    off = with_lora(patcher, on_streams(), region)
    (added,) = patches.carried(off)
    assert not added.when and not added.ours
    assert apart(call(off), plain) <= (HALF[torch.float16] if IS_NEO else 0.1)  # master requantizes
    ENGINE.configure(Settings())
    assert torch.equal(call(patcher), base)
    # Forge's own forward knows no places: the LoRA is not there, and comes back with the layer
    masked = with_lora(patcher, on_streams(), region)
    got = call(masked)
    layer = patcher.model.diffusion_model.get_submodule(Streams.LAYERS[0])
    state_of(layer).refused = "a test"
    assert apart(call(masked)[:, :8], base[:, :8]) <= HALF[torch.float16]
    scheduled = call(with_lora(patcher, on_streams(), told("end=0.5")), step=1)
    assert apart(scheduled[:, :8], plain[:, :8]) <= HALF[torch.float16]
    state_of(layer).refused = ""
    assert torch.equal(call(masked), got)
    # another number of tokens than the picture has is said, and the layer stays with Graft
    try:
        load(masked).diffusion_model(torch.zeros(1, COLUMNS // 4, 4, 8), None, torch.zeros(1, 3, COLUMNS))
        raise AssertionError("a region outside of a call of the model was taken for something")
    except GraftError:
        assert not state_of(layer).refused
    paths()


@check
def a_new_strength_keeps_the_factors() -> None:
    x = activations()
    patcher, value = build("Q8_0"), lora()
    state = state_of(patcher.model.linear)
    value = native(value)
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
def what_others_hang_on_a_layer_goes_to_forge_with_the_loras_beside_it() -> None:
    x = activations()
    patcher = build("Q4_K")
    base = load(patcher)(x)
    model = load(with_lora(patcher, {"linear.weight": lora(), "linear.bias": ("diff", (torch.full((ROWS,), 0.25),))}))
    ours = model(x)
    double = native(("diff", (decoded("Q4_K"),)))
    if IS_NEO:
        model.linear.weight_function = [lambda weight: 2 * weight]
    else:
        model.linear.forge_online_loras = {"weight": [[1.0, double, 1.0, None, None]]}
    got = model(x)
    if IS_NEO:
        assert len(model.linear.weight_function) == 1 and not model.linear.bias_function
        model.linear.weight_function = []
    else:
        assert set(model.linear.forge_online_loras) == {"weight"}
        del model.linear.forge_online_loras
    more = torch.nn.functional.linear(x, decoded("Q4_K"))
    assert apart(got - more, ours, base) <= 2e-3
    assert any((path == "forge" and "weight" in why) or "LoRAs" in why for path, why in ENGINE.counts)
    assert torch.equal(model(x), ours)
    paths()


@check
def a_layer_that_goes_back_to_forge_keeps_its_loras() -> None:
    x = activations()
    patcher = with_lora(build("Q8_0"), {"linear.weight": lora(), "linear.bias": ("diff", (torch.full((ROWS,), 1.0),))})
    model = load(patcher)
    y = model(x)
    state_of(model.linear).refused = "a test"
    assert apart(model(x), y) <= 2e-3 and ENGINE.counts["forge", "a test"] == 1
    paths()


# Forge Neo: partial loading, layers that are not Linear, models that stay where they are


class Several(nn.Module):
    """Linear layers on the same x, a convolution and an embedding, as Neo builds them for a GGUF file."""

    LINEAR = ("Q8_0", "Q4_K", "Q6_K", "F16")

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(COLUMNS, ROWS) for _ in self.LINEAR)
        self.conv = nn.Conv2d(COLUMNS // 4, ROWS, 2, stride=2, padding=1)
        self.embedding = nn.Embedding(ROWS, COLUMNS)
        self.norm = nn.LayerNorm(ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = sum(linear(x) for linear in self.linears)
        picture = x.reshape(-1, COLUMNS // 4, 2, 2)
        rows = self.embedding(torch.arange(len(picture)) % ROWS)
        return y.reshape(-1, ROWS) + self.conv(picture).mean((2, 3)) + rows[:, :ROWS]


CONVS, EMBEDDINGS = ("Q8_0", "BF16", "F16"), ("Q6_K", "BF16", "F32")


def several(conv: str = "BF16", embedding: str = "Q6_K", dtype: torch.dtype = torch.float32) -> ModelPatcher:
    with operations.using_forge_operations(device=CPU, dtype=dtype, bnb_dtype="gguf"):
        model = Several()
    state = {f"linears.{i}.weight": parameter(kind) for i, kind in enumerate(Several.LINEAR)}
    state |= {f"linears.{i}.bias": parameter("bias.F32") for i in range(len(Several.LINEAR))}
    folded = parameter(conv)
    folded.real_shape = torch.Size((ROWS, COLUMNS // 4, 2, 2))  # as `comfy.gguf.orig_shape` has it
    if folded.gguf_cls is None:
        folded = folded.copy_with_data(folded.data.reshape(folded.real_shape))
    state |= {"conv.weight": folded, "conv.bias": parameter("bias.F32"), "embedding.weight": parameter(embedding)}
    model.load_state_dict(state | {"norm.weight": torch.ones(ROWS), "norm.bias": torch.zeros(ROWS)})
    return ModelPatcher(model, CPU, CPU)


def everywhere(rank: int = 4) -> dict[str, Any]:
    """A LoRA on every layer of `Several`, large enough that what y is rounded to is small against its effect."""
    keys = [*(f"linears.{i}.weight" for i in range(len(Several.LINEAR))), "conv.weight", "embedding.weight"]
    pairs = {key: (20 * up, down) for i, key in enumerate(keys) for up, down in [lora(rank, seed=i)[1][:2]]}
    up, down = pairs["conv.weight"]
    pairs["conv.weight"] = up[:, :, None, None], down.reshape(rank, -1, 2, 2)
    return {key: ("lora", (up, down, float(rank), None, None)) for key, (up, down) in pairs.items()}


def dense(patcher: ModelPatcher, conv: str, embedding: str, patches: dict, strength: float) -> nn.Module:
    """The same model in fp32, with the LoRA in its weights."""
    model = Several()
    weights = {f"linears.{i}": decoded(kind) for i, kind in enumerate(Several.LINEAR)}
    weights |= {"conv": decoded(conv).reshape(ROWS, -1, 2, 2), "embedding": decoded(embedding)}
    for path, weight in weights.items():
        layer = model.get_submodule(path)
        if f"{path}.weight" in patches:
            up, down = patches[f"{path}.weight"][1][:2]
            weight = weight + strength * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        layer.weight.data = weight
        if path != "embedding":
            layer.bias.data = patcher.model.get_submodule(path).bias.data.float()
    return model


@on_neo
def convolutions_and_embeddings_run_in_graft() -> None:
    x = activations()
    for conv, embedding in zip(CONVS, EMBEDDINGS, strict=True):
        patcher = several(conv, embedding)
        base = load(patcher)(x)
        plain = dense(patcher, conv, embedding, {}, 0.0)(x)
        assert apart(base, plain) <= 1e-5, (conv, embedding)
        for online in (True, False):  # Forge Neo asks for the one or the other
            got = load(with_lora(patcher, everywhere(), 0.8, online))(x)
            want = dense(patcher, conv, embedding, everywhere(), 0.8)(x)
            assert apart(got - base, want - plain) <= 1e-4, (conv, embedding, online)
            assert torch.equal(load(patcher)(x), base), (conv, embedding, online)
    assert set(paths()) == {"base", "residual"}


@on_neo
def a_lora_across_linear_and_conv2d_breaks_nothing_when_off() -> None:
    x = activations()
    patcher = several()
    base = load(patcher)(x)
    ENGINE.configure(Settings(mode="off"))
    model = load(with_lora(patcher, everywhere(), 0.8, online=True))
    want = dense(patcher, "BF16", "Q6_K", everywhere(), 0.8)(x)
    assert apart(model(x) - base, want - base, want) <= HALF[torch.float16]
    ENGINE.configure(Settings())
    assert torch.equal(load(patcher)(x), base)
    paths()


def effects_of_partial_loading(patcher: ModelPatcher, x: torch.Tensor, base: torch.Tensor) -> list[torch.Tensor]:
    """The LoRA's effect after each step of what happens where memory is short."""
    found = []
    whole = memory_management.module_size(patcher.model)
    for step in (
        lambda: patcher.partially_load(CPU, 1e32),
        lambda: patcher.partially_unload(CPU, whole // 2),
        lambda: patcher.partially_unload(CPU, whole // 4),
        lambda: patcher.partially_load(CPU, whole // 4),
        lambda: patcher.partially_load(CPU, 1e32),
        lambda: patcher.partially_unload(CPU, whole),
        lambda: (patcher.detach(), patcher.partially_load(CPU, whole // 2)),
        lambda: patcher.partially_load(CPU, 1e32),
    ):
        step()
        memory_management.bake_gguf_model(patcher.model)
        found.append(patcher.model(x) - base)
    return found


@on_neo
def partial_loading_neither_doubles_nor_loses_a_lora() -> None:
    x = activations()
    patcher = several()
    base = load(patcher)(x)
    want = dense(patcher, "BF16", "Q6_K", everywhere(), 0.8)(x) - dense(patcher, "BF16", "Q6_K", {}, 0.0)(x)
    for step, effect in enumerate(effects_of_partial_loading(with_lora(patcher, everywhere()), x, base)):
        assert apart(effect, want) <= 1e-4, step
    # a new strength while parts are elsewhere, then none
    half = with_lora(patcher, everywhere(), 0.4)
    assert apart(load(half)(x) - base, want / 2) <= 1e-4
    half.partially_unload(CPU, memory_management.module_size(half.model) // 2)
    assert apart(half.model(x) - base, want / 2) <= 1e-4
    assert torch.equal(load(patcher)(x), base)
    assert set(paths()) == {"base", "residual"}


@on_neo
def unmodified_neo_doubles_and_loses_loras() -> None:
    x = activations()
    ENGINE.uninstall()
    try:
        patcher = several(conv="F16", embedding="F32")
        base = load(patcher)(x)
        want = dense(patcher, "F16", "F32", everywhere(), 0.8)(x) - dense(patcher, "F16", "F32", {}, 0.0)(x)
        effects = effects_of_partial_loading(with_lora(patcher, everywhere(), online=True), x, base)
        shares = [float((effect * want).sum() / (want * want).sum()) for effect in effects]
        assert max(shares) > 1.2 or min(shares) < 0.8, f"this Neo keeps LoRAs whole {shares}: tell the README"
    finally:
        ENGINE.install()


@on_neo
def a_lora_or_a_new_strength_reloads_nothing() -> None:
    patcher = several()
    load(patcher)
    moved = []
    real = ModelPatcher.unpatch_model

    def unpatch(self: ModelPatcher, device: Any = None, unpatch_weights: bool = True) -> Any:
        moved.append(unpatch_weights)
        return real(self, device, unpatch_weights)

    ModelPatcher.unpatch_model = unpatch
    try:
        for strength in (0.8, 0.4, None):
            branch = patcher if strength is None else with_lora(patcher, everywhere(), strength)
            assert branch.patches_uuid == patcher.patches_uuid
            load(branch)(activations())
    finally:
        ModelPatcher.unpatch_model = real
    assert moved == [False] * 3
    paths()


@on_neo
def torch_compile_finds_no_break_in_a_layer() -> None:
    x = activations()
    patcher = build("Q4_K")
    model = load(with_lora(patcher, {"linear.weight": lora()}))
    eager = model(x)
    assert torch._dynamo.explain(model)(x).graph_break_count == 0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), eager)
    eager = load(with_lora(patcher, {"linear.weight": lora()}, 0.3))(x)
    assert torch.equal(compiled(x), eager)
    paths()


@on_neo
def a_new_region_or_schedule_compiles_nothing_anew() -> None:
    patcher = streams("Q8_0")
    model, graphs = patcher.model.diffusion_model, []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    eager: list[torch.Tensor] = []
    texts = ("region=left", "region=0.5,0,1,0.5:start=0.25", "region=right:end=0.5:feather=0.5")
    for text in texts:
        patched = with_lora(patcher, on_streams(), told(text))
        eager += [call(patched, step=step) for step in (0, 2)]
    torch._dynamo.reset()
    original, seen = model.forward, []
    compiled = torch.compile(original, backend=count, fullgraph=True)
    try:
        for index, text in enumerate(texts):
            patched = with_lora(patcher, on_streams(), told(text))
            model.forward = original
            call(patched)  # puts the factors together, which is no part of a graph
            model.forward = compiled
            for step in (0, 2):
                assert torch.equal(call(patched, step=step), eager[2 * index + step // 2]), (text, step)
            seen.append(len(graphs))
    finally:
        model.forward = original
        torch._dynamo.reset()
    assert seen[1:] == [seen[0]] * 2, seen
    paths()


@on_neo
def eleven_architectures_with_a_lora_on_every_linear() -> None:
    import architectures

    ENGINE.configure(Settings(mode="on"))
    for name in architectures.ARCHITECTURES:
        small = architectures.small(name, ENGINE)
        base, plain = small.run(), small.dense()
        assert apart(base, plain) <= 1e-5, name
        assert apart(small.run(0.8) - base, small.dense(0.8) - plain) <= 1e-4, name
        assert torch.equal(small.run(), base), name
        assert set(paths()) == {"base", "residual"}, name


@on_neo
def files_that_graft_made_run_in_every_architecture() -> None:
    import architectures

    for name in architectures.ARCHITECTURES:
        got, want = architectures.small(name, ENGINE).saved(FOLDER / "saved.gguf")
        assert apart(got, want) <= 1e-5 and want.std() > 0, name
        (FOLDER / "saved.gguf").unlink()
    paths()


@on_neo
def a_region_finds_its_tokens_in_every_architecture_that_has_a_table() -> None:
    import architectures

    for name, (path, before, behind, grid) in architectures.JOINT.items():
        small = architectures.small(name, ENGINE)
        base, plain, got = (small.at(path, strength) for strength in (None, 1.0, told("region=left", 1.0)))
        tokens = torch.zeros(grid, dtype=torch.bool)
        tokens[..., : grid[2] // 2] = True
        inside = torch.nn.functional.pad(tokens.flatten(), (before, behind))
        assert torch.equal(got, torch.where(inside.view(1, -1, 1), plain, base)), name
        assert not torch.equal(got, base) and not torch.equal(got, plain), name
    for name in architectures.ARCHITECTURES.keys() - architectures.JOINT.keys():
        possible, why = ENGINE.possible(architectures.small(name, ENGINE).patcher.model, told("region=left").when)
        assert possible.mask is None and "mask" in why, name
    paths()


@on_neo
def pids_modulations_are_split_by_rows_of_bytes() -> None:
    from backend import loader

    pixel = ROWS // 6 // 2
    rows = 12 * pixel
    for kind in ("Q8_0", "Q4_K", "F16"):
        whole = parameter(kind)
        data = whole.data.reshape(ROWS, -1)[:rows].clone()
        cut = ENGINE.host.gguf_parameter(data, TENSORS[kind].fmt, (rows, COLUMNS), whole.gguf_cls)
        name = "pixel_blocks.0.adaLN_modulation"
        rest = {"pixel_embedder.proj.weight": torch.zeros(pixel, 3), f"net.{name}.0.bias": torch.arange(float(rows))}
        packed = {f"net.{name}.0.weight": cut, **rest}
        plain = {f"net.{name}.0.weight": decoded(kind)[:rows], **rest}
        loader.process_pid(packed)
        loader.process_pid(plain)
        assert packed.keys() == plain.keys(), kind
        for part in ("msa", "mlp"):
            half = packed[f"{name}_{part}.weight"]
            if getattr(half, "gguf_cls", None) is not None:
                half.gguf_cls.bake(half)
            weight = ENGINE.host.decode(half).float()
            assert apart(weight, plain[f"{name}_{part}.weight"]) <= HALF[torch.float16], (kind, part)
            assert torch.equal(packed[f"{name}_{part}.bias"], plain[f"{name}_{part}.bias"])


@on_neo
def text_encoders_of_llama_cpp_give_what_safetensors_give() -> None:
    import encoders

    for kind in encoders.KINDS:
        encoder = encoders.Encoder(FOLDER / f"{kind}.gguf")
        memory_management.bake_gguf_model(encoder.packed)
        table = encoder.packed.get_input_embeddings()
        assert state_of(table).fmt.name == "Q6_K" and table.weight.data.dtype == torch.uint8, kind
        got, want = encoders.encode(encoder.packed), encoders.encode(encoder.plain)
        assert apart(got, want) <= HALF[torch.float16], kind
        assert torch.nn.functional.cosine_similarity(got, want, dim=-1).min() >= 0.9999, kind
        assert set(paths()) == {"base"}, kind


@on_neo
def umt5_of_llama_cpp_gives_what_safetensors_give() -> None:
    import encoders

    packed, plain = encoders.umt5(FOLDER / "umt5.gguf")
    memory_management.bake_gguf_model(packed)
    table = packed.transformer.shared
    assert state_of(table).fmt.name == "Q8_0" and table.weight.data.dtype == torch.uint8
    tokens = torch.arange(9).view(1, -1) * 28_000
    got, want = (model.transformer(tokens).float() for model in (packed, plain))
    # Neo keeps the weights of safetensors in fp16, and T5's attention has no scale that would make its scores small
    assert apart(got, want) <= HALF[torch.bfloat16]
    assert torch.nn.functional.cosine_similarity(got, want, dim=-1).min() >= 0.9999
    assert set(paths()) == {"base"}


def main() -> None:
    torch.manual_seed(0)
    ENGINE.install()
    state_dict()
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
