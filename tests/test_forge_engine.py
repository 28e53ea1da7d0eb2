"""Graft's engine for Forge without a Forge: the re-layout, and stand-ins of the shape that Forge Neo has."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graft.kernels import AdapterError, UnsupportedFormat, by_name, dequantize, int8
from graft.ops.int8 import FINER, RULES
from graft.scripts.forge import layout, session
from graft.scripts.forge.engine import Engine, Settings
from graft.scripts.forge.host import Host
from graft.scripts.forge.inspection import files, inspect
from graft.scripts.forge.layers import STATE, state_of
from graft.scripts.forge.patches import Reader, carried, foreign
from graft.scripts.forge.reading import ForeignType
from graft.scripts.forge.strengths import REGIONS, Told, taken_from
from oracle import quantize, random_blocks
from safetensors.torch import save_file
from torch import nn

ROWS, COLUMNS = 32, 256


# the two layouts, as the module's table describes them


def bake(blocks: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    """What Forge does to the blocks of one of the types, written from the description."""
    header, codes = blocks[:, : layout.BAKED[name].header], blocks[:, layout.BAKED[name].header :]
    if layout.BAKED[name].header_is_scales:
        header = header.contiguous().view(torch.float16).to(dtype).view(torch.uint8)
    else:
        header = torch.zeros(len(blocks), layout.BAKED[name].baked_header, dtype=torch.uint8)
    groups = layout.BAKED[name].groups
    if groups:
        halves = codes.reshape(len(blocks), groups, 1, -1) >> torch.tensor([0, 4]).view(1, 1, 2, 1) & 15
        pairs = halves.reshape(len(blocks), -1, 2)
        codes = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    return torch.cat([header, codes], dim=1)


@pytest.mark.parametrize("name", layout.BAKED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_files_bytes_come_back_from_baked_ones(name: str, dtype: torch.dtype) -> None:
    blocks = random_blocks(by_name(name), 50)
    baked = bake(blocks, name, dtype)
    kept = layout.headers(blocks, name)
    assert torch.equal(layout.file_blocks(baked, name, dtype, kept), blocks)
    found = layout.file_blocks(baked, name, dtype)
    if name == "Q4_K":
        assert found is None  # its six-bit scales are gone
    elif dtype == torch.float16:
        assert torch.equal(found, blocks)
    else:
        fmt = by_name(name)
        got, want = (dequantize(b, fmt, (50, fmt.block_size)) for b in (found, blocks))
        assert (got - want).abs().max() <= 2**-8 * want.abs().max()  # the scales, rounded to bf16


# a Forge whose LoRAs are callables on the layer


class Linear(nn.Module):
    """Its GGUF layer: decodes in 16 bits, then lets every function on the weight change it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.bias = None
        self.weight_function: list[Callable] = []
        self.bias_function: list[Callable] = []
        self.forwards = 0

    def _load_from_state_dict(self, state: dict, prefix: str, *args: Any) -> None:
        self.weight, self.bias = state[prefix + "weight"], state.get(prefix + "bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        weight = decode(self.weight).to(x.dtype)
        for function in self.weight_function:
            weight = function(weight)
        return torch.nn.functional.linear(x, weight, self.bias)


class Parameter(nn.Parameter):
    """A parameter that knows its type, until somebody wraps it anew."""

    def __new__(cls, data: torch.Tensor, kind: str | None = None, shape: tuple[int, ...] = ()) -> Parameter:
        made = super().__new__(cls, data, requires_grad=False)
        made.gguf_cls = None if kind is None else ForeignType(by_name(kind))
        made.real_shape, made.computation_dtype, made.baked = torch.Size(shape), torch.float16, False
        return made


def decode(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.gguf_cls is None else weight.gguf_cls.dequantize_pytorch(weight)


class Adapter:
    """LoRAs are objects there, not tuples."""

    name = "lora"

    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        self.weights = (up, down, None, None, None, None)


class Patcher:
    """A patcher that says itself how it adds patches; older ones of Neo know no `online_mode`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {}
        self.patches: dict[str, list] = {}
        self.asked: list[bool | None] = []

    def clone(self) -> Patcher:
        made = type(self)(self.model)
        made.model_options, made.patches = copy.deepcopy(self.model_options), dict(self.patches)
        return made

    def add_patches(
        self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0, *, filename: str | None = None,
        online_mode: bool | None = None,
    ) -> list:  # fmt: skip
        self.asked.append(online_mode)
        return self._add(patches, strength_patch)

    def _add(self, patches: dict, strength: float) -> list:
        for key, value in patches.items():
            name, offset = key if isinstance(key, tuple) else (key, None)
            self.patches.setdefault(name, []).append([strength, value, 1.0, offset, None])
        return list(patches)

    def patch_model(self) -> nn.Module:
        return self.model

    def memory_required(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape)


class OlderPatcher(Patcher):
    def add_patches(self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        return self._add(patches, strength_patch)


def merge(patches: list, weight: torch.Tensor, key: str, computation_dtype: Any = None) -> torch.Tensor:
    for strength, value, _, offset, _ in patches:
        up, down = value.weights[:2]
        part = weight if offset is None else weight.narrow(*offset)
        part += strength * up @ down
    return weight


def host(patcher: type = Patcher) -> Host:
    layers = {"Linear": type("GGUFLinear", (Linear,), {})}
    return Host("a newer Forge", layers, type("ModelPatcher", (patcher,), {}), "patch_model", merge, decode)


@pytest.fixture(params=[Patcher, OlderPatcher])
def engine(request: pytest.FixtureRequest) -> Any:
    made = Engine(host(request.param))
    made.install()
    yield made
    made.uninstall()


def model_for(engine: Engine, kind: str = "Q4_K") -> nn.Module:
    """One GGUF layer and one of another class."""
    weights = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    data = weights if kind == "F32" else quantize(weights, by_name(kind))
    model = nn.Module()
    model.linear, model.norm = engine.host.layers["Linear"](), nn.LayerNorm(ROWS)
    bias = Parameter(torch.linspace(-1, 1, ROWS), None, (ROWS,))
    weight = Parameter(data, None if kind == "F32" else kind, (ROWS, COLUMNS))
    model.linear._load_from_state_dict({"weight": weight, "bias": bias}, "")
    return model


def adapter(seed: int = 0, rows: int = ROWS) -> Adapter:
    random = torch.Generator().manual_seed(seed + 1)
    return Adapter(torch.randn(rows, 4, generator=random), torch.randn(4, COLUMNS, generator=random) / 16)


def activations() -> torch.Tensor:
    return torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(9))


def delta(lora: Adapter) -> torch.Tensor:
    return lora.weights[0] @ lora.weights[1]


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Within what fp32 sums of this length round to."""
    return bool((got - want).abs().max() <= 1e-5 * want.abs().max())


def with_loras(engine: Engine, model: nn.Module, patches: dict, strength: float = 1.0) -> Patcher:
    """A patcher of the model that carries them, loaded."""
    patcher = engine.host.patcher(model)
    patcher.add_patches(patches, strength)
    patcher.patch_model()
    return patcher


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "IQ4_XS", "F32"])
def test_loras_become_residuals(engine: Engine, kind: str) -> None:
    model, x = model_for(engine, kind), activations()
    base = model.linear(x)
    whole, part = adapter(), adapter(1, 8)
    plain = engine.host.patcher(model)
    patcher = plain.clone()
    loaded = patcher.add_patches(
        {"linear.weight": whole, ("linear.weight", (0, 4, 8)): part, "norm.weight": adapter(2)}, 0.5
    )
    assert isinstance(loaded, list) and len(loaded) == 3
    (added,) = carried(patcher)
    assert set(added.ours) == {"linear.weight"} and added.others == ("norm.weight",)
    assert set(patcher.patches) == {"norm.weight"} and not carried(plain)
    assert torch.equal(model.linear(x), base)  # not before the patcher is loaded
    patcher.patch_model()
    effect = torch.nn.functional.linear(x, delta(whole))
    effect[:, 4:12] += torch.nn.functional.linear(x, delta(part))
    assert close(model.linear(x) - base, 0.5 * effect)
    assert model.linear.forwards == 0 and set(engine.counts) == {("base", ""), ("residual", "")}
    plain.patch_model()
    assert torch.equal(model.linear(x), base) and state_of(model.linear).residual is None


