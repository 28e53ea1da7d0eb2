"""The example workflows open and run in a fresh ComfyUI, with nothing to download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfy_server import Server
from PIL import Image
from workflows import to_api

ROOT = Path(__file__).resolve().parent.parent.parent
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("comfy"))
    yield running
    running.stop()


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        rgb = image.convert("RGB").resize((64, 64), Image.Resampling.NEAREST)
        return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(64, 64, 3).int()


def picture(server: Server, prompt: dict, loras: dict[str, float]) -> torch.Tensor:
    """What the workflow paints with these rows of its stack."""
    stack = next(node["inputs"] for node in prompt.values() if node["class_type"] == "GraftLoraStack")
    for row in range(1, 9):
        stack[f"enabled_{row}"] = stack[f"lora_{row}"] in loras
        stack[f"strength_{row}"] = loras.get(stack[f"lora_{row}"], 1.0)
    history = server.run(prompt)
    assert history["status"]["status_str"] == "success", history["status"]
    (image,) = next(iter(o["images"] for o in history["outputs"].values() if "images" in o))
    return pixels(server.output / image["filename"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_has_a_thumbnail_and_says_where_its_nodes_come_from(path):
    assert path.with_suffix(".jpg").is_file()
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"] != "Note":
            assert {"cnr_id", "ver", "Node name for S&R"} <= node["properties"].keys(), node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_runs_and_its_loras_show(server, path):
    prompt = to_api(json.loads(path.read_text()), server.get("/object_info"))
    base = picture(server, prompt, {})
    style = picture(server, prompt, {"graft-demo-neon.safetensors": 1.0})
    assert base.unique().numel() > 20, "the base is a blank picture"
    assert (style - base).abs().float().mean() > 20, "the LoRA does not show"
    assert torch.equal(picture(server, prompt, {}), base), "the base is another one after the LoRA"


def test_the_demo_picture_is_the_one_that_is_drawn_without_a_host(server, pack):
    """ComfyUI's sampler and the demo's own agree: 8 bits, 20 steps, guidance 3."""
    workflow = json.loads((ROOT / "example_workflows" / "Graft demo.json").read_text())
    prompt = to_api(workflow, server.get("/object_info"))
    loader = next(node["inputs"] for node in prompt.values() if node["class_type"] == "GraftUNETLoader")
    loader["compute_dtype"] = "fp32"
    pictures, mmdit = pack("demo.pictures"), pack("demo.mmdit")
    reader, packed, layers = pack("ops.gguf_file"), pack("ops.packed"), pack("ops.layers")
    tensors = reader.diffusion_tensors(reader.open_gguf(ROOT / "demo" / "graft-demo-Q4_K_M.gguf"))
    weights = {name: packed.as_weight(tensor) for name, tensor in tensors.items()}
    model = mmdit.MMDiT.like({name: w.shape for name, w in weights.items()}, operations=layers)
    model.load_state_dict(weights)
    drawn = pictures.sample(model, ["a red star and a blue ring on mint"], seed=7, steps=20, guidance=3.0)[0].int()
    # rounding to 8 bits twice (saving, scaling) on top of fp32 sums in another order
    assert (picture(server, prompt, {}) - drawn).abs().max() <= 2
