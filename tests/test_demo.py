"""`make demo` runs from end to end, and notices an error that is too large."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT, TORCH
from PIL import Image

pytestmark = pytest.mark.skipif(TORCH < (2, 4), reason="the demo model takes a layer that torch before 2.4 has not")

DEMO = ROOT / "benchmarks" / "demo.py"
SMALL = ["--types", "Q4_0", "--styles", "neon"]
# the same, with every LoRA a hundredth too strong
SPOILT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import checkout
from graft.ops import factors
run = factors.LayerFactors.slots
factors.LayerFactors.slots = lambda *args: [1.01 * s for s in run(*args)]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)


def test_it_prints_a_table_and_draws_the_sheet(tmp_path):
    ran = run(str(DEMO), *SMALL, "--out", str(tmp_path / "demo.png"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with Image.open(tmp_path / "demo.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 800
    (row,) = [line.split() for line in ran.stdout.splitlines() if line.strip().startswith("Q4_0")]
    assert row[5] == "1.0000"


def test_it_fails_if_strengths_are_off_by_a_hundredth(tmp_path):
    ran = run("-c", SPOILT, str(DEMO.parent), str(DEMO), *SMALL, "--out", str(tmp_path / "demo.png"))
    assert ran.returncode == 1
    # the numbers of one model call, and the pictures
    assert "an error exceeds what rounding explains: Q4_0, neon 0.5, neon 1, neon 1.5, Q4_0" in ran.stdout
