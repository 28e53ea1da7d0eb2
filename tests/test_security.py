"""What SECURITY.md promises: files are data, and reading and running them touches nothing else."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_samples import write_gguf
from hosts import ROOT
from safetensors.torch import save_file

FOLDERS = ("kernels", "ops", "nodes", "scripts", "tools")
PRODUCT = [*(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
PRODUCT.append(ROOT / "__init__.py")
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp"}
PROGRAMS = {"subprocess", "multiprocessing", "pty", "ctypes", "cffi", "runpy", "code", "webbrowser"}
UNPICKLING = {"pickle", "_pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
CALLS = {
    "eval", "exec", "compile", "__import__", "system", "popen", "execv", "torch.load", "numpy.load", "np.load",
}  # fmt: skip


def used(tree: ast.AST) -> set[str]:
    """The modules that a file imports, and the functions that it calls, by both their names and the last of these."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            # `re.compile` and `model.eval()` are other functions
            found |= {name} if isinstance(node.func, ast.Name) or name.startswith(("os.", "torch.", "np.")) else set()
            found |= {name.removeprefix("os.")} if name.startswith("os.") else set()
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_opens_a_network_runs_a_program_or_unpickles(path) -> None:
    assert not used(ast.parse(path.read_text())) & (NETWORK | PROGRAMS | UNPICKLING | CALLS)


def test_what_would_be_found() -> None:
    text = "import pickle\nfrom urllib.request import urlopen\nimport os\nos.system('x')\ntorch.load('x')\neval('1')"
    found = used(ast.parse(text)) & (NETWORK | PROGRAMS | UNPICKLING | CALLS)
    assert found == {"pickle", "urllib", "system", "torch.load", "eval"}
    assert not used(ast.parse("import re\nre.compile('x')\nmodel.eval()")) & CALLS


def test_the_hosts_reader_of_other_text_encoders_is_told_not_to_unpickle() -> None:
    calls = [
        node for path in PRODUCT for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_torch_file")
    ]  # fmt: skip
    assert calls
    for call in calls:
        assert {word.arg: ast.unparse(word.value) for word in call.keywords}.get("safe_load") == "True"


@pytest.mark.parametrize("path", sorted((ROOT / "web").glob("*.js")), ids=lambda path: path.name)
def test_the_page_is_given_text_and_no_html(path) -> None:
    script = path.read_text()
    unsafe = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "http")
    assert not [name for name in unsafe if name in script]


# A process that reads a model and a LoRA and runs both, watched by Python's own audit hook
WATCHED = """
import json, os, sys
sys.path.insert(0, sys.argv[1] + "/tests")
import conftest, torch
from graft.kernels import linear
from graft.ops import layers
from graft.ops.factors import FactorCache
from graft.ops.files.gguf import describe, diffusion_tensors, open_gguf
from graft.ops.files.lora import load_adapters
from graft.ops.packed import as_weight
from graft.ops.residual import ResidualStack
from graft.scripts.forge.inspection import inspect

def use():
    model = {}
    for name, tensor in diffusion_tensors(open_gguf("model.gguf")).items():
        layer = layers.Linear(tensor.shape[1], tensor.shape[0])
        layer.load_weight(as_weight(tensor))
        model[name.removesuffix(".weight")] = layer
    stack = ResidualStack()
    load_adapters("lora.safetensors").on(model).add_to(stack, 0.5)
    stack.build(model, FactorCache())
    with torch.no_grad(), stack.active(model, torch.device("cpu")):
        for layer in model.values():
            assert layer(torch.ones(2, layer.logical_shape[1])).isfinite().all()
    return [inspect(__import__("pathlib").Path(name)) for name in ("model.gguf", "lora.safetensors")]

events, watching = [], False

def hear(event, arguments):
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = any(c in (mode or "") for c in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes:
            events.append(f"{event} {path} {mode}")
    elif event.startswith(("socket", "subprocess", "os.", "pickle", "urllib", "ftplib", "shutil", "ctypes.dlopen")):
        if event not in ("os.listdir", "os.scandir"):
            events.append(f"{event} {arguments}")
    elif event in ("compile", "code.__new__"):
        events.append(f"{event} {arguments}"[:200])

use()  # imports what is imported late
sys.addaudithook(hear)
watching = True
if len(sys.argv) > 2:
    open("made", "w").close()
rows = use()
watching = False
print(json.dumps([events, rows]))
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a model and a LoRA for it, whose texts are code."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=g).numpy()
    hostile = {"general.name": "__import__('os').system('touch made')", "general.license": "<script>alert(1)</script>"}
    write_gguf(tmp_path / "model.gguf", {"img_in.weight": (weight, "Q4_K")}, metadata=hostile)
    lora = {"lora_down.weight": torch.ones(4, 256), "lora_up.weight": torch.ones(64, 4)}
    lora = {f"lora_unet_img_in.{name}": tensor for name, tensor in lora.items()}
    save_file(lora, tmp_path / "lora.safetensors", {"modelspec.title": "{{7*7}} ${jndi:ldap://x}"})
    return tmp_path


def watched(folder: Path, *more: str) -> list:
    # no home, no user, no path to programs
    ran = subprocess.run(
        [sys.executable, "-c", WATCHED, str(ROOT), *more], cwd=folder, env={"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_reading_and_running_writes_nothing_starts_nothing_and_asks_nobody(folder) -> None:
    before = sorted(folder.iterdir())
    events, rows = watched(folder)
    assert events == []
    assert sorted(folder.iterdir()) == before
    assert ["general.name", "__import__('os').system('touch made')"] in rows[0]


def test_the_watch_sees_what_is_written(folder) -> None:
    assert watched(folder, "write")[0] == ["open made w"]