def test_what_is_not_ours_is_added_as_the_caller_asks() -> None:
    engine = Engine(host())
    engine.install()
    model = model_for(engine)
    patcher = engine.host.patcher(model)
    for online in (None, False, True):
        patcher.add_patches({"linear.weight": adapter(), "norm.weight": adapter()}, online_mode=online)
    patcher.add_patches({"linear.weight": adapter()}, online_mode=False)
    assert patcher.asked == [None, False, True] and len(carried(patcher)) == 4  # the last one is none of its business
    engine.uninstall()


@pytest.mark.skipif(int8.unavailable(torch.device("cpu")) is not None, reason="no int8 products on this processor")
def test_int8_in_a_diffusion_model_and_nowhere_else(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {choice: replace(rule, columns=COLUMNS, rows=ROWS) for choice, rule in RULES.items()}
    small["int8"] = replace(small["int8"], finer=frozenset(["Q4_K"]))
    monkeypatch.setattr("graft.scripts.forge.engine.RULES", small)
    monkeypatch.setattr(int8, "LEAST_ROWS", 3)
    encoder, model, x = model_for(engine), model_for(engine), activations()
    model.diffusion_model = nn.Module()
    model.diffusion_model.blocks = nn.ModuleList([nn.Module()])
    model.diffusion_model.blocks[0].linear = model.linear
    del model.linear
    linear = model.diffusion_model.blocks[0].linear
    whole = adapter()
    patchers = [
        with_loras(engine, encoder, {"linear.weight": whole}, 0.5),
        with_loras(engine, model, {"diffusion_model.blocks.0.linear.weight": whole}, 0.5),
    ]
    usual = linear(x)
    engine.configure(Settings(dtype="int8_all"))
    objects = types.SimpleNamespace(unet=patchers[1], clip=types.SimpleNamespace(patcher=patchers[0]))
    checkpoint = types.SimpleNamespace(forge_objects=objects)
    device = torch.device("cpu")
    assert session.int8_of(engine, checkpoint, device) == [("int8", "from the next picture on")]
    assert torch.equal(encoder.linear(x), usual)
    got = linear(x)
    assert 1e-3 < (got - usual).norm() / usual.norm() < 0.02 and linear.forwards == 0
    assert session.int8_of(engine, checkpoint, device) == [("int8", "1 layer in int8, where there are many tokens")]
    engine.host.patcher(model).patch_model()
    base = torch.nn.functional.linear(x, delta(whole))
    assert close(got - linear(x), 0.5 * base)  # the LoRA itself is not rounded
    engine.configure(Settings(dtype="int8"))
    with_loras(engine, model, {"diffusion_model.blocks.0.linear.weight": whole}, 0.5)
    assert torch.equal(linear(x), usual)
    ((_, told),) = session.int8_of(engine, checkpoint, device)
    assert told.endswith(f"; 1 layer not in int8 ({FINER}): diffusion_model.blocks.0.linear")
    engine.configure(Settings())
    assert session.int8_of(engine, checkpoint, device) == []
    with_loras(engine, model, {"diffusion_model.blocks.0.linear.weight": whole}, 0.5)
    assert torch.equal(linear(x), usual)


def test_memory_for_factors_is_asked_for(engine: Engine) -> None:
    model = model_for(engine)
    patcher = with_loras(engine, model, {"linear.weight": adapter()})
    assert patcher.memory_required((2, 3)) == 6 + 2 * 4 * (ROWS + COLUMNS)  # in fp16
    model.computation_dtype = torch.float32
    assert patcher.memory_required((2, 3)) == 6 + 4 * 4 * (ROWS + COLUMNS)


def test_under_autocast_a_layer_gives_what_forges_own_gives(engine: Engine) -> None:
    model, x = model_for(engine), activations()
    with_loras(engine, model, {"linear.weight": adapter()}, 0.5)
    for dtype in ("auto", "fp32"):
        engine.configure(Settings(dtype=dtype))
        wanted = model.linear(x.bfloat16() if dtype == "auto" else x).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.linear(x), wanted)
    assert set(engine.counts) == {("residual", "")} and model.linear.forwards == 0
    engine.configure(Settings(mode="off"))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.linear(x).dtype == torch.bfloat16


