"""From weights to a GGUF file: recipes, rules, LoRAs and what the file says of itself."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT
from graft.kernels import GraftError, UnsupportedFormat, by_name, dequantize
from graft.ops.files.architectures import architecture_named
from graft.ops.files.gguf import diffusion_tensors, open_gguf
from graft.ops.make import VERSION, plan_model, write_model
from graft.ops.packed import PackedTensor, as_weight
from graft.ops.quantize import quantize
from graft.ops.recipes import KEPT, NAMES, RECIPES, SAME, Chooser, parse_rules, recipe_named
from safetensors.torch import save_file

DEMO = ROOT / "demo"


def _flux(width: int = 256, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Names and shapes as Flux has them, a few blocks."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "img_in.weight": (width, 64), "txt_in.weight": (width, 128), "final_layer.linear.weight": (64, width),
        "double_blocks.0.img_attn.norm.query_norm.scale": (64,),
    }  # fmt: skip
    for i in range(2):
        for stream in ("img", "txt"):
            shapes |= {
                f"double_blocks.{i}.{stream}_attn.qkv.weight": (3 * width, width),
                f"double_blocks.{i}.{stream}_attn.qkv.bias": (3 * width,),
                f"double_blocks.{i}.{stream}_attn.proj.weight": (width, width),
                f"double_blocks.{i}.{stream}_mlp.0.weight": (2 * width, width),
                f"double_blocks.{i}.{stream}_mlp.2.weight": (width, 2 * width),
            }
        shapes[f"single_blocks.{i}.linear1.weight"] = (3 * width, width)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def _types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def _write(path: Path, state: dict, recipe: str, architecture: str = "flux", rules: str = "", importance=None) -> Path:
    write_model(path, plan_model(state, recipe_named(recipe), architecture, parse_rules(rules), importance))
    return path


def test_a_mix_is_that_of_the_field(tmp_path):
    state = _flux()
    types = _types(_write(tmp_path / "a.gguf", state, "Q4_K_M"))
    assert types["double_blocks.0.img_attn.qkv.weight"] == "Q5_K" and types["single_blocks.1.linear1.weight"] == "Q4_K"
    assert types["double_blocks.1.txt_mlp.2.weight"] == "Q4_K"
    assert {types[name] for name in ("img_in.weight", "txt_in.weight", "final_layer.linear.weight")} == {"BF16"}
    assert types["double_blocks.0.img_attn.qkv.bias"] == "F32"
    assert gguf.GGUFReader(tmp_path / "a.gguf").get_field("general.file_type").contents() == 15


def test_the_first_few_of_a_kind_and_the_table_of_words():
    names = [f"blocks.{i}.self_attn.v.weight" for i in range(6)]
    plan = plan_model({name: torch.ones(256, 256) for name in names}, recipe_named("Q4_K_S"), "wan")
    assert [plan.choices[name].fmt.name for name in names] == ["Q5_K"] * 4 + ["Q4_K"] * 2
    words = {"token_embd.weight": torch.ones(512, 256), "blk.0.attn_q.weight": torch.ones(256, 256)}
    types = {recipe: plan_model(words, recipe_named(recipe), "qwen3").choices for recipe in ("Q4_K_S", "Q8_0")}
    assert [types[recipe]["token_embd.weight"].fmt.name for recipe in types] == ["Q6_K", "Q8_0"]


def test_every_row_of_the_table():
    assert {
        "Q8_0",
        "Q6_K",
        "Q5_K_M",
        "Q5_K_S",
        "Q4_K_M",
        "Q4_K_S",
        "Q4_0",
        "Q3_K_M",
        "Q2_K",
        "IQ4_XS",
        "IQ4_NL",
    } <= set(NAMES)
    numbers = {item.name: int(item) for item in gguf.LlamaFileType}
    for name, recipe in RECIPES.items():
        theirs = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
        assert numbers[theirs] == recipe.number
        for types in recipe.types.values():
            assert all(by_name(what) for _, what in types)
        most = by_name(recipe.type_of("most", 0)).bits_per_weight
        assert all(by_name(what).bits_per_weight >= most for types in recipe.types.values() for _, what in types), name
    three = RECIPES["Q3_K_M"]
    assert [three.type_of("values", n) for n in range(4)] == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]
    assert recipe_named("MXFP4").type_of("down", 9) == "MXFP4" and recipe_named(SAME) is None
    with pytest.raises(UnsupportedFormat, match="Q4_K_M"):
        recipe_named("Q4_K_XXL")


def test_bytes_are_those_of_the_quantizer(tmp_path, monkeypatch):
    from graft.ops import make

    monkeypatch.setattr(make, "_WEIGHTS_AT_A_TIME", 1000)  # many runs of rows
    state = _flux()
    file = open_gguf(_write(tmp_path / "a.gguf", state, "Q6_K"))
    for name, tensor in file.tensors.items():
        want = quantize(state[name].float().reshape(-1, state[name].shape[-1]), tensor.fmt)
        assert torch.equal(tensor.data, want.flatten()), name


def test_saved_unchanged_the_bytes_are_the_same(tmp_path):
    for name in ("graft-demo-Q4_K_M.gguf", "graft-demo-Q8_0.gguf"):
        first = open_gguf(DEMO / name)
        state = {key: as_weight(tensor) for key, tensor in diffusion_tensors(first).items()}
        second = open_gguf(_write(tmp_path / name, state, SAME, "wan"))
        assert first.tensors.keys() == second.tensors.keys()
        for key, tensor in first.tensors.items():
            other = second.tensors[key]
            assert (tensor.fmt, tensor.shape, tensor.stored_shape) == (other.fmt, other.shape, other.stored_shape), key
            assert torch.equal(tensor.data, other.data), key


@pytest.mark.parametrize("recipe", ["Q8_0", SAME])
def test_a_scale_beside_a_weight_is_worked_into_it(tmp_path, recipe):
    """Its bytes alone would be another weight."""
    weight, scale = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), torch.full((1,), 0.25)
    data = quantize(weight, by_name("Q8_0")).flatten()
    state = {"double_blocks.0.img_mlp.0.weight": PackedTensor(data, by_name("Q8_0"), (256, 256), scale=scale)}
    (tensor,) = open_gguf(_write(tmp_path / "a.gguf", state, recipe)).tensors.values()
    got = dequantize(tensor.data, tensor.fmt, (256, 256))
    want = 0.25 * dequantize(data, "Q8_0", (256, 256))
    assert float((got - want).norm() / want.norm()) < 0.006  # Q8_0 once more is half a percent


def test_rows_that_fill_no_blocks(tmp_path):
    state = {
        "double_blocks.0.a.weight": torch.randn(64, 96), "double_blocks.0.b.weight": torch.randn(64, 40),
        "double_blocks.0.c.weight": torch.randn(64, 40, dtype=torch.bfloat16),
    }  # fmt: skip
    plan = plan_model(state, recipe_named("Q4_K_M"), "flux")
    assert [choice.fmt.name for choice in plan.choices.values()] == ["Q5_0", "F16", "BF16"]
    assert [note for note in plan.notes if "rows of 96 do not fit Q4_K (blocks of 256)" in note]
    assert [note for note in plan.notes if "rows of 40" in note and "b.weight (F16)" in note]
    path = tmp_path / "a.gguf"
    assert write_model(path, plan) == path.stat().st_size > plan.nbytes


def test_a_unet_is_folded_and_a_video_model_keeps_five_dimensions(tmp_path):
    state = {
        "input_blocks.0.0.weight": torch.randn(32, 4, 3, 3),
        "input_blocks.1.0.in_layers.2.weight": torch.randn(32, 32, 3, 3),
        "time_embed.0.weight": torch.randn(64, 32), "label_emb.0.0.weight": torch.randn(64, 32),
        "input_blocks.1.1.proj_in.weight": torch.randn(320, 320),
    }  # fmt: skip
    assert architecture_named(state) == "sdxl"
    file = open_gguf(_write(tmp_path / "a.gguf", state, "Q4_0", "sdxl"))
    conv = file.tensors["input_blocks.1.0.in_layers.2.weight"]
    # in rows of 256, as ComfyUI-GGUF's converter folds them
    assert (conv.fmt.name, conv.shape, conv.stored_shape) == ("Q4_0", (32, 32, 3, 3), (36, 256))
    assert {file.tensors[n].fmt.name for n in ("input_blocks.0.0.weight", "time_embed.0.weight")} == {"F16"}
    field = gguf.GGUFReader(tmp_path / "a.gguf").get_field("comfy.gguf.orig_shape.input_blocks.1.0.in_layers.2.weight")
    assert field.contents() == [32, 32, 3, 3] and field.types[1] == gguf.GGUFValueType.INT32
    video = {
        "patch_embedding.weight": torch.randn(64, 16, 1, 2, 2, dtype=torch.bfloat16),
        "blocks.0.modulation": torch.randn(1, 6, 256),
    }
    file = open_gguf(_write(tmp_path / "b.gguf", video, "Q4_0", "wan"))
    assert [(t.fmt.name, t.stored_shape) for t in file.tensors.values()] == [
        ("F32", (64, 16, 1, 2, 2)),
        ("F32", (1, 6, 256)),
    ]


def test_rules_come_first():
    rules = "# comment\n\n*.img_attn.qkv.weight = Q8_0\ntxt_in = Q5_0\n single_blocks.0 = F16"
    plan = plan_model(_flux(), recipe_named("Q4_K_S"), "flux", parse_rules(rules))
    types = {name: choice.fmt.name for name, choice in plan.choices.items()}
    assert (
        types["double_blocks.1.img_attn.qkv.weight"] == "Q8_0"
        and types["double_blocks.1.txt_attn.qkv.weight"] == "Q4_K"
    )
    assert types["txt_in.weight"] == "Q5_0" and types["single_blocks.0.linear1.weight"] == "F16"
    for wrong, why in (("abc", "no rule"), ("a = Q9_K", "Q9_K"), ("= Q8_0", "no rule"), ("a = I8", "I8")):
        with pytest.raises(GraftError, match=why):
            parse_rules(wrong)


def test_types_that_need_an_importance_matrix(tmp_path):
    state = _flux()
    with pytest.raises(UnsupportedFormat, match="importance matrix"):
        plan_model(state, recipe_named("IQ2_XXS"), "flux")
    known = {name: torch.rand(t.shape[-1]) + 0.1 for name, t in state.items() if name.startswith("double_blocks.0")}
    plan = plan_model(state, recipe_named("IQ2_XXS"), "flux", importance=known)
    types = {name: choice.fmt.name for name, choice in plan.choices.items()}
    assert types["double_blocks.0.img_attn.proj.weight"] == "IQ2_XXS"
    assert types["double_blocks.1.img_attn.proj.weight"] == "Q2_K" and [n for n in plan.notes if "importance" in n]
    # of a layer that was given zeros alone as little is known; libgguf would refuse it while the file is written
    name = "double_blocks.0.img_attn.proj.weight"
    zeros = known | {name: torch.zeros_like(known[name])}
    plan = plan_model(state, recipe_named("IQ2_XXS"), "flux", importance=zeros)
    assert plan.choices[name].fmt.name == "Q2_K"
    _write(tmp_path / "zeros.gguf", state, "IQ2_XXS", importance=zeros)
    written = open_gguf(_write(tmp_path / "a.gguf", state, "Q3_K_S", importance=known))
    for name in ("double_blocks.0.txt_mlp.0.weight", "double_blocks.1.txt_mlp.0.weight"):
        want = quantize(state[name].float(), by_name("Q3_K"), known.get(name))
        assert torch.equal(written.tensors[name].data, want.flatten())


@pytest.mark.parametrize("names, what", [
    (("double_blocks.0.a.weight", "double_blocks.0.a.scale_weight"), "scale_weight"),
    (("double_blocks.0.a.weight", "double_blocks.0.a.weight.quant_state.bitsandbytes__nf4"), "nf4"),
    (("double_blocks.0.a.weight", "double_blocks.0.a.comfy_quant"), "comfy_quant"),
])  # fmt: skip
def test_weights_in_other_quantized_forms(names, what):
    state = {name: torch.ones(64, 64) for name in names}
    with pytest.raises(UnsupportedFormat, match=f"{what}.*load the model in bf16"):
        plan_model(state, recipe_named("Q8_0"), "flux")
    with pytest.raises(UnsupportedFormat, match="load the model in bf16"):
        plan_model({"double_blocks.0.a.weight": torch.ones(2048, 1, dtype=torch.uint8)}, recipe_named("Q8_0"), "flux")
    plan = plan_model(
        {"double_blocks.0.a.weight": torch.ones(64, 64).to(torch.float8_e4m3fn)}, recipe_named("Q8_0"), "flux"
    )
    assert any("fp8" in note for note in plan.notes)


def test_a_weight_that_is_no_number_is_named(tmp_path):
    state = _flux()
    state["single_blocks.1.linear1.weight"][0, 0] = float("nan")
    with pytest.raises(GraftError, match=r"single_blocks\.1\.linear1\.weight: a weight is not a finite"):
        _write(tmp_path / "a.gguf", state, "Q8_0")
    assert not list(tmp_path.iterdir())


def test_stopping(tmp_path):
    done = []

    def stop(count: int) -> None:
        done.append(count)
        if len(done) == 5:
            raise KeyboardInterrupt

    plan = plan_model(_flux(), recipe_named("Q8_0"), "flux")
    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "a.gguf", plan, progress=stop)
    assert not list(tmp_path.iterdir())
    done[:] = [0] * 10
    write_model(tmp_path / "a.gguf", plan, progress=stop)
    assert sum(done) == plan.weights


def _lora(state: dict, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    g, lora = torch.Generator().manual_seed(1), {}
    for name in names:
        rows, columns = state[f"{name}.weight"].shape
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, columns, generator=g)
        lora[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=g) * 0.1
    return lora


def test_the_command(tmp_path, make_gguf, capsys):
    """Shards of a whole checkpoint, a LoRA, a rule: what is in the file, and what it says of itself."""
    state, layer = _flux(), "double_blocks.1.img_attn.proj"
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    note = {
        "modelspec.license": "Apache-2.0",
        "modelspec.author": "someone",
        "modelspec.title": "A model",
        "config": '{"a": 1}',
    }
    for number, half in enumerate(halves, 1):
        named = {f"model.diffusion_model.{name}": tensor for name, tensor in half.items()}
        save_file(
            {**named, "first_stage_model.a": torch.ones(1)}, tmp_path / f"m-0000{number}-of-00002.safetensors", note
        )
    lora = _lora(state, (layer, "single_blocks.0.linear1"))
    save_file(lora, tmp_path / "style.safetensors")
    source, target = str(tmp_path / "m-00002-of-00002.safetensors"), tmp_path / "out.gguf"
    arguments = [
        source,
        str(target),
        "--type",
        "Q8_0",
        "--rule",
        f"{layer} = F32",
        "--lora",
        f"{tmp_path}/style.safetensors:0.5",
    ]
    assert make_gguf([*arguments, "--plan"]) == 0 and not target.exists()
    assert make_gguf(arguments) == 0
    said = capsys.readouterr().out
    assert "style.safetensors ×0.50: 2/2 layers" in said and "flux · Q8_0" in said and "M weights a second" in said
    file = open_gguf(target)
    assert file.tensors.keys() == state.keys() and file.architecture == "flux"
    want = (
        state[f"{layer}.weight"].float()
        + 0.5 * lora[f"diffusion_model.{layer}.lora_B.weight"] @ lora[f"diffusion_model.{layer}.lora_A.weight"]
    )
    assert torch.allclose(as_weight(file.tensors[f"{layer}.weight"]), want, rtol=1e-5, atol=1e-6)
    entries = {key: file.metadata[key] for key in file.metadata}
    assert (
        entries["general.license"] == "Apache-2.0"
        and entries["general.author"] == "someone"
        and entries["config"] == '{"a": 1}'
    )
    assert entries["graft.loras"] == ["style.safetensors ×0.5"] and entries["graft.recipe"] == "Q8_0"
    assert entries["graft.rules"] == [f"{layer} = F32"] and entries["graft.version"] == VERSION
    del file
    gc.collect()
    assert make_gguf(arguments) == 1 and "already" in capsys.readouterr().err
    assert make_gguf([*arguments, "--overwrite"]) == 0


def test_the_command_on_gguf(tmp_path, make_gguf, capsys):
    source, target = str(DEMO / "graft-demo-Q8_0.gguf"), tmp_path / "out.gguf"
    assert make_gguf([source, str(target), "--type", "Q4_0"]) == 0
    assert "quantized again" in capsys.readouterr().out
    first, second = open_gguf(source), open_gguf(target)
    assert second.architecture == first.architecture and re.fullmatch(
        "[0-9a-f]{64}", second.metadata["graft.source.sha256"]
    )
    name = "blocks.0.ffn.0.weight"
    decoded = dequantize(first.tensors[name].data, first.tensors[name].fmt, first.tensors[name].shape, torch.float32)
    assert np.array_equal(second.tensors[name].data, quantize(decoded, by_name("Q4_0")).flatten())


def test_what_the_command_refuses(tmp_path, make_gguf, capsys):
    save_file({"strange.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    save_file({"transformer_blocks.0.attn.norm_added_k.weight": torch.ones(4)}, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"nonsense")
    (tmp_path / "d.ckpt").write_bytes(b"PK")
    cases = {
        "a.safetensors": "--architecture", "b.safetensors": "names of diffusers", "c.safetensors": "cannot be read",
        "d.ckpt": "only .safetensors", "e-00001-of-00002.safetensors": "missing", "f.gguf": "no such file",
    }  # fmt: skip
    for name, why in cases.items():
        assert make_gguf([str(tmp_path / name), str(tmp_path / "out.gguf")]) == 1
        assert why in capsys.readouterr().err, name
    assert make_gguf([str(tmp_path / "a.safetensors"), str(tmp_path / "out.safetensors")]) == 1
    assert make_gguf([str(tmp_path / "a.safetensors"), str(tmp_path / "o.gguf"), "--architecture", "mine"]) == 0
    assert "does not know the architecture mine" in capsys.readouterr().out
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob("*.part"))


def test_what_is_kept_is_in_the_models(tmp_path):
    """The demo is a Wan: of each part of a name that the table keeps in floats there is a tensor."""
    names = open_gguf(DEMO / "graft-demo-Q8_0.gguf").tensors
    absent = [part for part in KEPT["wan"].split() if not any(part in name for name in names)]
    assert set(absent) <= {"modulation.", "img_emb."}
    assert architecture_named(names) == "wan"
    assert isinstance(as_weight(names["blocks.0.ffn.0.weight"]), PackedTensor)


def test_a_text_encoder_under_its_hosts_names():
    """Tables from which whole rows are taken keep Q6_K, experts in three dimensions are quantized, bytes stay bytes."""
    chooser = Chooser(recipe_named("Q4_K_M"), "text_encoder")
    types = {
        "model.embed_tokens.weight": "Q6_K", "layers.0.mlp.experts.gate_up_proj.weight": "Q4_K",
        "layers.0.mlp.experts.down_proj.weight": "Q6_K", "text_model.encoder.layers.0.self_attn.v_proj.weight": "Q6_K",
        "text_model.embeddings.position_embedding.weight": "F16", "visual.patch_embed.proj.weight": "F16",
    }  # fmt: skip
    shapes = {"experts": (4, 64, 256), "patch_embed": (64, 3, 16, 256)}
    for name, wanted in types.items():
        shape = next((shape for part, shape in shapes.items() if part in name), (64, 256))
        assert chooser.choose(name, torch.ones(shape)).fmt.name == wanted, name
    assert chooser.choose("spiece_model", torch.zeros(4, dtype=torch.int8)).fmt.name == "I8"
