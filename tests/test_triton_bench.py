"""`make bench-gpu` and `make kernels-report` run from end to end, at toy sizes in the interpreter."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script: str, *args: str, interpret: bool = True) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # without the others' cores: toy matrices are faster on one thread
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, str(BENCHMARKS / script), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stage(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_stage_writes_its_csv(tmp_path):
    run("bench_gpu.py", "--toy", "--device", "cpu", "--together", "--out", str(tmp_path))
    checks = [row for name in ("available", "decode", "products", "repeats", "encode") for row in stage(tmp_path, name)]
    assert {row["what"] for row in checks} == {"available", "decode", "product", "repeat", "encode"}
    assert all(row["ok"] == "True" and not row["note"] for row in checks), checks
    # the interpreter cuts bf16 off where a GPU rounds: half of the last bits, and nothing else, differ here
    assert {row["different"] for row in checks if row["dtype"] not in ("bf16", "int8")} == {"0"}
    measured = ("rates", "linear", "int8", "columns", "scratch", "step")
    figures = [row for name in measured for row in stage(tmp_path, name)]
    assert {row["what"] for row in figures} == {
        "copy", "dequantize", "matvec", "linear", "encode", "int8", "columns", "scratch", "step",
    }  # fmt: skip
    for row in figures:
        assert 0 <= float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) and float(row["host"]) >= 0
        assert row["gpu"] == "cpu" and row["torch"] and row["triton"] and row["commit"]
    assert {(row["variant"], row["m"], row["loras"]) for row in figures if row["what"] == "linear"} == {
        *((variant, m, n) for variant in ("graft", "torch decode") for m in "12" for n in "01"),
        *(("F.linear", m, "0") for m in "12"),
    }


def test_a_wrong_type_is_said_and_not_measured(tmp_path):
    """With a decode of Q8_0 that is wrong by more than one unit in the last place."""
    program = (
        "import bench_gpu, torch; from gpu import stages; from graft.kernels import dispatch\n"
        "right = dispatch.dequantize\n"
        "def wrong(data, fmt, *args, backend='auto', **more):\n"
        "    weight = right(data, fmt, *args, backend='torch', **more)\n"
        "    return weight if backend == 'torch' or str(fmt) != 'Q8_0' else weight * 1.02\n"
        "dispatch.dequantize = wrong\n"
        "raise SystemExit(bench_gpu.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--toy", "--device", "cpu", "--together", "--stages", "decode", "rates",
         "--out", str(tmp_path)],
        cwd=BENCHMARKS, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {(row["type"], row["ok"]) for row in stage(tmp_path, "decode")} == {("Q8_0", "False"), ("IQ2_XXS", "True")}
    assert {row["type"] for row in stage(tmp_path, "rates")} == {"U8", "IQ2_XXS"}


def test_every_kernel_of_a_card_is_compiled_first(monkeypatch):
    """Decoding to three dtypes and to int8; matvec and the fused kernel in its tiles, with and without a LoRA."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu.compiling import compile_type
    from graft.kernels.triton_ import launch, plan

    def compile(self, *arguments):
        compiled.append((self.kernel.__name__, self.constants.get("BLOCK_M")))
        if self.constants.get("BLOCK_M") == 32:
            raise RuntimeError("out of registers\nmore of it")

    compiled = []
    monkeypatch.setattr(launch.Launch, "compile", compile)
    monkeypatch.setattr(plan, "architecture", lambda device: "sm_90")
    done = compile_type("Q4_K", torch.device("cuda", 0))
    tiles = [("matmul_kernel", m) for m in (16, 32, 64)]
    assert sorted(compiled, key=str) == sorted(
        [("dequantize_kernel", None)] * 3
        + [("int8_kernel", None), ("int8_largest_kernel", None)]
        + [("project_kernel", None)] + 2 * [("matvec_kernel", None), *tiles], key=str
    )
    assert done.kernels == 12 and done.note == "; ".join(["matmul_kernel: RuntimeError: out of registers"] * 2)


def test_a_cache_is_carried(monkeypatch, tmp_path):
    """What was compiled without a device is found with one, in another folder: here the second has none either."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = (
        "import sys; from pathlib import Path; from gpu import carried\n"
        "carried.prepare(Path(sys.argv[1])); carried.stand_in_for('sm_90')\n"
        "import torch; from graft.kernels import by_name, triton_\n"
        "triton_.dequantize(torch.zeros(2, 34, dtype=torch.uint8), by_name('Q8_0'), torch.empty(2, 32))"
    )
    here, there = tmp_path / "here", tmp_path / "there"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def compile_into(folder: Path) -> dict[str, int]:
        command = [sys.executable, "-c", program, str(folder)]
        done = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*.cubin")}

    compiled = compile_into(here)
    here.rename(there)
    assert compiled and compile_into(there) == compiled
    assert not list(there.rglob("*.ptx")) and not here.exists()


def test_no_stage_stops_the_next(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bench_gpu import isolated

    programs = {"hangs": "while True: pass", "crashes": "import os; os.abort()", "runs": "pass"}
    outcome = isolated(list(programs), lambda name: [sys.executable, "-c", programs[name]], 2)
    assert [text.split(",")[0] for text in outcome.values()] == ["ended after 2 s", "failed (-6)", "done"]


def test_the_plot_shows_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu import plot

    about = {"gpu": "a card", "torch": "2"}
    for name, rows in {
        "linear": [
            {"variant": v, "type": t, "n": "8", "k": "4", "m": m, "loras": "0", "p50": p} | about
            for v, t, p in (("F.linear", "BF16", "1.0"), ("graft", "Q4_K", "1.1")) for m in ("1", "16")
        ],
        "rates": [{"what": "matvec", "variant": "graft", "type": "Q4_K", "share": "0.8"} | about],
    }.items():  # fmt: skip
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    plot.plot(tmp_path, tmp_path / "figures.png")
    assert (tmp_path / "figures.png").stat().st_size > 10_000


def test_tuning_writes_every_tile(tmp_path):
    run("bench_gpu.py", "--toy", "--device", "cpu", "--together", "--stages", "tune", "--out", str(tmp_path))
    rows = stage(tmp_path, "tune")
    assert len(rows) == 2 and all(float(row["gain"]) > 0 and row["m"] == "2" for row in rows)
    assert float(rows[0]["time"]) <= float(rows[1]["time"])


def test_bench_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(AssertionError, match="there is no GPU"):
        run("bench_gpu.py")


def test_report_prints_a_line_per_kernel():
    args = ("--formats", "Q8_0", "--kernels", "dequantize", "--targets", "sm_86", "gfx942", "--processes", "1")
    header, *lines = run("kernels_report.py", *args, interpret=False).splitlines()
    assert header.split()[:3] == ["type", "kernel", "target"]
    assert [line.split()[:3] for line in lines] == [["Q8_0", "dequantize", "sm_86"], ["Q8_0", "dequantize", "gfx942"]]
