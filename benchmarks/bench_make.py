"""What making a GGUF costs, and what baking a LoRA into one loses.

    make bench-make      # four Markdown tables, for docs/benchmarks.md; minutes on two cores
    make bench-make ARGS=--memory      # the last one alone

Rates are millions of weights a second of one core, of a weight of 3072 columns, the tables of the I types made before.
The times for Flux (11.9B weights) are an estimate: what its tensors take at these rates, without the disk.

The demo's LoRA neon is baked into files of a few types that are made of the Q8_0 one, and run beside the same types
without it. Errors are of pictures, two prompts of 20 steps, against the Q8_0 weights with the LoRA merged in fp64 and
not rounded; the effect kept is of one model call: the share of the LoRA's true effect that is left, and how far the
effect is from it.

Memory is what tools/make_gguf.py holds at most beyond what Python and torch take before it reads a weight: not counted
are pages of the mapped model, which the system takes back when it needs them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from checkout import ROOT
from demo import GUIDANCE, PROMPTS, SEED, STEPS
from graft.demo import pictures
from graft.demo.grafted import Grafted, load_model, shipped
from graft.kernels import by_name
from graft.ops.baked import with_loras
from graft.ops.files.checkpoint import open_checkpoint
from graft.ops.make import plan_model, write_model
from graft.ops.quantize import needs_importance, quantize
from graft.ops.recipes import RECIPES, Rule, recipe_named
from safetensors.torch import save_file
from torch import Tensor

LORA = "neon"
TYPES = ("Q8_0", "Q4_K", "IQ3_S")
RATED = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K", "IQ2_XXS")
WIDTH, ROWS = 3072, 256


def rates() -> dict[str, float]:
    """Weights a second of one core, for every type that recipes use: the best of three."""
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    used = {name for recipe in RECIPES.values() for types in recipe.types.values() for _, name in types}
    found = {}
    for name in sorted(used):
        fmt, seconds = by_name(name), []
        if name.startswith("IQ1"):
            continue  # tables that take a minute
        importance = torch.ones(WIDTH) if needs_importance(fmt) else None
        quantize(weight[:1], fmt, importance)
        for _ in range(3):
            start = time.process_time()  # of all threads, and not what other programs take
            quantize(weight, fmt, importance)
            seconds.append(time.process_time() - start)
        found[name] = weight.numel() / min(seconds)
    return found


def flux() -> dict[str, Tensor]:
    """Flux.1's tensors, without memory."""
    shapes = {"img_in": (WIDTH, 64), "txt_in": (WIDTH, 4096), "final_layer.linear": (64, WIDTH)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH), "vector_in.in_layer": (WIDTH, 768)}
    shapes |= {f"{name}.{part}": (WIDTH, 256 if part == "in_layer" else WIDTH) for name in ("time_in", "guidance_in")
               for part in ("in_layer", "out_layer")}  # fmt: skip
    for block in range(19):
        for stream in ("img", "txt"):
            shapes |= {
                f"double_blocks.{block}.{stream}_attn.qkv": (3 * WIDTH, WIDTH),
                f"double_blocks.{block}.{stream}_attn.proj": (WIDTH, WIDTH),
                f"double_blocks.{block}.{stream}_mlp.0": (4 * WIDTH, WIDTH),
                f"double_blocks.{block}.{stream}_mlp.2": (WIDTH, 4 * WIDTH),
                f"double_blocks.{block}.{stream}_mod.lin": (6 * WIDTH, WIDTH),
            }
    for block in range(38):
        shapes |= {
            f"single_blocks.{block}.linear1": (7 * WIDTH, WIDTH), f"single_blocks.{block}.linear2": (WIDTH, 5 * WIDTH),
            f"single_blocks.{block}.modulation.lin": (3 * WIDTH, WIDTH),
        }  # fmt: skip
    return {f"{name}.weight": torch.empty(s, dtype=torch.bfloat16, device="meta") for name, s in shapes.items()}


def sizes(rated: dict[str, float]) -> str:
    """Size and time of every recipe for Flux."""
    state, lines = (
        flux(),
        ["| recipe | Flux.1, 11.9B | bits a weight | on 2 cores | on 8 cores |", "|---|---|---|---|---|"],
    )
    measured = {name: torch.ones(tensor.shape[-1]) for name, tensor in state.items()}
    for name in RECIPES:
        if name in ("F32", "IQ1_S", "IQ1_M"):
            continue
        plan = plan_model(state, recipe_named(name), "flux", importance=measured)
        seconds = sum(state[n].numel() / rated[c.fmt.name] for n, c in plan.choices.items())
        times = " | ".join(_duration(seconds / cores) for cores in (2, 8))
        lines.append(f"| {name} | {plan.nbytes / 1e9:.1f} GB | {8 * plan.nbytes / plan.weights:.2f} | {times} |")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def drawn(model: object) -> Tensor:
    return torch.cat([pictures.sample(model, [prompt], SEED, STEPS, GUIDANCE) for prompt in PROMPTS[:2]])


