"""Saved LoRAs in ComfyUI: what was on a model, loaded again by our node and the host's own, on plain models."""

from __future__ import annotations

from dataclasses import replace

import comfy.sd
import comfy.utils
import folder_paths
import nodes
import pytest
import torch
from adapter_samples import Sampler
from conftest import ROOT
from generation import distance, forget, sample, with_lora
from safetensors import safe_open
from small import SD3, loras, sd3, stock  # noqa: F401  (fixtures)
from sweep import sizes_of, write_tiny
from tiny_models import MODELS


@pytest.fixture
def output(tmp_path, monkeypatch):
    """The host's output, whose LoRAs it lists."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    return tmp_path / "loras"


def saved(model, rank: int = 0, names: str = "kohya", file: str = "fp32", base=None, importance=None) -> str:
    save = nodes.NODE_CLASS_MAPPINGS["GraftSaveLora"]()
    return save.save(model, "loras/saved", rank, names, file, base, importance)["result"][1]


def name_in(output) -> str:
    (path,) = output.iterdir()
    return path.name


def on_the_plain(sd3, stock, name: str) -> dict:  # noqa: F811
    """The saved file on plain models: ours by our node and the stock one, the host's own by the stock one."""
    load = nodes.LoraLoaderModelOnly().load_lora_model_only
    stack = nodes.NODE_CLASS_MAPPINGS["GraftLoraStack"]().apply(sd3[0], lora_1=name, strength_1=1.0)["result"][0]
    return {"stack": (stack, sd3[0]), "stock node": (load(sd3[0], name, 1.0)[0], sd3[0]),
            "stock": (load(stock, name, 1.0)[0], stock)}  # fmt: skip


