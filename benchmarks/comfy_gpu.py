"""A step of a real ComfyUI on a GPU: Graft, ComfyUI-GGUF and ComfyUI's own unquantized bf16 in one process, in turn.

A part of `make bench-comfy`, by `--gpu`. Every time goes into a CSV as soon as it is known, and what fails, a pack, a
LoRA or a step that the card has no memory for, is a line there and stops nothing else. With `--device cpu` and small
sizes everything runs without a GPU.
"""

from __future__ import annotations

import csv
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "bf16"


@dataclass(frozen=True)
class Step:
    """A line of the CSV.

    Attributes:
        turn: 0 is the first step of a model, which loads it and compiles kernels and does not count.
        seconds: of the diffusion model's forward pass; NaN where it failed.
        peak: MiB allocated on the GPU at most beyond what was before, in the step; NaN where nobody counts.
    """

    type: str
    loras: int
    variant: str
    turn: int
    seconds: float
    peak: float = math.nan
    note: str = ""


def machine(device: str) -> dict[str, str]:
    """What the figures belong to."""
    import comfyui_version
    import torch

    gpu = torch.cuda.get_device_name() if device == "cuda" else "none: CPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    about = {"gpu": gpu, "torch": torch.__version__, "comfyui": comfyui_version.__version__}
    return about | {"commit": commit.strip() or "unknown"}


class Record:
    """The CSV, and what is in it."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.steps: list[Step] = []
        self.about, self._file = about, path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, [*Step.__dataclass_fields__, *about])
        self._writer.writeheader()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, step: Step) -> None:
        self.steps.append(step)
        self._writer.writerow(asdict(step) | self.about)
        self._file.flush()
        which = f"{step.type} {step.loras} LoRAs, {step.variant}, turn {step.turn}"
        print(f"  {which}: {step.seconds:.4f} s {step.note}", flush=True)


def waiting_clock(device: str) -> Callable[[], float]:
    """The time once the GPU has done all that it was told to."""
    import torch

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def unquantized(pack: Callable, path: Path) -> Any:
    """ComfyUI's own model on the same weights, decoded and rounded to bf16; LoRAs are merged into it once."""
    import comfy.sd
    import torch

    reader, scales = pack("ops.files.gguf"), pack("ops.files.scales")
    file = reader.open_gguf(path)
    weights = scales.weights_of(reader.diffusion_tensors(file), file)
    state = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.bfloat16})


def measure(
    type_name: str, loaders: dict[str, Callable[[], Any]], grafted: Callable[[Any, int], Any],
    seconds: Callable[[Any], float], counts: Iterable[int], turns: int, record: Record,
) -> None:  # fmt: skip
    """Steps of every variant with each number of LoRAs, all variants in every turn.

    Args:
        loaders: a MODEL by variant.
        grafted: a MODEL with so many LoRAs.
        seconds: of a step of a MODEL.
    """
    bases: dict[str, Any] = {}
    for variant, load in loaders.items():
        with _kept_as_a_line(record, Step(type_name, 0, variant, 0, math.nan)):
            bases[variant] = load()
    for count in counts:
        models: dict[str, Any] = {}
        for variant, base in bases.items():
            with _kept_as_a_line(record, Step(type_name, count, variant, 0, math.nan)):
                models[variant] = grafted(base, count)
        for turn in range(turns + 1):
            for variant in list(models):
                model = models.pop(variant)
                with _kept_as_a_line(record, Step(type_name, count, variant, turn, math.nan)):
                    taken, peak = _peaking(partial(seconds, model))
                    record.add(Step(type_name, count, variant, turn, taken, peak))
                    models[variant] = model  # once one has failed it is not tried again


@contextmanager
def _kept_as_a_line(record: Record, failed: Step) -> Iterator[None]:
    """Why what is within did not run is a line."""
    try:
        yield
    except Exception as error:  # of a host, a pack, a driver: the others are measured nevertheless
        text = (str(error).strip().splitlines() or [""])[0]
        record.add(replace(failed, note=f"{type(error).__name__}: {text:.200}"))


def _peaking(run: Callable[[], float]) -> tuple[float, float]:
    """Its result, and the MiB that were allocated at most meanwhile."""
    import torch

    if not torch.cuda.is_available():
        return run(), math.nan
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    taken = run()
    return taken, (torch.cuda.max_memory_allocated() - before) / 2**20


def table(steps: list[Step], titles: dict[str, str]) -> str:
    """Medians with their 20 and 80 % quantiles, and shares of the unquantized step with as many LoRAs."""
    counted: dict[tuple[str, int, str], list[float]] = {}
    for step in steps:
        if step.turn and not math.isnan(step.seconds):
            counted.setdefault((step.type, step.loras, step.variant), []).append(step.seconds)
    medians = {key: statistics.median(times) for key, times in counted.items()}
    lines = ["| type | LoRAs | variant | a step | of unquantized bf16 | LoRAs cost |", "|---|---|---|---|---|---|"]
    for (name, count, variant), times in counted.items():
        middle, base = medians[name, count, variant], medians.get((name, count, BASELINE))
        bare = medians.get((name, 0, variant))
        share = f"{middle / base:.2f}" if base else ""
        cost = f"{middle / bare - 1:+.1%}" if bare and count else ""
        spread = f"{_quantile(times, 0.2):.4f} to {_quantile(times, 0.8):.4f}"
        lines.append(f"| {name} | {count} | {titles[variant]} | {middle:.4f} s ({spread}) | {share} | {cost} |")
    failed = [step for step in steps if step.note]
    lines += [f"\n{s.type}, {s.loras} LoRAs, {titles[s.variant]}: {s.note}" for s in failed]
    return "\n".join(lines)


def _quantile(times: list[float], share: float) -> float:
    ordered = sorted(times)
    return ordered[round(share * (len(ordered) - 1))]
