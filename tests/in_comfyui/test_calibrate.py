"""Calibration in ComfyUI: numbers of a sampler run, of which nothing stays on the model and nothing counts twice."""

from __future__ import annotations

from dataclasses import replace

import folder_paths
import nodes
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from generation import sample, with_lora
from small import SD3, loras, sd3, stock  # noqa: F401  (fixtures)

TWO = replace(SD3, latent=(2, *SD3.latent[1:]))


@pytest.fixture(scope="module")
def classes():
    return nodes.NODE_CLASS_MAPPINGS


class Prompt:
    """What the host tells a node of the graph."""

    def __init__(self, **links: list) -> None:
        self.nodes = {name: {"inputs": inputs} for name, inputs in links.items()}

    def has_node(self, node_id: str) -> bool:
        return node_id in self.nodes

    def get_node(self, node_id: str) -> dict:
        return self.nodes[node_id]


def watched(classes, model):
    return classes["GraftCalibrate"]().watch(model)[0]


def collected(classes, model, **more):
    return classes["GraftImportance"]().collect([model], [{}], **more)["result"][0]


def run(model, node_id: str, prompt: str, seed: int = 3, steps: int = 1) -> torch.Tensor:
    with CurrentNodeContext(prompt, node_id):
        return sample(model, SD3, steps=steps, seed=seed)


def counted_directly(model, layer: str, sampling) -> tuple[torch.Tensor, int]:
    """The mean square of what goes into a layer, by a hook of the test's own, and of how many rows."""
    seen = []
    module = model.get_model_object(layer)
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().flatten(0, -2)))
    try:
        sampling()
    finally:
        handle.remove()
    rows = torch.cat(seen)
    return rows.square().mean(0).float(), len(rows)


@pytest.mark.parametrize("which", ["ours", "stock"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "with LoRA"])
def test_the_numbers_are_those_of_the_run(classes, sd3, stock, loras, which, lora):  # noqa: F811
    """Two steps of two pictures, with guidance: all rows of both prompts count, and the pictures stay as they are."""
    model = sd3[0] if which == "ours" else stock
    model = with_lora(model, loras[0], 0.8) if lora else model
    plain = sample(model, TWO, steps=2, cfg=3.0)
    calibrated = watched(classes, model)
    assert torch.equal(sample(calibrated, TWO, steps=2, cfg=3.0), plain)
    found = collected(classes, calibrated)
    assert found.calls == 2
    for layer in ("joint_blocks.0.x_block.attn.qkv", "context_embedder"):
        path = f"diffusion_model.{layer}"
        wanted, rows = counted_directly(model, path, lambda: sample(model, TWO, steps=2, cfg=3.0))
        torch.testing.assert_close(found[f"{layer}.weight"], wanted, rtol=1e-6, atol=0)
        assert found.rows(f"{layer}.weight") == rows
    assert not any(module._forward_pre_hooks for module in model.model.modules())
    names = {key.removeprefix("diffusion_model.") for key in model.model.state_dict()}
    assert set(found) <= names and "x_embedder.proj.weight" in found


def test_ours_and_the_hosts_own_see_the_same(classes, sd3, stock):  # noqa: F811
    pair = [watched(classes, model) for model in (sd3[0], stock)]
    for model in pair:
        sample(model, SD3)
    ours, theirs = (collected(classes, model) for model in pair)
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-9)


def test_a_node_that_runs_again_replaces_what_it_has_shown(classes, sd3):  # noqa: F811
    """The host runs again only what has changed: what it has cached counts as it was, and once."""
    model = watched(classes, sd3[0])
    graph = Prompt(first={}, second={}, other={}, collect={"samples": ["first", 0], "samples_2": ["second", 0]})
    asked = {"prompt": [graph], "unique_id": ["collect"]}

    def alone(node_id: str, seed: int):
        fresh = watched(classes, sd3[0])
        run(fresh, node_id, "p", seed)
        return collected(classes, fresh)

    for node_id in ("first", "second", "other"):
        run(model, node_id, "1", seed=1)
    before = collected(classes, model, **asked)
    run(model, "second", "2", seed=9)
    after = collected(classes, model, **asked)
    wanted = alone("first", 1) + alone("second", 9)
    for name in wanted:
        torch.testing.assert_close(after[name], wanted[name], rtol=1e-6, atol=0)
        assert after.rows(name) == before.rows(name) == wanted.rows(name)
    assert after.calls == 2 and any(not torch.equal(before[name], after[name]) for name in wanted)


