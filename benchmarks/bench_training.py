"""What training on quantized weights is worth, on the demo model, and what it costs.

    make bench-training       # the tables in docs/benchmarks.md, docs/training.png; half an hour on two cores

"styles": one LoRA of rank 16 is learnt on each base, from the same 512 pictures of a style in the same order and with
the same noise, and run on each base. The bases are the demo's Q8_0 file with its matrices in a type, quantized with the
importance of 8 prompts; fp32 is that file decoded. The loss is the mean squared error of the velocity on 192 other
pictures, at fixed shares of noise; much of it cannot be predicted from noise.

"repair": a LoRA learns to give the outputs of the unquantized model, from what that one saw and answered while it drew
32 random prompts, and needs no pictures. It begins with the repair that needs no training (`calibration.py`). The error
is |v - v'| / |v| over 16 other prompts, as there, and so is what stands against it: some layers in the next larger
type, for the same bytes.

"cost": a LoRA of rank 16 on all layers of four blocks of Wan 1.3B (186 million weights), a picture of 256x256.
Each way runs in a process of its own, one after the other, `--turns` times; its peak is that of the process in
training, less what it was before the model was there. PEFT trains on torch's own layers with weights in bf16 or fp32;
Graft computes in bf16. Shown are the medians of the turns, and the least and the most. The processor's time changes
less where other programs use the machine: with OMP_NUM_THREADS=1, since threads that wait for each other count, too.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from calibration import FACTORS, Bench, rounded
from checkout import ROOT
from graft.demo import pictures
from graft.demo.grafted import load_model, shipped
from graft.demo.scenes import random_scene
from graft.demo.train import Gallery
from graft.demo.wan import Wan
from graft.kernels import by_name
from graft.ops import layers as packed_operations
from graft.ops.checkpointing import checkpointed
from graft.ops.extract import Change, cut
from graft.ops.factors import FactorCache
from graft.ops.layers import packed_layers
from graft.ops.packed import PackedTensor
from graft.ops.quantize import quantize
from graft.ops.residual import ResidualStack
from graft.ops.trainable import Target
from graft.ops.training import Plan, Run, Training
from PIL import Image, ImageDraw
from sheet import INK, PAPER, TILE, font
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CPU = torch.device("cpu")
BASES = ("fp32", "Q4_K", "Q3_K", "IQ2_XS")
RANK, STEPS, BATCH, RATE = 16, 200, 8, 3e-3
PICTURES, HELD_OUT = 512, 192
REPAIRS = {"Q3_K": (4, 16), "Q2_K": (4, 16)}
LARGER = {"Q3_K": ("IQ4_XS", "Q4_K"), "Q2_K": ("IQ3_XXS", "Q3_K")}
"""Types that the same bytes may buy for some layers; the better one counts."""
REPAIR_STEPS, REPAIR_RATE, PROMPTS = 200, 1e-3, 32
SHOWN = ("a red star and a blue ring on mint", "a pink heart on cream")
RESULTS = ROOT / "benchmarks" / "results" / "training.csv"


def learners(model: nn.Module, rank: int, names: Sequence[str] | None = None) -> Training:
    """Beside every linear layer of the blocks and the head, or beside these."""
    found = packed_layers(model)
    names = [name for name in found if name.startswith(("blocks.", "head."))] if names is None else names
    return Training(found, [Target(name) for name in names], rank=rank)


class Learnt:
    """A base with what was learnt, here or elsewhere, beside its weights."""

    def __init__(self, model: Wan, training: Training | None) -> None:
        self.model, self.layers = model, packed_layers(model)
        self.stack = ResidualStack({} if training is None else training.patches())
        self.stack.build(self.layers, FactorCache())

    def __call__(self, *inputs: Tensor) -> Tensor:
        with self.stack.active(self.layers, CPU):
            return self.model(*inputs)


def base_of(bench: Bench, type_name: str) -> Wan:
    """The demo model with its matrices in a type, packed, or in fp32."""
    model = load_model(shipped("Q8_0.gguf"))
    for name, layer in packed_layers(model).items():
        if f"{name}.weight" in bench.names:
            layer.load_weight(
                packed(bench.state[f"{name}.weight"].float(), type_name, bench.importance.get(f"{name}.weight"))
            )
    return model


def packed(weight: Tensor, type_name: str, importance: Tensor | None = None) -> Tensor:
    """A weight in a type, as a state dict holds it."""
    if type_name == "fp32":
        return weight
    fmt = by_name(type_name)
    return PackedTensor(quantize(weight, fmt, importance).flatten(), fmt, weight.shape)


# A style, learnt on each base


def flow_loss(model: Callable[..., Tensor], latents: Tensor, context: Tensor, random: torch.Generator) -> Tensor:
    """At shares of noise as the sampler's schedule visits them, evenly over the batch."""
    even = (torch.randperm(len(latents), generator=random) + torch.rand(len(latents), generator=random)) / len(latents)
    sigma = pictures.SHIFT * even / (1 + (pictures.SHIFT - 1) * even)
    noise = torch.randn(latents.shape, generator=random)
    mixed = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
    return F.mse_loss(model(pictures.beside_places(mixed), 1000 * sigma, context), noise - latents)


