"""`import checkout` from a script in this folder binds the checkout, whatever it is called, as the package `graft`.

GRAFT_CHECKOUT names another one, for what compares two.
"""

import os
import sys
import types
from pathlib import Path

ROOT = Path(os.environ.get("GRAFT_CHECKOUT") or Path(__file__).resolve().parent.parent)

package = types.ModuleType("graft")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("graft", package)
