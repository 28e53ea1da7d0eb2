"""The pictures in help pages: nodes as the newest ComfyUI shows them, with the demo model (web/docs/*.png).

    python benchmarks/help_pictures.py              # needs chromium and playwright, as the browser tests do
    python benchmarks/help_pictures.py --training   # example_workflows/Graft train.jpg: the workflow runs, some minutes
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from architectures_table import ROOT, newest
from PIL import Image

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "in_comfyui")]
import conftest  # noqa: E402, F401  (binds the checkout as `graft`)
from browser import chromium  # noqa: E402
from comfy_server import Server  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_comfyui_frontend import INSPECT, LOADER, STACK, Page, choose, demo  # noqa: E402
from workflows import to_api  # noqa: E402

PLACE, WORKFLOWS = ROOT / "web" / "docs", ROOT / "example_workflows"
SIDE = 384
"""Pixels of a picture in a workflow's own."""
TOLD = {
    "modelspec.trigger_phrase": "neon sign", "ss_base_model_version": "wan", "ss_num_train_images": "64",
    "ss_steps": "1200", "ss_unet_lr": "0.0005", "ss_optimizer": "AdamW", "ss_training_comment": "Try it at 0.8 first.",
}  # fmt: skip


def put_lora(base: Path) -> None:
    """A LoRA that says something of itself, and a picture beside it."""
    folder = base / "models" / "loras"
    folder.mkdir(parents=True)
    save_file(load_file(ROOT / "demo" / "graft-demo-neon.safetensors"), folder / "neon sign.safetensors", TOLD)
    shutil.copy(WORKFLOWS / "Graft demo.jpg", folder / "neon sign.jpg")


def settle(page: Page) -> None:
    page.page.wait_for_timeout(800)


def shoot(page: Page, kind: str, name: str) -> None:
    """A node by itself, at its own size."""
    page.see(
        """([kind]) => {
          const [x, y] = seen.nodes(kind)[0].pos;
          app.canvas.ds.scale = 1;
          app.canvas.ds.offset = [120 - x, 160 - y];
          app.graph.setDirtyCanvas(true, true);
        }""", kind,
    )  # fmt: skip
    settle(page)
    node = page.see("([kind]) => seen.nodes(kind)[0].id", kind)
    saved(page.page.locator(f"[data-node-id='{node}']"), name)


def saved(place: Any, name: str) -> None:
    path = PLACE / f"{name}.png"
    place.screenshot(path=path)
    with Image.open(path) as picture:
        compress(picture.copy(), path)


def draw_regions(page: Page, base: Path) -> None:
    """What Inspect draws of the workflow with two regions."""
    page.load(json.loads((WORKFLOWS / "Graft regions.json").read_text()))
    page.see(
        """() => {
          const inspect = LiteGraph.createNode("GraftInspect");
          inspect.pos = [430, 1200];
          app.graph.add(inspect);
          seen.nodes("GraftLora").at(-1).connect(0, inspect, 0);
        }"""
    )
    page.run()
    width = 4 * 128 + 3 * 8  # of a row (nodes/charts.py)
    for path in sorted((base / "temp").glob("*.png")):
        with Image.open(path) as picture:
            if picture.width == width:
                compress(picture.copy(), PLACE / "regions.png")


def asked(server: Server, path: str, given: dict | None = None) -> dict:
    """What the server answers."""
    data = None if given is None else json.dumps(given).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/{path}", data) as answer:
        return json.load(answer)


def draw_training(server: Server) -> None:
    """What the workflow that trains draws without its LoRA and with it."""
    workflow = json.loads((WORKFLOWS / "Graft train.json").read_text())
    asked(server, "prompt", {"prompt": to_api(workflow, asked(server, "object_info"))})
    while not asked(server, "history"):  # which tells of what has ended
        time.sleep(1)
    both = Image.new("RGB", (2 * SIDE, SIDE))
    for place, when in enumerate(("before", "after")):
        (path,) = server.output.glob(f"graft_train_{when}*.png")
        with Image.open(path) as picture:
            both.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), (place * SIDE, 0))
    both.save(WORKFLOWS / "Graft train.jpg", quality=85, optimize=True)


def compress(picture: Image.Image, path: Path) -> None:
    picture.convert("RGB").quantize(128).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} KB")


def rows() -> dict:
    """The demo with a LoRA that says something of itself."""
    workflow = demo("neon", "blueprint", "linocut", inspect=True)
    (stack,) = (node for node in workflow["nodes"] if node["type"] == STACK)
    stack["widgets_values"][:9] = [
        True, "neon sign.safetensors", 0.8, True, "graft-demo-blueprint.safetensors", 0.5,
        False, "graft-demo-linocut.safetensors", 1.0,
    ]  # fmt: skip
    return workflow


def draw_help(server: Server, base: Path) -> None:
    """Nodes in Chromium."""
    with chromium() as browser:
        page = Page(browser.new_page(viewport={"width": 1200, "height": 1000}), server, vue=True)
        page.load(rows())
        page.run()
        page.wait_for_texts()
        for kind, name in ((LOADER, "loader"), (INSPECT, "inspect"), (STACK, "stack")):
            shoot(page, kind, name)
        choose(page, 1, "Info")
        settle(page)
        saved(page.page.locator("dialog.graft-info"), "info")
        page.page.keyboard.press("Escape")
        draw_regions(page, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", action="store_true", help="the picture of the workflow that trains, and no other")
    options, host = parser.parse_args(), newest()
    base = Path(tempfile.mkdtemp())
    put_lora(base)
    server = Server(base, host.python, host.folder)
    try:
        if options.training:
            draw_training(server)
        else:
            draw_help(server, base)
    finally:
        server.stop()
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