def learn_style(model: Wan, gallery: Gallery, steps: int, kept: Path, name: str) -> Run:
    """A LoRA on this base; what an earlier command has learnt so is kept in a file."""
    run = Run(learners(model, RANK), Plan(steps, RATE))
    if run.load(kept / name, name):
        return run
    contexts = pictures.prompts(gallery.captions)
    while run.step < steps:
        picked = run.examples(len(gallery.captions), BATCH)

        def loss_of(picked: list[int] = picked) -> Tensor:
            with run.training.beside():
                return flow_loss(model, gallery.latents[picked].float(), contexts[picked], run.random())

        run.advance([loss_of])
    run.save(kept / name, name)
    return run


@torch.no_grad()
def held_out_loss(model: Callable[..., Tensor], gallery: Gallery) -> float:
    contexts, random = pictures.prompts(gallery.captions), torch.Generator().manual_seed(0)
    parts = range(0, len(gallery.captions), 64)
    losses = [flow_loss(model, gallery.latents[i : i + 64].float(), contexts[i : i + 64], random) for i in parts]
    return float(torch.stack(losses).mean())


def styles(bench: Bench, options: argparse.Namespace, note: Callable[..., None]) -> None:
    style = options.style
    gallery, others = Gallery(style, PICTURES, 1), Gallery(style, HELD_OUT, 2)
    bases = {name: base_of(bench, name) for name in options.bases}
    learnt: dict[str, Training | None] = {"no LoRA": None}
    for name, model in bases.items():
        if options.only in (None, name):
            run = learn_style(model, gallery, options.steps, options.kept, f"{style}-{name}-{options.steps}")
            learnt[name] = run.training
            print(
                f"{style} learnt on {name}: loss {sum(run.losses[-50:]) / len(run.losses[-50:]):.4f}", file=sys.stderr
            )
    if options.only is not None:
        return
    print(f"\n{style}, held-out loss\n| learnt on | " + " | ".join(f"on {name}" for name in options.bases) + " |")
    print("|---" * (len(options.bases) + 1) + "|")
    for where, training in learnt.items():
        losses = {name: held_out_loss(Learnt(model, training), others) for name, model in bases.items()}
        for name, loss in losses.items():
            note("style", style=style, learnt_on=where, run_on=name, loss=f"{loss:.4f}")
        print(f"| {where} | " + " | ".join(f"{loss:.4f}" for loss in losses.values()) + " |", flush=True)
    if options.sheet is not None:
        draw(style, bases, learnt, options.sheet)


