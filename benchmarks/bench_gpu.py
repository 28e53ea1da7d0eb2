"""The Triton kernels on this GPU: `make bench-gpu`. Stages, each a process of its own with a CSV of its own.

    python benchmarks/bench_gpu.py                                # everything, into benchmarks/results/<card>/
    python benchmarks/bench_gpu.py --stages decode linear --types Q4_K
    python benchmarks/bench_gpu.py --stages tune                  # which tile and which M for `kernels/triton_/plan.py`
    python benchmarks/bench_gpu.py --compile-for sm_90 --cache build/sm_90    # on a machine without a GPU ...
    python benchmarks/bench_gpu.py --cache build/sm_90                        # ... for this one, with the same Triton
    TRITON_INTERPRET=1 python benchmarks/bench_gpu.py --toy --device cpu   # that the stages themselves run

Results are looked at first; types that are wrong on this card are not measured. Whatever goes wrong in a stage, also a
crash of the GPU's context or a stage that hangs, the next one runs. Against bf16 `F.linear` on the decoded weight, a
decode in torch before every `F.linear`, and, given its folder in COMFYUI_GGUF (and that of a second version in
COMFYUI_GGUF_TRITON), city96/ComfyUI-GGUF's decode before every `F.linear`. Times are medians with their 20 and 80 %
quantiles, each run from a cold L2 cache: the device's own time, and apart from it what the host takes to launch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkout
import torch
from gpu import carried, compiling, plot, setting, stages


def isolated(names: list[str], command: Callable[[str], list[str]], limit: float) -> dict[str, str]:
    """Run ``command(name)`` for each stage in a process of its own, of at most `limit` seconds; what became of each."""
    outcome = {}
    for name in names:
        start = time.monotonic()
        try:
            code = subprocess.run(command(name), timeout=limit).returncode
            outcome[name] = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            outcome[name] = f"ended after {limit:.0f} s"
        outcome[name] += f", {time.monotonic() - start:.0f} s"
        print(f"== {name}: {outcome[name]}", flush=True)
    return outcome


def together(names: list[str], of: setting.Setting, folder: Path) -> dict[str, str]:
    """Run stages in this process; an error ends its stage only."""
    outcome = {}
    for name in names:
        if name not in stages.CHECKS:
            of.wrong = stages.wrong_types(folder)
        try:
            count = stages.run(name, of, folder)
            outcome[name] = "done" if count else "failed: it has no line"
        except Exception:
            traceback.print_exc()
            outcome[name] = "failed"
    return outcome


def compile_for(architecture: str, cache: Path | None, types: tuple[str, ...]) -> int:
    """Fill a cache of Triton's for a card that is not here."""
    if cache is None:
        raise SystemExit("say in --cache where the compiled kernels are to lie")
    carried.prepare(cache.absolute())
    sizes = replace(setting.Sizes(), checked_types=types or setting.EVERY_TYPE, compilers=os.cpu_count() or 1)
    failed = 0
    for line in compiling.compiling_for(architecture, setting.Setting(torch.device("cpu"), sizes)):
        print(line, flush=True)
        failed += bool(line.note)
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(stages.EVERY), default=list(stages.STAGES))
    parser.add_argument("--types", nargs="+", help=f"to measure (default: {' '.join(setting.Sizes().types)})")
    parser.add_argument("--rows", nargs="+", type=int, help="values of M to measure")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<card>)")
    parser.add_argument("--limit", type=float, default=150, help="seconds that a stage may take (default %(default)s)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: do the stages run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cache", type=Path, help="Triton's cache, which may come from another machine")
    parser.add_argument("--compile-for", metavar="SM", help="compile every kernel for such a card, and nothing else")
    parser.add_argument("--together", action="store_true", help="all stages in this process")
    args = parser.parse_args()
    if args.compile_for:
        return compile_for(args.compile_for, args.cache, tuple(args.types or ()))
    if args.cache:
        carried.use(args.cache.absolute())
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: nothing to measure")

    sizes = setting.TOY if args.toy else setting.Sizes()
    changed = {"types": args.types, "rows": args.rows}
    sizes = replace(sizes, **{key: tuple(value) for key, value in changed.items() if value})
    card = re.sub(r"[^a-z0-9]+", "-", setting.machine(device)["gpu"].lower()).strip("-")
    folder = args.out or checkout.ROOT / "benchmarks" / "results" / card
    if args.together:
        outcome = together(args.stages, setting.Setting(device, sizes), folder)
        return int(any(not text.startswith("done") for text in outcome.values()))

    again = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--together", "--stages"]
    outcome = isolated(args.stages, lambda name: [*again, name], args.limit)
    plot.plot(folder, folder / "figures.png")
    wrong = stages.wrong_types(folder)
    print(f"{folder}: {', '.join(f'{name} {text}' for name, text in outcome.items())}")
    print(f"wrong on this card, and not measured: {', '.join(sorted(wrong))}" if wrong else "every check passed")
    return int(bool(wrong) or any(not text.startswith("done") for text in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
