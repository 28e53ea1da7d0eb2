"""No expression takes more than linear time on a name that a stranger may have chosen."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import pkgutil
import re
import time
import timeit

import graft.kernels
import graft.ops
import pytest
from conftest import ROOT
from graft.ops.workflows import names

LONG, SHORT = 64_000, 4_000
"""Characters; the GGUF reader lets a name have 65,535 bytes."""
MUCH = 0.2
"""Seconds for one name."""


def held_by_modules() -> dict[str, re.Pattern[str]]:
    """What the modules without a host hold, whatever it was put together from."""
    found: dict[str, re.Pattern[str]] = {}

    def collect(name: str, value: object) -> None:
        if isinstance(value, re.Pattern):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}[{key}]", inner)
        elif isinstance(value, (tuple, list)):
            for i, inner in enumerate(value):
                collect(f"{name}[{i}]", inner)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                collect(f"{name}.{field.name}", getattr(value, field.name))

    for package in (graft.kernels, graft.ops):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".triton_" not in module.name:
                for name, value in vars(importlib.import_module(module.name)).items():
                    collect(f"{module.name}.{name}", value)
    return found


def written_in_sources() -> dict[str, re.Pattern[str]]:
    """What stands as text in a call of `re`, in all of the pack."""
    found = {}
    for path in (ROOT / name for folder in ("nodes", "ops", "kernels", "scripts", "tools") for name in sources(folder)):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("re.") and call.args:
                pattern = call.args[0]
                if isinstance(pattern, ast.Constant) and isinstance(pattern.value, str):
                    found[f"{path.relative_to(ROOT)}:{call.lineno}"] = re.compile(pattern.value)
    return found


def sources(folder: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).rglob("*.py"))]


def in_the_table() -> dict[str, re.Pattern[str]]:
    """Of `web/loaders.json`, which the page's JavaScript compiles as well."""
    table = json.loads((ROOT / "web" / "loaders.json").read_text(encoding="utf-8"))
    texts = {"wrapper": table["wrapper"], **{key: table["names"][key] for key in ("quantization", "fillers")}}
    return {f"loaders.json[{key}]": re.compile(text) for key, text in texts.items()}


PATTERNS = {
    # each once, by the first place that has it
    pattern: place
    for place, pattern in reversed((held_by_modules() | written_in_sources() | in_the_table()).items())
}


def pieces(pattern: str) -> set[str]:
    """That match parts of an expression, as it spells them, and some that many take."""
    plain = re.sub(r"\(\?(?:[:=!]|<[=!]|P<\w+>)|\[\._\]|\[\.\]|\\\.", lambda m: "." if "." in m[0] else "(", pattern)
    spelled = {re.sub(r"\\d", "1", piece) for piece in re.split(r"[|()^$*+?{}\[\]\s]+", plain)}
    common = {"1", ".1", "1.", ".a", "a.", "_", "a", "A", "-_", " "}
    return {piece for piece in spelled if 2 <= len(piece) <= 60} | common


def seconds(pattern: re.Pattern[str], piece: str, size: int, repeat: int = 3) -> float:
    """Of processor time, for a search in a name of `size` characters that repeats a piece."""
    name = ("a" + piece * (size // len(piece)))[:size] + "!."
    return min(timeit.repeat(lambda: pattern.search(name), time.process_time, number=1, repeat=repeat))


def is_linear(pattern: re.Pattern[str]) -> bool:
    """A name sixteen times as long takes sixteen times as long; 256 times, where it is quadratic."""
    for piece in sorted(pieces(pattern.pattern)):
        # what takes as little as this takes little for the longest name, too, even if it grows by the square
        if seconds(pattern, piece, SHORT, repeat=1) * (LONG / SHORT) ** 2 < MUCH:
            continue
        # three microseconds a character are no square, which would be far more
        if (long := seconds(pattern, piece, LONG, repeat=1)) >= MUCH and long >= 64 * seconds(pattern, piece, SHORT):
            return False
    return True


@pytest.mark.parametrize("pattern", PATTERNS, ids=PATTERNS.values())
def test_no_name_takes_an_expression_more_than_linear_time(pattern: re.Pattern[str]) -> None:
    assert is_linear(pattern)


@pytest.mark.parametrize(
    "text", [r"\.lora_magnitude_vector(?:\.[^.]+)*$", r"[-_. ]+q\d", r"(?:layer|h)s?\w*\.\d+\."]
)
def test_an_expression_that_is_quadratic_would_be_seen(text: str) -> None:
    assert not is_linear(re.compile(text))


def test_all_places_are_looked_at() -> None:
    where = " ".join(PATTERNS.values())
    for place in ("graft.ops.recipes", "graft.ops.places", "graft.ops.files.dialects", "nodes/", "loaders.json"):
        assert place in where


def test_a_file_name_of_a_workflow_may_have_any_length() -> None:
    """No system has one that is longer than 255 characters."""
    there = [f"a folder/{'_'.join('abcdefgh' * 4)}-{n}-Q4_K_M.gguf" for n in range(200)]
    for hostile in ("a" + "_" * 64_000, "ab" * 32_000 + ".gguf", "-q4_k" * 12_000, "1" * 64_000 + "b", "aB" * 32_000):
        assert timeit.timeit(lambda hostile=hostile: names.nearest(hostile, there), number=1) < 2
