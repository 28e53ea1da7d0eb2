"""Put Graft's loaders into a workflow, without a browser: python <pack>/tools/swap_workflow.py in.json out.json

Reads what ComfyUI saves and what it exports for its API. With --back it puts the old loaders back.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT / "tools"]
package = types.ModuleType("graft")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("graft", package)

from graft.kernels import GraftError  # noqa: E402  (the checkout is the package `graft` from here on)
from graft.ops import workflows  # noqa: E402
from graft.ops.make import VERSION  # noqa: E402

FOLDERS = {workflows.MODEL: ("diffusion_models", "unet"), workflows.TEXT: ("text_encoders", "clip")}
ENDINGS = (".gguf", ".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns:
    0, or 1 where nothing was written, with the reason on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        _swap(options)
    except GraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Put Graft's loaders into a workflow of ComfyUI.")
    parser.add_argument("source", help="the workflow: a .json as ComfyUI saves it, or exports it for its API")
    parser.add_argument("target", nargs="?", help="the .json to write; it may be the same")
    parser.add_argument("--back", action="store_true", help="put the loaders back that Graft's took the place of")
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and write nothing")
    parser.add_argument(
        "--models", action="append", metavar="FOLDER",
        help="ComfyUI's folder of models, where a GGUF with the nearest name is looked for; may be given more than "
        "once (default: the one of the ComfyUI that this pack is in)",
    )  # fmt: skip
    parser.add_argument(
        "--file", action="append", default=[], metavar="OLD=NEW", help="take the file NEW for OLD, wherever it is"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file of the target's name")
    return parser


def _swap(options: argparse.Namespace) -> None:
    if not options.dry_run and options.target is None:
        raise GraftError("name the file to write after the workflow, or add --dry-run")
    data = workflows.read_workflow(Path(options.source))
    if options.target and not options.dry_run and Path(options.target).exists() and not options.overwrite:
        raise GraftError(f"the file is there already: add --overwrite, or choose another name ({options.target})")
    choose_for = _chooser(_folders(options), dict(_pair(text) for text in options.file), options.back)
    done = workflows.swapped(data, choose_for, VERSION, options.back)
    changed = sum(not swapped.left for swapped in done)
    for swapped in done:
        print("\n  ".join([f"node {swapped.node}, {swapped.kind}:", *(swapped.lines or ["changed"])]))
    print(f"{changed} of {len(done)} loaders {'would be changed' if options.dry_run else 'changed'}")
    if not options.dry_run:
        text = json.dumps(data, ensure_ascii=False, indent=2)
        Path(options.target).write_text(text + "\n", encoding="utf-8")


def _chooser(folders: Sequence[Path], named: dict[str, str], back: bool) -> Callable[[str], workflows.Choose]:
    """For a class of loaders, what finds a file: named by hand, or the nearest in the folders."""
    files = {ours: _files(folders, names) for ours, names in FOLDERS.items()}
    fits: Callable[[str], bool] = (lambda name: True) if back else workflows.is_gguf

    def choose_for(kind: str) -> workflows.Choose:
        loader = workflows.loader_of(kind)
        names = files[loader.ours if loader else kind]
        if loader is not None:
            names = [name for name in names if workflows.is_gguf(name) == ("GGUF" in kind)]
        return lambda name: named.get(str(name)) or workflows.nearest(name, names, fits)

    return choose_for


def _folders(options: argparse.Namespace) -> list[Path]:
    folders = [Path(folder) for folder in options.models or _own_models()]
    for folder in folders:
        if not folder.is_dir():
            raise GraftError(f"this folder is not there: name ComfyUI's folder of models after --models ({folder})")
    return folders


def _own_models() -> list[Path]:
    """The folder of models of the ComfyUI in whose custom_nodes this pack is, if it is in one."""
    place = Path(__file__).absolute().parent.parent  # a link to a checkout elsewhere is in that ComfyUI, too
    folder = place.parent.parent / "models"
    return [folder] if place.parent.name == "custom_nodes" and folder.is_dir() else []


def _files(folders: Sequence[Path], names: Sequence[str]) -> list[str]:
    """All files of models in these folders, as ComfyUI lists them."""
    roots = [folder / name for folder in folders for name in names]
    found = (
        str(path.relative_to(root)) for root in roots for path in sorted(root.rglob("*"))
        if path.suffix.lower() in ENDINGS
    )  # fmt: skip
    return list(dict.fromkeys(found))


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.rpartition("=")
    if not (equals and old and new):
        raise GraftError(f"--file takes OLD=NEW, the name in the workflow and the one to take ({text})")
    return old, new


if __name__ == "__main__":
    sys.exit(main())
