"""Forge and Forge Neo with and without Graft, each in one process on the same layers: `make bench-forge`.

Their own Flux with one single block at 3072, 256 image and 128 text tokens, fp32 on the CPU, with 0, 1
and 4 LoRAs of ranks 16/32/64/32 on every linear layer of the block. Forge runs LoRAs in two
ways: online builds them into each weight in each step, offline requantizes the weights once, where it can;
Neo runs them on GGUF models online alone.

    FORGE_PATH      folders of Forges (default ~/stable-diffusion-webui-forge and ~/forge-neo)
    FORGE_PYTHON    their Python (default each one's own in its venv)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDTH, TEXT = 3072, 4096
RANKS = (16, 32, 64, 32)
COUNTS = (0, 1, 4)
ROUNDS = {"online": 1, "graft": 3}  # in a turn, four times over; what differs by less takes more to tell apart


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["Q4_K", "Q8_0"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest  # noqa: F401, binds the checkout
    from forge import forges

    if not (found := forges()):
        raise SystemExit("there is no Forge: set FORGE_PATH")
    cases = ((forge, kind) for forge in found for kind in chosen.types)
    tables = [table(forge, kind, measured(forge, kind, chosen.turns), chosen.turns) for forge, kind in cases]
    text = "\n\n".join([*tables, f"{processor()}, {os.cpu_count()} cores"])
    print(text)
    if chosen.markdown:
        chosen.markdown.write_text(text + "\n", encoding="utf-8")


def measured(forge: Any, kind: str, turns: int) -> dict[str, list[float]]:
    """Write the model, then measure it with the Forge's Python; seconds by what was measured."""
    from forge_toys import flux_tensors
    from gguf_samples import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, "flux.gguf"), Path(folder, "seconds.json")
        write_gguf(file, flux_tensors(kind, width=WIDTH, text=TEXT, double=0, single=1))
        inside = [str(forge.python), str(Path(__file__).resolve()), "inside", str(file), str(out), str(turns)]
        subprocess.run(inside, cwd=forge.folder, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def table(forge: Any, kind: str, seconds: dict[str, list[float]], turns: int) -> str:
    """Medians, and what LoRAs add to the step without one of the same round."""

    def row(name: str, way: str) -> str:
        bare, *others = (seconds[f"{way} {n}"] for n in COUNTS)
        changed = statistics.median(a - b for a, b in zip(seconds[f"{way} change"], others[-1], strict=True))
        shares = [statistics.median(a / b - 1 for a, b in zip(other, bare, strict=True)) for other in others]
        steps = "".join(f" {statistics.median(o):.2f} s ({s:+.0%}) |" for o, s in zip(others, shares, strict=True))
        return f"| {name} | {statistics.median(bare):.2f} s |{steps} {max(0.0, changed):.2f} s |"

    host = "Forge Neo" if forge.is_neo else "Forge"
    lines = [
        f"| {kind}, a step | no LoRA | 1 LoRA | 4 LoRAs | a new strength of the four |", "|---|---|---|---|---|",
        row(f"{host}, online", "online"), row(f"{host} with Graft", "graft"),
    ]  # fmt: skip
    offline = f"refuses: it cannot write {kind}"
    if patching := seconds.get("offline patch"):
        offline = f"takes {statistics.median(patching):.1f} s to build four LoRAs, or a new strength, into the weights"
    said = f"Medians over {turns} turns." if forge.is_neo else f"Forge, offline, {offline}. Medians over {turns} turns."
    return "\n".join([*lines, "", said])


def processor() -> str:
    try:
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return found[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


# in Forge's Python, with Forge's folder as working directory


def inside(file: str, out: str, turns: int) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "in_forge"))
    import bootstrap  # before Forge
    import torch

    with torch.inference_mode():
        seconds = Bench(file, bootstrap.IS_NEO).run(turns)
    Path(out).write_text(json.dumps(seconds))


