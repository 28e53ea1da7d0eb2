"""`make fuzz`: every target for a while, or those that are named."""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
import traceback
import types
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]
package = types.ModuleType("graft")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("graft", package)

TARGETS = (
    "gguf_reader", "decodes", "adapters", "kinds", "dialects", "text_encoders", "tokenizers", "inspection", "imatrix",
    "workflows",
)  # fmt: skip
LENGTH = 512
"""Bytes of choices for an input; most take fewer."""


def choices_of(name: str, seed: int, number: int) -> bytes:
    """Those of one input, by which it can be made again."""
    return random.Random(f"{name} {seed} {number}").randbytes(LENGTH)


def load(name: str) -> ModuleType:
    return importlib.import_module(f"fuzz.{name}")


def try_one(target: ModuleType, data: bytes) -> None:
    """One input; raises what is wrong with the answer."""
    from fuzz.bounds import watch
    from fuzz.choices import Choices

    made = target.make(Choices(data))
    watch()
    target.check(made)


def campaign(name: str, inputs: int, seed: int = 0, first: int = 0, seconds: float = float("inf")) -> tuple[int, dict]:
    """Try inputs number `first` to `first` + `inputs` of a target; an interrupt ends it early.

    Returns:
        how many were tried, and for each place in the code where one failed the number of the first, and its error.
    """
    from fuzz.bounds import confined

    target, found, end = load(name), {}, time.monotonic() + seconds
    number = first
    with confined():
        for number in range(first, first + inputs):
            try:
                try_one(target, choices_of(name, seed, number))
            except KeyboardInterrupt:
                return number - first, found
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                key = f"{type(error).__name__} {Path(where.filename).name}:{where.lineno}"
                found.setdefault(key, (number, "".join(traceback.format_exception(error))))
            if time.monotonic() > end:
                break
    return number + 1 - first, found


def guided(name: str, runs: int) -> None:
    """The same with atheris, which keeps what reaches new code; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["graft"]):
        target = load(name)
    from fuzz.bounds import confined

    with confined():
        atheris.Setup([sys.argv[0], f"-runs={runs}", f"-max_len={LENGTH}"], lambda data: try_one(target, data))
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all, if none is named")
    parser.add_argument("--inputs", type=int, default=20_000, help="of each target (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="that each target may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input, to try one again")
    parser.add_argument("--guided", action="store_true", help="one target, by what code it reaches: needs atheris")
    options = parser.parse_args()
    if options.guided:
        guided(options.targets[0], options.inputs)
    failed = 0
    for name in options.targets or TARGETS:
        start = time.monotonic()
        count, found = campaign(name, options.inputs, options.seed, options.first, options.seconds)
        taken = time.monotonic() - start
        print(f"{name:14} {count:9,} inputs, {count / taken:6,.0f} a second, {len(found)} failures", flush=True)
        for number, error in found.values():
            print(f"\nnumber {number} of seed {options.seed}:\n{error}", flush=True)
        failed += len(found)
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())
