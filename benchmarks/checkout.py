"""`import checkout` from a script in this folder binds the checkout, whatever it is called, as the package `graft`."""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

package = types.ModuleType("graft")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("graft", package)
