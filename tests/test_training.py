"""Learning beside packed weights, against autograd on the decoded ones."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F
from graft.kernels import AdapterError, GraftError, by_name, scratch
from graft.ops import layers, load_adapters
from graft.ops.checkpointing import blocks_of, checkpointed
from graft.ops.factors import FactorCache
from graft.ops.files.lora_writer import write_lora
from graft.ops.kinds import Diff, LoRA, Patch, Region
from graft.ops.layers import packed_layers
from graft.ops.packed import PackedTensor
from graft.ops.residual import ResidualStack
from graft.ops.trainable import KINDS, Target, can_learn
from graft.ops.training import SCHEDULES, Plan, Run, Training, optimizers
from torch import nn

CPU = torch.device("cpu")
RANK = 3
OUT = 40
ROWS = Region(0, 4, 6)
"""Of OUT rows; what divides both and what is above these is 2 rows."""
TOLERANCE = 1e-5

QUANTIZED = pytest.mark.parametrize("fmt", [*oracle.QUANTIZED, *map(by_name, ("F16", "F32"))], ids=str)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(layer, fmt, seed: int = 0):
    """The layer with a weight in `fmt` and a bias."""
    shape = layer.logical_shape
    if fmt.is_quantized:
        weight = PackedTensor(oracle.random_blocks(fmt, shape.numel() // fmt.block_size, seed), fmt, shape)
    else:
        weight = normal(*shape, seed=seed).to(fmt.dtype)
    layer.load_state_dict({"weight": weight, "bias": normal(shape[0], seed=seed + 1)})
    return layer


def linear(fmt=None):
    return filled(layers.Linear(256, OUT), fmt or by_name("Q4_K")), normal(5, 256, seed=3)


def convolution(fmt=None):
    return filled(layers.Conv2d(64, OUT, 2, padding=1, stride=2), fmt or by_name("Q4_K")), normal(2, 64, 6, 5, seed=3)


def shaken(training: Training, seed: int = 5) -> Training:
    """With factors that are no zeros."""
    with torch.no_grad():
        for index, parameter in enumerate(training.parameters()):
            parameter.add_(0.1 * normal(*parameter.shape, seed=seed + index))
    return training


def learning(layer, kind: str, region: Region | None = None, alpha: float = 2.0, **more) -> Training:
    return shaken(Training({"layer": layer}, [Target("layer", region)], kind, RANK, alpha, **more))


def changed(weight: torch.Tensor, learner, region: Region | None) -> torch.Tensor:
    """W' in full, of the very parameters, as the papers write it."""
    part = weight if region is None else weight.narrow(*region)
    flat = part.flatten(1)
    if learner.kind == "LoKr":
        second = learner.w2.flatten(1) if learner.w2 is not None else learner.w2_a @ learner.w2_b * (2.0 / RANK)
        new = flat + torch.kron(learner.w1, second)
    else:
        new = flat + (2.0 / RANK) * learner.up @ learner.down
    if learner.kind == "DoRA":
        norms = flat.norm(dim=1) + torch.finfo(torch.float32).eps  # as ComfyUI has them
        new = (learner.magnitude / norms).unsqueeze(1) * new
    if region is None:
        return new.reshape(weight.shape)
    rows = weight.flatten(1)
    end = region.start + region.length
    return torch.cat([rows[: region.start], new, rows[end:]]).reshape(weight.shape)


def gradients(y: torch.Tensor, x: torch.Tensor, training: Training) -> list[torch.Tensor]:
    seen = normal(*y.shape, seed=9).to(y)
    return [y.detach(), *torch.autograd.grad((y * seen).sum(), [x, *training.parameters()])]


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float = TOLERANCE) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


def compared(layer, x: torch.Tensor, training: Training, region: Region | None = None) -> None:
    """Outputs and all gradients, of our layer and of torch's own on the decoded weight in fp64."""
    x = x.clone().requires_grad_()
    with training.beside():
        got = gradients(layer(x), x, training)
    wide = training.double()
    x64 = x.detach().double().requires_grad_()
    weight = changed(layer.dequantized(dtype=torch.float64), wide.learners[0], region)
    want = gradients(layer.compute_dense(x64, weight, layer.bias.double()), x64, wide)
    assert_close(got, want)


