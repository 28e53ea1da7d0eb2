"""Starts the ComfyUI in COMFYUI_PATH on the CPU, and loads this checkout through its own loader."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMFYUI = os.environ.get("COMFYUI_PATH", "")

if not (Path(COMFYUI) / "main.py").is_file():
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path[:0] = [COMFYUI, str(ROOT / "tests"), str(Path(__file__).parent)]
    sys.argv = ["main.py", "--cpu"]
    sys.modules.setdefault("in_comfyui", types.ModuleType("in_comfyui"))

    import comfy.options

    comfy.options.enable_args_parsing()

    import nodes

    assert asyncio.run(nodes.load_custom_node(str(ROOT))), "ComfyUI could not load the pack"
    PACK = str(ROOT).replace(".", "_x_")
    # the tests' own tools are written against the name `graft`: give them the very modules that ComfyUI loaded
    sys.modules["graft"] = sys.modules[PACK]
    for name in [n for n in sys.modules if n.startswith(PACK + ".")]:
        sys.modules["graft" + name[len(PACK) :]] = sys.modules[name]


@pytest.fixture(scope="session")
def pack():
    """`pack("nodes.loader")` is a module of the pack as ComfyUI loaded it."""
    return lambda name: importlib.import_module(f"{PACK}.{name}")


@pytest.fixture(scope="session", autouse=True)
def folders(tmp_path_factory):
    """Model folders of their own, so that nothing is written into the installation."""
    import folder_paths

    base = tmp_path_factory.mktemp("models")
    for name in ("unet_gguf", "loras"):
        folder = base / name
        folder.mkdir()
        paths, extensions = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = ([str(folder), *paths], extensions)
    return base
