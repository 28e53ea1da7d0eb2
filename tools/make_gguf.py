"""Make a GGUF file of a model, without a host: python <pack>/tools/make_gguf.py in.safetensors out.gguf --type Q4_K_M

Needs torch, safetensors and libgguf; ComfyUI's and Forge's own Python have them.
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT / "tools"]
package = types.ModuleType("graft")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("graft", package)

from graft.kernels import GraftError, UnsupportedFormat  # noqa: E402  (the checkout is the package `graft` from here on)
from graft.ops.baked import with_loras  # noqa: E402
from graft.ops.files.architectures import KNOWN_TO_PEERS, architecture_named, has_diffusers_names  # noqa: E402
from graft.ops.files.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from graft.ops.files.writer import check_place  # noqa: E402
from graft.ops.make import VERSION, plan_model, provenance, sha256_of, write_model  # noqa: E402
from graft.ops.recipes import NAMES, parse_rules, recipe_named  # noqa: E402
from graft.ops.report import size_text  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns:
    0, or 1 where there is no file then, with the reason on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        _make(options)
    except GraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped, nothing is written", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a GGUF file of a diffusion model.")
    parser.add_argument("source", nargs="+", help="the model: .safetensors, all or one of several shards, or a .gguf")
    parser.add_argument("target", help="the .gguf to write")
    parser.add_argument("--type", default="Q4_K_M", help=f"a recipe, or any type of GGUF; recipes: {', '.join(NAMES)}")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="a LoRA to merge in first"
    )
    parser.add_argument("--rule", action="append", default=[], metavar="PATTERN=TYPE", help="a type of your own choice")
    parser.add_argument("--architecture", help="general.architecture, where it is not known by the model's tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of the target's name")
    parser.add_argument("--plan", action="store_true", help="say what would be written, and write nothing")
    return parser


def _make(options: argparse.Namespace) -> None:
    rules, recipe, target = parse_rules(options.rule), recipe_named(options.type), Path(options.target)
    if target.suffix.lower() != ".gguf":
        raise GraftError(f"the last argument is the file to write, which ends in .gguf ({target})")
    model = open_checkpoint(options.source)
    loras = [_lora(text) for text in options.lora]
    architecture = options.architecture or _architecture_of(model)
    state = with_loras(model.state, loras, report=print)
    plan = plan_model(state, recipe, architecture, rules)
    print(plan.summary)
    for note in plan.notes:
        print(f"note: {note}")
    if options.plan:
        return
    check_place(target, plan.nbytes, options.overwrite)
    names = [(Path(path).name, strength) for path, strength in loras]
    source, digest = ", ".join(path.name for path in model.paths), sha256_of(model.paths[0])
    started = time.monotonic()
    entries = provenance(
        VERSION, source, digest if len(model.paths) == 1 else "", names, rules, passed_on=model.entries
    )
    size = write_model(target, plan, entries, options.overwrite, _progress(plan.weights))
    seconds = time.monotonic() - started
    print(f"\n{target}: {size_text(size)} in {seconds:.0f} s, {plan.weights / seconds / 1e6:.1f} M weights a second")


def _lora(text: str) -> tuple[str, float]:
    """``FILE:STRENGTH``; without a number behind its last colon all of it is the file."""
    name, colon, strength = text.rpartition(":")
    try:
        return (name, float(strength)) if colon and name else (text, 1.0)
    except ValueError:
        return text, 1.0


def _architecture_of(model: Checkpoint) -> str:
    if model.is_text_encoder and model.architecture:
        return model.architecture
    if has_diffusers_names(model.state):
        raise UnsupportedFormat(
            "the model has the names of diffusers, which other readers do not know: load it in ComfyUI and use Save as "
            f"GGUF there, or get it under its original names ({model.paths[0]})"
        )
    found = architecture_named(model.state) or model.architecture
    if found is None:
        raise UnsupportedFormat(
            f"the architecture of this model is not known by its tensors: name it with --architecture, such as "
            f"{', '.join(KNOWN_TO_PEERS)} ({model.paths[0]})"
        )
    return found


def _progress(total: int) -> Callable[[int], None]:
    done, started, shown = 0, time.monotonic(), 0.0

    def progress(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown > 1 or done == total:
            shown, left = now, (now - started) * (total - done) / max(done, 1)
            print(f"\r{done / total:4.0%}, {left:.0f} s left   ", end="", flush=True)

    return progress


if __name__ == "__main__":
    sys.exit(main())
