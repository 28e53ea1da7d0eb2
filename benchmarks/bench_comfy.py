"""Graft and ComfyUI-GGUF in one ComfyUI process, in turn, on the same files: `make bench-comfy`.

Flux blocks (1 double, 1 single) at 3072, 256 image and 128 text tokens, with 0, 1 and 4 LoRAs of ranks
16/32/64/32 on every linear layer of the blocks, through the stock LoRA loader and ComfyUI's own sampler.
Prints medians over the turns and their ratios, and each pack's peak memory in a process of its own.

    COMFYUI_PATH     ComfyUI's folder (default ~/ComfyUI); COMFYUI_PYTHON its Python (default its venv's)
    COMFYUI_GGUF     a checkout of city96/ComfyUI-GGUF (default ~/peers/ComfyUI-GGUF)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH", str(Path.home() / "ComfyUI")).split(os.pathsep)[0])
PEER = Path(os.environ.get("COMFYUI_GGUF", Path.home() / "peers" / "ComfyUI-GGUF"))
RANKS = (16, 32, 64, 32)
LORAS = (0, 1, 4)
# each beside what the loader is told: the peer takes the host's dtype, which on a CPU is fp32, and so does "graft"
VARIANTS = {"peer": "auto", "graft": "auto", "graft bf16": "bf16"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["Q4_K", "Q8_0"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--memory", nargs=2, metavar=("VARIANT", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def start_comfyui() -> dict:
    """Import ComfyUI on the CPU and load both packs through its own loader; returns their node classes."""
    sys.path[:0] = [str(COMFYUI), str(ROOT / "tests"), str(ROOT / "tests" / "in_comfyui")]
    sys.argv = ["main.py", "--cpu"]
    os.chdir(COMFYUI)
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes

    for pack in (ROOT, PEER):
        if not asyncio.run(nodes.load_custom_node(str(pack))):
            raise SystemExit(f"ComfyUI could not load the pack in {pack}")
    return nodes.NODE_CLASS_MAPPINGS


def write_files(folder: Path, types: list[str]) -> None:
    from architectures import ARCHITECTURES, write_model

    for type_name in types:
        write_model(ARCHITECTURES["flux"], type_name, folder / f"{type_name}.gguf")


def load(variant: str, path: Path, classes: dict):
    """A MODEL as the pack's own loader node returns it."""
    import folder_paths

    # both packs list the folders of diffusion models under keys of their own
    for key in ("unet", "diffusion_models", "unet_gguf"):
        paths, extensions = folder_paths.folder_names_and_paths.get(key, ([], set()))
        if str(path.parent) not in paths:
            folder_paths.folder_names_and_paths[key] = ([str(path.parent), *paths], set(extensions) | {".gguf"})
    if variant == "peer":
        return classes["UnetLoaderGGUF"]().load_unet(path.name)[0]
    return classes["GraftUNETLoader"]().load(path.name, compute_dtype=VARIANTS[variant])["result"][0]


def grafted(model, count: int):
    """The model with the first `count` LoRAs, through what the stock LoRA loader calls."""
    from generation import with_lora
    from loras import make_lora

    shapes = {k: v.shape for k, v in flux_shapes().items()}
    for seed, rank in enumerate(RANKS[:count]):
        blocks = ("double_blocks.0", "single_blocks.0")
        model = with_lora(model, make_lora(model.model, shapes, "native", blocks, rank, seed), 0.8)
    return model


def flux_shapes() -> dict:
    from architectures import ARCHITECTURES

    return {f"diffusion_model.{k}": v for k, v in ARCHITECTURES["flux"].build().state_dict().items()}


