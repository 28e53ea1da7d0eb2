"""Runs `tests/in_comfyui` inside every ComfyUI that is installed here, with that ComfyUI's own Python."""

from __future__ import annotations

import re

import pytest
from hosts import ROOT, Host, comfyui_hosts

HOSTS = comfyui_hosts()
FOLDER = ROOT / "tests" / "in_comfyui"
# large models, compilers and servers have a process to themselves; the others share one, since ComfyUI takes its time
ALONE = ("test_adapter_models", "test_compile", "test_example_workflow", "test_generate", "test_server")
SUITES = {name: [FOLDER / f"{name}.py"] for name in ALONE}
SUITES["others"] = sorted(path for path in FOLDER.glob("test_*.py") if path.stem not in ALONE)


@pytest.mark.host
@pytest.mark.skipif(bool(HOSTS), reason="ComfyUI is here")
def test_a_comfyui_is_installed() -> None:
    pytest.skip("no ComfyUI found: set COMFYUI_PATH to run the host tests (CONTRIBUTING.md)")


@pytest.mark.host
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_in_comfyui(host: Host, suite: str) -> None:
    here = str(FOLDER)
    ran = host.run(
        "-m", "pytest", *map(str, SUITES[suite]), "--import-mode=importlib", "-q", "-x", "-rs",
        "-p", "no:cacheprovider", "--rootdir", here, "--confcutdir", here, "-c", "/dev/null",
        COMFYUI_PATH=str(host.folder),
    )  # fmt: skip
    if "No module named pytest" in ran.stdout:
        pytest.skip(f"{host.name} has no pytest: install it into {host.python}")
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert ran.returncode == 0 and passed, f"in {host.folder}:\n{ran.stdout[-8000:]}"
    print(f"{host.name}: {ran.stdout.strip().splitlines()[-1]}")
