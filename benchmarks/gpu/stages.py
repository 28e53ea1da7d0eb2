"""The stages of `bench_gpu.py` in their order, and how one is run."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import compiling, correctness, figures, setting
from .setting import Setting

CHECKS = ("available", "decode", "products", "repeats", "encode")
"""Stages that look at results; a type that one finds wrong is not measured."""


@dataclass(frozen=True)
class Fact:
    """A line of the CSV of the machine."""

    what: str
    value: str

    def __str__(self) -> str:
        return f"{self.what}: {self.value}"


def machine(of: Setting) -> Iterator[Fact]:
    """What the figures belong to."""
    for what, value in setting.surroundings(of.device).items():
        yield Fact(what, value)


STAGES: dict[str, Callable[[Setting], Iterator[Any]]] = {
    "machine": machine,
    "compiling": compiling.compiling,
    "available": correctness.available,
    "decode": correctness.decode,
    "products": correctness.products,
    "repeats": correctness.repeats,
    "encode": correctness.encode,
    "rates": figures.rates,
    "linear": figures.linear,
    "int8": figures.int8_products,
    "columns": figures.columns,
    "scratch": figures.scratch_sizes,
    "step": figures.step,
}
EXTRA = {"tune": figures.tune}
"""Run only where they are named: they take minutes."""
EVERY = STAGES | EXTRA


def run(name: str, of: Setting, folder: Path) -> int:
    """One stage: its CSV is written line by line, so that a stage that is ended keeps what it has; lines written."""
    about, count = setting.machine(of.device), 0
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = None
        for row in EVERY[name](of):
            count += 1
            numbers = {key: round(v, 6) if isinstance(v, float) else v for key, v in asdict(row).items()}
            if writer is None:
                writer = csv.DictWriter(file, [*numbers, *about])
                writer.writeheader()
            writer.writerow(numbers | about)
            file.flush()
            print(f"{name:10} {row}", flush=True)
    return count


def read(name: str, folder: Path) -> list[dict[str, str]]:
    """The lines of a stage that has run, or none."""
    path = folder / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def wrong_types(folder: Path) -> frozenset[str]:
    """Types of which a stage that has run said that they are wrong."""
    return frozenset(row["type"] for name in CHECKS for row in read(name, folder) if row["ok"] == "False")
