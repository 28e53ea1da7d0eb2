"""The example workflows open in a fresh ComfyUI; the demo's runs there, the others lack nothing but their models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from comfy_server import Server, packed_files
from PIL import Image
from workflows import to_api

ROOT = Path(__file__).resolve().parent.parent.parent
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
DEMO = ROOT / "example_workflows" / "Graft demo.json"
PROMPT = "a red star and a blue ring on mint"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("comfy"), packed=True)
    yield running
    running.stop()


def test_what_the_registry_hands_on_is_small():
    files = packed_files()
    assert {"__init__.py", "pyproject.toml", "web/graft.js", "example_workflows/Graft demo.json"} <= set(files)
    assert not [name for name in files if name.startswith(("tests/", "benchmarks/", ".ci/"))]
    assert sum((ROOT / name).stat().st_size for name in files) < 9e6


def saved(server: Server, prompt: dict, workflow: dict | None = None) -> Path:
    """Run it, and the file that it saves."""
    history = server.run(prompt, workflow)
    assert history["status"]["status_str"] == "success", history["status"]
    (image,) = next(iter(o["images"] for o in history["outputs"].values() if "images" in o))
    return server.output / image["filename"]


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3).int()


def with_rows(prompt: dict, loras: dict[str, float]) -> dict:
    """The workflow with these rows of its stack."""
    stack = next(node["inputs"] for node in prompt.values() if node["class_type"] == "GraftLoraStack")
    for row in range(1, 9):
        stack[f"enabled_{row}"] = stack[f"lora_{row}"] in loras
        stack[f"strength_{row}"] = loras.get(stack[f"lora_{row}"], 1.0)
    return prompt


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_has_a_thumbnail_and_says_where_its_nodes_come_from(path):
    assert path.with_suffix(".jpg").is_file()
    for node in json.loads(path.read_text())["nodes"]:
        if not node["type"].endswith("Note"):
            assert {"cnr_id", "ver", "Node name for S&R"} <= node["properties"].keys(), node["type"]


@pytest.mark.parametrize("path", [p for p in WORKFLOWS if not p.stem.startswith("Graft")], ids=lambda p: p.stem)
def test_a_workflow_for_a_real_model_lacks_its_files_only(server, path):
    workflow = json.loads(path.read_text())
    refused = server.refused(to_api(workflow, server.get("/object_info")))
    files: dict[str, list[str]] = {}
    for node in workflow["nodes"]:
        values = [v for v in node["widgets_values"] if str(v).endswith((".gguf", ".safetensors"))]
        if values and not node["type"].endswith("Note"):
            files.setdefault(node["type"], []).extend(values)
    # a stack may name what is missing when it runs
    assert refused.keys() | {"GraftLoraStack"} == files.keys() | {"GraftLoraStack"}
    for kind, message in refused.items():
        assert all(file in message for file in files[kind]) and message.count("; ") == len(files[kind]) - 1, message
    note = next(node["widgets_values"][0] for node in workflow["nodes"] if node["type"].endswith("Note"))
    assert all(file in note for names in files.values() for file in names), "the note says where each file comes from"


def test_the_demo_runs_and_its_loras_show(server):
    prompt = to_api(json.loads(DEMO.read_text()), server.get("/object_info"))
    base = pixels(saved(server, with_rows(prompt, {})))
    style = pixels(saved(server, with_rows(prompt, {"graft-demo-neon.safetensors": 1.0})))
    assert base.unique().numel() > 20, "the base is a blank picture"
    assert (style - base).abs().float().mean() > 20, "the LoRA does not show"
    assert torch.equal(pixels(saved(server, with_rows(prompt, {}))), base), "the base is another one after the LoRA"


def test_two_regions_are_those_of_make_demo(server, pack):
    workflow = json.loads((ROOT / "example_workflows" / "Graft regions.json").read_text())
    prompt = to_api(workflow, server.get("/object_info"))
    loader = next(node["inputs"] for node in prompt.values() if node["class_type"] == "GraftUNETLoader")
    loader["compute_dtype"] = "fp32"
    got = pixels(saved(server, prompt))
    pictures, grafted = pack("demo.pictures"), pack("demo.grafted")
    left = torch.zeros(1, 2, 2)
    left[..., 0] = 1
    styles = {"neon": 1.0, "blueprint": 1.0}
    masks = dict(zip(styles, (left, 1 - left), strict=True))
    model = grafted.Grafted(grafted.load_model(grafted.shipped("Q8_0.gguf")), styles, masks)
    drawn = pictures.sample(model, [PROMPT], seed=7, steps=20, guidance=3.0)[0]
    # as below: fp32 sums in another order may fall on the other side of a cut to 8 bits
    assert (got - (drawn * 255).int()).abs().max() <= 1


def test_a_model_is_calibrated_baked_saved_and_loaded(server, pack):
    """The two pictures are nearly one; the file says what it is and what it was made of."""
    workflow = json.loads((ROOT / "example_workflows" / "Graft make.json").read_text())
    history = server.run(to_api(workflow, server.get("/object_info")))
    assert history["status"]["status_str"] == "success", history["status"]
    beside, baked = (
        pixels(server.output / image["filename"])
        for image in sorted((o["images"][0] for o in history["outputs"].values() if "images" in o), key=str)[::-1]
    )
    changed = (beside - baked).abs().float().mean()
    assert 0 < changed < 16 and beside.unique().numel() > 20
    (text,) = (o["text"][0] for o in history["outputs"].values() if "saved" in str(o.get("text")))
    assert "wan · Q4_K_M" in text and "quantized again" in text
    file = pack("ops.files.gguf").open_gguf(server.output / "graft-demo-neon-Q4_K_M.gguf")
    assert file.metadata["graft.loras"] == ["graft-demo-neon.safetensors ×1"] and file.metadata["graft.importance"]
    assert file.metadata["graft.source"] == "graft-demo-Q8_0.gguf" and not list(server.output.glob("*.part"))


def test_a_style_is_trained_and_shows(server):
    """In fewer steps than the workflow has; its file lies where ComfyUI lists LoRAs."""
    workflow = json.loads((ROOT / "example_workflows" / "Graft train.json").read_text())
    prompt = to_api(workflow, server.get("/object_info"))
    short = {"steps": 12, "learning_rate": 1e-2, "batch_size": 4, "sample_every": 12, "sample_steps": 2}
    for node in prompt.values():
        node["inputs"] |= short if node["class_type"] == "GraftTrainLora" else {}
        node["inputs"] |= {"steps": 8} if node["class_type"] == "KSampler" else {}
    history = server.run(prompt)
    assert history["status"]["status_str"] == "success", history["status"]
    before, after = (pixels(next(server.output.glob(f"graft_train_{when}*.png"))) for when in ("before", "after"))
    assert (after - before).abs().float().mean() > 10 and after.unique().numel() > 20
    assert len([o for o in history["outputs"].values() if "images" in o]) == 4
    (made,) = (server.output / "loras").glob("*.safetensors")
    assert made.name in server.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    (text,) = (o["text"][0] for o in history["outputs"].values() if "text" in o and "12 steps" in str(o["text"]))
    assert "LoRA, rank 16, on 40 layers" in text


def test_the_saved_picture_brings_its_workflow_back(server):
    """What the front end sends along lies in the PNG, where it looks for it when a picture is dropped on the canvas."""
    workflow = json.loads(DEMO.read_text())
    prompt = to_api(workflow, server.get("/object_info"))
    with Image.open(saved(server, prompt, workflow)) as image:
        assert json.loads(image.info["workflow"]) == workflow
        assert to_api(json.loads(image.info["workflow"]), server.get("/object_info")) == prompt


@pytest.mark.parametrize("old", ["UnetLoaderGGUF", "UnetLoaderGGUFAdvanced"])
def test_a_workflow_of_comfyui_gguf_runs_without_it(server, old):
    """A host that replaces nodes which are missing puts our loader where that pack's stood."""
    if not (Path(os.environ["COMFYUI_PATH"]) / "app" / "node_replace_manager.py").is_file():
        pytest.skip("this ComfyUI does not replace nodes")
    workflow = json.loads(DEMO.read_text())
    prompt = with_rows(to_api(workflow, server.get("/object_info")), {})
    want = pixels(saved(server, prompt))
    loader = next(node for node in prompt.values() if node["class_type"] == "GraftUNETLoader")
    more = {"dequant_dtype": "default", "patch_dtype": "default", "patch_on_device": False}
    inputs = {"unet_name": loader["inputs"]["unet_name"]} | (more if old.endswith("Advanced") else {})
    loader |= {"class_type": old, "inputs": inputs}
    for node in prompt.values():
        node["_meta"] = {"title": node["class_type"]}  # as the front end sends it
    assert torch.equal(pixels(saved(server, prompt)), want)
    (replacement,) = server.get("/node_replacements")[old]
    assert replacement["new_node_id"] == "GraftUNETLoader" and replacement["old_widget_ids"] == list(inputs)


@pytest.mark.parametrize("loras", [{}, {"neon": 1.0}, {"neon": 0.6, "blueprint": 0.6}], ids="+".join)
def test_the_picture_is_that_of_make_demo(server, pack, loras):
    """ComfyUI's sampler on the nodes' model, and what draws the contact sheet: 20 steps, guidance 3."""
    workflow = json.loads(DEMO.read_text())
    prompt = to_api(workflow, server.get("/object_info"))
    loader = next(node["inputs"] for node in prompt.values() if node["class_type"] == "GraftUNETLoader")
    loader["compute_dtype"] = "fp32"
    got = pixels(saved(server, with_rows(prompt, {f"graft-demo-{style}.safetensors": s for style, s in loras.items()})))
    pictures, grafted = pack("demo.pictures"), pack("demo.grafted")
    model = grafted.Grafted(grafted.load_model(grafted.shipped("Q8_0.gguf")), loras)
    drawn = pictures.sample(model, [PROMPT], seed=7, steps=20, guidance=3.0)[0]
    # ComfyUI cuts to 8 bits, and fp32 sums in another order may fall on the other side of a cut
    assert (got - (drawn * 255).int()).abs().max() <= 1