@QUANTIZED
@EVERY_KIND
@pytest.mark.parametrize("make", [linear, convolution])
def test_gradients_are_those_on_the_decoded_weight(make, kind, fmt):
    layer, x = make(fmt)
    compared(layer, x, learning(layer, kind))


@QUANTIZED
@EVERY_KIND
@pytest.mark.parametrize("make", [linear, convolution])
def test_rows_of_a_fused_layer(make, kind, fmt):
    layer, x = make(fmt)
    compared(layer, x, learning(layer, kind, ROWS), ROWS)


@pytest.mark.parametrize("region", [None, ROWS], ids=["whole", "rows"])
def test_a_whole_second_factor_of_lokr(region):
    layer, x = linear()
    training = shaken(Training({"layer": layer}, [Target("layer", region)], "LoKr", 64))
    assert training.learners[0].w2 is not None
    compared(layer, x, training, region)


@pytest.mark.parametrize(
    ("region", "groups", "rows"),
    [
        (None, 8, 5), (Region(0, 0, 40), 8, 5), (Region(0, 8, 16), 8, 2), (Region(0, 0, 24), 6, 4),
        (Region(0, 24, 16), 8, 2), (Region(0, 3, 20), 20, 1),
    ],
)  # fmt: skip
def test_the_groups_of_lokr_fit_into_the_whole_weight(region, groups, rows):
    layer, _ = linear()
    (learner,) = learning(layer, "LoKr", region).learners
    assert learner.adapter().shapes() == ((groups, 8), (rows, 32))
    w1 = learner.tensors()["lokr_w1"]
    assert len(w1) * rows == OUT and w1.count_nonzero() == learner.w1.count_nonzero()


@EVERY_KIND
@pytest.mark.parametrize("make", [linear, convolution])
@pytest.mark.parametrize("region", [None, ROWS], ids=["whole", "rows"])
def test_gradcheck(make, kind, region):
    """Against differences, in fp64; a small part of x is enough for a linear map."""
    layer, x = make(by_name("Q8_0"))
    training = learning(layer, kind, region).double()
    x, through = x[:3].double(), _Through(training, layer)
    names = [name for name, _ in through.named_parameters()]

    def run(scale: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        with training.beside():
            return torch.func.functional_call(through, dict(zip(names, values, strict=True)), x * scale)

    scale = torch.full((), 0.7, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in training.parameters()]
    assert torch.autograd.gradcheck(run, (scale, *values), fast_mode=True)


class _Through(nn.Sequential):
    """A module with the parameters of a training, which runs a layer."""

    def __init__(self, training, layer):
        super().__init__(training)
        self._layer = [layer]

    def forward(self, x):
        return self._layer[0](x)


@EVERY_KIND
def test_what_begins_changes_nothing(kind):
    layer, x = linear()
    training = Training({"layer": layer}, [Target("layer")], kind, RANK)
    before = layer(x)
    with training.beside():
        torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)
    assert layer.residual is None and torch.equal(layer(x), before)


