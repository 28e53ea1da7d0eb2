"""`make bench-gpu` and `make kernels-report` run from end to end, at toy sizes in the interpreter."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script: str, *args: str, interpret: bool = True) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # without the others' cores: toy matrices are faster on one thread
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, str(BENCHMARKS / script), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bench_writes_csv_and_plot(tmp_path):
    run("bench_gpu.py", "--toy", "--device", "cpu", "--out", str(tmp_path / "gpu.csv"))
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["what"] for row in rows} == {"dequantize", "matvec", "linear", "step"}
    assert {row["variant"] for row in rows} == {"graft", "F.linear", "torch decode"}
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert row["gpu"] == "cpu" and row["torch"] and row["triton"] and row["commit"]
    assert {(row["variant"], row["m"], row["loras"]) for row in rows if row["what"] == "linear"} == {
        *((variant, m, n) for variant in ("graft", "torch decode") for m in "12" for n in "01"),
        *(("F.linear", m, "0") for m in "12"),
    }
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_tuning_writes_json(tmp_path):
    run("bench_gpu.py", "--toy", "--device", "cpu", "--tune", str(tmp_path / "tiles.json"))
    found = json.loads((tmp_path / "tiles.json").read_text())
    assert found["rows"]["2"]["gain"] > 0
    assert set(found["rows"]["2"]["tile"]) == {"m", "n", "unit", "warps", "stages"}


def test_bench_without_a_gpu_says_so():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(AssertionError, match="there is no GPU"):
        run("bench_gpu.py")


def test_report_prints_a_line_per_kernel():
    args = ("--formats", "Q8_0", "--kernels", "dequantize", "--targets", "sm_86", "gfx942", "--processes", "1")
    header, *lines = run("kernels_report.py", *args, interpret=False).splitlines()
    assert header.split()[:3] == ["type", "kernel", "target"]
    assert [line.split()[:3] for line in lines] == [["Q8_0", "dequantize", "sm_86"], ["Q8_0", "dequantize", "gfx942"]]
