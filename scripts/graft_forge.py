"""What Forge's script loader runs: binds the extension's folder as a package and hands everything to it.

The folder may be called anything, and Forge executes this file again when its UI is reloaded, outside of
`sys.modules`. So nothing lives here; `scripts/forge` is imported once and keeps its state.
"""

import importlib
import sys
import types
from pathlib import Path

from modules import errors, scripts

PACKAGE = "graft_gguf"
ROOT = Path(__file__).resolve().parent.parent


def bind():
    """Make this folder importable as PACKAGE without running its __init__.py, which is for ComfyUI."""
    package = sys.modules.get(PACKAGE)
    if package is None:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(ROOT)]
        sys.modules[PACKAGE] = package
    elif package.__path__ != [str(ROOT)]:
        raise RuntimeError(f"Graft is there twice, delete one of the folders {package.__path__[0]} and {ROOT}")
    return importlib.import_module(f"{PACKAGE}.scripts.forge.app").app


try:
    app = bind()
    app.load()
except Exception:
    errors.report("Graft is not active", exc_info=True)
else:

    class GraftScript(scripts.Script):
        """Follows every txt2img, img2img, hires and API job."""

        def title(self):
            return "Graft"

        def show(self, is_img2img):
            return scripts.AlwaysVisible

        def process(self, p, *args):
            app.before_images(p)

        def postprocess(self, p, processed, *args):
            app.after_images()
