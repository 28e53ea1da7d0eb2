"""The pictures in help pages: each node as the newest ComfyUI shows it (web/docs/*.png).

    python benchmarks/help_pictures.py                 # needs chromium and playwright, as the browser tests do
    python benchmarks/help_pictures.py GraftRegions    # only these
    python benchmarks/help_pictures.py --training      # example_workflows/Graft train.jpg: it runs, some minutes

Nodes of the demo have run; the others hold what people choose in them, and their files are names only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
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
EDGE = 8  # pixels around a node, since half of a dot for links lies outside
SIDE = 384
"""Pixels of a picture in a workflow's own."""
TOLD = {
    "modelspec.trigger_phrase": "neon sign", "ss_base_model_version": "wan", "ss_num_train_images": "64",
    "ss_steps": "1200", "ss_unet_lr": "0.0005", "ss_optimizer": "AdamW", "ss_training_comment": "Try it at 0.8 first.",
}  # fmt: skip

ALONE: dict[str, dict[str, Any]] = {
    "GraftCLIPLoader": {
        "clip_name1": "clip_l.safetensors", "type": "flux", "clip_name2": "t5xxl-Q5_K_M.gguf",
    },
    "GraftCheckpointLoader": {"ckpt_name": "sd_xl_base_1.0-Q8_0.gguf"},
    "GraftVAELoader": {"vae_name": "flux-vae-BF16.gguf"},
    "GraftControlNetLoader": {"control_net_name": "flux-depth-Q8_0.gguf"},
    "GraftModelPatchLoader": {"name": "qwen-canny-Q8_0.gguf"},
    "GraftLora": {
        "lora_name": "watercolor.safetensors", "strength": 0.8, "end": 0.5, "course": "fade out",
        "blocks": "double 0-9 = 0.5, single = 0, * = 1",
    },
    "GraftStrength": {"end": 0.25, "applies_to": "positive"},
    "GraftRegions": {"split": "rectangle", "feather": 0.05, "left": 0.5, "top": 0.1, "right": 0.95, "bottom": 0.8},
    "GraftSaveGGUF": {
        "type": "Q4_K_M", "filename_prefix": "my-flux-watercolor", "rules": "img_attn.qkv = Q6_K",
    },
    "GraftSaveCLIPGGUF": {"type": "Q8_0", "filename_prefix": "t5xxl"},
    "GraftCalibrate": {"for_repair": False},
    "GraftSaveImatrix": {"filename_prefix": "imatrix/my-flux"},
    "GraftLoadImatrix": {"imatrix_name": "flux1-dev.imatrix.gguf"},
    "GraftSaveLora": {"filename_prefix": "loras/my-repair", "rank": 32, "file": "Q8_0 (GGUF)"},
    "GraftTrainLora": {
        "steps": 1000, "filename_prefix": "loras/my-style", "trigger_phrase": "watercolor by hand",
        "sample_every": 250, "sample_cfg": 3.5,
    },
    "GraftDemoPrompt": {"text": "a red star and a blue ring on mint"},
    "GraftDemoDecode": {},
    "GraftDemoPictures": {"style": "blueprint"},
    "GraftRayLoader": {"unet_name": "flux1-dev-Q4_K_M.gguf"},
}  # fmt: skip
"""Nodes that did not run, and the values of their inputs that are not the defaults."""

FILES = {
    "diffusion_models": "unet_name", "checkpoints": "ckpt_name", "text_encoders": "clip_name", "vae": "vae_name",
    "controlnet": "control_net_name", "model_patches": "name", "imatrix": "imatrix_name", "loras": "lora_name",
}  # fmt: skip
"""By folder of the host's: which inputs name a file in it."""

RAYLIGHT = """
class Standing:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES = ()


NODE_CLASS_MAPPINGS = {"RayUNETLoader": Standing}
"""
"""For that pack, which need not be installed to look at our node for it."""


def put_files(base: Path) -> None:
    """What lists of files show, a LoRA that says something of itself, and a picture beside it."""
    for folder, key in FILES.items():
        place = base / "models" / folder
        place.mkdir(parents=True)
        for values in ALONE.values():
            for name in (value for name, value in values.items() if name.rstrip("1234") == key):
                (place / name).touch()
    loras = base / "models" / "loras"
    save_file(load_file(ROOT / "demo" / "graft-demo-neon.safetensors"), loras / "neon sign.safetensors", TOLD)
    shutil.copy(WORKFLOWS / "Graft demo.jpg", loras / "neon sign.jpg")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "raylight_stands_here.py").write_text(RAYLIGHT)


