"""`tools/swap_workflow.py`: workflows and prompts in, the same with our loaders out, and back."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from graft.ops.make import VERSION
from workflow_samples import group_node, shown_by_inputs

TOOL = ROOT / "tools" / "swap_workflow.py"
FILES = {
    "diffusion_models": ("Flux/flux1-dev-Q4_K_M.gguf", "Flux/flux1-schnell-Q4_K_M.gguf", "flux1-dev.safetensors"),
    "text_encoders": ("clip_l.safetensors", "t5xxl_fp16.safetensors", "t5-v1_1-xxl-encoder-Q8_0.gguf"),
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for folder, names in FILES.items():
        for name in names:
            (tmp_path / "models" / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "models" / folder / name).touch()
    return tmp_path / "models"


def swap(folder: Path, workflow: Any, *options: str) -> tuple[Any, str]:
    """What is written, and what is said."""
    source, target = folder / "in.json", folder / "out.json"
    source.write_text(workflow if isinstance(workflow, str) else json.dumps(workflow), encoding="utf-8")
    target.unlink(missing_ok=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tool().main([str(source), str(target), *options])
    written = json.loads(target.read_text(encoding="utf-8")) if target.exists() else None
    assert code == (1 if err.getvalue() else 0)
    return written, out.getvalue() + err.getvalue()


@functools.cache
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("swap_workflow", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slot(name: str, link: int | None, widget: bool = True) -> dict:
    return {"name": name, "type": "*", "link": link, **({"widget": {"name": name}} if widget else {})}


def workflow() -> dict:
    """Loaders beside and within a subgraph, which hands on a dtype that ours has none of, and shows two widgets."""
    inner = {
        "id": "a1b2", "inputs": [{"name": "dtype", "linkIds": [5]}, {"name": "kind", "linkIds": [6]}],
        "nodes": [
            {
                "id": 3, "type": "UNETLoader", "pos": [1, 2], "title": "The model",
                "inputs": [slot("unet_name", None), slot("weight_dtype", 5)],
                "outputs": [{"name": "MODEL", "links": [7]}],
                "widgets_values": ["flux1-dev.safetensors", "fp8_e4m3fn"],
                "properties": {"cnr_id": "comfy-core", "ver": "0.3.64", "models": [{"name": "flux1-dev.safetensors"}]},
            },
            {
                "id": 4, "type": "DualCLIPLoader", "inputs": [slot("type", 6)], "outputs": [],
                "widgets_values": ["clip_l.safetensors", "t5xxl_fp16.safetensors", "flux", "default"], "properties": {},
            },
        ],
        "links": [
            {"id": 5, "origin_id": -10, "origin_slot": 0, "target_id": 3, "target_slot": 1},
            {"id": 6, "origin_id": -10, "origin_slot": 1, "target_id": 4, "target_slot": 0},
            {"id": 7, "origin_id": 3, "origin_slot": 0, "target_id": -20, "target_slot": 0},
        ],
    }  # fmt: skip
    shown = [["3", "unet_name"], ["3", "weight_dtype"]]
    nodes = [
        {"id": 1, "type": "Text", "outputs": [{"name": "STRING", "links": [1]}, {"name": "STRING", "links": [2]}]},
        {
            "id": 2, "type": "a1b2", "inputs": [slot("dtype", 1, False), slot("kind", 2, False)],
            "widgets_values": ["flux1-dev.safetensors", "fp8_e4m3fn"], "properties": {"proxyWidgets": shown},
        },
        {
            "id": 9, "type": "UnetLoaderGGUFAdvancedMultiGPU", "inputs": [], "outputs": [], "properties": {},
            "widgets_values": ["FLUX\\flux1-schnell-Q4_K_M.gguf", "float32", "default", False, "cuda:1"],
        },
        {"id": 10, "type": "UNETLoader", "widgets_values": ["sd3.safetensors", "default"], "properties": {}},
    ]  # fmt: skip
    links = [[1, 1, 0, 2, 0, "*"], [2, 1, 1, 2, 1, "*"]]
    return {"nodes": nodes, "links": links, "definitions": {"subgraphs": [inner]}}


def test_a_workflow_with_a_subgraph_and_back(models):
    before = workflow()
    after, said = swap(models, before, "--models", str(models))
    (inner,) = after["definitions"]["subgraphs"]
    outer, (model, text) = {node["id"]: node for node in after["nodes"]}, inner["nodes"]
    assert (model["type"], model["pos"], model["title"]) == ("GraftUNETLoader", [1, 2], "The model")
    assert model["widgets_values"] == ["Flux/flux1-dev-Q4_K_M.gguf", "auto", "auto", "None"]
    files = ["clip_l.safetensors", "flux", "t5-v1_1-xxl-encoder-Q8_0.gguf", "None", "None", "default", "auto"]
    assert (text["type"], text["widgets_values"]) == ("GraftCLIPLoader", files)
    assert (model["properties"]["cnr_id"], model["properties"]["ver"]) == ("graft", VERSION)
    assert "models" not in model["properties"]
    # the dtype's input is gone from the subgraph, and what follows has moved up
    assert [source["name"] for source in inner["inputs"]] == ["kind"] and inner["links"][0]["origin_slot"] == 0
    assert [slot["name"] for slot in outer[2]["inputs"]] == ["kind"] and after["links"] == [[2, 1, 1, 2, 0, "*"]]
    assert outer[2]["properties"]["proxyWidgets"] == [["3", "unet_name"]]
    assert outer[2]["widgets_values"] == ["Flux/flux1-dev-Q4_K_M.gguf"] and outer[1]["outputs"][0]["links"] == []
    assert outer[9]["widgets_values"][0] == "Flux/flux1-schnell-Q4_K_M.gguf"
    assert outer[10] == before["nodes"][3]
    assert "left as it is: there is no GGUF with a name like sd3.safetensors" in said
    assert "not taken along: weight_dtype fp8_e4m3fn" in said and said.endswith("3 of 4 loaders changed\n")

    again, said = swap(models, after, "--models", str(models), "--back")
    assert said.endswith("3 of 3 loaders changed\n")
    olds = [*before["nodes"], *before["definitions"]["subgraphs"][0]["nodes"]]
    news = [*again["nodes"], *again["definitions"]["subgraphs"][0]["nodes"]]
    for old, new in zip(olds, news, strict=True):
        assert new["type"] == old["type"] and (old["id"] == 2 or new.get("widgets_values") == old.get("widgets_values"))
        kept = {"cnr_id", "ver", "models"} & old.get("properties", {}).keys()
        assert all(new["properties"][name] == old["properties"][name] for name in kept)


@pytest.mark.parametrize("file", ["flux1-dev.safetensors", "FLUX\\flux1-dev-Q4_K_M.gguf"])
def test_a_file_that_is_chosen_outside_of_subgraphs_and_back(models, file):
    before = shown_by_inputs(file)
    after, said = swap(models, before, "--models", str(models))
    outer, inner = after["definitions"]["subgraphs"]
    chosen = "Flux/flux1-dev-Q4_K_M.gguf"
    assert f"{chosen} for {file}" in said and "not taken along: weight_dtype fp8_e4m3fn" in said
    assert inner["nodes"][0]["widgets_values"][0] == chosen
    for graph, node in ((inner, outer["nodes"][0]), (outer, after["nodes"][0])):
        assert [source["name"] for source in graph["inputs"]] == ["unet_name"]
        assert [slot["name"] for slot in node["inputs"]] == ["unet_name"]
        assert node["properties"]["proxyWidgets"] == [["-1", "unet_name"]]
    assert after["nodes"][0]["widgets_values"] == [chosen]
    again, _ = swap(models, after, "--models", str(models), "--back")
    assert again["nodes"][0]["widgets_values"] == [file]
    (old,), (new,) = before["definitions"]["subgraphs"][1]["nodes"], again["definitions"]["subgraphs"][1]["nodes"]
    assert (new["type"], new["widgets_values"]) == ("UNETLoader", old["widgets_values"])


def test_a_file_that_is_chosen_outside_as_older_front_ends_save_it(models):
    """They know no widgets but those of inputs, and name none."""
    before = shown_by_inputs("FLUX\\flux1-dev-Q4_K_M.gguf")
    for node in (before["nodes"][0], before["definitions"]["subgraphs"][0]["nodes"][0]):
        node["properties"] = {}
    after, said = swap(models, before, "--models", str(models))
    chosen = "Flux/flux1-dev-Q4_K_M.gguf"
    assert f"{chosen} for FLUX\\flux1-dev-Q4_K_M.gguf" in said and after["nodes"][0]["widgets_values"] == [chosen]
    assert after["definitions"]["subgraphs"][0]["nodes"][0]["widgets_values"] == ["stale.safetensors"]
    again, _ = swap(models, after, "--models", str(models), "--back")
    assert again["nodes"][0]["widgets_values"] == ["FLUX\\flux1-dev-Q4_K_M.gguf"]


def test_widgets_that_a_subgraph_shows_by_inputs_and_by_nodes(models):
    """Then it has values of the first only; the others' are within."""
    before = shown_by_inputs()
    node = before["nodes"][0]
    node["properties"]["proxyWidgets"] = [["4", "seed"], ["-1", "weight_dtype"], ["-1", "unet_name"]]
    node["widgets_values"].reverse()
    after, _ = swap(models, before, "--models", str(models))
    assert after["nodes"][0]["properties"]["proxyWidgets"] == [["4", "seed"], ["-1", "unet_name"]]
    assert after["nodes"][0]["widgets_values"] == ["Flux/flux1-dev-Q4_K_M.gguf"]