class Bench:
    """The model twice, as Forge holds it and as Graft does, and LoRAs for it."""

    def __init__(self, file: str, is_neo: bool) -> None:
        import torch
        from graft.scripts.forge.engine import Engine
        from graft.scripts.forge.host import detect

        self.engine, self.file, self.is_neo = Engine(detect()), file, is_neo
        self.theirs = self.patcher()
        self.engine.install()
        self.ours = self.patcher()
        random = torch.Generator().manual_seed(0)
        self.inputs = {
            "x": torch.randn(1, 16, 32, 32, generator=random), "timestep": torch.tensor([0.5]),
            "context": torch.randn(1, 128, TEXT, generator=random), "y": torch.randn(1, 768, generator=random),
            "guidance": torch.tensor([3.5]),
        }  # fmt: skip
        self.loras = [self.lora(rank, random) for rank in RANKS]

    def patcher(self) -> Any:
        import torch
        from backend import operations, utils
        from backend.nn.flux import IntegratedFluxTransformer2DModel
        from backend.patcher.base import ModelPatcher

        cpu = torch.device("cpu")
        more = {"out_channels": 16, "patch_size": 2} if self.is_neo else {}
        with operations.using_forge_operations(device=cpu, dtype=torch.float32, bnb_dtype="gguf"):
            model = IntegratedFluxTransformer2DModel(
                in_channels=16, vec_in_dim=768, context_in_dim=TEXT, hidden_size=WIDTH, mlp_ratio=4.0, num_heads=24,
                depth=0, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, guidance_embed=True,
                **more,
            )  # fmt: skip
        model.load_state_dict(utils.load_torch_file(self.file))
        return ModelPatcher(model, cpu, cpu)

    def lora(self, rank: int, random: Any) -> dict[str, Any]:
        """As the loader of this Forge makes it of a file."""
        import torch

        tensors, names = {}, {}
        for name, layer in self.theirs.model.named_modules():
            if self.engine.host.is_layer(layer) and "blocks" in name:
                rows, columns = layer.weight.shape
                tensors[f"{name}.lora_up.weight"] = torch.randn(rows, rank, generator=random) * 0.01
                tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=random) / columns**0.5
                names[name] = f"{name}.weight"
        return self.engine.host.load_lora(tensors, names)[0]

    def loaded(self, base: Any, count: int, strength: float, online: bool) -> Any:
        """The model as Forge loads it, with the first LoRAs in one of its two modes."""
        from backend import memory_management

        patcher = base.clone()
        for index, lora in enumerate(self.loras[:count]):
            patcher.add_patches(filename=str(index), patches=lora, strength_patch=strength, online_mode=online)
        if self.is_neo:
            patcher.partially_load(patcher.load_device, 1e32)
        memory_management.bake_gguf_model(patcher.model)
        if not self.is_neo:
            patcher.refresh_loras()
        return patcher.model

    def run(self, turns: int) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {}

        def note(name: str, run: Callable[[], Any]) -> None:
            start = time.perf_counter()
            run()
            seconds.setdefault(name, []).append(time.perf_counter() - start)

        kinds = [*((str(count), count) for count in COUNTS), ("change", COUNTS[-1])]
        for turn in range(turns + 1):
            for way, base in (("online", self.theirs), ("graft", self.ours)):
                self.install(way == "graft")
                self.loaded(base, 0, 1.0, True)(**self.inputs)  # what the other way left in the caches is gone
                for step in range(ROUNDS[way] * len(kinds)):
                    # each kind comes first as often as another: none pays for the order
                    first = step % len(kinds)
                    for name, count in kinds[first:] + kinds[:first]:
                        strength = 0.05 * (step + 1) if name == "change" else 0.8
                        model = self.loaded(base, count, strength, True)
                        note(f"{way} {name}", lambda model=model: model(**self.inputs))
            self.install(False)
            # where the type cannot be requantized, no note is taken
            if not self.is_neo:
                with contextlib.suppress(NotImplementedError):
                    note("offline patch", lambda: self.loaded(self.theirs, COUNTS[-1], 0.8, False))
            self.loaded(self.theirs, 0, 1.0, True)
            if turn == 0:
                seconds.clear()  # to warm up
        return seconds

    def install(self, ours: bool) -> None:
        if ours:
            self.engine.install()
        else:
            self.engine.uninstall()


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        inside(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
