"""What the documents say is what the project has."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

DOCUMENTS = (
    "README.md", "README.zh.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md", "demo/README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)  # fmt: skip


def test_the_format_matrix_is_that_of_the_table():
    command = [sys.executable, str(ROOT / "benchmarks" / "formats_matrix.py"), "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_saved_nodes_name_this_version_of_the_pack():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    name, version = (re.search(rf'^{key} = "(.+)"$', project, re.MULTILINE)[1] for key in ("name", "version"))
    assert f'const PACK = {{ cnr_id: "{name}", ver: "{version}" }};' in (ROOT / "web" / "graft.js").read_text("utf-8")


def test_the_chinese_readme_says_as_much():
    """Section by section the same pictures, commands, numbers, and links; only the words differ."""

    def skeleton(name: str) -> list[tuple[object, ...]]:
        sections = re.split(r"^## .*$", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        return [
            (
                sorted(re.findall(r"\]\(((?!README|#)[^)\s]+)\)", section)),
                re.findall(r"^ {4,}(.*)$", section, re.MULTILINE),
                len(re.findall(r"^ *(?:[-|]|\d\.) ?", section, re.MULTILINE)),  # rows and points
                sorted(re.findall(r"`([^`]*)`", section)),
                sorted(re.findall(r"\d+(?:\.\d+)*", section)),
            )
            for section in sections
        ]

    assert skeleton("README.zh.md") == skeleton("README.md")


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