@contextlib.contextmanager
def noting() -> Iterator[list[int]]:
    """How many numbers autograd keeps of each tensor."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        yield kept


@pytest.mark.parametrize("make", [linear, convolution])
def test_nothing_of_the_base_is_kept_and_its_bytes_stay(make):
    layer, x = make()
    training = learning(layer, "LoRA")
    before = hashlib.sha256(layer.weight.numpy().tobytes()).hexdigest()
    x.requires_grad_()
    with noting() as kept, training.beside():
        y = layer(x)
    y.sum().backward()
    assert layer.logical_shape.numel() not in kept
    assert hashlib.sha256(layer.weight.numpy().tobytes()).hexdigest() == before
    assert layer.weight.grad is None and not layer.weight.requires_grad


@pytest.mark.parametrize("make", [linear, convolution])
def test_a_host_that_lends_its_memory_to_the_next_layer(make):
    """Between the way there and the way back the bytes that were fetched are overwritten."""
    layer, x = make()
    want = gradients_of_input(layer, x)

    def fetch(x):
        copy = layer.weight.data.clone()
        return copy, layer.bias, lambda: copy.fill_(255)

    layer.fetch = fetch
    torch.testing.assert_close(gradients_of_input(layer, x), want)


def gradients_of_input(layer, x):
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    return x.grad


def test_chunks_are_added_up_in_fp32(monkeypatch):
    """Of a layer that passes through the scratch in many pieces, in bf16: as exact as in one."""
    layer, x = filled(layers.Linear(256, 512), by_name("Q8_0")), normal(4, 512, seed=3).bfloat16()
    want = (x.double() @ layer.dequantized().double()).bfloat16().double()
    errors = {}
    for size in (1 << 20, 8 << 10):
        monkeypatch.setattr(scratch, "CPU_BYTES", size)
        got = layer.input_gradient(x, layer.weight.data, torch.Size((4, 256)))
        errors[size] = ((got.double() - want).norm() / want.norm()).item()
    assert len(list(layer.chunks(layer.weight.data, torch.bfloat16))) > 16
    assert errors[8 << 10] <= errors[1 << 20] + 2**-8


@EVERY_KIND
@pytest.mark.parametrize("make", [linear, convolution])
def test_bf16(make, kind):
    """Computed in bf16, learnt in fp32: within what that rounds."""
    layer, x = make()
    training = learning(layer, kind)
    wide, narrow = (x.to(dtype).requires_grad_() for dtype in (torch.float32, torch.bfloat16))
    with training.beside():
        want, got = gradients(layer(wide), wide, training), gradients(layer(narrow), narrow, training)
    assert got[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in got[2:])
    assert_close(got, want, 2**-5)


# On top of LoRAs


@EVERY_KIND
def test_beside_a_lora_that_is_on_the_model(kind):
    """It learns on the model as it is, and works there as the next LoRA."""
    layer, x = linear()
    stack = ResidualStack()
    stack.add("layer.weight", Patch(0.8, LoRA(normal(OUT, 4, seed=6), 0.1 * normal(4, 256, seed=7), 4.0)))
    stack.build({"layer": layer}, FactorCache())
    training = learning(layer, kind, before=stack.patches)
    x.requires_grad_()
    with stack.active({"layer": layer}, CPU), training.beside():
        got = layer(x)
    for key, patches in training.patches().items():
        for patch in patches:
            stack.add(key, patch)
    stack.build({"layer": layer}, FactorCache())
    with stack.active({"layer": layer}, CPU):
        want = layer(x)
    assert_close([got], [want])
    assert layer.residual is None


def test_a_changed_bias_is_beneath_too():
    layer, x = linear()
    stack = ResidualStack({"layer.bias": [Patch(1.0, Diff(normal(OUT, seed=6)))]})
    stack.build({"layer": layer}, FactorCache())
    training = learning(layer, "LoRA")
    with stack.active({"layer": layer}, CPU):
        alone = layer(x)
        with training.beside():
            both = layer(x)
    with training.beside():
        torch.testing.assert_close(both - alone, layer(x) - layer_without(layer, x), rtol=1e-3, atol=1e-4)
    with pytest.raises(AdapterError, match="a DoRA cannot learn next to it"):
        learning(layer, "DoRA", before=stack.patches)


def layer_without(layer, x):
    held, layer.residual = layer.residual, None
    try:
        return layer(x)
    finally:
        layer.residual = held


# A whole model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Linear(64, 96), layers.Linear(96, 64)

    def forward(self, x, options):
        options["block"] = options.get("block", 0) + 1
        x += self.second(F.silu(self.first(x * 1.0))) * options["block"]  # as blocks of some models write
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = layers.Linear(32, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = layers.Linear(64, 32)

    def forward(self, x):
        x, options = self.into(x), {}
        for block in self.blocks:
            x = block(x, options)
        return self.out(x)


def model() -> Model:
    return filled_with_small(Model())


def filled_with_small(made):
    for index, layer in enumerate(packed_layers(made).values()):
        filled(layer, by_name("Q8_0"), seed=10 * index)
        layer.weight.data.view(-1, 34)[:, 1] = 0x20  # scales near 2^-7
        layer.weight.data.view(-1, 34)[:, 0] = 0
    return made


def everywhere(made: Model, kind: str = "LoRA", **more) -> Training:
    found = packed_layers(made)
    return Training(found, [Target(name) for name, layer in found.items() if can_learn(layer)], kind, RANK, **more)


def test_checkpointing_gives_the_same_gradients_with_what_was_beside_the_layers():
    made, x = model(), normal(4, 32)
    found = packed_layers(made)
    stack = ResidualStack()
    stack.add("blocks.1.first.weight", Patch(1.0, LoRA(normal(96, 2, seed=6), 0.1 * normal(2, 64, seed=7))))
    stack.build(found, FactorCache())
    training = shaken(everywhere(made))

    kept: list[int] = []

    def run() -> list[torch.Tensor]:
        with stack.active(found, CPU), training.beside(), noting() as noted:
            loss = made(x).square().mean()
        kept.append(sum(noted))
        # by now nothing is on the layers
        assert all(layer.residual is None for layer in found.values())
        return way_back(loss, training)

    want = run()
    with checkpointed(made):
        got = run()
    assert_close(got, want, 1e-6)
    assert kept[1] < 0.5 * kept[0]
    with checkpointed(made), stack.active(found, CPU), training.beside():
        # on a GPU the way back is another thread, which would wait for this one to leave the layers
        loss = made(x).square().mean()
        inside = in_a_thread(lambda: way_back(loss, training))
    assert_close(inside, want, 1e-6)
    assert all("forward" not in vars(block) for block in made.blocks)
    assert all(layer.residual is None for layer in found.values())


class Telling(nn.Module):
    """A block that works something out for those behind it, into an object and a list that all are given."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Linear(64, 96), layers.Linear(96, 64)

    def forward(self, x, emb, cache, seen):
        if "emb" not in cache.held:
            cache.held["emb"] = {"in parts": emb.chunk(2, -1)}
            seen.append(torch.tanh(emb))
        shift, scale = cache.held["emb"]["in parts"]
        return x + self.second(F.silu(self.first(x))) * scale + shift * seen[0].mean()


