"""Graft on Forge's real backend: the checks of in_forge/checks.py, run once by Forge's own Python."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
from forge import forge
from gguf_samples import write_gguf
from graft.kernels import FORMATS
from hosts import ROOT

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).parent / "in_forge" / "checks.py"
NAMES = re.findall(r"^@check\ndef (\w+)", SCRIPT.read_text(), re.MULTILINE)
# Forge's GGUF reader is of a time before these types
UNKNOWN_TO_FORGE = {"TQ1_0", "TQ2_0", "MXFP4", "NVFP4"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    host = forge()
    folder = tmp_path_factory.mktemp("forge-contract")
    rng = np.random.default_rng(0)
    kinds = [f.name for f in FORMATS if f.decode and f.name not in UNKNOWN_TO_FORGE] + ["F16", "F32"]
    tensors = {k: (rng.standard_normal((64, 512), dtype=np.float32), k) for k in kinds}
    tensors |= {f"bias.{k}": (rng.standard_normal(64, dtype=np.float32), k) for k in ("F32", "F16")}
    file = write_gguf(folder / "layers.gguf", tensors)
    done = host.run(str(SCRIPT), str(file), str(folder / "report.json"), timeout=300)
    assert done.returncode == 0, done.stdout
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_contract(report: dict[str, str], name: str) -> None:
    assert not report[name], report[name]


def test_install_is_silent_and_quick() -> None:
    """Forge runs it at every start. Where something is missing it would install that, which is not for a test to do."""
    host = forge()
    listing = "import sys; sys.path.insert(0, sys.argv[1]); import install; "
    listing += "print(*install.missing(install.REQUIREMENTS.read_text(encoding='utf-8')))"
    if missing := host.run("-c", listing, str(ROOT)).stdout.strip():
        pytest.skip(f"install.py was not timed: this Forge lacks {missing}")
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = host.run(str(ROOT / "install.py"), PYTHONPATH=str(host.folder))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and done.stdout == ""
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3