def test_a_group_node_is_told_and_left(models):
    before = group_node()
    after, said = swap(models, before, "--models", str(models))
    assert after["nodes"][0] == before["nodes"][0] and after["extra"] == before["extra"]
    assert "node 1, workflow/Both:\n  left as it is: choose Convert to nodes on the group node Both first\n" in said
    assert after["nodes"][1]["type"] == "GraftUNETLoader" and said.endswith("1 of 2 loaders changed\n")


def test_what_a_loader_was_saved_without_is_not_made_up(models):
    """An older one has no device, and its pack's node none at all."""
    values = ["clip_l.safetensors", "t5-v1_1-xxl-encoder-Q8_0.gguf", "flux"]
    node = {"id": 1, "type": "DualCLIPLoaderGGUF", "widgets_values": values, "inputs": [], "properties": {}}
    after, _ = swap(models, {"nodes": [node], "links": []}, "--models", str(models))
    back, _ = swap(models, after, "--models", str(models), "--back")
    assert back["nodes"][0]["widgets_values"] == values


def test_choices_without_an_equal_are_told(models):
    values = ["flux1-dev-Q4_K_M.gguf", "none", "float16", "default", True, True, "sageattn"]
    node = {"id": 1, "type": "GGUFLoaderKJ", "widgets_values": values, "inputs": [], "properties": {}}
    after, said = swap(models, {"nodes": [node], "links": []}, "--models", str(models))
    lost = [line.partition("not taken along: ")[2] for line in said.splitlines() if "not taken along" in line]
    assert lost == ["enable_fp16_accumulation True", "attention_override sageattn"]
    back, _ = swap(models, after, "--models", str(models), "--back")
    assert back["nodes"][0]["widgets_values"] == values


