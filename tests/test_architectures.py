"""docs/architectures.md is of the architectures that the pack has names for."""

from __future__ import annotations

import sys

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import architectures_table as table

RIGHT = {"base": 1e-6, "lora": 2e-5, "restored": True}
SAVED = {"base": 3e-6, "cost": 0.1}


def test_the_table_has_a_line_for_every_architecture_under_its_name():
    lines = [line for line in table.TABLE.read_text(encoding="utf-8").splitlines() if "| `" in line]
    heads = [table.head(name, known) for name, known in table.names().items()]
    assert [line for line, start in zip(lines, heads, strict=True) if not line.startswith(start)] == []


def test_a_line_shows_the_worst_of_all_files():
    known = table.names()["WAN21_T2V"]
    halves = {**RIGHT, "base": 9e-6, "lora": 1e-5}
    line, right = table.row("WAN21_T2V", known, {"weights": RIGHT, "halves": halves, "saved": SAVED})
    names = "Wan 2.1 / 2.2 T2V, Wan 2.2 I2V, Wan 2.2 Fun Control"
    assert (line, right) == (f"| {names} | `WAN21_T2V` | 0.3.64 | 9.0e-06 | 2.0e-05 | 3.0e-06 |  |\n", True)


def test_a_line_says_what_is_wrong():
    known = table.names()["SD3"]
    for changed in ({"base": 2e-5}, {"lora": 2e-4}, {"restored": False}):
        assert not table.row("SD3", known, {"weights": RIGHT, "matrices": {**RIGHT, **changed}, "saved": SAVED})[1]
    assert not table.row("SD3", known, {"weights": RIGHT, "saved": {**SAVED, "base": 2e-5}})[1]
    line, right = table.row("SD3", known, {"weights": RIGHT, "matrices": {"error": "GraftError: no"}})
    assert line.endswith("| | | matrices: GraftError: no |\n") and not right