def test_a_sampler_that_is_connected_elsewhere_no_longer_counts(classes, sd3):  # noqa: F811
    (model,) = classes["GraftCalibrate"]().watch(sd3[0], unique_id="watch")
    for node_id in ("first", "second"):
        run(model, node_id, "1")
    latents = {"samples": ["first", 0], "samples_2": ["second", 0]}
    both = {"first": {"model": ["watch", 0]}, "second": {"model": ["watch", 0]}}
    for links, calls in ((both, 2), (both | {"second": {"model": ["load", 0]}}, 1)):
        graph = Prompt(watch={"model": ["load", 0]}, load={}, collect=latents, **links)
        assert collected(classes, model, prompt=[graph], unique_id=["collect"]).calls == calls


def test_all_samplings_of_one_node_count(classes, sd3):  # noqa: F811
    """A list of prompts, or the parts of a picture."""
    model = watched(classes, sd3[0])
    run(model, "7.0.1", "1", seed=1)
    run(model, "7.0.1", "1", seed=2)
    graph = Prompt(collect={"samples": ["7", 0]}, **{"7": {}})
    found = collected(classes, model, prompt=[graph], unique_id=["collect"])
    assert found.calls == 2


def test_an_interrupted_run_leaves_nothing(classes, sd3):  # noqa: F811
    model = watched(classes, sd3[0])

    def interrupted(*_: object) -> None:
        raise InterruptedError

    broken = model.clone()
    broken.model_options["sampler_post_cfg_function"] = [interrupted]
    with pytest.raises(InterruptedError):
        run(broken, "first", "1")
    assert not any(module._forward_pre_hooks for module in model.model.modules())
    with pytest.raises(Exception, match="no sampler that leads to these latents"):
        collected(classes, model)


def test_a_model_that_is_not_watched(classes, sd3):  # noqa: F811
    with pytest.raises(Exception, match="not watched: connect the sampler"):
        collected(classes, sd3[0])


def test_an_earlier_calibration_is_added_and_saved_and_loaded(classes, sd3, tmp_path, monkeypatch):  # noqa: F811
    model = watched(classes, sd3[0])
    run(model, "first", "1")
    once = collected(classes, model)
    both = collected(classes, model, importance=[once])
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    assert both.rows(name) == 2 * once.rows(name) and torch.equal(both[name], once[name])
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "imatrix", ([str(tmp_path / "imatrix")], {".gguf"}))
    shown = classes["GraftSaveImatrix"]().save(both, "imatrix/sd3")
    (path,) = (tmp_path / "imatrix").iterdir()
    assert path.name == "sd3_00001_.gguf" and shown["result"][0] == str(path)
    load = classes["GraftLoadImatrix"]
    assert load.INPUT_TYPES()["required"]["imatrix_name"][0] == [path.name]
    assert load.VALIDATE_INPUTS(path.name) is True and "is not there" in load.VALIDATE_INPUTS("gone.gguf")
    loaded, text = load().load(path.name)["result"]
    torch.testing.assert_close(loaded[name], both[name], rtol=1e-6, atol=0)
    assert loaded.calls == 2 and "ComfyUI, 1 sampler run" in text


@pytest.mark.parametrize("which", ["ours", "stock"])
def test_save_as_gguf_finds_every_weight_that_it_quantizes(pack, classes, sd3, stock, which):  # noqa: F811
    model = watched(classes, sd3[0] if which == "ours" else stock)
    sample(model, SD3)
    importance, save = collected(classes, model), pack("nodes.save")
    state = save.weights_of_model(model)
    plan = pack("ops.make").plan_model(state, pack("ops.recipes").recipe_named("Q2_K"), "sd3", (), importance)
    quantized = [name for name, choice in plan.choices.items() if choice.fmt.is_quantized]
    assert quantized and all(importance[name].numel() == state[name][0].numel() for name in quantized)
    assert not [name for name in quantized if not plan.has_importance(name)]
