"""Runs `tests/in_comfyui` inside every ComfyUI that is installed here, with that ComfyUI's own Python."""

from __future__ import annotations

import re

import pytest
from hosts import ROOT, Host, comfyui_hosts

HOSTS = comfyui_hosts()
SUITES = sorted(p.stem for p in (ROOT / "tests" / "in_comfyui").glob("test_*.py"))


@pytest.mark.host
@pytest.mark.skipif(bool(HOSTS), reason="ComfyUI is here")
def test_a_comfyui_is_installed() -> None:
    pytest.skip("no ComfyUI found: set COMFYUI_PATH to run the host tests (CONTRIBUTING.md)")


@pytest.mark.host
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_in_comfyui(host: Host, suite: str) -> None:
    tests = ROOT / "tests" / "in_comfyui" / f"{suite}.py"
    here = str(tests.parent)
    ran = host.run(
        "-m", "pytest", str(tests), "--import-mode=importlib", "-q", "-x", "-rs", "-p", "no:cacheprovider",
        "--rootdir", here, "--confcutdir", here, "-c", "/dev/null", COMFYUI_PATH=str(host.folder),
    )  # fmt: skip
    if "No module named pytest" in ran.stdout:
        pytest.skip(f"{host.name} has no pytest: install it into {host.python}")
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert ran.returncode == 0 and passed, f"in {host.folder}:\n{ran.stdout[-8000:]}"
    print(f"{host.name}: {ran.stdout.strip().splitlines()[-1]}")
