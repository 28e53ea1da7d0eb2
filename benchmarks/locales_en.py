"""locales/en: names and tooltips as ComfyUI's front end looks them up, written anew from the nodes.

    python benchmarks/locales_en.py    # in the newest ComfyUI of COMFYUI_PATH or the home folder
"""

from __future__ import annotations

import sys

from architectures_table import FOLDER, newest


def main() -> None:
    ran = newest().run(
        "-m", "pytest", str(FOLDER / "test_locales.py"), "-k", "write", "--import-mode=importlib", "-q",
        "-p", "no:cacheprovider", "--rootdir", str(FOLDER), "--confcutdir", str(FOLDER), "-c", "/dev/null",
        COMFYUI_PATH=str(newest().folder), GRAFT_WRITE_LOCALES="1",
    )  # fmt: skip
    if ran.returncode:
        sys.exit(ran.stdout)


if __name__ == "__main__":
    main()