class Cache:
    def __init__(self):
        self.held, self.prefix = {}, "blocks"


def test_what_a_block_works_out_for_others_has_its_gradient():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = layers.Linear(32, 128), nn.ModuleList(Telling() for _ in range(3))

        def forward(self, x):
            emb, cache, seen = self.embed(x), Cache(), []
            x = emb[:, :64]
            for block in self.blocks:
                x = block(x, emb, cache=cache, seen=seen)
            assert len(seen) == 1 and list(cache.held) == ["emb"]
            return x

    made, x = filled_with_small(Model()), normal(4, 32)
    training = shaken(everywhere(made))
    with training.beside():
        want = way_back(made(x).square().mean(), training)
        with checkpointed(made):
            got = way_back(made(x).square().mean(), training)
    assert_close(got, want, 1e-6)


def way_back(loss: torch.Tensor, training: Training) -> list[torch.Tensor]:
    training.zero_grad(set_to_none=True)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in training.parameters())]


def in_a_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(60)


def test_blocks_are_the_outermost_entries_of_lists():
    made = model()
    assert blocks_of(made) == list(made.blocks)
    unet = SimpleNamespace(blocks=nn.ModuleList([nn.Sequential(Block(), Block()), nn.Sequential(layers.Linear(4, 4))]))
    holder = nn.Module()
    holder.blocks = unet.blocks
    assert blocks_of(holder) == [unet.blocks[0][0], unet.blocks[0][1]]


def task(made: Model) -> tuple[torch.Tensor, torch.Tensor]:
    x = normal(64, 32, seed=20)
    with torch.no_grad():
        return x, made(x) + 0.1 * x @ normal(32, 32, seed=21)


