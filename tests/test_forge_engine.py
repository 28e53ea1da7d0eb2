"""Graft's engine for Forge without a Forge: the re-layout, and stand-ins of the shape that newer branches have."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graft.kernels import UnsupportedFormat, by_name, dequantize
from graft.scripts.forge import layout, session
from graft.scripts.forge.engine import STATE, Engine, ForeignType, Settings, state_of
from graft.scripts.forge.host import Host
from graft.scripts.forge.inspection import files, inspect, size
from graft.scripts.forge.patches import Reader, host_patches
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


class OnlineLoRAPatch:
    def __init__(self, name: str, key: str, patch: list) -> None:
        self.name, self.key, self.patch = name, key, [patch]

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return merge(self.patch, weight, self.key)


class LowVramPatch:
    def __init__(self, key: str, patches: dict) -> None:
        self.key, self.patches = key, patches


class Adapter:
    """LoRAs are objects there, not tuples."""

    name = "lora"

    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        self.weights = (up, down, None, None, None, None)


class Patcher:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weight_wrapper_patches: dict[str, list] = {}
        self.patches: dict[str, list] = {}

    def add_patches(
        self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0, *, filename: str | None = None,
        online_mode: bool | None = None,
    ) -> list:  # fmt: skip
        for key, value in patches.items():
            name, offset = key if isinstance(key, tuple) else (key, None)
            patch = [strength_patch, value, strength_model, offset, None]
            if online_mode:
                wrapper = OnlineLoRAPatch(filename, name, patch)
                self.weight_wrapper_patches.setdefault(name, []).append(wrapper)
                layer = self.model.get_submodule(name.rpartition(".")[0])
                getattr(layer, name.rpartition(".")[2] + "_function").append(wrapper)
            else:
                self.patches.setdefault(name, []).append(patch)
        return list(patches)


def merge(patches: list, weight: torch.Tensor, key: str, computation_dtype: Any = None) -> torch.Tensor:
    for strength, value, _, offset, _ in patches:
        up, down = value.weights[:2]
        part = weight if offset is None else weight.narrow(*offset)
        part += strength * up @ down
    return weight


@pytest.fixture
def engine() -> Any:
    host = Host("a newer Forge", type("GGUFLinear", (Linear,), {}), type("ModelPatcher", (Patcher,), {}), merge, decode)
    made = Engine(host)
    made.install()
    yield made
    made.uninstall()


def model_for(engine: Engine, kind: str = "Q4_K") -> nn.Module:
    """One GGUF layer and one of another class."""
    weights = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    data = weights if kind == "F32" else quantize(weights, by_name(kind))
    model = nn.Module()
    model.linear, model.norm = engine.host.linear(), nn.LayerNorm(ROWS)
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


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "IQ4_XS", "F32"])
def test_callables_on_the_layer_become_residuals(engine: Engine, kind: str) -> None:
    model, x = model_for(engine, kind), activations()
    base = model.linear(x)
    patcher = engine.host.patcher(model)
    whole, part = adapter(), adapter(1, 8)
    loaded = patcher.add_patches(
        {"linear.weight": whole, ("linear.weight", (0, 4, 8)): part, "norm.weight": adapter(2)}, 0.5, filename="a/b.x"
    )
    assert isinstance(loaded, list) and len(loaded) == 3
    assert set(patcher.weight_wrapper_patches) == {"linear.weight"} and set(patcher.patches) == {"norm.weight"}
    effect = torch.nn.functional.linear(x, delta(whole))
    effect[:, 4:12] += torch.nn.functional.linear(x, delta(part))
    assert close(model.linear(x) - base, 0.5 * effect)
    assert model.linear.forwards == 0 and set(engine.counts) == {("base", ""), ("residual", "")}
    model.linear.weight_function.clear()
    assert torch.equal(model.linear(x), base) and state_of(model.linear).residual is None


def test_under_autocast_a_layer_gives_what_forges_own_gives(engine: Engine) -> None:
    model, x = model_for(engine), activations()
    engine.host.patcher(model).add_patches({"linear.weight": adapter()}, 0.5, filename="a")
    for dtype in ("auto", "fp32"):
        engine.configure(Settings(dtype=dtype))
        wanted = model.linear(x.bfloat16() if dtype == "auto" else x).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.linear(x), wanted)
    assert set(engine.counts) == {("residual", "")} and model.linear.forwards == 0
    engine.configure(Settings(mode="off"))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.linear(x).dtype == torch.bfloat16


def test_patches_of_offloaded_layers_are_read_too(engine: Engine) -> None:
    model, x = model_for(engine), activations()
    base, lora = model.linear(x), adapter()
    model.linear.weight_function = [LowVramPatch("linear.weight", {"linear.weight": [(0.25, lora, 1.0, None, None)]})]
    assert close(model.linear(x) - base, 0.25 * torch.nn.functional.linear(x, delta(lora)))


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


def test_memory_errors_stay_memory_errors(engine: Engine) -> None:
    model = model_for(engine)

    def full(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    state_of(model.linear).math.compute = full
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model.linear(activations())


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
    assert patcher.patches and not patcher.weight_wrapper_patches
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
    linear = engine.host.linear
    hooked = linear.forward
    engine.install()
    assert linear.forward is hooked
    engine.uninstall()
    assert linear.forward is Linear.forward and engine.host.patcher.add_patches is Patcher.add_patches
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


def test_patch_lists_of_both_shapes() -> None:
    layer = nn.Module()
    layer.forge_online_loras = {"weight": [[1.0, "a", 1.0, None, None]]}
    layer.weight_function = [OnlineLoRAPatch("f", "k", [0.5, "b", 1.0, None, None])]
    assert [p[1] for p in host_patches(layer, "weight")] == ["b", "a"] and host_patches(layer, "bias") == []


def forge_model(model: nn.Module, patcher: Any = None) -> Any:
    unet = patcher or types.SimpleNamespace(model=model)
    return types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet, clip=None))


def test_rows_of_the_tab(engine: Engine) -> None:
    model = model_for(engine)
    patcher = engine.host.patcher(model)
    patcher.add_patches({"linear.weight": adapter(), "linear.bias": adapter()}, 0.5, filename="loras/style.safetensors")
    loaded = forge_model(model, patcher)
    (part,) = session.parts(engine, loaded)
    assert part.types == {"Q4_K": 1} and part.layers == 1 and part.others == {"float32": 3}
    (lora,) = session.used_loras(engine, loaded)
    assert (lora.name, lora.strength, lora.layers, lora.waiting, lora.residual) == ("style", 0.5, 2, 2, 0)
    model.linear.bias_function.clear()
    model.linear(activations())
    assert session.used_loras(engine, loaded)[0].residual == 2
    engine.configure(Settings(mode="off"))
    assert session.used_loras(engine, loaded)[0].others == {"Forge's online mode: Graft is off": 2}
    assert session.parts(engine, types.SimpleNamespace()) == []


def test_settings_and_infotext() -> None:
    options = types.SimpleNamespace(graft_mode="on", graft_backend="nonsense", graft_dtype="bf16")
    settings = session.settings_from(options)
    assert settings == Settings("on", "auto", "bf16")
    assert session.infotext(settings) == {"Graft": "on", "Graft dtype": "bf16"}
    assert session.settings_from(object()) == Settings()
    assert "cpu" in session.backend_of(Engine(Host("", Linear, Patcher, merge, decode)), torch.device("cpu"))


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
    assert (size(999), size(1.234e9)) == ("999 B", "1.23 GB")