def test_unknown_functions_go_to_forges_own_forward_and_are_counted(engine: Engine) -> None:
    model, x = model_for(engine), activations()
    want = model.linear(x)
    model.linear.weight_function = [lambda weight: weight * 2]
    got = model.linear(x)
    assert model.linear.forwards == 1 and engine.counts["forge", "function on the weight"] == 1
    bias = model.linear.bias
    # Forge decodes to fp16
    assert (got - bias - 2 * (want - bias)).abs().max() <= 2**-9 * got.abs().max()


def test_an_error_of_ours_is_forges_turn_and_said_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    model, x = model_for(engine), activations()
    state_of(model.linear).math.compute = None
    for _ in range(3):
        assert model.linear(x).shape == (3, ROWS)
    assert model.linear.forwards == 3 and len(caplog.records) == 1
    assert engine.counts.total() == 3 and next(iter(engine.counts))[0] == "forge"
    part = session.parts(engine, forge_model(model))[0]
    assert sum(part.refused.values()) == 1


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("full"), RuntimeError("MPS backend out of memory")])
def test_memory_errors_stay_memory_errors(engine: Engine, error: Exception) -> None:
    """They say nothing of the layer, which runs again when memory is free."""
    model = model_for(engine)
    math = state_of(model.linear).math
    compute = math.compute

    def full(*args: Any) -> None:
        raise error

    math.compute = full
    with pytest.raises(type(error), match=str(error)):
        model.linear(activations())
    math.compute = compute
    model.linear(activations())
    assert not state_of(model.linear).refused


