"""Graft on the real backends of Forge and Forge Neo: the checks of in_forge/checks.py, run by their own Pythons."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from forge import EACH, Forge, chosen, named
from forge_toys import ENCODERS, t5_tensors, write_encoder
from gguf_samples import write_gguf
from graft.kernels import FORMATS
from graft.ops.make import plan_model, write_model
from graft.ops.recipes import parse_rules, recipe_named
from hosts import ROOT

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).parent / "in_forge" / "checks.py"
NAMES = re.findall(r"^@(check|on_master|on_neo)\ndef (\w+)", SCRIPT.read_text(), re.MULTILINE)


def checks_of(forge: Forge | None) -> list[str]:
    left_out = "" if forge is None else "on_master" if forge.is_neo else "on_neo"
    return [name for kind, name in NAMES if kind != left_out]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What each Forge has reported so far."""
    return {}


def write_made(path: Path) -> None:
    """A model as Save as GGUF writes it, with a weight in each type that all Forges know."""
    kinds = ["Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "BF16", "F16", "F32"]
    g = torch.Generator().manual_seed(0)
    state = {f"double_blocks.0.{kind}.weight": torch.randn(64, 512, generator=g) for kind in kinds}
    state |= {"double_blocks.0.bias": torch.randn(64, generator=g), "img_in.weight": torch.randn(64, 128, generator=g)}
    state["patch.weight"] = torch.randn(64, 4, 1, 2, 2, generator=g)
    state["txt_in.weight"] = torch.randn(64, 128, generator=g).bfloat16()
    rules = parse_rules(f"double_blocks.0.{kind}.weight = {kind}" for kind in kinds)
    write_model(path, plan_model(state, recipe_named("Q8_0"), "flux", rules), {"graft.loras": ["a", "b"]})


def report(forge: Forge, reports: dict[str, dict[str, str]], folder: Path) -> dict[str, str]:
    if forge.name not in reports:
        rng = np.random.default_rng(0)
        kinds = [f.name for f in FORMATS if f.decode] + ["F16", "F32"]
        tensors = {k: (rng.standard_normal((64, 512), dtype=np.float32), k) for k in kinds}
        tensors |= {f"bias.{k}": (rng.standard_normal(64, dtype=np.float32), k) for k in ("F32", "F16")}
        write_gguf(folder / "layers.gguf", tensors)
        scaled = {"linear.weight": tensors["NVFP4"], "linear.bias": tensors["bias.F32"]}
        for name, shape in (("one", 1), ("rows", (64, 1))):
            scale = (rng.uniform(0.5, 2.0, shape).astype(np.float32), "F32")
            write_gguf(folder / f"scaled-{name}.gguf", {**scaled, "linear.scale": scale})
        write_made(folder / "made.gguf")
        for architecture in ENCODERS if forge.is_neo else ():
            write_encoder(architecture, folder / f"{architecture}.gguf")
        if forge.is_neo:
            write_gguf(folder / "umt5.gguf", t5_tensors("Q8_0", 64, 256384, is_umt5=True), "t5encoder")
        done = forge.run(str(SCRIPT), str(folder), str(folder / "report.json"), timeout=300)
        with forge.starting():
            assert done.returncode == 0, done.stdout
        reports[forge.name] = json.loads((folder / "report.json").read_text())
    return reports[forge.name]


@pytest.mark.parametrize(
    ("forge", "name"),
    [pytest.param(forge, name, id=f"{named(forge)}-{name}") for forge in EACH for name in checks_of(forge)],
)
def test_contract(forge: Forge | None, name: str, reports: dict[str, dict[str, str]], tmp_path: Path) -> None:
    failed = report(chosen(forge), reports, tmp_path)[name]
    assert not failed, failed


@pytest.mark.parametrize("forge", EACH, ids=named)
def test_install_is_silent_and_quick(forge: Forge | None) -> None:
    """Forge runs it at every start. Where something is missing it would install that, which is not for a test to do."""
    host = chosen(forge)
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
