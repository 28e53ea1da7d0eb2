"""Starts the ComfyUI in COMFYUI_PATH on the CPU, and loads this checkout through its own loader."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMFYUI = os.environ.get("COMFYUI_PATH", "")
DYNAMIC_VRAM = bool(os.environ.get("GRAFT_DYNAMIC_VRAM"))

if not (Path(COMFYUI) / "main.py").is_file():
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path[:0] = [COMFYUI, str(ROOT / "tests"), str(Path(__file__).parent)]
    sys.argv = ["main.py", "--cpu"]
    if os.environ.get("COMFYUI_BASE"):  # other packs write into folders that are not the installation's
        sys.argv += ["--base-directory", os.environ["COMFYUI_BASE"]]
    sys.modules.setdefault("in_comfyui", types.ModuleType("in_comfyui"))

    import comfy.options

    comfy.options.enable_args_parsing()

    importlib.import_module("utils.extra_config")  # before `nodes` puts `comfy`, with another `utils`, first

    import nodes

    if DYNAMIC_VRAM:
        import dynamic_vram

        dynamic_vram.install()

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


@pytest.fixture(autouse=DYNAMIC_VRAM)
def everything_given_back():
    """Whoever asked for room on the GPU gives it back by the end of a test."""
    import dynamic_vram

    before = dynamic_vram.pinned()
    yield
    assert dynamic_vram.pinned() == before, "layers kept their weights on the GPU"


@pytest.fixture(scope="session", autouse=DYNAMIC_VRAM)
def nothing_stays_pinned():
    """Once all models are unloaded no memory is pinned for them."""
    import comfy.model_management
    import dynamic_vram

    yield
    comfy.model_management.unload_all_models()
    gc.collect()
    assert not dynamic_vram.pinned_in_memory()


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
    folder_paths.set_temp_directory(str(base / "temp"))  # of previews
    return base