def draw(style: str, bases: Mapping[str, Wan], learnt: Mapping[str, Training | None], path: Path) -> None:
    """Rows of bases; two prompts without a LoRA, with the one learnt in fp32, and with their own."""
    gap, left, top = 10, 96, 64
    columns = [("no LoRA", "no LoRA"), ("learnt on fp32", "fp32"), ("learnt here", "")]
    step = 2 * TILE + 2 * gap + 14
    sheet = Image.new("RGB", (left + len(columns) * step, top + len(bases) * (TILE + gap) + 12), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (title, _) in enumerate(columns):
        pen.text(
            (left + index * (2 * TILE + 2 * gap + 14), 24),
            f"{style}: {title}" if index else title,
            INK,
            font(15, bold=True),
        )
    for row, (name, model) in enumerate(bases.items()):
        y = top + row * (TILE + gap)
        pen.text((16, y + TILE / 2 - 8), name, INK, font(15, bold=True))
        for index, (_, where) in enumerate(columns):
            drawn = pictures.sample(Learnt(model, learnt[where or name]), SHOWN, seed=7)
            for place, picture in enumerate(drawn):
                tile = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
                sheet.paste(tile, (left + index * step + place * (TILE + gap), y))
    sheet.quantize(256, kmeans=3).save(path, optimize=True)


# A repair, learnt from the unquantized model


def answers(bench: Bench) -> tuple[list[Tensor], Tensor]:
    """What the unquantized model was given while it drew random prompts, and what it answered, row by row."""
    rng, teacher = np.random.default_rng(5), base_of(bench, "fp32")
    given: list[tuple[Tensor, ...]] = []
    answered: list[Tensor] = []

    def noted(*inputs: Tensor) -> Tensor:
        given.append(inputs)
        answered.append(teacher(*inputs))
        return answered[-1]

    for index in range(0, PROMPTS, 16):
        pictures.sample(noted, [random_scene(rng).caption for _ in range(16)], seed=100 + index)
    return [torch.cat(column) for column in zip(*given, strict=True)], torch.cat(answered)


def learn_repair(
    bench: Bench, type_name: str, rank: int, seen: tuple[list[Tensor], Tensor], steps: int
) -> dict[str, Tensor]:
    """The weights with what was learnt, both factors rounded as they are stored."""
    model, (inputs, wanted) = base_of(bench, type_name), seen
    names = [name.removesuffix(".weight") for name in bench.names]
    training, found = learners(model, rank, names), packed_layers(model)
    with torch.no_grad():
        for target, learner in training.each():
            start = bench.closed_form(f"{target.layer}.weight", found[target.layer].dequantized().double(), rank)
            learner.up.copy_(start.up), learner.down.copy_(start.down)
    run, scale = Run(training, Plan(steps, REPAIR_RATE)), wanted.square().mean()
    while run.step < steps:
        picked = run.examples(len(wanted), BATCH)

        def loss_of(picked: list[int] = picked) -> Tensor:
            with training.beside():
                return F.mse_loss(model(*(part[picked] for part in inputs)), wanted[picked]) / scale

        run.advance([loss_of])
    return {
        f"{target.layer}.weight": found[target.layer].dequantized().double() + stored(learner)
        for target, learner in training.each()
    }


def stored(learner: Any) -> Tensor:
    """ΔW of factors in Q8_0; rows of B are too short for blocks, so it is rounded the other way round."""
    up, down = learner.up.detach().double(), learner.down.detach().double()
    return rounded(up.T.contiguous(), FACTORS).T @ rounded(down, FACTORS)


class RepairBench(Bench):
    """With the repair that needs no training, as factors."""

    def closed_form(self, name: str, weight: Tensor, rank: int) -> Any:
        missing = (self.state[name] - weight).float()
        inputs = self.inputs_of(name, "by inputs")
        return cut(Change(missing.shape, full=missing), rank, None if inputs is None else inputs.float())


def repairs(bench: RepairBench, options: argparse.Namespace, note: Callable[..., None]) -> None:
    seen = answers(bench)
    print("\n| type | rank | error | repaired, not trained | trained | bits a weight | the same bytes without a LoRA |")
    print("|---|---|---|---|---|---|---|")
    for name, ranks in ((name, REPAIRS[name]) for name in options.repaired):
        fmt, weights = by_name(name), bench.quantized(by_name(name), True)
        plain = bench.error(weights)
        for rank in ranks:
            trained = bench.error(learn_repair(bench, name, rank, seen, options.repair_steps))
            untrained = bench.error(bench.repaired(weights, rank, "by inputs"))
            nbytes = bench.bytes_of_repair(rank, FACTORS)
            bits = 8 * fmt.type_size / fmt.block_size + 8 * nbytes / bench.parameters
            other, larger = min((bench.error(bench.mixed(name, large, nbytes)), large) for large in LARGER[name])
            note(
                "repair", run_on=name, rank=rank, plain=f"{plain:.4f}", untrained=f"{untrained:.4f}",
                trained=f"{trained:.4f}", bits=f"{bits:.2f}", larger=larger, mixed=f"{other:.4f}",
            )  # fmt: skip
            print(
                f"| {name} | {rank} | {plain:.3f} | {untrained:.3f} | {trained:.3f} | {bits:.2f} | "
                f"{larger} for some layers: {other:.3f} |", flush=True,
            )  # fmt: skip


# What it costs

WIDTH, MLP, DEPTH, SIDE = 1536, 8960, 4, 32
"""Wan 1.3B, but for its depth, which is 30; latent cells on a side."""
WAYS = ("Graft, Q4_K", "PEFT, bf16", "PEFT, fp32", "Graft, Q4_K, checkpointing", "PEFT, bf16, checkpointing")
DENSE = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""What a model without packed weights is in."""
COST_STEPS = 4
LIKE = 64
"""Rows of a weight that differ; what decodes and multiplies them does not care."""


def large(type_name: str) -> Wan:
    """Random weights, in every block the same ones, in memory of their own; packed, or of `DENSE`."""
    one = Wan(WIDTH, MLP, 1).to(DENSE.get(type_name, torch.bfloat16)).state_dict()
    state = {name: tensor for name, tensor in one.items() if not name.startswith("blocks.")}
    for name in one.keys() - state.keys():
        matrix = type_name not in DENSE and one[name].dim() == 2
        held = repeated(one[name], type_name) if matrix else one[name]
        for index in range(DEPTH):
            state[name.replace("blocks.0.", f"blocks.{index}.")] = copied(held)
    if type_name in DENSE:
        with torch.device("meta"):
            model = Wan(WIDTH, MLP, DEPTH)
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False)
    model = Wan(WIDTH, MLP, DEPTH, operations=packed_operations)
    model.load_state_dict(state)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16() if parameter.is_floating_point() else parameter.data
    return model.requires_grad_(False)


def repeated(weight: Tensor, type_name: str) -> Tensor:
    """A weight whose first rows come again and again: to quantize all of them would take longer than to train."""
    few = packed(weight[:LIKE].float(), type_name)
    assert isinstance(few, PackedTensor)
    return PackedTensor(few.packed.repeat(weight.shape[0] // LIKE), few.fmt, weight.shape)


def copied(weight: Tensor) -> Tensor:
    if isinstance(weight, PackedTensor):
        return PackedTensor(weight.packed.clone(), weight.fmt, weight.shape)
    return weight.clone()


def with_peft(model: Wan) -> None:
    """LoRAs of PEFT's on the layers that `learners` takes."""
    import peft

    wanted = [
        name for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith(("blocks.", "head."))
    ]  # fmt: skip
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=wanted), model)