def test_the_format_outlives_the_parameter(engine: Engine) -> None:
    model, x = model_for(engine), activations()
    base = model.linear(x)
    model.linear.weight = nn.Parameter(model.linear.weight.data, requires_grad=False)
    assert torch.equal(model.linear(x), base)


def test_off_is_forges_own(engine: Engine) -> None:
    model, x = model_for(engine, "IQ4_XS"), activations()
    base = model.linear(x)
    assert engine.configure(Settings(mode="off")) and not engine.configure(Settings(mode="off", dtype="fp16"))
    patcher = engine.host.patcher(model)
    patcher.add_patches({"linear.weight": adapter()})
    assert patcher.patches and carried(patcher)[0].others == ("linear.weight",)
    assert (model.linear(x) - base).abs().max() <= 2**-9 * base.abs().max() and model.linear.forwards == 1
    assert engine.configure(Settings())
    assert torch.equal(model.linear(x), base)


def test_a_backend_that_cannot_run_here_gives_way(engine: Engine) -> None:
    model, x = model_for(engine), activations()
    base = model.linear(x)
    engine.configure(Settings(backend="torch"))
    assert close(model.linear(x), base)
    engine.configure(Settings(backend="no such thing"))
    assert torch.equal(model.linear(x), base) and engine.counts["base", ""] == 3


def test_hooks_go_in_once_and_out_again(engine: Engine) -> None:
    linear, patcher = engine.host.layers["Linear"], engine.host.patcher
    hooked = linear.forward
    engine.install()
    assert linear.forward is hooked
    engine.uninstall()
    assert linear.forward is Linear.forward and patcher.add_patches is patcher.__base__.add_patches
    engine.install()
    outer = linear.forward
    linear.forward = lambda self, x: outer(self, x) + 1  # another extension over ours
    model, x = model_for(engine), activations()
    with_ours = model.linear(x)
    engine.uninstall()
    assert (model.linear(x) - with_ours).abs().max() <= 2**-9 * with_ours.abs().max()
    assert model.linear.forwards == 1


def test_layers_that_were_there_before_graft(engine: Engine) -> None:
    engine.uninstall()
    model, x = model_for(engine), activations()
    theirs = model.linear(x)
    assert STATE not in model.linear.__dict__
    engine.install()
    assert (model.linear(x) - theirs).abs().max() <= 2**-9 * theirs.abs().max() and model.linear.forwards == 1


def test_a_weight_that_says_nothing_stays_with_forge(engine: Engine) -> None:
    model = model_for(engine)
    model.linear._load_from_state_dict({"weight": nn.Parameter(model.linear.weight.data, requires_grad=False)}, "")
    assert state_of(model.linear) is None
    with pytest.raises(AttributeError):
        model.linear(activations())  # Forge's own answer to it: #1223
    assert engine.counts["forge", "unknown weight"] == 1


# reading patches, rows for the tab


def test_control_loras_of_another_width() -> None:
    shape = torch.Size((ROWS, COLUMNS))
    narrow, wide = Adapter(torch.ones(ROWS, 2), torch.ones(2, 64)), Adapter(torch.ones(ROWS, 2), torch.ones(2, 300))
    read = Reader().read
    assert tuple(read((1.0, narrow, 1.0, None, None), shape).region) == (1, 0, 64)
    assert read((1.0, wide, 1.0, None, None), shape).adapter.shape == (ROWS, 300)
    assert read((1.0, adapter(), 1.0, None, None), shape).region is None


