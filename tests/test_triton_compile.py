"""The compiled kernels' budgets, held without a GPU: spills, shared memory, wide stores, tensor cores, instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from graft.benchmarks.kernels_report import DTYPES, TARGETS, Case, Usage
from graft.kernels.formats import FORMATS

REPORT = Path(__file__).resolve().parent.parent / "benchmarks" / "kernels_report.py"
DECODABLE = [fmt.name for fmt in FORMATS if fmt.triton]
# one of each kind of decode: aligned and not, with code books and without
KINDS = ["Q8_0", "Q4_K", "Q6_K", "IQ2_XS", "IQ4_XS", "MXFP4"]
EVERYTHING = bool(os.environ.get("GRAFT_EVERY_TYPE"))
"""Every type and tile for every card, as `make kernels` has it; `make test` has one of each kind, for three cards."""
CARDS = TARGETS if EVERYTHING else ("sm_86", "sm_90", "gfx1100")
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]

# lane instructions per weight on sm_86, in each kernel. At the speed of its memory a 3090 has time for 49 of them in
# dequantize, an H200 for 16. MXFP4's blocks of 17 bytes can only be read byte by byte
BUDGETS = dict.fromkeys(DECODABLE, 18) | {
    "BF16": 5, "Q8_0": 13, "Q4_0": 12, "Q4_1": 12, "Q4_K": 12, "Q5_0": 16, "Q5_1": 16, "Q5_K": 16, "IQ4_XS": 16,
    "MXFP4": 21,
}  # fmt: skip


def survey(cases: list[Case]) -> list[Usage]:
    """Compile in a process of its own: in this one Triton may be in its interpreter."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    processes = str(max(1, (os.cpu_count() or 1) // workers))
    text = json.dumps([vars(case) for case in cases])
    command = [sys.executable, str(REPORT), "--processes", processes, "--cases", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Usage(case=Case(**row.pop("case")), **row) for row in json.loads(done.stdout)]


def assert_sound(rows: list[Usage]) -> None:
    """What holds for every kernel: nothing spills, shared memory fits every card, offsets of rows are 64-bit."""
    limit = 99 * 1024
    wrong = [row for row in rows if row.spilled or row.shared > limit or not row.wide_rows]
    wrong += [row for row in rows if row.case.target == "gfx1100" and row.shared > 64 * 1024]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("target", [target for target in CARDS if target != "sm_86"])
def test_dequantize(target):
    rows = survey([Case("dequantize", name, target, count=False) for name in (DECODABLE if EVERYTHING else KINDS)])
    assert_sound(rows)
    assert all(row.wide_stores for row in rows), [row for row in rows if not row.wide_stores]


def test_dequantize_to_the_other_dtypes():
    names, dtypes = DECODABLE if EVERYTHING else KINDS, ("fp16", "fp32")
    rows = survey([Case("dequantize", name, "sm_86", dtype, count=False) for name in names for dtype in dtypes])
    assert_sound(rows)
    assert all(row.wide_stores for row in rows), [row for row in rows if not row.wide_stores]


@pytest.mark.parametrize("kernel", ["dequantize", "matvec", "matmul"])
def test_instructions_per_weight(kernel):
    rows = survey([Case(kernel, name, "sm_86") for name in (DECODABLE if EVERYTHING else KINDS)])
    assert_sound(rows)
    over = {row.case.fmt: row.instructions for row in rows if row.instructions > BUDGETS[row.case.fmt]}
    assert not over
    loads = {row.case.fmt: row.loads for row in rows}
    # halves of words took 0.56 and 1.12, and were loaded anew for each of the weights that lie in them
    assert loads["Q8_0"] < 0.4 and loads["Q6_K"] < (0.6 if kernel == "matmul" else 0.4)
    if kernel == "dequantize":
        assert all(row.wide_stores for row in rows)
    if kernel == "matmul":
        assert all(row.tensor_cores for row in rows)


@pytest.mark.parametrize("target", CARDS)
def test_linear_kernels(target):
    """With a low-rank term; the fused kernel in the largest tile of the plan, on one card in the smallest, too."""
    cases = [Case("matvec", name, target, low_rank=True, count=False) for name in KINDS]
    tiles = (16, 128) if EVERYTHING or target == "sm_86" else (128,)
    cases += [Case("matmul", name, target, m=m, low_rank=True, count=False) for name in KINDS for m in tiles]
    rows = survey(cases)
    assert_sound(rows)
    assert all(row.tensor_cores for row in rows if row.case.kernel == "matmul")


def test_the_way_to_the_ranks():
    rows = survey([Case("project", "F32", target, dtype, count=False) for target in TARGETS for dtype in DTYPES])
    assert not [row for row in rows if row.spilled or row.shared > 1024]


def test_int8_kernels():
    """Every kind of decode on one card, and the one that takes most registers on all of NVIDIA's."""
    cases = [Case("int8", name, "sm_86", count=False) for name in KINDS if name != "Q6_K"]
    cases += [Case(kernel, "Q6_K", target, count=False) for kernel in ("int8", "int8_largest") for target in NVIDIA]
    rows = survey(cases)
    assert_sound(rows)
    assert all(row.tensor_cores and row.wide_stores for row in rows if row.case.kernel == "int8")