def seconds_a_step(model) -> float:
    """Seconds of the diffusion model's forward pass in a step of ComfyUI's sampler."""
    import comfy.sample
    import torch
    from architectures import ARCHITECTURES

    pooled = ARCHITECTURES["flux"].pooled
    g = torch.Generator().manual_seed(0)
    latent = torch.zeros(1, 16, 32, 32)
    condition = [[torch.randn(1, 128, 4096, generator=g), {"pooled_output": torch.randn(1, pooled, generator=g)}]]
    noise = torch.randn(latent.shape, generator=g)
    times: list[float] = []
    network = model.model.diffusion_model
    hooks = [
        network.register_forward_pre_hook(lambda *_: times.append(-time.perf_counter())),
        network.register_forward_hook(lambda *_: times.append(time.perf_counter())),
    ]
    comfy.sample.sample(model, noise, 1, 1.0, "euler", "simple", condition, condition, latent, disable_pbar=True)
    for hook in hooks:
        hook.remove()
    return sum(times)


def measure(type_name: str, folder: Path, classes: dict, turns: int) -> list[dict]:
    """Rows of one type: median seconds a step of every variant with 0, 1 and 4 LoRAs."""
    bases = {variant: load(variant, folder / f"{type_name}.gguf", classes) for variant in VARIANTS}
    rows = []
    for count in LORAS:
        models = {variant: grafted(base, count) for variant, base in bases.items()}
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for model in models.values():
            seconds_a_step(model)  # loads it
        for _ in range(turns):
            for variant, model in models.items():
                times[variant].append(seconds_a_step(model))
        medians = {variant: statistics.median(seconds) for variant, seconds in times.items()}
        rows.append({"type": type_name, "loras": count, **medians})
        each = ", ".join(f"{variant} {[round(t, 2) for t in seconds]}" for variant, seconds in times.items())
        print(f"  {type_name} {count} LoRAs: {each}", flush=True)
    return rows


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
    none = {row["type"]: row for row in rows if row["loras"] == 0}
    lines = [
        "| type | LoRAs | ComfyUI-GGUF | Graft | Graft, bf16 | times its speed | in bf16 | LoRAs cost: theirs / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bare = none[row["type"]]
        cost = " / ".join(f"{row[v] / bare[v] - 1:+.0%}" for v in ("peer", "graft")) if row["loras"] else ""
        seconds = " | ".join(f"{row[v]:.2f} s" for v in VARIANTS)
        ratios = " | ".join(f"{row['peer'] / row[v]:.2f}" for v in ("graft", "graft bf16"))
        lines.append(f"| {row['type']} | {row['loras']} | {seconds} | {ratios} | {cost} |")
    lines += ["", "| peak memory, four LoRAs | ComfyUI-GGUF | Graft | Graft, bf16 |", "|---|---|---|---|"]
    for type_name in none:
        lines.append(f"| {type_name} | " + " | ".join(f"{memory[v, type_name]:.2f} GiB" for v in VARIANTS) + " |")
    return "\n".join(lines)


def run_in_comfyui() -> None:
    """Go on in ComfyUI's own Python, if this is another one."""
    own = COMFYUI / "venv" / "bin" / "python"
    python = Path(os.environ.get("COMFYUI_PYTHON") or (own if own.exists() else sys.executable))
    for needed, variable in ((COMFYUI / "main.py", "COMFYUI_PATH"), (PEER / "nodes.py", "COMFYUI_GGUF")):
        if not needed.is_file():
            raise SystemExit(f"{needed} is not there: say where it is in {variable}")
    if python.absolute() != Path(sys.executable).absolute():
        os.execv(python, [str(python), __file__, *sys.argv[1:]])


def main() -> None:
    options = arguments()
    run_in_comfyui()
    classes = start_comfyui()
    import comfyui_version
    import torch

    if options.memory:
        variant, file = options.memory
        seconds_a_step(grafted(load(variant, Path(file), classes), len(RANKS)))
        print(peak_resident())
        return
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = Path(temporary)
        write_files(folder, options.types)
        rows = [row for type_name in options.types for row in measure(type_name, folder, classes, options.turns)]
        memory = {(v, t): peak_memory(v, folder / f"{t}.gguf") for t in options.types for v in VARIANTS}
    header = (
        f"ComfyUI {comfyui_version.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"medians of {options.turns} turns; seconds a step, fp32 where nothing else is said"
    )
    text = f"{header}\n\n{table(rows, memory)}"
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
