"""Runs `tests/in_comfyui` inside every ComfyUI that is installed here, with that ComfyUI's own Python."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from hosts import EVERYTHING, ROOT, CannotStart, Host, comfyui_hosts

HOSTS = comfyui_hosts()
FOLDER = ROOT / "tests" / "in_comfyui"
# large models, compilers and servers have a process to themselves; the others share one, since ComfyUI takes its time
ALONE = ("test_adapter_models", "test_churn", "test_compile", "test_example_workflow", "test_generate", "test_server")
DYNAMIC = "dynamic VRAM"
LONG = ("test_text_encoder_families", "test_train", "test_train_architectures")
"""As long as the others together: in the newest host only."""
EVERYWHERE = ("test_isolation", "test_lora_names", "test_nodes")
"""Of the others, what older hosts all run; they take turns at the rest."""
DYNAMICALLY = (
    "test_dynamic_vram", "test_merging", "test_isolation", "test_nodes", "test_controlnets", "test_text_encoders",
)  # fmt: skip
# the host moves the layers of all text encoders in the same way
SOME_TEXT_ENCODERS = "not test_text_encoders or test_flux or test_loras or test_wan_reads or test_a_merge"
# the long ones first, so that no process is left with one of them at the end
SUITES = {
    "others": sorted(p for p in FOLDER.glob("test_*.py") if p.stem not in (*ALONE, *LONG, "test_dynamic_vram")),
    "long": [FOLDER / f"{name}.py" for name in LONG],
    # played without a GPU, on hosts that have it
    DYNAMIC: [FOLDER / f"{name}.py" for name in DYNAMICALLY],
    **{name: [FOLDER / f"{name}.py"] for name in ALONE},
}


def hosts_of(suite: str) -> list[Host]:
    able = [host for host in HOSTS if host.has_dynamic_vram] if suite == DYNAMIC else HOSTS
    if EVERYTHING or suite in ("others", "test_server"):
        return able
    if suite == "test_example_workflow":
        return able[:1] + able[1:][-1:]
    return able[-2:] if suite == "test_churn" else able[-1:]


def files_of(host: Host, suite: str) -> list[Path]:
    if EVERYTHING or suite != "others" or host is HOSTS[-1]:
        return SUITES[suite]
    turn, older = HOSTS.index(host), len(HOSTS) - 1
    return [p for number, p in enumerate(SUITES[suite]) if p.stem in EVERYWHERE or number % older == turn]


RUNS = [(host, suite) for suite in SUITES for host in hosts_of(suite)]


@pytest.mark.host
@pytest.mark.skipif(bool(HOSTS), reason="ComfyUI is here")
def test_a_comfyui_is_installed() -> None:
    pytest.skip("no ComfyUI found: set COMFYUI_PATH to run the host tests (CONTRIBUTING.md)")


@pytest.mark.host
@pytest.mark.parametrize(("host", "suite"), RUNS, ids=[f"{host.name}-{suite}" for host, suite in RUNS])
def test_in_comfyui(host: Host, suite: str) -> None:
    here = str(FOLDER)
    chosen = ["-k", SOME_TEXT_ENCODERS] if suite == DYNAMIC and not EVERYTHING else []
    ran = host.run(
        "-m", "pytest", *map(str, files_of(host, suite)), *chosen, "--import-mode=importlib", "-q", "-x", "-rsfE",
        "--show-capture=no", "-p", "no:cacheprovider", "--rootdir", here, "--confcutdir", here, "-c", "/dev/null",
        COMFYUI_PATH=str(host.folder), GRAFT_DYNAMIC_VRAM="1" if suite == DYNAMIC else "",
    )  # fmt: skip
    if "No module named pytest" in ran.stdout:
        pytest.skip(f"{host.name} has no pytest: install it into {host.python}")
    output = f"in {host.folder}:\n{ran.stdout[-8000:]}"
    if not re.search(r"\d+ (passed|failed|errors?|skipped)\b", ran.stdout):
        raise CannotStart(host.name, output)
    assert ran.returncode == 0 and re.search(r"\d+ passed", ran.stdout), output
    print(f"{host.name}: {ran.stdout.strip().splitlines()[-1]}")


@pytest.mark.host
@pytest.mark.skipif(not HOSTS, reason="no ComfyUI found")
def test_the_benchmark_on_a_gpu_runs_without_one(tmp_path) -> None:
    """In the newest ComfyUI on its CPU, with small blocks: what is not there is a line, and stops nothing."""
    host, out = HOSTS[-1], tmp_path / "comfyui.csv"
    ran = host.run(
        str(ROOT / "benchmarks" / "bench_comfy.py"), "--gpu", "--device", "cpu", "--width", "256", "--side", "8",
        "--text", "8", "--turns", "1", "--types", "Q8_0", "--variants", "bf16", "peer", "graft", "--out", str(out),
        COMFYUI_PATH=str(host.folder), COMFYUI_PYTHON=str(host.python), COMFYUI_GGUF=str(tmp_path / "nowhere"),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:]
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    steps = {(row["variant"], row["loras"], row["turn"]): float(row["seconds"]) for row in rows if not row["note"]}
    assert set(steps) == {(v, n, turn) for v in ("bf16", "graft") for n in "014" for turn in "01"}
    assert all(seconds > 0 for seconds in steps.values())
    assert [row["variant"] for row in rows if row["note"]] == ["peer"]
    assert "| Q8_0 | 4 | Graft |" in ran.stdout and "KeyError" in ran.stdout