def cost_of(way: str) -> dict[str, float]:
    """Seconds a step, the median, by the clock and of all cores, and MiB beyond what was there before the model."""
    tool, type_name, *saving = way.split(", ")
    random, dtype = torch.Generator().manual_seed(1), DENSE.get(type_name, torch.bfloat16)
    x = torch.randn(1, 32, 1, SIDE, SIDE, generator=random).to(dtype)
    context = torch.randn(1, 256, 4096, generator=random).to(dtype)
    at, before, model = torch.tensor([500.0]), memory("VmRSS"), large(type_name)
    with contextlib.ExitStack() as stack:
        if tool == "Graft":
            training = learners(model, RANK)
            parameters = list(training.parameters())
            stack.enter_context(training.beside())
            stack.enter_context(checkpointed(model) if saving else contextlib.nullcontext())
        else:
            with_peft(model)
            parameters = [p for name, p in model.named_parameters() if "lora_" in name]
            for block in model.blocks if saving else ():
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        optimizer, times = torch.optim.AdamW(parameters, lr=1e-4), list[tuple[float, float]]()
        Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
        for _ in range(COST_STEPS):
            begin = time.perf_counter(), time.process_time()
            model(x, at, context).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    seconds, cpu_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "mib": memory("VmHWM") - before}


def memory(field: str) -> float:
    """MiB of this process, by Linux."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def costs(_: Any, options: argparse.Namespace, note: Callable[..., None]) -> None:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.turns):
        for way in WAYS:
            command = [sys.executable, __file__, "--cost-of", way]
            found[way].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print("\n| | a step | of it the processor's, all cores | peak memory |\n|---|---|---|---|")
    for way, measured in found.items():
        spread = {key: _spread([one[key] for one in measured]) for key in ("seconds", "cpu_seconds", "mib")}
        figures = {f"{key}{end}": f"{value:.2f}" for key, values in spread.items() for end, value in values.items()}
        note("cost", way=way, turns=len(measured), **figures)
        shown = [
            f"{values[''] / scale:.2f} {unit} ({values['_least'] / scale:.2f} to {values['_most'] / scale:.2f})"
            for values, scale, unit in zip(spread.values(), (1, 1, 1024), ("s", "s", "GiB"), strict=True)
        ]
        print(f"| {way} | {' | '.join(shown)} |", flush=True)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"": statistics.median(values), "_least": min(values), "_most": max(values)}


PARTS = {"styles": styles, "repair": repairs, "cost": costs}


def machine() -> str:
    """The processor, what it multiplies with, and how many threads do."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    capability = "AVX512-BF16" if "avx512_bf16" in told else torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{name[1] if name else platform.machine()}, {capability}, {threads} thread{'s' * (threads > 1)}"