def agree(sd3, stock, output, wanted: torch.Tensor, tolerance: float) -> None:  # noqa: F811
    """The saved file has the same effect as what it was made of."""
    base = sample(sd3[0], SD3)
    for way, (model, plain) in on_the_plain(sd3, stock, name_in(output)).items():
        error = distance(sample(model, SD3) - sample(plain, SD3), wanted - base)
        assert error < tolerance, f"{way}: {error}"


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
@pytest.mark.parametrize("which", ["ours", "stock"])
def test_several_loras_become_one(sd3, stock, loras, output, which, names):  # noqa: F811
    model = sd3[0] if which == "ours" else stock
    both = with_lora(with_lora(model, loras[0], 0.7), loras[1], -0.4)
    text = saved(both, names=names)
    assert "of rank up to 28" in text and "nothing was cut" in text, text
    with safe_open(output / name_in(output), "pt") as file:
        keys = list(file.keys())
        assert file.metadata()["ss_network_dim"] == "28"
    of_qkv = {
        "kohya": {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"},
        "diffusers": {f"transformer.transformer_blocks.0.attn.to_{part}.lora_B.weight" for part in "qkv"},
    }
    assert of_qkv[names] <= set(keys)
    agree(sd3, stock, output, sample(with_lora(with_lora(sd3[0], loras[0], 0.7), loras[1], -0.4), SD3), 1e-4)


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_every_layer_comes_back(pack, tmp_path, names):
    """Under names that stand for parts of layers, too: what the host and our own reader make of the file."""
    path, saving, writer = tmp_path / "a.gguf", pack("nodes.save_lora"), pack("ops.files.lora_writer")
    with sizes_of(MODELS["Flux"]) as module:
        write_tiny(MODELS["Flux"], module, "weights", path)
        model = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
    r = Sampler(4, torch.float32)
    shapes = {path: layer.logical_shape for path, layer in model.graft.layers.items()}
    lora = {}
    for layer, (rows, columns) in shapes.items():
        lora |= {f"{layer}.lora_A.weight": r(1, columns), f"{layer}.lora_B.weight": r(rows, 1)}
    before = {name: change for name, change, _ in saving.changes_of(with_lora(model, lora)) if change is not None}
    assert len(before) == len(shapes) > 20
    file = tmp_path / "a.safetensors"
    state = writer.kohya_state(before)
    if names == "diffusers":
        state = writer.diffusers_state(before, saving.diffusers_names(model))
        assert sum(name.startswith("transformer.") for name in state) > len(shapes)
    writer.write_lora(file, state, "fp32", {})
    lora_node = pack("nodes.lora")
    stacked = model.clone()
    lora_node.apply_lora(stacked, lora_node.LoraFiles().open(str(file)), "a", 1.0)
    for again in (stacked, with_lora(model, comfy.utils.load_torch_file(str(file)))):
        after = {name: change for name, change, _ in saving.changes_of(again) if change is not None}
        assert after.keys() == before.keys()
        for name, change in before.items():
            assert distance(after[name].matrix(), change.matrix()) < 1e-5, name
    forget(model)


def others(dense) -> dict[str, torch.Tensor]:
    """A LoKr, the bias of another layer, and the table of places."""
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    layer = "diffusion_model.joint_blocks.0.x_block.mlp.fc1"
    rows, columns = shapes[f"{layer}.weight"]
    r = Sampler(4, torch.float32)
    table = "diffusion_model.pos_embed"  # neither a weight nor a bias
    return {
        f"{layer}.lokr_w1": r(8, 8), f"{layer}.lokr_w2": r(rows // 8, columns // 8, scale=0.01),
        "diffusion_model.joint_blocks.0.x_block.attn.proj.diff_b": r(columns, scale=0.5),
        f"{table}.diff": r(*shapes[table], scale=0.5),
    }  # fmt: skip


@pytest.mark.parametrize("which", ["ours", "stock"])
def test_what_is_no_product_is_saved_in_full(sd3, stock, loras, output, which):  # noqa: F811
    file = others(sd3[1])
    model = with_lora(with_lora(sd3[0] if which == "ours" else stock, file), loras[0])
    text = saved(model)
    assert "3 in full" in text, text
    agree(sd3, stock, output, sample(with_lora(with_lora(sd3[0], file), loras[0]), SD3), 1e-4)


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_a_rank_cuts_layers_alone(sd3, stock, loras, output, names):  # noqa: F811
    """A file has no name for factors of a table."""
    file = {key: value for key, value in others(sd3[1]).items() if "pos_embed" in key}
    model = with_lora(with_lora(sd3[0], file), loras[0])
    text = saved(model, rank=16, names=names)
    assert "1 in full" in text and "lost by rank 16: 0.00%" in text, text
    agree(sd3, stock, output, sample(model, SD3), 1e-4)


def test_a_cut_says_what_it_loses(sd3, stock, loras, output):  # noqa: F811
    both = with_lora(with_lora(sd3[0], loras[0], 0.7), loras[1], 0.7)
    text = saved(both, rank=24, file="fp16")
    lost = float(text.split("lost by rank 24: ")[1].split("%")[0]) / 100
    assert 0.05 < lost < 0.4, text
    wanted, base = sample(both, SD3), sample(sd3[0], SD3)
    for way, (model, plain) in on_the_plain(sd3, stock, name_in(output)).items():
        assert distance(sample(model, SD3) - sample(plain, SD3), wanted - base) < 3 * lost, way


def test_what_sets_two_models_apart(sd3, stock, loras, output):  # noqa: F811
    """A model that was merged with a LoRA is the plain one with that LoRA, whichever loaded it."""
    text = saved(with_lora(stock, loras[0], 1.0), rank=16, base=sd3[0])
    assert float(text.split("lost by rank 16: ")[1].split("%")[0]) < 0.1, text
    agree(sd3, stock, output, sample(with_lora(sd3[0], loras[0], 1.0), SD3), 2e-3)


def of_the_demo(pack, type_name: str):
    path = ROOT / "demo" / f"graft-demo-{type_name}.gguf"
    return pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")


def picture(pack, model, text: str, steps: int = 2) -> torch.Tensor:
    prompt = pack("nodes.demo").GraftDemoPrompt()
    positive, negative = prompt.encode(text)[0], prompt.encode("")[0]
    latent = {"samples": torch.zeros(1, 16, 1, 16, 16)}
    return nodes.common_ksampler(model, 1, steps, 3.0, "euler", "simple", positive, negative, latent)[0]["samples"]


def calibrated(pack, model):
    watched = nodes.NODE_CLASS_MAPPINGS["GraftCalibrate"]().watch(model, for_repair=True)[0]
    picture(pack, watched, "a red star and a blue ring on mint")
    return nodes.NODE_CLASS_MAPPINGS["GraftImportance"]().collect([watched], [{}])["result"][0]


def test_a_repair_goes_to_what_counts(pack, output, monkeypatch):
    """A file of fewer bits with a LoRA of its rounding beside it: nearer to its original, most with a calibration."""
    monkeypatch.setattr(pack("nodes.calibrate"), "SKETCHED", 64)
    fine, rough = of_the_demo(pack, "Q8_0"), of_the_demo(pack, "Q4_K_M")
    text = "a pink heart on sand"
    wanted, errors = picture(pack, fine, text), [distance(picture(pack, rough, text), picture(pack, fine, text))]
    importance = calibrated(pack, fine)
    for known in (None, importance):
        report = saved(fine, rank=8, base=rough, importance=known)
        name = sorted(path.name for path in output.iterdir())[-1]
        repaired = nodes.LoraLoaderModelOnly().load_lora_model_only(rough, name, 1.0)[0]
        errors.append(distance(picture(pack, repaired, text), wanted))
    assert "as calibrated" in report
    assert errors[2] < 0.9 * errors[1] and errors[1] < errors[0], errors
    with pytest.raises(Exception, match="switch for_repair on"):
        saved(fine, rank=4, base=rough, importance=replace(importance, sketches={}))
    elsewhere = {f"other.{name}": sketch for name, sketch in importance.sketches.items()}
    with pytest.raises(Exception, match="the calibration is of another model"):
        saved(fine, rank=4, base=rough, importance=replace(importance, sketches=elsewhere))


def test_a_gguf_file_of_it(sd3, loras, output):  # noqa: F811
    from graft.ops import open_gguf

    saved(with_lora(sd3[0], loras[0]), file="Q8_0 (GGUF)")
    file = open_gguf(output / name_in(output))
    assert file.metadata["general.type"] == "adapter" and "Q8_0" in file.type_counts
    assert any(name.endswith(".lora_down.weight") for name in file.tensors)


@pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this ComfyUI has no such node")
def test_a_lora_that_is_in_no_patch_is_said(pack, sd3, loras, output):  # noqa: F811
    """The host's Load LoRA (Bypass)."""
    bypassed = comfy.sd.load_bypass_lora_for_models(sd3[0], None, dict(loras[0]), 1.0, 0.0)[0]
    with pytest.raises(Exception, match=r"LoRAs of Load LoRA \(Bypass\) are in no file"):
        saved(bypassed)
    assert "Load LoRA (Bypass)" in saved(with_lora(bypassed, loras[1]))
    assert "are not merged in" in pack("nodes.save")._left_out(bypassed)


def test_what_cannot_be_saved(sd3, loras, output):  # noqa: F811
    with pytest.raises(Exception, match="no LoRA on this model"):
        saved(sd3[0])
    with pytest.raises(Exception, match="set rank, for example to 64"):
        saved(sd3[0], base=sd3[0])
    with pytest.raises(Exception, match="the same: there is nothing"):
        saved(sd3[0], rank=4, base=sd3[0].clone())
    assert not output.exists() or not list(output.iterdir())


def test_files_do_not_take_each_others_place(sd3, loras, output):  # noqa: F811
    for _ in range(2):
        saved(with_lora(sd3[0], loras[0]), rank=2, file="bf16")
    assert sorted(path.name for path in output.iterdir()) == ["saved_00001_.safetensors", "saved_00002_.safetensors"]
