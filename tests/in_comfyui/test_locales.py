"""What people read in the page is there in English and in Chinese: names, tooltips, menus and help pages.

`locales/en` is what the code says (`make locales` writes it); Chinese has a text for each of these.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LOCALES, WEB = ROOT / "locales", ROOT / "web"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# texts that are the same in Chinese: names of inputs that people know by these, and of types on links
SAME = {"MODEL", "CLIP", "VAE", "CONTROL_NET", "LORA_STACK", "CONDITIONING", "IMAGE"}
WRITES = bool(os.environ.get("GRAFT_WRITE_LOCALES"))


def english(pack) -> dict[str, dict]:
    """What the front end looks up of our nodes, as they have it themselves."""
    nodes, found = pack("nodes"), {}
    beside_raylight = pack("nodes.raylight").GraftRayLoader  # which is there where that pack is
    for name, node in {**nodes.NODE_CLASS_MAPPINGS, "GraftRayLoader": beside_raylight}.items():
        inputs = {key: given for group in node.INPUT_TYPES().values() for key, given in group.items()}
        tooltips = {key: given[1]["tooltip"] for key, given in inputs.items() if isinstance(given, tuple)}
        names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
        outputs = zip(names, node.OUTPUT_TOOLTIPS, strict=True)
        found[name] = {
            "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS.get(name) or inspect.getdoc(node).rstrip("."),
            "description": node.DESCRIPTION,
            "inputs": {key: {"name": key, "tooltip": text} for key, text in tooltips.items()},
            "outputs": {str(i): {"name": out, "tooltip": text} for i, (out, text) in enumerate(outputs)},
        }
    return found


def read(language: str, file: str) -> dict:
    return json.loads((LOCALES / language / file).read_text(encoding="utf-8"))


def texts(tree: dict, path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        yield from texts(value, f"{path}.{key}") if isinstance(value, dict) else [(f"{path}.{key}", value)]


def commands() -> dict[str, dict]:
    """The commands that our part of the page has, with their English names."""
    script = (WEB / "swap.js").read_text(encoding="utf-8")
    labels = dict(re.findall(r'^const (\w+) = (?:say\()?"(.+?)"\)?;', script, re.MULTILINE))
    found = re.findall(r'\{ id: "([\w.]+)", label: (\w+)', script)
    return {key.replace(".", "_"): {"label": labels[label]} for key, label in found}


@pytest.mark.skipif(WRITES, reason="they are being written")
@pytest.mark.parametrize("file", ["nodeDefs.json", "commands.json"])
def test_english_is_what_the_code_says(pack, file):
    assert read("en", file) == {"nodeDefs.json": english(pack), "commands.json": commands()}[file]


@pytest.mark.skipif(not WRITES, reason="`make locales` writes them")
def test_write_english(pack):
    (LOCALES / "en").mkdir(parents=True, exist_ok=True)
    for file, tree in (("nodeDefs.json", english(pack)), ("commands.json", commands())):
        (LOCALES / "en" / file).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.mark.parametrize("file", ["nodeDefs.json", "commands.json"])
def test_chinese_has_all_of_it(pack, file):
    ours = {"nodeDefs.json": english(pack), "commands.json": commands()}[file]
    given, wanted = dict(texts(read("zh", file))), dict(texts(ours))
    assert given.keys() == wanted.keys()
    plain = [path for path, text in given.items() if not CHINESE.search(text)]
    assert [path for path in plain if given[path] not in SAME] == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_in_a_text_is_read_as_a_place_to_fill_in(language):
    """The front end's translations have marks of their own: braces, bars and at signs."""
    for file in (LOCALES / language).glob("*.json"):
        assert [path for path, text in texts(read(language, file.name)) if re.search(r"[{}|@]", text)] == []


def headings(page: Path) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", page.read_text(encoding="utf-8"), re.MULTILINE)]


def inputs_in(page: Path) -> set[str]:
    """What a page sets as code, of letters and marks that inputs and choices consist of."""
    return set(re.findall(r"`([a-z0-9_]+)`", page.read_text(encoding="utf-8")))


def test_each_node_has_its_help_page_in_chinese(pack):
    names = {*pack("nodes").NODE_CLASS_MAPPINGS, "GraftRayLoader"}
    assert {page.parent.name for page in (WEB / "docs").glob("*/zh.md")} == names
    for name in names:
        page, translated = WEB / "docs" / f"{name}.md", WEB / "docs" / name / "zh.md"
        title = translated.read_text(encoding="utf-8").partition("\n")[0]
        assert title == f"# {read('zh', 'nodeDefs.json')[name]['display_name']}"
        assert headings(translated) == headings(page), f"{name}: parts are missing"
        assert inputs_in(translated) == inputs_in(page), f"{name}: something is not spoken of"
        assert "|--" not in translated.read_text(encoding="utf-8"), "the panel of help pages cuts tables off"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_help_page_names_all_inputs_and_outputs_and_shows_its_node(pack, language):
    for name, node in english(pack).items():
        page = WEB / "docs" / (f"{name}.md" if language == "en" else f"{name}/zh.md")
        text = page.read_text(encoding="utf-8")
        wanted = {*node["inputs"], *(output["name"] for output in node["outputs"].values())}
        if name == "GraftLoraStack":  # of its rows the page names the inputs of the first
            wanted = {key for key in wanted if not re.fullmatch(r"(?:enabled|lora|strength|when)_[2-8]", key)}
        assert wanted - set(re.findall(r"`(\w+)`", text)) == set(), page
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
        assert f"{name}.png" in pictures, page
        # the front end looks for the pictures of a page in any language here
        sizes = {picture: (WEB / "docs" / picture).stat().st_size for picture in pictures}
        assert max(sizes.values()) <= 40_000, sizes


def test_a_page_names_nodes_as_they_are_called(pack):
    """Or nobody finds them: nodes in a Chinese page have their Chinese names."""
    defs = read("zh", "nodeDefs.json")
    ours = {node["display_name"] for node in defs.values()}
    pages = [*(WEB / "docs").glob("*/zh.md"), ROOT / "README.zh.md"]
    for page in pages:
        named = re.findall(r"\*\*([^*]+（(?:GGUF，)?Graft）)\*\*", page.read_text(encoding="utf-8"))
        assert set(named) - ours - {"使用 GGUF（Graft）"} == set(), page
        english = re.findall(r"\*\*([^*]+\((?:GGUF, )?Graft\))\*\*", page.read_text(encoding="utf-8"))
        assert english == [], page


def words() -> dict[str, str]:
    """The table of the page's own texts."""
    table = (WEB / "words.js").read_text(encoding="utf-8")
    pairs = re.findall(r'^  (?:"((?:[^"\\]|\\.)+)"|(\w+)): "((?:[^"\\]|\\.)+)",$', table, re.MULTILINE)
    return {quoted or bare: chinese for quoted, bare, chinese in pairs}


def test_the_page_says_nothing_that_is_not_in_its_table(pack):
    table = words()
    scripts = {path: path.read_text(encoding="utf-8") for path in WEB.glob("*.js") if path.name != "words.js"}
    said = {text for script in scripts.values() for text in re.findall(r'\bsay\("([^"]+)"', script)}
    labels = set(pack("ops.files.lora_info").LABELS)
    assert said and said - table.keys() == set() and labels - table.keys() == set()
    everything = "\n".join(scripts.values())
    unused = {text for text in table if f'"{text}"' not in everything and f"{text}:" not in everything} - labels
    assert unused == set()
    for text, chinese in table.items():
        assert CHINESE.search(chinese) or text in ("alpha", "{is} for {was}")
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese))