class Notes:
    """The results file: lines of a part that is measured again replace its old ones."""

    FIELDS = (
        "part", "style", "learnt_on", "run_on", "loss", "rank", "plain", "untrained", "trained", "bits", "larger",
        "mixed", "way", "turns", "seconds", "seconds_least", "seconds_most", "cpu_seconds", "cpu_seconds_least",
        "cpu_seconds_most", "mib", "mib_least", "mib_most", "torch", "machine",
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, str]] = []

    def __call__(self, part: str, **values: Any) -> None:
        about = {"torch": torch.__version__, "machine": machine()}
        self.lines.append({"part": part, **{k: str(v) for k, v in values.items()}, **about})

    def write(self) -> None:
        if not self.lines:
            return

        def key(line: dict[str, str]) -> tuple[str, ...]:
            return tuple(line.get(name, "") for name in ("part", "style", "learnt_on", "run_on", "rank", "way"))

        renewed = {key(line) for line in self.lines}
        held = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                held = [line for line in csv.DictReader(file) if key(line) not in renewed]
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.FIELDS, restval="")
            writer.writeheader()
            writer.writerows([*held, *self.lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--style", default="linocut", choices=("neon", "blueprint", "linocut"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--only", choices=BASES, help="learn the style on this base, for a later command")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "training", help="what has been learnt so far")
    parser.add_argument("--repaired", nargs="+", choices=REPAIRS, default=list(REPAIRS))
    parser.add_argument("--repair-steps", type=int, default=REPAIR_STEPS)
    parser.add_argument("--turns", type=int, default=3, help="of each way in the part on costs")
    parser.add_argument("--sheet", type=Path, default=ROOT / "docs" / "training.png")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cost-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cost_of:
        print(json.dumps(cost_of(options.cost_of)))
        return
    bench = RepairBench() if {"styles", "repair"} & set(options.parts) else None
    notes = Notes(options.results)
    for part in options.parts:
        PARTS[part](bench, options, notes)  # type: ignore[operator]
        notes.write()


if __name__ == "__main__":
    main()
