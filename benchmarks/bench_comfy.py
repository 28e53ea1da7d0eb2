"""Graft and ComfyUI-GGUF in one ComfyUI process, in turn, on the same files: `make bench-comfy`.

Flux blocks (1 double, 1 single) at 3072, 256 image (`--side` 32) and 128 text tokens, with 0, 1 and 4 LoRAs of ranks
16/32/64/32 on every linear layer of the blocks, through the stock LoRA loader and ComfyUI's own sampler.
Prints medians over the turns and their ratios, and each pack's peak memory in a process of its own. Then the same four
LoRAs by region and step, against constants and against ComfyUI's own hooks (`comfy_strengths`).

    make bench-comfy ARGS="--gpu"      # on the GPU, also against unquantized bf16, with a CSV (`comfy_gpu`)

    COMFYUI_PATH     ComfyUI's folder (default ~/ComfyUI); COMFYUI_PYTHON its Python (default its venv's)
    COMFYUI_GGUF     a checkout of city96/ComfyUI-GGUF (default ~/peers/ComfyUI-GGUF)
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import comfy_gpu
import comfy_strengths

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH", str(Path.home() / "ComfyUI")).split(os.pathsep)[0])
PEER = Path(os.environ.get("COMFYUI_GGUF", Path.home() / "peers" / "ComfyUI-GGUF"))
RANKS = (16, 32, 64, 32)
LORAS = (0, 1, 4)
SIZE = 32
"""Of a side of the latent, where nothing else is said: 256 tokens."""
PARTS = ("packs", "strengths")
# each beside what the loader is told: the peer takes the host's dtype, which on a CPU is fp32, and so does "graft"
VARIANTS = {
    "peer": "auto",
    "peer bf16": "auto",
    "graft": "auto",
    "graft bf16": "bf16",
    "graft int8": "int8_all",
    "graft int8 fp32": "int8_all",
}
# where nothing else is said
USUAL = ("peer", "graft", "graft bf16", "graft int8")
# what the host is then told to compute in: the peer's loader has no such input, and ours takes bf16 beside int8 where a
# processor has it
TOLD = {"peer bf16": "bfloat16", "graft int8 fp32": "float32"}
# on a GPU the host computes in bf16, and so do the peer and "graft"
ON_GPU = ("bf16", "peer", "graft", "graft int8")
# one way by another, turn by turn
SHARES = (
    ("graft bf16", "peer bf16"),
    ("graft int8", "graft"),
    ("graft int8", "graft bf16"),
    ("graft int8 fp32", "graft bf16"),
)
TITLES = {
    "bf16": "unquantized bf16",
    "peer": "ComfyUI-GGUF",
    "peer bf16": "ComfyUI-GGUF, bf16",
    "graft": "Graft",
    "graft bf16": "Graft, bf16",
    "graft int8": "Graft, int8",
    "graft int8 fp32": "Graft, int8 and fp32",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["Q4_K", "Q8_0"])
    parser.add_argument("--turns", type=int, help="default: 5, and on a GPU 20")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--side", type=int, help=f"of the latent: 64 is a picture of 512 by 512 (default: {SIZE}, and on a GPU 128)"
    )
    parser.add_argument("--text", type=int, help="tokens of the prompt (default: 128, and on a GPU 512)")
    parser.add_argument("--width", type=int, default=3072, help="of the Flux blocks, a multiple of 128")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(TITLES),
        help="default: all in fp32, and Graft's in bf16 and int8; 'bf16' is for --gpu",
    )
    parser.add_argument("--gpu", action="store_true", help="on a GPU: packs and unquantized bf16, into a CSV")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="of --gpu; cpu tries it without one")
    parser.add_argument("--out", type=Path, help="CSV of --gpu (default: benchmarks/results/<card>/comfyui.csv)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of this process, where others use the machine, too; with one thread"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks of memory out")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--memory", nargs=2, metavar=("VARIANT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    usual = (20, 128, 512, ON_GPU) if options.gpu else (5, SIZE, 128, USUAL)
    for name, value in zip(("turns", "side", "text", "variants"), usual, strict=True):
        setattr(options, name, getattr(options, name) or value)
    if "bf16" in options.variants and not options.gpu:
        parser.error("the variant bf16 is for --gpu")
    options.out = options.out and options.out.absolute()
    return options


def start_comfyui(packs: list[Path], device: str = "cpu") -> dict:
    """Import ComfyUI and load these packs through its own loader; returns their node classes."""
    sys.path[:0] = [str(COMFYUI), str(ROOT / "tests"), str(ROOT / "tests" / "in_comfyui")]
    sys.argv = ["main.py", "--cpu"] if device == "cpu" else ["main.py"]
    os.chdir(COMFYUI)
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes

    for pack in packs:
        if not asyncio.run(nodes.load_custom_node(str(pack))):
            raise SystemExit(f"ComfyUI could not load the pack in {pack}")
    return nodes.NODE_CLASS_MAPPINGS


def blocks(width: int):
    """The architecture that is measured: a double and a single block of Flux."""
    from architectures import ARCHITECTURES, flux_of

    return replace(ARCHITECTURES["flux"], build=functools.partial(flux_of, width))


def write_files(folder: Path, types: list[str], width: int) -> None:
    from architectures import write_model

    for type_name in types:
        write_model(blocks(width), type_name, folder / f"{type_name}.gguf")


def load(variant: str, path: Path, classes: dict):
    """A MODEL as the pack's own loader node returns it."""
    import folder_paths

    # both packs list the folders of diffusion models under keys of their own
    for key in ("unet", "diffusion_models", "unet_gguf"):
        paths, extensions = folder_paths.folder_names_and_paths.get(key, ([], set()))
        if str(path.parent) not in paths:
            folder_paths.folder_names_and_paths[key] = ([str(path.parent), *paths], set(extensions) | {".gguf"})
    if variant == comfy_gpu.BASELINE:
        return comfy_gpu.unquantized(pack, path)
    if variant.startswith("peer"):
        model = classes["UnetLoaderGGUF"]().load_unet(path.name)[0]
    else:
        model = classes["GraftUNETLoader"]().load(path.name, compute_dtype=VARIANTS[variant])["result"][0]
    if variant in TOLD:
        import torch

        model.model.manual_cast_dtype = getattr(torch, TOLD[variant])
    return model


