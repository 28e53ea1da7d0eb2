"""Runs `tests/in_comfyui/company` with other packs, each alone and all together, in every ComfyUI that is installed.

The packs are copied: they write into their own folders, and into the home folder. `make company` adds each alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import urllib.request
from pathlib import Path

import pytest
from hosts import EVERYTHING, ROOT, CannotStart, Host, comfyui_hosts

sys.path.append(str(Path(__file__).parent / "in_comfyui"))
from comfy_server import Server

PEERS = Path(os.environ.get("COMFYUI_PEERS") or Path.home() / "peers")
PACKS = (
    "rgthree-comfy", "ComfyUI-KJNodes", "ComfyUI-Lora-Manager", "efficiency-nodes-comfyui", "ComfyUI-Easy-Use",
    "ComfyUI_Comfyroll_CustomNodes", "ComfyUI-Inspire-Pack", "ComfyUI_essentials", "ComfyUI-MultiGPU",
)  # fmt: skip
INSTALLED = [name for name in PACKS if (PEERS / name / "__init__.py").is_file()]
TOGETHER = "all together"
MULTIGPU = "ComfyUI-MultiGPU"
ALONE = INSTALLED if EVERYTHING else []
HOSTS = comfyui_hosts() if INSTALLED else []
RUNS = [(host, what) for host in HOSTS for what in (*ALONE, TOGETHER)]


def copy_pack(name: str, base: Path) -> Path:
    """The pack among the custom nodes of a ComfyUI."""
    ignored = shutil.ignore_patterns(".git", "*.gif", "*.mp4", "tests", "conftest.py")
    return shutil.copytree(PEERS / name, base / "custom_nodes" / name, ignore=ignored)


@pytest.mark.host
@pytest.mark.skipif(bool(RUNS), reason="packs and a ComfyUI are here")
def test_packs_are_installed() -> None:
    pytest.skip(f"no pack to be tested beside in {PEERS}: set COMFYUI_PEERS (CONTRIBUTING.md)")


@pytest.mark.host
@pytest.mark.parametrize(("host", "what"), RUNS, ids=[f"{host.name}-{what}" for host, what in RUNS])
def test_beside(host: Host, what: str, tmp_path: Path) -> None:
    for name in INSTALLED if what == TOGETHER else [what]:
        copy_pack(name, tmp_path)
    run_in(host, "test_company.py", what, tmp_path)


def run_in(host: Host, file: str, what: str, base: Path) -> None:
    """A file of `tests/in_comfyui/company` in a host whose folders are in `base`."""
    here = str(ROOT / "tests" / "in_comfyui")
    ran = host.run(
        "-m", "pytest", f"{here}/company/{file}", "--import-mode=importlib", "-q", "-rs",
        "-p", "no:cacheprovider", "--rootdir", here, "--confcutdir", here, "-c", "/dev/null",
        COMFYUI_PATH=str(host.folder), COMFYUI_BASE=str(base), HOME=str(base),
    )  # fmt: skip
    output = f"in {host.folder}, {what}:\n{ran.stdout[-8000:]}"
    if not re.search(r"\d+ (passed|failed|errors?|skipped)\b", ran.stdout):
        raise CannotStart(host.name, output)
    assert ran.returncode == 0, output
    print(f"{host.name}, {what}: {ran.stdout.strip().splitlines()[-1]}")


@pytest.mark.host
def test_raylight(tmp_path: Path) -> None:
    """With two workers on the CPU, where Ray is installed into the newest ComfyUI's Python."""
    host = next(reversed(comfyui_hosts()), None)
    if host is None or host.run("-c", "import importlib.util as i, sys; sys.exit(not i.find_spec('ray'))").returncode:
        pytest.skip("Ray is not installed into a ComfyUI's Python, so that its loader was not run (CONTRIBUTING.md)")
    run_in(host, "test_raylight.py", "Raylight", tmp_path)


@pytest.mark.host
def test_a_server_offers_our_loaders_under_multigpus_wrappers(tmp_path: Path) -> None:
    """Whichever of the two packs is loaded first."""
    if not HOSTS or MULTIGPU not in INSTALLED:
        pytest.skip(f"{MULTIGPU} is not in {PEERS}, or there is no ComfyUI: set COMFYUI_PEERS (CONTRIBUTING.md)")
    copy_pack(MULTIGPU, tmp_path)
    with HOSTS[-1].starting():
        server = Server(tmp_path, HOSTS[-1].python, HOSTS[-1].folder)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/object_info", timeout=120) as answer:
            nodes = json.load(answer)
    finally:
        server.stop()
    for name in ("GraftUNETLoaderMultiGPU", "GraftUNETLoaderDisTorch2MultiGPU", "GraftCLIPLoaderDisTorch2MultiGPU"):
        assert nodes[name]["python_module"] == nodes["GraftUNETLoader"]["python_module"]
        assert nodes[name]["display_name"].startswith(nodes[name.partition("Loader")[0] + "Loader"]["display_name"])
