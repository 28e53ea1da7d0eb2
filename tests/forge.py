"""The Forge installations that tests run in; `import forge` from any test."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hosts import Host, own_python


class Forge(Host):
    """An installed Forge: master, or Forge Neo."""

    @functools.cached_property
    def is_neo(self) -> bool:
        arguments = self.folder / "backend" / "args.py"
        return arguments.is_file() and "--always-cpu" not in arguments.read_text(encoding="utf-8")

    @property
    def command(self) -> Sequence[str]:
        """Its own entry point, with what makes it run on a CPU and install nothing."""
        common = ("--skip-torch-cuda-test", "--skip-version-check", "--no-hashing")
        if self.is_neo:
            alone = ("--skip-prepare-environment", "--skip-python-version-check")
            return (str(self.python), "launch.py", "--cpu", *common, *alone)
        return (str(self.python), "webui.py", "--always-cpu", *common, "--no-download-sd-model")


def forges() -> list[Forge]:
    """Every Forge in FORGE_PATH (several, separated as in PATH), or those in the home folder.

    FORGE_PYTHON is their Python; else each has its own in its venv.
    """
    paths = os.environ.get("FORGE_PATH")
    home = Path.home()
    usual = [home / "stable-diffusion-webui-forge", home / "forge-neo"]
    folders = [Path(p) for p in paths.split(os.pathsep)] if paths else usual
    python = os.environ.get("FORGE_PYTHON")
    found = (folder for folder in folders if (folder / "webui.py").is_file())
    return [Forge(folder, Path(python) if python else own_python(folder)) for folder in found]


def chosen(forge: Forge | None) -> Forge:
    """`forge`, or a skip that says so.

    Raises:
        CannotStart: its Python does not run.
    """
    if forge is None:
        pytest.skip("Forge was not tested: there is none (set FORGE_PATH)")
    _check_python(forge)  # before models are written for it
    return forge


@functools.cache
def _check_python(forge: Forge) -> None:
    ran = forge.run("-c", "")
    with forge.starting():
        assert ran.returncode == 0, ran.stdout


EACH = forges() or [None]
"""For fixtures and tests that are repeated for each of them."""


def named(forge: Forge | None) -> str:
    return "none" if forge is None else forge.name