def test_the_same_tensors_are_read_once() -> None:
    shape, reader, lora = torch.Size((ROWS, COLUMNS)), Reader(), adapter()
    first = reader.read((1.0, ("lora", lora.weights), 1.0, None, None), shape)
    reader = Reader(reader.known)
    second = reader.read((0.5, ("lora", tuple(lora.weights)), 1.0, None, None), shape)
    assert second.adapter is first.adapter and (first.strength, second.strength) == (1.0, 0.5)
    assert reader.read((1.0, ("lora", adapter().weights), 1.0, None, None), shape).adapter is not first.adapter
    assert reader.read((1.0, lora, 1.0, [0, 0, ROWS], None), shape).region == (0, 0, ROWS)
    assert len(reader.known) == 3 and not Reader(reader.known).known


def test_what_others_hang_on_a_layer() -> None:
    layer = nn.Module()
    assert not foreign(layer)
    layer.forge_online_loras = {"weight": [[1.0, "a", 1.0, None, None]]}
    assert foreign(layer) == "LoRAs of Forge's own"
    layer.bias_function = [types.SimpleNamespace()]
    assert foreign(layer) == "SimpleNamespace on the bias"


def forge_model(model: nn.Module, patcher: Any = None) -> Any:
    unet = patcher or types.SimpleNamespace(model=model)
    return types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet, clip=None))


def test_rows_of_the_tab() -> None:
    engine = Engine(host())
    engine.install()
    model = model_for(engine)
    patcher = engine.host.patcher(model)
    keys = ("linear.weight", "linear.bias", "norm.weight")
    patcher.add_patches(dict.fromkeys(keys, adapter()), 0.5, filename="loras/style.safetensors")
    loaded = forge_model(model, patcher)
    (part,) = session.parts(engine, loaded)
    assert part.types == {"Q4_K": 1} and part.layers == 1 and part.others == {"float32": 3}
    (lora,) = session.used_loras(engine, loaded)
    assert (lora.name, lora.strength, lora.layers, lora.waiting, lora.residual) == ("style", 0.5, 3, 2, 0)
    assert lora.others == {"patched by Forge: no GGUF layer": 1}
    patcher.patch_model()
    model.linear(activations())
    (lora,) = session.used_loras(engine, loaded)
    assert lora.others["left out: the adapter is for 32×256, the weight is 32: it was made for another model"] == 2
    engine.configure(Settings(mode="off"))
    assert session.used_loras(engine, loaded)[0].others["merged by Forge in each step: Graft is off"] == 2
    patcher = engine.host.patcher(model)
    patcher.add_patches({"linear.weight": adapter()})
    (lora,) = session.used_loras(engine, forge_model(model, patcher))
    assert lora.others == {"patched by Forge, as Graft was off": 1}
    assert session.parts(engine, types.SimpleNamespace()) == []
    engine.uninstall()


def test_settings_and_infotext() -> None:
    options = types.SimpleNamespace(graft_mode="on", graft_backend="nonsense", graft_dtype="bf16")
    settings = session.settings_from(options)
    assert settings == Settings("on", "auto", "bf16")
    assert session.infotext(settings) == {"Graft": "on", "Graft dtype": "bf16"}
    assert session.settings_from(object()) == Settings()
    assert "cpu" in session.backend_of(Engine(host()), torch.device("cpu"))


def test_types_that_forge_cannot_decode() -> None:
    fmt = by_name("IQ4_XS")
    weights = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    parameter = Parameter(quantize(weights, fmt), "IQ4_XS", (4, 256))
    foreign = parameter.gguf_cls
    foreign.bake(parameter)
    got = foreign.dequantize_pytorch(parameter)
    assert parameter.baked and got.dtype == torch.float16 and foreign.__name__ == "IQ4_XS"
    assert torch.equal(got, dequantize(parameter.data, fmt, (4, 256), torch.float16))
    with pytest.raises(UnsupportedFormat, match="turn Graft on"):
        foreign.quantize_pytorch(weights, parameter)