def grafted(model, count: int, width: int = 3072):
    """The model with the first `count` LoRAs, through what the stock LoRA loader calls."""
    from generation import with_lora

    for lora in lora_files(model, count, blocks(width)):
        model = with_lora(model, lora, 0.8)
    return model


def lora_files(model, count: int, architecture=None) -> list[dict]:
    from architectures import ARCHITECTURES
    from loras import make_lora

    built = (architecture or ARCHITECTURES["flux"]).build()
    shapes = {f"diffusion_model.{name}": weight.shape for name, weight in built.state_dict().items()}
    blocks = ("double_blocks.0", "single_blocks.0")
    return [make_lora(model.model, shapes, "native", blocks, rank, seed) for seed, rank in enumerate(RANKS[:count])]


def seconds_a_step(model, options: argparse.Namespace) -> float:
    """Seconds of the diffusion model's forward pass in a step of ComfyUI's sampler."""
    import comfy.sample
    import torch

    latent, condition = torch.zeros(1, 16, options.side, options.side), conditioning(options.text)
    clock = time.process_time if options.cpu_time else comfy_gpu.waiting_clock(options.device if options.gpu else "cpu")
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    times: list[float] = []
    network = model.model.diffusion_model
    hooks = [
        network.register_forward_pre_hook(lambda *_: times.append(-clock())),
        network.register_forward_hook(lambda *_: times.append(clock())),
    ]
    comfy.sample.sample(model, noise, 1, 1.0, "euler", "simple", condition, condition, latent, disable_pbar=True)
    for hook in hooks:
        hook.remove()
    return sum(times)