def test_a_prompt_and_back(models):
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}},
        "2": {
            "class_type": "DualClipLoaderGGUF", "_meta": {"title": "Words"},
            "inputs": {
                "clip_name1": "clip_l.safetensors", "clip_name2": "t5-v1_1-xxl-encoder-Q8_0.gguf", "type": ["4", 0],
            },
        },
        "3": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "seed": 1}},
        "4": {"class_type": "Type", "inputs": {}},
        "5": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": ["4", 0]}},
    }  # fmt: skip
    after, said = swap(models, {"prompt": prompt}, "--models", str(models))
    new = after["prompt"]
    assert new["1"]["class_type"] == "GraftUNETLoader" and new["2"]["class_type"] == "GraftCLIPLoader"
    assert new["1"]["inputs"]["unet_name"] == "Flux/flux1-dev-Q4_K_M.gguf" and new["2"]["inputs"]["type"] == ["4", 0]
    assert [new[key] for key in "345"] == [prompt[key] for key in "345"] and new["2"]["_meta"]["title"] == "Words"
    assert "node 5, UnetLoaderGGUF:\n  left as it is: its file comes through a link\n" in said
    again, _ = swap(models, after, "--back", "--models", str(models))
    assert again["prompt"] == prompt


def test_the_hosts_own_come_back_where_nothing_is_known(models):
    """A workflow that was made with ours."""
    values = ["Flux\\flux1-dev-Q8_0.gguf", "auto", "auto", "None"]
    node = {"id": 1, "type": "GraftUNETLoader", "widgets_values": values, "inputs": [], "properties": {}}
    back, _ = swap(models, {"nodes": [node], "links": []}, "--back", "--models", str(models))
    assert back["nodes"][0]["type"] == "UNETLoader"
    assert back["nodes"][0]["widgets_values"] == ["flux1-dev.safetensors", "default"]
    prompt = {"1": {"class_type": "GraftUNETLoader", "inputs": {"unet_name": values[0], "compute_dtype": "auto"}}}
    back, _ = swap(models, prompt, "--back", "--models", str(models))
    inputs = {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}
    assert back == {"1": {"class_type": "UNETLoader", "inputs": inputs}}


def test_a_dry_run_writes_nothing_and_a_file_can_be_named(models):
    before = workflow()
    named = ("--models", str(models), "--file", "sd3.safetensors=sd3.5-Q4_K_M.gguf")
    written, said = swap(models, copy.deepcopy(before), *named, "--dry-run")
    assert written is None and "sd3.5-Q4_K_M.gguf for sd3.safetensors" in said
    assert said.endswith("4 of 4 loaders would be changed\n")
    written, _ = swap(models, before, *named)
    assert written["nodes"][3]["widgets_values"][0] == "sd3.5-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "this is no JSON"), ("[]", "no workflow of ComfyUI"), ('{"a": 1}', "no workflow of ComfyUI")],
)
def test_what_is_no_workflow_is_said(models, text, said):
    written, error = swap(models, text, "--models", str(models))
    assert written is None and error.startswith("error: ") and said in error


def test_nothing_is_replaced_unasked(models, capsys):
    source = models / "in.json"
    source.write_text(json.dumps(workflow()))
    before = source.read_bytes()
    command = [str(source), str(source), "--models", str(models)]
    assert tool().main(command) == 1 and source.read_bytes() == before
    assert "add --overwrite" in capsys.readouterr().err
    assert tool().main([*command, "--overwrite"]) == 0 and source.read_bytes() != before


def test_it_runs_by_itself(models):
    """From a folder of any name, where the models of its ComfyUI are found."""
    place = models.parent / "custom_nodes" / "a pack-1.0"
    place.parent.mkdir()
    place.symlink_to(ROOT, target_is_directory=True)
    (models / "in.json").write_text(json.dumps(workflow()))
    command = [sys.executable, place / "tools" / "swap_workflow.py", models / "in.json", "--dry-run"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.endswith("3 of 4 loaders would be changed\n")