def written(path: Path, state: dict[str, Tensor], type_name: str) -> Path:
    """The demo with what its Q8_0 file has quantized in another type, and nothing else changed."""
    source = open_checkpoint([shipped("Q8_0.gguf")]).state
    packed = [name for name, tensor in source.items() if hasattr(tensor, "fmt")]
    write_model(path, plan_model(state, None, "wan", [Rule(name, type_name) for name in packed]))
    return path


@torch.no_grad()
def baked(folder: Path) -> str:
    """What is left of a LoRA beside the weights, and in them."""
    source, file = open_checkpoint([shipped("Q8_0.gguf")]).state, shipped(f"{LORA}.safetensors")
    full = Grafted(load_model(shipped("Q8_0.gguf")), {LORA: 1.0})
    exact, plain = full.twin(torch.float64), Grafted(load_model(shipped("Q8_0.gguf")), {}).twin(torch.float64)
    x, t = pictures.beside_places(pictures.noise(SEED, len(PROMPTS))), torch.full((len(PROMPTS),), 700.0)
    words = pictures.prompts(PROMPTS)
    effect = exact(x.double(), t.double(), words.double()) - plain(x.double(), t.double(), words.double())
    want = drawn(full.twin(torch.float32))
    lines = ["| type | LoRA | effect kept | error of the effect | error of the pictures |", "|---|---|---|---|---|"]
    for name in TYPES:
        base = load_model(written(folder / f"{name}.gguf", source, name))
        alone = Grafted(base, {})(x, t, words).double()
        mixed = load_model(written(folder / f"{name}-baked.gguf", with_loras(source, [(file, 1.0)]), name))
        for how, model in (("beside", Grafted(base, {LORA: 1.0})), ("baked", Grafted(mixed, {}))):
            got = model(x, t, words).double() - alone
            kept = float((got * effect).sum() / effect.square().sum())
            error = float((got - effect).norm() / effect.norm())
            picture = float((drawn(model) - want).square().mean().sqrt() / want.square().mean().sqrt())
            lines.append(f"| {name} | {how} | {kept:.3f} | {error:.4f} | {picture:.4f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def memory(folder: Path) -> str:
    """What making a file holds in memory, of models of few and of many of Flux's largest layers."""
    lines = ["| model | largest layer in fp32 | LoRA | memory at most |", "|---|---|---|---|"]
    largest = torch.empty(7 * WIDTH, WIDTH, dtype=torch.bfloat16)
    factors = {"lora_A.weight": torch.randn(16, WIDTH) / 64, "lora_B.weight": torch.randn(7 * WIDTH, 16) / 64}
    for count in (4, 16):
        names = [f"single_blocks.{block}.linear1" for block in range(count)]
        save_file({f"{name}.weight": largest.normal_() / 64 for name in names}, folder / "model.safetensors")
        lora = {f"diffusion_model.{name}.{part}": w.clone() for name in names for part, w in factors.items()}
        save_file(lora, folder / "lora.safetensors")
        size = (folder / "model.safetensors").stat().st_size
        for told, more in (("none", []), ("rank 16 on every layer", ["--lora", str(folder / "lora.safetensors")])):
            peak = _peak([str(folder / "model.safetensors"), str(folder / "out.gguf"), *more])
            sizes = f"{size / 1e9:.2f} GB, {count} layers | {4 * largest.numel() / 1e9:.2f} GB"
            lines.append(f"| {sizes} | {told} | {peak / 1e9:.2f} GB |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _peak(arguments: list[str]) -> int:
    """Bytes that the command holds at most, beyond what it holds when it has planned and written nothing."""
    command = [sys.executable, str(ROOT / "tools" / "make_gguf.py"), *arguments, "--type", "Q8_0", "--overwrite"]
    command += ["--architecture", "flux"]
    return _held([*command]) - _held([*command, "--plan"])


def _held(command: list[str]) -> int:
    process, most = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except ProcessLookupError:
            break
        own = re.search(r"RssAnon:\s+(\d+) kB", status)
        most = max(most, int(own[1]) * 1024 if own else 0)
        time.sleep(0.005)
    assert process.wait() == 0, command
    return most


def main() -> None:
    print(f"{torch.get_num_threads()} threads, {ROOT.name}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        table = memory(Path(folder))
        if "--memory" in sys.argv:
            print(table)
            return
        print(baked(Path(folder)), end="\n\n")
    rated = rates()
    head = "| " + " | ".join(RATED) + " |\n" + "|---" * len(RATED) + "|"
    print(f"{head}\n| " + " | ".join(f"{rated[name] / 1e6:.1f}" for name in RATED) + " |\n")
    print(sizes(rated), end="\n\n")
    print(table)


if __name__ == "__main__":
    main()
