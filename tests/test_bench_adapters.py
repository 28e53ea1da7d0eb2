"""`make bench-adapters` runs from end to end at a toy size; a partial run keeps what was measured before it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import bench_adapters as bench


def test_every_kind_has_a_line() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_adapters.py"), "--toy"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[2:]
    assert [line[:28].strip() for line in lines] == list(bench.KINDS)
    assert all(line[28:].split()[:2] == ["toy", "8"] for line in lines)


def test_narrow_blocks_are_left_out_where_they_do_not_fit() -> None:
    narrow = bench.KINDS["BOFT, blocks up to 8"]
    # 3072 = 2¹⁰ · 3 is 512 blocks of 6 in ten stages; 21504 = 2¹⁰ · 21 has no even divisor below 42 with 2ᵖ others
    assert bench.boft_shape(3072, 8) == (10, 6) and narrow.macs(3072, 3072) == 10 * 6 * 3072
    assert narrow.macs(21504, 3072) == 0


def test_a_partial_run_keeps_the_other_rows_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "results" / "adapters.csv"
    first = bench.Row("LoRA", "proj", 384, "Q4_K", "fp32", "here", 50.0, 2.1, 3.0, 1.0, 5.0, 120.0)
    other = replace(first, kind="OFT")
    bench.write(path, [first, other])
    bench.write(path, [replace(first, percent=2.5)])
    with path.open(newline="") as file:
        assert [(r["kind"], r["percent"]) for r in csv.DictReader(file)] == [("LoRA", "2.5"), ("OFT", "3.0")]
    bench.write(path, [replace(first, device="elsewhere")])
    with path.open(newline="") as file:
        assert [r["device"] for r in csv.DictReader(file)] == ["elsewhere"]