def test_inspecting_files(tmp_path: Any) -> None:
    from gguf_samples import write_gguf

    weights = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    write_gguf(tmp_path / "b.gguf", {"x": (weights.numpy(), "Q8_0")}, metadata={"general.name": "A toy"})
    lora = {"lora_unet_a.lora_down.weight": torch.ones(8, 4), "lora_unet_a.lora_up.weight": torch.ones(4, 8),
            "lora_unet_a.alpha": torch.tensor(8.0)}  # fmt: skip
    save_file(lora, tmp_path / "a.safetensors", {"ss_network_dim": "8"})
    (tmp_path / "c.safetensors").write_text("<html>")
    (tmp_path / "notes.txt").write_text("")
    assert [p.name for p in files([tmp_path, None, tmp_path])] == ["a.safetensors", "b.gguf", "c.safetensors"]
    told = {path.name: dict(inspect(path)) for path in files([tmp_path])}
    lora = told["a.safetensors"]
    assert (lora["kind"], lora["modules"], lora["tensors"]) == ("rank 8", "1", "float32 3")
    assert lora["ss_network_dim"] == "8"
    assert told["b.gguf"]["types"] == "Q8_0 1" and told["b.gguf"]["general.name"] == "A toy"
    assert math.isclose(float(told["b.gguf"]["bits per weight"]), 8.5)
    assert "web page" in told["c.safetensors"]["problem"]


# what the prompt says of where and when


def params(text: str) -> types.SimpleNamespace:
    """As Forge parses ``<lora:TEXT>``: what has one ``=`` has a name, all else a place."""
    items = text.split(":")
    named = dict(item.split("=") for item in items if item.count("=") == 1)
    return types.SimpleNamespace(items=items, positional=[i for i in items if i.count("=") != 1], named=named)


def test_the_prompts_arguments_are_taken_out_of_what_forge_sees() -> None:
    given = params("name:0.8:te=0.5:START=0.25: region =left:blocks=double=0.5, single=0")
    plain, when, text = taken_from(given)
    assert plain.positional == ["name", "0.8"] and plain.named == {"te": "0.5"} and len(given.items) == 6
    assert plain.items == ["name", "0.8", "te=0.5"]
    assert when.mask.mean() == 0.5 and when.curve.keys[0] == (0.0, 0.0, "hold") and len(when.blocks.rules) == 2
    assert text == "blocks=double=0.5, single=0:region=left:start=0.25"
    assert taken_from(params("name:1:te=0.5"))[1:] == (None, "")
    # the same words are the same strength, and another region is another entry in Forge's list
    assert taken_from(params("other:1:region=left"))[1] is taken_from(params("name:1:region=left"))[1]
    assert repr(Told(0.8, when, text)) == f"0.8 ({text})" and Told(0.8, when, text) == 0.8


def test_regions_are_parts_of_the_picture() -> None:
    masks = {name: taken_from(params(f"x:1:region={name}"))[1].mask[0] for name in REGIONS}
    for names in (("left", "right"), ("top", "bottom"), ("column-1", "column-2", "column-3"),
                  ("row-1", "row-2", "row-3"), ("top-left", "top-right", "bottom-left", "bottom-right")):  # fmt: skip
        assert torch.equal(sum(masks[name] for name in names), torch.ones(512, 512)), names
    corners = {"top-left": (0, 0), "top-right": (0, -1), "bottom-left": (-1, 0), "bottom-right": (-1, -1)}
    assert all(masks[name][place] == 1 for name, place in corners.items())
    for text, same in (("0, 0, 0.5, 1", "left"), ("Top Left", "top-left"), ("not right", "left"), ("row_1", "row-1")):
        assert torch.equal(taken_from(params(f"x:1:region={text}"))[1].mask[0], masks[same]), text
    soft = taken_from(params("x:1:region=left:feather=0.5"))[1].mask[0, 0]
    assert 0 < soft[256] < 1 and abs(float(soft.mean()) - 0.5) < 1e-3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("start=5", "start=5 is not a number from 0 to 1"), ("end=soon", "end=soon is not a number"),
        ("start=nan", "start=nan is not a number"), ("start=0.5:end=0.25", "end=0.25 is not after start=0.5"),
        ("feather=0.1", "feather needs a region"), ("region=left:feather=2", "feather=2 is not a number from 0 to 0.5"),
        ("region=lef", "region=lef is unknown: write one of left, right"),
        ("region=0,0,2,1", "region=0,0,2,1 is unknown"), ("region=", "region= is unknown"),
        ("region=0.5,0,0.25,1", "is unknown"), ("blocks=what", "blocks=what: a rule"),
        ("region=" + "x" * 5000, "is unknown"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_in_a_sentence(text: str, says: str) -> None:
    with pytest.raises(AdapterError) as error:
        taken_from(params(f"name:1:{text}"))
    assert says in str(error.value) and len(str(error.value)) < 400
