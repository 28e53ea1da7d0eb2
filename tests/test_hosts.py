"""Which hosts the host tests take, and what they say of one that does not run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import ROOT, comfyui_hosts

FILES = ("test_comfyui.py", "test_comfyui_frontend.py", "test_forge_contract.py", "test_forge_server.py")


def install(folder: Path, python: str | None = None) -> Path:
    """What looks like a host and has this for a Python."""
    own = folder / "venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    for name in ("main.py", "webui.py"):
        (folder / name).touch()
    if python is not None:
        own.write_text(python)
        own.chmod(0o755)
    return folder


def test_a_host_that_cannot_start_is_one_failure(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COMFYUI", "FORGE"))}
    env["COMFYUI_PATH"] = str(install(tmp_path / "Comfy"))
    env["FORGE_PATH"] = str(install(tmp_path / "Forge", "#!/bin/sh\necho this venv was moved\nexit 1\n"))
    files = [str(ROOT / "tests" / name) for name in FILES]
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(tmp_path / "temp")]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *options], cwd=ROOT, env=env, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", ran.stdout.splitlines()[-1])}
    assert counts.get("failed", 0) + counts.get("error", 0) == 2 and "passed" not in counts, ran.stdout
    for reason in ("Comfy cannot start: [Errno 2]", "Forge cannot start: this venv was moved"):
        assert ran.stdout.count(reason) == 1, ran.stdout
    assert "Comfy cannot start: another test" in ran.stdout and "Forge cannot start: another test" in ran.stdout


def test_each_comfyui_has_its_own_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [install(tmp_path / name) for name in ("old", "new")]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", os.pathsep.join(map(str, [*folders, bare, tmp_path / "absent"])))
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    own = [folder / "venv" / "bin" / "python" for folder in folders]
    assert [host.python for host in comfyui_hosts()] == [*own, Path(sys.executable)]
    monkeypatch.setenv("COMFYUI_PYTHON", "/one/python")
    with pytest.raises(ValueError, match="has 1 for 3 ComfyUI"):
        comfyui_hosts()
    monkeypatch.setenv("COMFYUI_PYTHON", os.pathsep.join(["/a", "/b", "/c"]))
    assert [str(host.python) for host in comfyui_hosts()] == ["/a", "/b", "/c"]
    monkeypatch.setenv("COMFYUI_PATH", str(folders[1]))
    monkeypatch.setenv("COMFYUI_PYTHON", "/one/python")
    assert [(host.name, str(host.python)) for host in comfyui_hosts()] == [("new", "/one/python")]
