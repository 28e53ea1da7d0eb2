"""For scripts that a Forge installation's own Python runs: its backend on the path, on the CPU, and Graft bound.

Import this before anything else; the working directory is Forge's.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
FORGE = Path.cwd()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
ARGUMENTS = sys.argv[1:]
IS_NEO = "--always-cpu" not in (FORGE / "backend" / "args.py").read_text(encoding="utf-8")
sys.argv = [sys.argv[0], "--cpu" if IS_NEO else "--always-cpu"]  # what Forge's own argument parser sees
FOLDERS = ("packages_3rdparty", "modules_forge/packages", "repositories/huggingface_guess")
sys.path[:0] = [str(FORGE), *(str(FORGE / folder) for folder in FOLDERS)]

package = types.ModuleType("graft")
package.__path__ = [str(CHECKOUT)]
sys.modules["graft"] = package
