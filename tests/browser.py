"""A headless Chromium, for the pages that hosts show of us."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser, driven by Playwright; the test is skipped where one of the two is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no page was opened: pip install playwright")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no page was opened: there is no chromium (apt install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=FLAGS)
        yield opened
        opened.close()