def conditioning(tokens: int = 128) -> list:
    import torch
    from architectures import ARCHITECTURES

    g = torch.Generator().manual_seed(0)
    pooled = torch.randn(1, ARCHITECTURES["flux"].pooled, generator=g)
    return [[torch.randn(1, tokens, 4096, generator=g), {"pooled_output": pooled}]]


def measure(type_name: str, folder: Path, classes: dict, options: argparse.Namespace) -> list[dict]:
    """Rows of one type: median seconds a step of every variant with 0, 1 and 4 LoRAs, each once in every turn.

    What LoRAs cost, and what one way takes of another's time, are medians of shares within a turn: what changes from
    turn to turn, the machine, drops out.
    """
    bases = {variant: load(variant, folder / f"{type_name}.gguf", classes) for variant in options.variants}
    models = {(n, variant): grafted(base, n, options.width) for n in LORAS for variant, base in bases.items()}
    for model in models.values():
        seconds_a_step(model, options)  # loads it
    times: dict[tuple[int, str], list[float]] = {which: [] for which in models}
    for _ in range(options.turns):
        for which, model in models.items():
            times[which].append(seconds_a_step(model, options))
    rows = []
    for count in LORAS:
        row = {"type": type_name, "loras": count, "cost": {}, "shares": {}}
        for variant in options.variants:
            seconds = times[count, variant]
            row[variant] = statistics.median(seconds)
            row["cost"][variant] = share(seconds, times[0, variant]) - 1
            print(f"  {type_name} {count} LoRAs: {variant} {[round(t, 2) for t in seconds]}", flush=True)
        for ours, other in SHARES:
            if {ours, other} <= bases.keys():
                row["shares"][ours, other] = share(times[count, ours], times[count, other])
        rows.append(row)
    return rows


def share(these: list[float], those: list[float]) -> float:
    """The median of one by the other, turn by turn."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def measure_on_gpu(folder: Path, classes: dict, options: argparse.Namespace) -> str:
    """The table of `comfy_gpu`; its CSV is written meanwhile."""
    from architectures import flux_as_wide_as_its_file

    about = comfy_gpu.machine(options.device)
    card = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    out = options.out or ROOT / "benchmarks" / "results" / card / "comfyui.csv"
    with comfy_gpu.Record(out, about) as record, flux_as_wide_as_its_file():
        for type_name in options.types:
            path = folder / f"{type_name}.gguf"
            loaders = {name: functools.partial(load, name, path, classes) for name in options.variants}
            with_loras = functools.partial(grafted, width=options.width)
            seconds = functools.partial(seconds_a_step, options=options)
            comfy_gpu.measure(type_name, loaders, with_loras, seconds, LORAS, options.turns, record)
    title = ", ".join(f"{key} {value}" for key, value in about.items())
    sizes = f"{(options.side // 2) ** 2} + {options.text} tokens, {options.turns} turns"
    return f"{title}; {sizes}; medians with 20 and 80 % quantiles\n\n{comfy_gpu.table(record.steps, TITLES)}"


def pack(name: str):
    """A module of Graft's, as ComfyUI has loaded it."""
    return importlib.import_module(f"{str(ROOT).replace('.', '_x_')}.{name}")


def measure_strengths(type_name: str, folder: Path, classes: dict, turns: int) -> str:
    """The table of `comfy_strengths` on a file of this type, half as wide: ComfyUI keeps a copy of it for each hook."""
    from architectures import flux_as_wide_as_its_file, write_model
    from generation import dense_model

    half = blocks(1536)
    path = write_model(half, type_name, folder / f"half-{type_name}.gguf")
    with flux_as_wide_as_its_file():
        graft, dense = load("graft", path, classes), dense_model(pack, path)
    loras = lora_files(graft, len(RANKS), half)
    return comfy_strengths.measure(graft, dense, loras, conditioning(), SIZE, pack, turns)