def settle(page: Page) -> None:
    page.page.wait_for_timeout(800)


def shoot(page: Page, kind: str) -> None:
    """A node by itself, at its own size."""
    page.see(
        """([kind]) => {
          const [x, y] = seen.nodes(kind)[0].pos;
          app.canvas.links_render_mode = LiteGraph.HIDDEN_LINK;
          app.canvas.ds.scale = 1;
          app.canvas.ds.offset = [120 - x, 160 - y];
          app.graph.setDirtyCanvas(true, true);
        }""", kind,
    )  # fmt: skip
    settle(page)
    node = page.see("([kind]) => seen.nodes(kind)[0].id", kind)
    box = page.page.locator(f"[data-node-id='{node}']").bounding_box()
    around = {"x": box["x"] - EDGE, "y": box["y"] - EDGE}
    saved(page.page, kind, clip={**around, "width": box["width"] + 2 * EDGE, "height": box["height"] + 2 * EDGE})


def draw_alone(page: Page, kind: str, values: dict[str, Any]) -> None:
    """A node in an empty workflow, as somebody has filled it in."""
    page.see(
        """([kind, values]) => {
          // not clear(), which gives ids again: a new node of an old id has its texts
          app.graph._nodes.slice().forEach((node) => app.graph.remove(node));
          const node = LiteGraph.createNode(kind);
          node.pos = [100, 100];
          app.graph.add(node);
          for (const [name, value] of Object.entries(values)) {
            const widget = node.widgets.find((widget) => widget.name === name);
            const known = widget.options.values;
            if (Array.isArray(known) && !known.includes(value)) throw new Error(`${kind}: ${name} is not ${value}`);
            widget.value = value;
            widget.callback?.(value);
          }
          node.setSize([Math.max(node.size[0], 360), node.computeSize()[1]]);
        }""", kind, values,
    )  # fmt: skip
    shoot(page, kind)


def saved(place: Any, name: str, **how: Any) -> None:
    path = PLACE / f"{name}.png"
    place.screenshot(path=path, **how)
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


def draw_demo(page: Page, _: Path) -> None:
    """The nodes of the demo, and what a row of LoRA Stack says of its file."""
    page.load(rows())
    page.run()
    page.wait_for_texts()
    for kind in (LOADER, INSPECT, STACK):
        shoot(page, kind)
    choose(page, 1, "Info")
    settle(page)
    saved(page.page.locator("dialog.graft-info"), "info")
    page.page.keyboard.press("Escape")


def draw_calibration(page: Page, _: Path) -> None:
    """Importance, behind a sampler that has run."""
    page.load(json.loads((WORKFLOWS / "Graft make.json").read_text()))
    page.run()
    page.wait("() => seen.text('GraftImportance')?.value")
    shoot(page, "GraftImportance")


RAN = {
    LOADER: draw_demo, INSPECT: draw_demo, STACK: draw_demo, "info": draw_demo, "GraftImportance": draw_calibration,
    "regions": draw_regions,
}  # fmt: skip
"""What draws each of the other pictures."""


def draw_help(server: Server, base: Path, wanted: Sequence[str]) -> None:
    """Nodes in Chromium."""
    with chromium() as browser:
        page = Page(browser.new_page(viewport={"width": 1200, "height": 1400}), server, vue=True)
        for kind in filter(ALONE.__contains__, wanted):
            draw_alone(page, kind, ALONE[kind])
        for draw in dict.fromkeys(RAN[kind] for kind in wanted if kind not in ALONE):
            draw(page, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="only their pictures")
    parser.add_argument("--training", action="store_true", help="the picture of the workflow that trains, and no other")
    options, host = parser.parse_args(), newest()
    base = Path(tempfile.mkdtemp())
    put_files(base)
    server = Server(base, host.python, host.folder)
    try:
        if options.training:
            draw_training(server)
        else:
            draw_help(server, base, options.nodes or [*ALONE, *RAN])
    finally:
        server.stop()
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
