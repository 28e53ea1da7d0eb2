"""Binds the checkout, whatever its folder is called, as the package `graft`; decides where Triton kernels run."""

import importlib.util
import os
import sys
import types
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def bind(root: Path = ROOT, name: str = "graft") -> None:
    """Make `root` importable as `name` without executing its `__init__.py`, which needs ComfyUI."""
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(root)]
        sys.modules[name] = package


bind()
# `python -m pytest` puts the checkout on the path, where transformers would take `kernels` for a package of that name
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
sys.path.append(str(Path(__file__).parent))  # for `import oracle`: importlib mode leaves the path alone
# pytest imports the root package of a conftest by its folder's name, or as `__init__` if that is no name that Python
# could import: give it one that does nothing
for name in (ROOT.name, "__init__"):
    sys.modules.setdefault(name, types.ModuleType(name))

if not torch.cuda.is_available():
    # read when Triton is imported. With a GPU the same tests compile the kernels and run them there
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in the dtype of x on every machine; tests that are about the others say so."""
    from graft.kernels import cpu

    monkeypatch.setattr(cpu, "SLOW_DTYPES", frozenset())


@pytest.fixture(scope="session")
def make_gguf() -> Callable[[Sequence[str]], int]:
    """What tools/make_gguf.py does with a command line's arguments."""
    spec = importlib.util.spec_from_file_location("make_gguf", ROOT / "tools" / "make_gguf.py")
    assert spec is not None and spec.loader is not None
    path, module = list(sys.path), importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module.main


TORCH = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
"""Forge comes with 2.3, ComfyUI with whatever is newest."""

SHARED = pytest.StashKey[Path]()


@pytest.fixture(scope="session", autouse=True)
def shared_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One folder for all processes that run tests."""
    own = tmp_path_factory.getbasetemp()
    request.config.stash[SHARED] = own.parent if hasattr(request.config, "workerinput") else own


def _once_a_host(item: pytest.Item) -> Generator[None, object, object]:
    """A host that cannot start is one failure: the tests after the first that finds it so are skipped."""
    from hosts import CannotStart

    try:
        return (yield)
    except CannotStart as error:
        host, reason = error.host, str(error)
    try:
        (item.config.stash[SHARED] / f"{host} cannot start").touch(exist_ok=False)
    except FileExistsError:
        reason = ""
    if reason:
        pytest.fail(reason, pytrace=False)
    pytest.skip(f"{host} cannot start: another test fails of it and says why")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _once_a_host(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _once_a_host(item))


SCATTERED = ("test_comfyui", "test_demo", "test_expressions", "test_triton_compile", "test_triton_linear")
"""Files whose tests take long and have nothing in common."""


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, where that is installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that share a running host run in one process, one after the other, and so do those of a file."""
    from forge import forges
    from hosts import comfyui_hosts
    from xdist.scheduler import LoadScopeScheduling

    hosts = sorted((host.name for host in (*comfyui_hosts(), *forges())), key=len, reverse=True)

    class ByHost(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, parameters = nodeid.partition("[")
            name = Path(file.partition("::")[0]).stem
            if name in SCATTERED:
                return nodeid
            return f"{name} {next((host for host in hosts if parameters.startswith(host)), '')}"

    return ByHost(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs in a host takes longest and comes first.

    Tests marked `gpu` are skipped, visibly, where there is none or the interpreter is asked for.
    """
    items.sort(key=lambda item: item.get_closest_marker("host") is None)
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and Triton not interpreted"))
