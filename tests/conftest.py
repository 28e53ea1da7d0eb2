"""Binds the checkout, whatever its folder is called, as the package `graft`."""

import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def bind(root: Path = ROOT, name: str = "graft") -> None:
    """Make `root` importable as `name` without executing its `__init__.py`, which needs ComfyUI."""
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(root)]
        sys.modules[name] = package


bind()
sys.path.append(str(Path(__file__).parent))  # for `import oracle`: importlib mode leaves the path alone
# pytest imports the root package of a conftest by its folder's name: give it one that does nothing
sys.modules.setdefault(ROOT.name, types.ModuleType(ROOT.name))
os.environ.setdefault("TRITON_INTERPRET", "1")