def peak_memory(variant: str, file: Path) -> float:
    """Peak resident GiB of a process that loads the file with one pack and samples with four LoRAs."""
    command = [sys.executable, __file__, "--memory", variant, str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(ran.stdout.strip().splitlines()[-1])


def peak_resident() -> float:
    """This process's peak resident GiB (getrusage would start from the parent's peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def table(rows: list[dict], memory: dict[tuple[str, str], float]) -> str:
    """Two Markdown tables: seconds and ratios, and memory."""
    variants = [v for v in VARIANTS if v in rows[0]]
    ours = [v for v in variants if not v.startswith("peer")] if "peer" in variants else []
    titles = [TITLES[v] for v in variants] + [f"times its speed: {TITLES[v]}" for v in ours]
    titles += [f"{TITLES[v]}: share of the time of {TITLES[other]}" for v, other in rows[0]["shares"]]
    types = dict.fromkeys(row["type"] for row in rows)
    lines = [_line(["type", "LoRAs", *titles, "LoRAs cost"]), _line(["---"] * (len(titles) + 3))]
    for row in rows:
        cells = [f"{row[v]:.2f} s" for v in variants] + [f"{row['peer'] / row[v]:.1f}" for v in ours]
        cells += [f"{taken:.2f}" for taken in row["shares"].values()]
        cost = " / ".join(f"{row['cost'][v]:+.0%}" for v in variants) if row["loras"] else ""
        lines.append(_line([row["type"], str(row["loras"]), *cells, cost]))
    if memory:
        lines += ["", _line(["peak memory, four LoRAs", *(TITLES[v] for v in variants)])]
        lines.append(_line(["---"] * (len(variants) + 1)))
        lines += [_line([name, *(f"{memory[v, name]:.2f} GiB" for v in variants)]) for name in types]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def run_in_comfyui(needs: dict[Path, str]) -> None:
    """Go on in ComfyUI's own Python, if this is another one."""
    own = COMFYUI / "venv" / "bin" / "python"
    python = Path(os.environ.get("COMFYUI_PYTHON") or (own if own.exists() else sys.executable))
    for needed, variable in needs.items():
        if not needed.is_file():
            raise SystemExit(f"{needed} is not there: say where it is in {variable}")
    if python.absolute() != Path(sys.executable).absolute():
        os.execv(python, [str(python), __file__, *sys.argv[1:]])


def main() -> None:
    options = arguments()
    needs = {COMFYUI / "main.py": "COMFYUI_PATH"}
    with_peer = "packs" in options.parts and "peer" in options.variants
    if with_peer and not options.gpu:  # there it is a variant that fails, and the others are measured
        needs[PEER / "nodes.py"] = "COMFYUI_GGUF"
    run_in_comfyui(needs)
    with_peer = with_peer and (PEER / "nodes.py").is_file()
    classes = start_comfyui([ROOT, PEER] if with_peer else [ROOT], options.device if options.gpu else "cpu")
    import comfyui_version
    import torch

    if options.gpu and options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: nothing to measure")

    if options.memory:
        variant, file = options.memory
        seconds_a_step(grafted(load(variant, Path(file), classes), len(RANKS), options.width), options)
        print(peak_resident())
        return
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = Path(temporary)
        write_files(folder, options.types, options.width)
        if options.gpu:
            print_and_keep(measure_on_gpu(folder, classes, options), options.markdown)
            return
        tables = []
        if "packs" in options.parts:
            rows = [row for type_name in options.types for row in measure(type_name, folder, classes, options)]
            measured = [] if options.no_memory else options.types
            memory = {(v, t): peak_memory(v, folder / f"{t}.gguf") for t in measured for v in options.variants}
            tables.append(table(rows, memory))
        if "strengths" in options.parts:
            tables += [f"{t}\n\n{measure_strengths(t, folder, classes, options.turns)}" for t in options.types]
    header = (
        f"ComfyUI {comfyui_version.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{options.side // 2} by {options.side // 2} + {options.text} tokens, medians of {options.turns} turns; "
        f"seconds {'of CPU time ' if options.cpu_time else ''}a step, fp32 where nothing else is said"
    )
    print_and_keep("\n\n".join([header, *tables]), options.markdown)


def print_and_keep(text: str, path: Path | None) -> None:
    print(text)
    if path:
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
