"""What the documents say is what the project has."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md", "demo/README.md", "docs/benchmarks.md")


def test_the_format_matrix_is_that_of_the_table():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_matrix.py"), "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    """Links, and paths in backticks that begin in one of our folders."""
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    folders = "kernels|ops|nodes|scripts|tests|benchmarks|demo|docs|example_workflows|web"
    paths = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert missing + [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_targets_that_are_named_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"`make ([a-z -]+)`", (ROOT / name).read_text(encoding="utf-8"))
    assert {target for words in named for target in words.split()} <= targets
