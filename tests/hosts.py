"""Where the real hosts are, and how to run tests inside them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = bool(os.environ.get("GRAFT_EVERY_HOST"))
"""Every suite, page and pack in every host, as `make hosts` and `make company` have it; `make test` leaves some out."""


class CannotStart(Exception):
    """A host that is there and does not run. `conftest.py` lets one test fail of it, and skips the others.

    Attributes:
        host: its name.
    """

    def __init__(self, host: str, reason: str) -> None:
        super().__init__(f"{host} cannot start: {reason}")
        self.host = host


@dataclass(frozen=True)
class Host:
    """An installed host: its folder and the Python that it runs with."""

    folder: Path
    python: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def has_dynamic_vram(self) -> bool:
        """Whether it is a ComfyUI that has a patcher for it."""
        file = self.folder / "comfy" / "model_patcher.py"
        return file.is_file() and "class ModelPatcherDynamic" in file.read_text(encoding="utf-8")

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Around what starts it: whatever goes wrong there is `CannotStart`."""
        try:
            yield
        except (OSError, AssertionError) as error:
            raise CannotStart(self.name, str(error)) from None

    def run(self, *arguments: str, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the host's Python in the host's folder; output is captured as text.

        Raises:
            CannotStart: that Python does not run.
        """
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON_INTERPRET"))}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", **environment}
        with self.starting():
            return subprocess.run(
                [str(self.python), *arguments], cwd=self.folder, env=env, text=True, timeout=timeout,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip


def comfyui_hosts() -> list[Host]:
    """Every ComfyUI in COMFYUI_PATH (several, separated as in PATH), or those in the home folder.

    Each runs with its own Python, or with the one in its place in COMFYUI_PYTHON.

    Raises:
        ValueError: COMFYUI_PYTHON names another number of them.
    """
    paths = os.environ.get("COMFYUI_PATH")
    home = Path.home()
    default = [home / "ComfyUI", home / "ComfyUI-0.19", home / "ComfyUI-0.28"]
    folders = [Path(p) for p in paths.split(os.pathsep)] if paths else default
    found = [folder for folder in folders if (folder / "main.py").is_file()]
    chosen = os.environ.get("COMFYUI_PYTHON")
    if not chosen:
        return [Host(folder, own_python(folder)) for folder in found]
    pythons = [Path(p) for p in chosen.split(os.pathsep)]
    if len(pythons) != len(found):
        raise ValueError(
            f"COMFYUI_PYTHON has {len(pythons)} for {len(found)} ComfyUI ({', '.join(map(str, found))}): "
            "name one for each, or only one ComfyUI in COMFYUI_PATH"
        )
    return [Host(folder, python) for folder, python in zip(found, pythons, strict=True)]


def own_python(folder: Path) -> Path:
    """Its venv's where it has one, whether that runs or not."""
    return folder / "venv" / "bin" / "python" if (folder / "venv").is_dir() else Path(sys.executable)
