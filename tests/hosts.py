"""Where the real hosts are, and how to run tests inside them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Host:
    """An installed host: its folder and the Python that it runs with."""

    folder: Path
    python: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def run(self, *arguments: str, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the host's Python in the host's folder; output is captured as text."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON_INTERPRET"))}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", **environment}
        return subprocess.run(
            [str(self.python), *arguments], cwd=self.folder, env=env, text=True, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip


def _python_of(folder: Path, variable: str) -> Path:
    chosen = os.environ.get(variable)
    own = folder / "venv" / "bin" / "python"
    return Path(chosen) if chosen else own if own.exists() else Path(sys.executable)


def comfyui_hosts() -> list[Host]:
    """Every ComfyUI in COMFYUI_PATH (several, separated as in PATH), or those in the home folder."""
    paths = os.environ.get("COMFYUI_PATH")
    home = Path.home()
    folders = [Path(p) for p in paths.split(os.pathsep)] if paths else [home / "ComfyUI", home / "ComfyUI-0.19"]
    return [Host(f, _python_of(f, "COMFYUI_PYTHON")) for f in folders if (f / "main.py").is_file()]
