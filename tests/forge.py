"""The Forge installation that tests run in; `import forge` from any test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hosts import Host


def forge() -> Host:
    """Forge in FORGE_PATH (default: in the home folder) and its Python in FORGE_PYTHON (default: its venv's).

    Skips the test that asks if there is none.
    """
    folder = Path(os.environ.get("FORGE_PATH", Path.home() / "stable-diffusion-webui-forge"))
    python = Path(os.environ.get("FORGE_PYTHON", folder / "venv" / "bin" / "python"))
    if not (folder / "webui.py").is_file():
        pytest.skip(f"Forge was not tested: there is none in {folder} (set FORGE_PATH)")
    if not python.is_file():
        pytest.skip(f"Forge was not tested: there is no Python at {python} (set FORGE_PYTHON)")
    return Host(folder, python)
