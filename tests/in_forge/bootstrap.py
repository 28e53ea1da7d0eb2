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
sys.argv = [sys.argv[0], "--always-cpu"]  # what Forge's own argument parser sees
sys.path[:0] = [str(FORGE), str(FORGE / "packages_3rdparty"), str(FORGE / "modules_forge" / "packages")]

package = types.ModuleType("graft")
package.__path__ = [str(CHECKOUT)]
sys.modules["graft"] = package
