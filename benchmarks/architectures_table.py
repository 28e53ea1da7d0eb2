"""docs/architectures.md: every class of models that ComfyUI knows, loaded by Graft and measured.

    python benchmarks/architectures_table.py            # in the newest ComfyUI of COMFYUI_PATH or the home folder
    python benchmarks/architectures_table.py --print    # show the table only
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "architectures.md"
FOLDER = ROOT / "tests" / "in_comfyui"
HEAD = """\
# Architectures

Written by `make architectures` with ComfyUI {version}. For each class of models that this ComfyUI knows, a small
model with random weights is written as GGUF in mixed types, loaded by Graft, and compared with ComfyUI's own loader
on the same weights. Both compute in fp32 on a CPU.

- **base**: the relative error of the model's output. Up to 1e-5 is right.
- **LoRA**: the relative error of what a LoRA changes, on about eight layers and a part of one. Up to 1e-4 is right.
- **saved**: the model in BF16, written by Save Diffusion Model as GGUF as Q4_K_M and loaded again. Each tensor in that
  file is what libgguf makes of the model's own weight, and the error is that of the output against ComfyUI's own loader
  on these rounded weights. Up to 1e-5 is right: then a file costs what its type costs.

For base and LoRA the worst of three files counts: one with only the `weight` tensors quantized, one with every tensor
of two dimensions or more quantized, one in BF16. After the LoRA the output without it is the same as before, to
the last bit.

| model | ComfyUI's class | since | base | LoRA | saved | remarks |
|---|---|---|---|---|---|---|
"""


def names() -> dict[str, Any]:
    """The table in `nodes/architectures.py`, whose package needs a host, and which does not."""
    spec = importlib.util.spec_from_file_location("architectures_of_graft", ROOT / "nodes" / "architectures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.ARCHITECTURES


def version_of(host: Any) -> str:
    return re.search(r'"(.+)"', (host.folder / "comfyui_version.py").read_text(encoding="utf-8"))[1]


def newest() -> Any:
    sys.path.insert(0, str(ROOT / "tests"))
    from hosts import comfyui_hosts

    hosts = comfyui_hosts()
    if not hosts:
        sys.exit("no ComfyUI found: set COMFYUI_PATH (CONTRIBUTING.md)")
    return max(hosts, key=lambda host: [int(n) for n in re.findall(r"\d+", version_of(host))])


def measured(host: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """By class and packing: what the tests in that host have written down."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        ran = host.run(
            "-m", "pytest", str(FOLDER / "test_architectures.py"),
            f"{FOLDER / 'test_save.py'}::test_an_architecture_saved_and_loaded",
            "--import-mode=importlib", "-q", "--tb=line",
            "-p", "no:cacheprovider", "--rootdir", str(FOLDER), "--confcutdir", str(FOLDER), "-c", "/dev/null",
            timeout=4 * 3600, COMFYUI_PATH=str(host.folder), GRAFT_ARCHITECTURES=str(results),
        )  # fmt: skip
        if not results.is_file():
            sys.exit(f"nothing was measured in {host.folder}:\n{ran.stdout[-4000:]}")
        print(ran.stdout.strip().splitlines()[-1])
        return json.loads(results.read_text())


def head(host_class: str, known: Any) -> str:
    """The part of a line that needs no host."""
    name = ", ".join([known.name, *(variant for variant, _ in known.variants)])
    return f"| {name} | `{host_class}` | {known.since} |"


def row(host_class: str, known: Any, packings: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """A line of the table, and whether all of it is right."""
    line = head(host_class, known)
    errors = [f"{packing}: {result['error']}" for packing, result in packings.items() if "error" in result]
    if errors:
        return f"{line} | | | {errors[0].replace('|', '/')} |\n", False
    saved = packings["saved"]["base"]
    loaded = [result for packing, result in packings.items() if packing != "saved"]
    base = max(result["base"] for result in loaded)
    loras = [result["lora"] for result in loaded if result["lora"] is not None]
    restored = all(result["restored"] for result in loaded)
    remarks = [] if loras else ["is called and not sampled: no LoRAs"]
    remarks += [] if restored else ["not restored after the LoRA"]
    remarks += ["the base is off"] if base > 1e-5 else []
    remarks += ["the LoRA's effect is off"] if max(loras, default=0) > 1e-4 else []
    remarks += ["the saved file is off"] if saved > 1e-5 else []
    right = max(base, saved) <= 1e-5 and max(loras, default=0) <= 1e-4 and restored
    lora = f"{max(loras):.1e}" if loras else "–"
    return f"{line} {base:.1e} | {lora} | {saved:.1e} | {'; '.join(remarks)} |\n", right


def main() -> None:
    host, known = newest(), names()
    results = measured(host)
    rows = [row(name, known[name], results[name]) for name in known if name in results]
    text = HEAD.format(version=version_of(host)) + "".join(line for line, _ in rows)
    if "--print" in sys.argv:
        print(text)
    else:
        TABLE.write_text(text, encoding="utf-8")
    wrong = [line for line, right in rows if not right]
    print(f"{len(rows) - len(wrong)} of {len(rows)} right in ComfyUI {version_of(host)}")
    sys.exit("".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
