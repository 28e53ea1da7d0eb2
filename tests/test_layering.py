"""Who may import whom: ``kernels <- ops <- {nodes, scripts}``, the hosts at the edge, and what an import costs."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

COMFYUI = {
    "app", "comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "execution", "folder_paths",
    "latent_preview", "node_helpers", "nodes", "server", "utils",
}  # fmt: skip
FORGE = {"backend", "fastapi", "gradio", "ldm_patched", "modules", "modules_forge", "packages_3rdparty"}

# folder: (our folders that it may import, what it may import from elsewhere beside the standard library)
LAYERS = {
    "kernels": ({"kernels"}, {"torch"}),
    "ops": ({"kernels", "ops"}, {"torch", "safetensors"}),
    "demo": ({"kernels", "ops", "demo"}, {"torch", "safetensors", "numpy", "PIL", "gguf", "libgguf"}),
    "nodes": ({"kernels", "ops", "demo", "nodes"}, {"torch", "safetensors", "PIL"} | COMFYUI),
    "scripts": ({"kernels", "ops", "scripts"}, {"torch", "safetensors"} | FORGE),
    "tools": (set(), {"graft"}),  # which binds the checkout first
}
# what only one place may know
SPECIALISTS = {
    "kernels/triton_/": "triton", "kernels/cpu.py": "libgguf", "kernels/int8.py": "comfy_kitchen",
    "nodes/raylight.py": "ray",
}  # fmt: skip


def imports(source: str, path: Path) -> Iterator[tuple[int, str, bool]]:
    """Every import in `source` at `path` (relative to the checkout), at any depth: (line, module, is it ours)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            # a relative import starts from the folder of the file and goes up a folder for each further dot
            folder = path.parent.parts
            base = (*folder[: len(folder) - node.level + 1], *filter(None, [node.module]))
            for alias in node.names:
                yield node.lineno, ".".join(base) if base else alias.name, True


def violations(source: str, path: Path) -> list[str]:
    """What the file imports against the rules."""
    ours, others = LAYERS[path.parts[0]]
    others = others | {name for place, name in SPECIALISTS.items() if path.as_posix().startswith(place)}
    found = []
    for line, module, relative in imports(source, path):
        top = module.partition(".")[0]
        allowed = top in ours if relative else top in others or top in sys.stdlib_module_names
        if not allowed:
            found.append(f"{path}:{line} imports {'our ' if relative else ''}{module}")
    return found


FILES = [p.relative_to(ROOT) for layer in LAYERS for p in sorted((ROOT / layer).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down_only(path):
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    "path, source",
    [
        ("kernels/new.py", "from ..ops import layers"),
        ("kernels/new.py", "from .. import ops"),
        ("kernels/new.py", "def f():\n    import triton"),
        ("kernels/new.py", "import numpy"),
        ("ops/new.py", "import comfy.utils"),
        ("ops/new.py", "from ..nodes.loader import Loader"),
        ("ops/new.py", "from kernels import linear"),
        ("ops/new.py", "import graft.kernels"),
        ("nodes/new.py", "from ..scripts import graft_forge"),
        ("nodes/new.py", "import modules_forge"),
        ("scripts/forge/new.py", "from ...nodes import loader"),
        ("scripts/forge/new.py", "import comfy"),
        ("kernels/triton_/new.py", "from ...ops import packed"),
    ],
)
def test_violations_are_seen(path, source):
    assert len(violations(source, Path(path))) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("kernels/new.py", "from .errors import GraftError\nfrom . import cpu\nimport math, torch.nn"),
        ("kernels/triton_/new.py", "import triton\nfrom .bits import locate\nfrom ..formats import Format"),
        ("ops/new.py", "from ..kernels import linear\nfrom ..kernels.errors import GraftError"),
        ("nodes/new.py", "import comfy.sd\nfrom ..ops import layers\nfrom . import node"),
        ("scripts/forge/new.py", "from modules_forge import utils\nfrom ...ops import layers"),
    ],
)
def test_what_is_allowed_is_allowed(path, source):
    assert violations(source, Path(path)) == []


def test_install_needs_nothing():
    found = imports((ROOT / "install.py").read_text(encoding="utf-8"), Path("install.py"))
    assert {module.partition(".")[0] for _, module, _ in found} <= sys.stdlib_module_names


def test_the_entry_of_comfyui_only_passes_on():
    found = imports((ROOT / "__init__.py").read_text(encoding="utf-8"), Path("__init__.py"))
    assert {module.partition(".")[0] for _, module, relative in found if relative} == {"nodes"}


IMPORT_ALL = """
import sys, time
import torch
sys.path.append("tests")
import conftest
before = set(sys.modules)
start = time.process_time()
import importlib, pathlib
for folder in ("kernels", "ops"):
    for path in sorted(pathlib.Path(folder).glob("*.py")):
        importlib.import_module(f"graft.{folder}" + ("" if path.stem == "__init__" else f".{path.stem}"))
cost = time.process_time() - start
heavy = {m.partition(".")[0] for m in set(sys.modules) - before} & {"triton", "comfy", "gguf", "libgguf", "matplotlib"}
assert not heavy, f"imported {heavy}"
assert not torch.cuda.is_initialized()
print(cost)
"""


def test_importing_is_quick_and_quiet():
    """Everything in kernels/ and ops/: under 0.3 s of processor time, nothing printed, no GPU, no Triton, no host."""
    costs = []
    # on a busy machine processor time is stretched as well: the least of a few says what the imports cost
    while len(costs) < 5 and min(costs, default=1.0) >= 0.3:
        ran = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.count("\n") == 1, f"importing printed {ran.stdout}"
        costs.append(float(ran.stdout))
    assert min(costs) < 0.3, f"took {costs} s"


TEST = """
import json
from graft.kernels import by_name

def test_table():
    assert by_name(json.loads('"Q4_K"')).block_size == 256
"""


@pytest.mark.parametrize("name", ["a folder-1.0 (new)", "json"])
def test_the_folder_may_have_any_name(name, tmp_path):
    """Also one that Python could not import, and one that it would import something else for."""
    checkout = tmp_path / name
    shutil.copytree(ROOT / "kernels", checkout / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "tests").mkdir()
    for file in ("__init__.py", "pyproject.toml", "tests/conftest.py", "tests/hosts.py"):
        shutil.copy(ROOT / file, checkout / file)
    (checkout / "tests" / "test_table.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "1 passed" in ran.stdout, ran.stdout