def trained(run: Run, made: Model, steps: int, seen: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, want = seen
    while run.step < steps:
        picked = run.examples(len(x), 16)
        given = x[picked] + 1e-3 * torch.randn(16, 32, generator=run.random())
        parts = zip(given.chunk(2), want[picked].chunk(2), strict=True)
        run.advance([functools.partial(loss_of, run, made, *part) for part in parts])


def loss_of(run: Run, made: Model, given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    with run.training.beside():
        return F.mse_loss(made(given), wanted)


@EVERY_KIND
def test_the_loss_falls(kind):
    made = model()
    seen, before = task(made), made(normal(3, 32))
    run = Run(everywhere(made, kind), Plan(60, 2e-2))
    trained(run, made, 60, seen)
    assert sum(run.losses[-5:]) < 0.35 * sum(run.losses[:5])
    assert torch.equal(made(normal(3, 32)), before)


@pytest.mark.parametrize("optimizer", optimizers())
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_goes_on_is_the_one_that_was_not_interrupted(optimizer, schedule, tmp_path):
    made = model()
    seen, plan = task(made), Plan(12, 1e-3, schedule, optimizer, seed=7)
    whole = Run(everywhere(made), plan)
    trained(whole, made, 12, seen)
    first = Run(everywhere(made), plan)
    trained(first, made, 5, seen)
    first.save(tmp_path / "state", "this one")
    second = Run(everywhere(made, seed=99), plan)
    assert not second.load(tmp_path / "state", "another") and second.step == 0
    assert second.load(tmp_path / "state", "this one") and second.step == 5
    trained(second, made, 12, seen)
    assert second.losses == whole.losses
    assert all(map(torch.equal, second.training.parameters(), whole.training.parameters()))


def test_the_order_of_a_file_does_not_matter(tmp_path):
    made = model()
    found = packed_layers(made)
    training = shaken(everywhere(made))
    write_lora(tmp_path / "lora.safetensors", training.state(), "fp32", {})
    placed = load_adapters(tmp_path / "lora.safetensors", "comfy").on(found).placed
    again = Training.going_on(found, placed[::-1])
    assert again.targets == training.targets
    assert all(map(torch.equal, again.named().values(), training.named().values()))


def test_a_state_of_other_factors_or_no_state_is_not_taken(tmp_path):
    made = model()
    run = Run(everywhere(made), Plan(5))
    run.save(tmp_path / "state", "x")
    assert not Run(everywhere(made, "LoKr"), Plan(5)).load(tmp_path / "state", "x")
    assert not Run(everywhere(made), Plan(5, optimizer="SGD")).load(tmp_path / "state", "x")
    assert not run.load(tmp_path / "nothing", "x")
    (tmp_path / "broken").write_bytes(b"no such thing")
    assert not run.load(tmp_path / "broken", "x")


def test_a_loss_that_is_no_number_changes_nothing():
    made = model()
    run = Run(everywhere(made), Plan(5))
    before = [p.clone() for p in run.parameters]
    with pytest.raises(GraftError, match="the loss is no number in step 1: make learning_rate smaller"):
        run.advance([lambda: sum(p.sum() for p in run.parameters) * float("nan")])
    assert all(map(torch.equal, run.parameters, before)) and run.step == 0


def test_every_example_is_seen_once_a_round():
    made = model()
    run = Run(everywhere(made), Plan(100, seed=3))
    seen = []
    for _ in range(10):
        seen += run.examples(5, 2)
        run.step += 1
    rounds = [seen[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(one) == list(range(5)) for one in rounds) and any(a != b for a, b in itertools.pairwise(rounds))


@pytest.mark.parametrize("saving", [False, True])
def test_a_model_that_writes_into_what_autograd_keeps(saving, monkeypatch):
    """As Flux's blocks in ComfyUI do; the gradients are those of the same block without such writing."""

    def writing(self, x, options):
        x = x.clone()
        x += self.second(F.silu(self.first(x)))
        x += torch.tanh(x) * 0.5
        return x

    def plain(self, x, options):
        x = x + self.second(F.silu(self.first(x)))
        return x + torch.tanh(x) * 0.5

    found = {}
    for forward in (plain, writing):
        monkeypatch.setattr(Block, "forward", forward)
        made = model()
        run = Run(everywhere(made), Plan(3, 1e-2))
        with checkpointed(made) if saving else contextlib.nullcontext():
            trained(run, made, 3, task(made))
        found[forward] = run.losses
    assert found[plain] == found[writing]


def test_rates():
    plan = Plan(100, 1.0, "cosine")
    rates = [plan.rate_at(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0 and rates[-1] < 1e-3
    assert Plan(100, 1.0, "constant").rate_at(99) == 1.0
    assert Plan(3, 1.0, "constant").rate_at(0) == 1.0
    assert Plan(100, 1.0, "linear").rate_at(55) == 0.5


# Files


@EVERY_KIND
@pytest.mark.parametrize("make", [linear, convolution])
def test_the_file_is_what_was_learnt_and_training_goes_on_from_it(make, kind, tmp_path):
    layer, x = make()
    found = {"layer": layer}
    training = learning(layer, kind)
    with training.beside():
        want = layer(x)
    write_lora(tmp_path / "lora.safetensors", training.state(), "fp32", {})
    got, placed = running(tmp_path / "lora.safetensors", layer, x)
    assert_close([got], [want])
    again = Training.going_on(found, placed)
    assert again.kind == kind and again.rank == training.rank
    with again.beside():
        assert_close([layer(x)], [want])


def running(path, layer, x: torch.Tensor):
    """The layer's output with a file's adapters beside it, and where they are."""
    fitted, stack = load_adapters(path, "comfy").on({"layer": layer}, norm="comfy"), ResidualStack()
    fitted.add_to(stack, 1.0)
    stack.build({"layer": layer}, FactorCache())
    with stack.active({"layer": layer}, CPU):
        return layer(x), fitted.placed


@EVERY_KIND
@pytest.mark.parametrize("make", [linear, convolution])
def test_rows_of_a_fused_layer_in_a_file(make, kind, tmp_path):
    """The file is of the whole layer; what goes on from it is these rows again."""
    layer, x = make()
    training, path = learning(layer, kind, ROWS), tmp_path / "lora.safetensors"
    with training.beside():
        want = layer(x)
    write_lora(path, training.state(), "fp32", {})
    got, placed = running(path, layer, x)
    assert_close([got], [want])
    assert_close([got.narrow(1, 0, ROWS.start)], [layer(x).narrow(1, 0, ROWS.start)], 1e-6)
    again = Training.going_on({"layer": layer}, placed, told=training.rows())
    assert again.targets == training.targets and again.named().keys() == training.named().keys()
    assert_close(list(again.parameters()), list(training.parameters()), 1e-6)
    with again.beside():
        assert_close([layer(x)], [want])


@EVERY_KIND
def test_rows_that_a_file_does_not_have_are_not_taken(kind, tmp_path):
    """What is said of rows may be of another file, since tools copy metadata."""
    layer, _ = linear()
    training, path = learning(layer, kind), tmp_path / "lora.safetensors"
    write_lora(path, training.state(), "fp32", {})
    placed = load_adapters(path, "comfy").on({"layer": layer}, norm="comfy").placed
    for told in ('{"layer": [0, 4]}', '{"layer": [-4, 8]}', '{"layer": [38, 8]}', '{"layer": [0]}', "[]", "no JSON"):
        assert Training.going_on({"layer": layer}, placed, told=told).targets == (Target("layer"),)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_several_parts_of_one_layer_stand_in_one_lora(kind, tmp_path):
    layer, x = linear()
    targets = [Target("layer", Region(0, 0, 4)), Target("layer", Region(0, 4, 30))]
    training, path = shaken(Training({"layer": layer}, targets, kind, RANK, 2.0)), tmp_path / "lora.safetensors"
    with training.beside():
        want = layer(x)
    write_lora(path, training.state(), "fp32", {})
    assert_close([running(path, layer, x)[0]], [want])
    assert not training.rows()


def test_what_cannot_be_trained_says_so():
    layer, _ = linear()
    with pytest.raises(AdapterError, match="no layer is left to train"):
        Training({"layer": layer}, [])
    parts = [Target("layer", Region(0, 0, 4)), Target("layer", Region(0, 4, 36))]
    with pytest.raises(AdapterError, match="layer is in 2 parts here, whose LoKrs cannot stand in one file"):
        Training({"layer": layer}, parts, "LoKr")
    grouped = filled(layers.Conv2d(64, 12, 2, groups=2), by_name("Q8_0"))
    assert not can_learn(grouped) and not can_learn(layers.Embedding(4, 8))
