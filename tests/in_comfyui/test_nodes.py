"""Our nodes as a workflow calls them."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import comfy.lora
import comfy.utils
import comfy_extras.nodes_train
import folder_paths
import gguf
import pytest
import torch
from generation import distance, sample, with_lora
from gguf_samples import encode, write_gguf
from loras import make_lora
from small import SD3, loras, sd3  # noqa: F401  (fixtures)


class LinkedValue:
    """Gives a value that is known only when the prompt runs."""

    FUNCTION = "run"
    OUTPUT_NODE = True

    class Any(str):
        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = str.__hash__

    RETURN_TYPES = (Any("*"),)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}, "optional": {"any": (cls.Any("*"),)}}


@pytest.fixture(scope="module")
def classes():
    import nodes

    nodes.NODE_CLASS_MAPPINGS["LinkedValue"] = LinkedValue
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def files(folders, loras):  # noqa: F811
    """The two LoRAs as files, and one that was trained for another model."""
    metadata = {"modelspec.trigger_phrase": "in my style, soft light"}
    comfy.utils.save_torch_file(loras[0], str(folders / "loras" / "style.safetensors"), metadata)
    comfy.utils.save_torch_file(loras[1], str(folders / "loras" / "subject.safetensors"))
    flux = {
        f"transformer.single_transformer_blocks.{i}.attn.to_q.lora_{side}.weight": torch.ones(*shape)
        for i in range(3)
        for side, shape in (("A", (4, 3072)), ("B", (3072, 4)))
    }
    comfy.utils.save_torch_file(flux, str(folders / "loras" / "for_flux.safetensors"))
    (folders / "loras" / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def test_the_loader_shows_what_it_loaded(sd3, classes):  # noqa: F811
    shown = classes["GraftUNETLoader"]().load("sd3-Q4_K.gguf")
    (text,) = shown["ui"]["text"]
    summary, place, way = text.splitlines()
    assert summary.startswith("Stable Diffusion 3 / 3.5 · ") and summary.endswith("cpu"), text
    assert re.fullmatch(r"runs on the processor: the model takes [\d.]+ MB of [\d.]+ GB", place)
    assert way == "weights are decoded by libgguf"
    assert "Q4_K" in text and "float32" in text, text
    assert type(shown["result"][0]).__name__.startswith("GraftModelPatcher")


def test_the_loader_says_which_dtype_is_faster_here(sd3, classes, pack, monkeypatch):  # noqa: F811
    kernels, load = pack("kernels"), classes["GraftUNETLoader"]().load
    monkeypatch.setattr(kernels, "SLOW_DTYPES", frozenset([torch.bfloat16]))
    monkeypatch.setattr(kernels, "has_fast_bf16", lambda: True)
    for chosen, other, shown in (("bf16", "fp32", "bfloat16"), ("fp32", "bf16", "float32")):
        (text,) = load("sd3-Q4_K.gguf", compute_dtype=chosen)["ui"]["text"]
        assert f"{shown} (compute_dtype {other} is faster on this processor)" in text
    (text,) = load("sd3-Q4_K.gguf", compute_dtype="fp16")["ui"]["text"]
    assert "faster" not in text


def test_inputs_are_the_promised_ones(classes):
    loader, stack = (classes[n].INPUT_TYPES() for n in ("GraftUNETLoader", "GraftLoraStack"))
    assert list(loader["required"]) == ["unet_name"]
    assert list(loader["optional"]) == ["compute_dtype", "backend", "module_name"]
    assert loader["optional"]["compute_dtype"][0] == ["auto", "bf16", "fp16", "fp32", "int8", "int8_all"]
    rows = [f"{what}_{row}" for row in range(1, 9) for what in ("enabled", "lora", "strength")]
    assert list(stack["required"]) == ["model"]
    links = [f"when_{row}" for row in range(1, 9)]
    assert list(stack["optional"]) == ["lora_stack", *rows, "clip", *links, "clip_strengths", "more_rows", "if_missing"]
    assert classes["GraftLoraStack"].RETURN_TYPES == ("MODEL", "LORA_STACK", "STRING", "STRING", "CLIP")
    for inputs in (loader, stack):
        for group in ("required", "optional"):
            for name, (_, *options) in inputs[group].items():
                assert options and options[0].get("tooltip"), f"{name} has no tooltip"


def test_the_stack_is_the_stock_loader_twice(sd3, loras, files, classes):  # noqa: F811
    graft, _ = sd3
    rows = {"lora_1": "style.safetensors", "strength_1": 0.8, "lora_3": "subject.safetensors", "strength_3": -0.5}
    model, stack, report, words, clip = classes["GraftLoraStack"]().apply(graft, **rows)["result"]
    assert clip is None
    want = with_lora(with_lora(graft, loras[0], 0.8), loras[1], -0.5)
    assert torch.equal(sample(model, SD3), sample(want, SD3))
    assert stack == [("style.safetensors", 0.8, 0.8), ("subject.safetensors", -0.5, -0.5)]
    layers = len({k for k in loras[0] if "lora_A" in k})
    assert report.splitlines() == [
        f"style.safetensors ×0.80: {layers}/{layers} layers, rank 8",
        f"  native names; {layers} layers next to the quantized weights",
        f"subject.safetensors ×-0.50: {layers}/{layers} layers, rank 20",
        f"  kohya names; {layers} layers next to the quantized weights",
    ]
    assert words == "in my style, soft light"


def test_loras_in_gguf(sd3, loras, folders, classes, monkeypatch):  # noqa: F811
    """As llama.cpp's converter names them; listed beside the others, and put on any model."""
    stored, lora = {}, {}
    for key, value in loras[0].items():
        module, side = re.fullmatch(r"diffusion_model\.(.+)\.lora_([AB])\.weight", key).groups()
        kind = "Q8_0" if value.shape[-1] % 32 == 0 else "F16"
        stored[f"{module}.weight.lora_{side.lower()}"] = value.float().numpy(), kind
        data = encode(value.float().numpy(), gguf.GGMLQuantizationType[kind])
        lora[key] = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).astype("float32"))
    write_gguf(folders / "loras" / "style.gguf", stored, "sd3", {"general.type": "adapter", "adapter.lora.alpha": 8.0})
    paths, extensions = folder_paths.folder_names_and_paths["graft_lora_gguf"]
    listed = ([str(folders / "loras"), *paths], extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "graft_lora_gguf", listed)
    stack, one = (classes[name] for name in ("GraftLoraStack", "GraftLora"))
    assert "style.gguf" in stack.INPUT_TYPES()["optional"]["lora_1"][0]
    assert "style.gguf" in one.INPUT_TYPES()["required"]["lora_name"][0]
    for model in sd3:
        got, _, report, *_ = stack().apply(model, lora_1="style.gguf", strength_1=0.8)["result"]
        want = sample(with_lora(model, lora, 0.8), SD3)
        assert torch.equal(sample(got, SD3), want) and "rank 8" in report
    got = one().apply(sd3[0], "style.gguf", 0.8)["result"][0]
    assert torch.equal(sample(got, SD3), sample(with_lora(sd3[0], lora, 0.8), SD3))


def test_parts_of_a_fused_layer_are_counted_as_the_file_has_them(sd3, folders, classes):  # noqa: F811
    graft, dense = sd3
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    lora = make_lora(dense.model, shapes, "diffusers", ("joint_blocks.0.x_block.attn.qkv",), rank=8)
    comfy.utils.save_torch_file(lora, str(folders / "loras" / "qkv.safetensors"))
    report = classes["GraftLoraStack"]().apply(graft, lora_1="qkv.safetensors")["result"][2]
    assert report.splitlines() == [
        "qkv.safetensors ×1.00: 3/3 layers, rank 8", "  diffusers names; 3 layers next to the quantized weights",
    ]  # fmt: skip


# names that the host has no entry for, or not for this architecture, and one of its own for the same part
OTHER_NAMES = {
    "joint_blocks.0.x_block.attn.proj": "diffusion_model.joint_blocks.0.x_block.attn.proj",
    "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1": "diffusion_model.joint_blocks.0.x_block.mlp.fc1",
    "transformer_blocks.1.attn.to_k": "transformer.transformer_blocks.1.attn.to_k",
    "transformer.transformer_blocks.1.attn.processor.to_v": "transformer.transformer_blocks.1.attn.to_v",
    "unet.base_model.model.transformer_blocks.2.attn.add_q_proj": "transformer.transformer_blocks.2.attn.add_q_proj",
    "norm_out.linear": "transformer.norm_out.linear",
}


@pytest.mark.parametrize("on_graft", [True, False], ids=["Graft", "another loader"])
def test_names_that_the_host_has_none_for(sd3, folders, classes, on_graft):  # noqa: F811
    model, dense = sd3 if on_graft else (sd3[1], sd3[1])
    known = comfy.lora.model_lora_keys_unet(dense.model, {})
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    g = torch.Generator().manual_seed(0)
    odd, usual = {}, {}
    for name, hosts_name in OTHER_NAMES.items():
        target = known[hosts_name]
        key, part = target[:2] if isinstance(target, tuple) else (target, None)
        rows, columns = shapes[key] if part is None else (part[2], shapes[key][1])
        up, down = 0.1 * torch.randn(rows, 4, generator=g), 0.1 * torch.randn(4, columns, generator=g)
        odd |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
        usual |= {f"{hosts_name}.lora_A.weight": down, f"{hosts_name}.lora_B.weight": up}
    comfy.utils.save_torch_file(odd, str(folders / "loras" / "odd.safetensors"))
    got, _, report, *_ = classes["GraftLoraStack"]().apply(model, lora_1="odd.safetensors")["result"]
    assert report.startswith("odd.safetensors ×1.00: 6/6 layers, rank 4")
    base, want = (sample(m, SD3) for m in (dense, with_lora(dense, usual)))
    assert distance(want, base) > 0.1
    if on_graft:
        assert distance(sample(got, SD3) - sample(model, SD3), want - base) < 1e-4
    else:
        assert torch.equal(sample(got, SD3), want)


def test_the_hosts_names_come_before_ours(sd3, pack):  # noqa: F811
    """The same name for two layers, and one that only we have."""
    factors = {"lora_A.weight": torch.ones(4, 256), "lora_B.weight": torch.ones(256, 4)}
    state = {f"{m}.{n}": t for m in ("x_embedder.proj", "context_embedder", "nowhere") for n, t in factors.items()}
    file = pack("nodes.lora_names").LoadedFile(sd3[0].model, state, {"x_embedder.proj": "theirs.weight"})
    (patches,) = file.patches
    assert set(patches) == {"theirs.weight", "diffusion_model.context_embedder.weight"}
    assert file.missing == ["nowhere"]


def test_what_the_hosts_loader_would_lose(sd3, folders, classes):  # noqa: F811
    """A difference beside factors of the same layer, and the bias of a part of a fused one."""
    dense = sd3[1]
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    weight = dense.model.state_dict()[f"{key}.weight"]
    width, g = weight.shape[1], torch.Generator().manual_seed(3)
    name = "transformer.transformer_blocks.0.attn.to_k"
    factors = {
        f"{name}.lora_A.weight": torch.randn(8, width, generator=g) / width**0.5,
        f"{name}.lora_B.weight": torch.randn(width, 8, generator=g) / 8,
    }
    whole = {f"{name}.diff": torch.randn(width, width, generator=g) / width**0.5}
    bias = {f"{name}.diff_b": torch.randn(width, generator=g)}
    comfy.utils.save_torch_file(factors | whole | bias, str(folders / "loras" / "both.safetensors"))
    want = with_lora(with_lora(dense, factors), whole).clone()
    assert want.add_patches({(f"{key}.bias", (0, width, width)): ("diff", (bias[f"{name}.diff_b"],))})
    for model in sd3:
        got, _, report, *_ = classes["GraftLoraStack"]().apply(model, lora_1="both.safetensors")["result"]
        assert report.startswith("both.safetensors ×1.00: 1/1 layers, full, rank 8")
        base = sample(model, SD3)
        effect = sample(want, SD3) - base
        assert distance(sample(got, SD3) - base, effect) < 1e-4
        assert effect.norm() > 0.01 * base.norm()


def test_a_stack_passes_through_other_stackers(sd3, loras, files, classes):  # noqa: F811
    graft, _ = sd3
    node = classes["GraftLoraStack"]()
    incoming = [("style.safetensors", 0.8, 1.0), ("None", 1.0, 1.0)]
    model, stack, *_ = node.apply(graft, lora_stack=incoming, lora_1="subject.safetensors", strength_1=0.3)["result"]
    assert stack == [("style.safetensors", 0.8, 1.0), ("subject.safetensors", 0.3, 0.3)]
    want = with_lora(with_lora(graft, loras[0], 0.8), loras[1], 0.3)
    assert torch.equal(sample(model, SD3), sample(want, SD3))
    assert node.apply(graft, lora_stack=[["style.safetensors", 0.8]])["result"][1] == [("style.safetensors", 0.8, 0.8)]


def test_rows_behind_the_eighth(sd3, loras, files, classes):  # noqa: F811
    """They are in a text, as JSON, in which a preset may be put as it is."""
    graft, _ = sd3
    apply = classes["GraftLoraStack"]().apply
    more = [
        {"on": True, "lora": "subject.safetensors", "strength": 0.3, "strength_clip": 0.1},
        {"on": False, "lora": "gone.safetensors", "strength": 1},
        {"lora": "None"},
        {"lora": "style.safetensors"},
    ]
    given = {"lora_1": "style.safetensors", "clip_strengths": "1 = 0.5, 12 = 0.25", "more_rows": json.dumps(more)}
    model, stack, *_ = apply(graft, **given)["result"]
    style, subject = "style.safetensors", "subject.safetensors"
    assert stack == [(style, 1.0, 0.5), (subject, 0.3, 0.1), (style, 1.0, 0.25)]
    want = with_lora(with_lora(with_lora(graft, loras[0], 1.0), loras[1], 0.3), loras[0], 1.0)
    assert torch.equal(sample(model, SD3), sample(want, SD3))


UNREADABLE = ("style.safetensors", "{}", "[1]", '[{"lora": 1}]', '[{"lora": "a", "strength": "b"}]', "[" * 5000)


@pytest.mark.parametrize("text", [*UNREADABLE, '[{"lora": "a", "strength": NaN}]'], ids=str.__len__)
def test_rows_that_cannot_be_read_are_an_error(classes, text):
    with pytest.raises(Exception, match=r"^more_rows cannot be read .* write it as JSON, like \[\{"):
        classes["GraftLoraStack"].VALIDATE_INPUTS(more_rows=text)


def test_files_that_are_missing_may_be_skipped(sd3, loras, files, classes):  # noqa: F811
    graft, _ = sd3
    stack = classes["GraftLoraStack"]
    rows = {"lora_1": "gone.safetensors", "lora_2": "style.safetensors", "lora_stack": [("away.safetensors", 1.0, 1.0)]}
    rows["more_rows"] = '[{"lora": "style-Q8_0.safetensors"}]'
    assert stack.VALIDATE_INPUTS(**rows, if_missing="skip") is True
    assert stack.VALIDATE_INPUTS(**rows, if_missing=None) is True, "it is on a link"
    assert stack.IS_CHANGED(**rows, if_missing="skip") == stack.IS_CHANGED(**rows, if_missing="skip")
    for refused in ({}, {"if_missing": "error"}, {"if_missing": "else"}):
        with pytest.raises(Exception, match=r"gone\.safetensors \(row 1\), style-Q8_0\.safetensors \(row 9, there is"):
            stack.VALIDATE_INPUTS(**rows, **refused)
        with pytest.raises(Exception, match=r"away\.safetensors \(lora_stack\), gone\.safetensors \(row 1\)"):
            stack().apply(graft, **rows, **refused)
    model, sent, report, *_ = stack().apply(graft, **rows, if_missing="skip")["result"]
    assert report.splitlines()[:3] == [
        "away.safetensors (lora_stack): skipped, the file is not here",
        "gone.safetensors (row 1): skipped, the file is not here",
        "style-Q8_0.safetensors (row 9, there is style.safetensors): skipped, the file is not here",
    ]
    assert sent == [("style.safetensors", 1.0, 1.0)]
    assert torch.equal(sample(model, SD3), sample(with_lora(graft, loras[0], 1.0), SD3))


def test_both_outputs_of_a_stack_into_the_next_one(sd3, loras, files, classes):  # noqa: F811
    """MODEL has the rows of LORA_STACK already; they are put on it once."""
    apply, row = classes["GraftLoraStack"]().apply, {"lora_1": "style.safetensors", "strength_1": 0.5}
    for model in sd3:
        first, stack, *_ = apply(model, **row)["result"]
        # a row of the second node's own is meant, even if it is the same
        both, stack, report, *_ = apply(first, lora_stack=stack, **row)["result"]
        assert stack == [("style.safetensors", 0.5, 0.5)] * 2
        assert report.startswith("style.safetensors ×0.50: on this model already, not put on it again\nstyle.")
        want = with_lora(with_lora(model, loras[0], 0.5), loras[0], 0.5)
        assert torch.equal(sample(both, SD3), sample(want, SD3))
        other, *_ = apply(model, lora_stack=stack)["result"]
        assert torch.equal(sample(other, SD3), sample(want, SD3))


def test_text_encoder_layers_go_to_the_clip(sd3, loras, folders, classes):  # noqa: F811
    import comfy.sd
    import comfy.sd1_clip

    graft, _ = sd3

    parts = {"clip": comfy.sd1_clip.SD1ClipModel, "tokenizer": comfy.sd1_clip.SD1Tokenizer, "params": {}}
    clip = comfy.sd.CLIP(type("Target", (), parts))
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    module = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    text = {f"{module}.lora_up.weight": torch.ones(3072, 2), f"{module}.lora_down.weight": torch.ones(2, 768)}
    comfy.utils.save_torch_file(text, str(folders / "loras" / "words.safetensors"))
    comfy.utils.save_torch_file(loras[0] | text, str(folders / "loras" / "both.safetensors"))
    node = classes["GraftLoraStack"]()
    with pytest.raises(Exception, match=r"for a text encoder only \(1 layer\): connect a CLIP"):
        node.apply(graft, lora_1="words.safetensors")
    other = {f"{module.replace('te1', 'te3')}.{k.rpartition(module)[2][1:]}": v for k, v in text.items()}
    comfy.utils.save_torch_file(other, str(folders / "loras" / "other words.safetensors"))
    with pytest.raises(Exception, match=r"for another text encoder \(0 of 1 layer match\)"):
        node.apply(graft, clip, lora_1="other words.safetensors")
    model, _, report, _, patched = node.apply(graft, clip, lora_1="words.safetensors", strength_1=0.5)["result"]
    assert not model.residuals and report.startswith("words.safetensors: 1 layer of the text encoder")
    assert [p[0] for p in patched.patcher.patches[f"{key}.weight"]] == [0.5] and not clip.patcher.patches
    model, stack, report, _, patched = node.apply(graft, clip, lora_1="both.safetensors")["result"]
    assert "1 of 1 text encoder layers on the CLIP" in report
    assert torch.equal(sample(model, SD3), sample(with_lora(graft, loras[0], 1.0), SD3))
    again = node.apply(model, patched, lora_stack=stack)["result"]
    assert again[0] is model and again[4] is patched
    assert "connect a CLIP" in node.apply(graft, lora_1="both.safetensors")["result"][2]


@pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this ComfyUI has no such node")
def test_the_hosts_loras_beside_the_weights(sd3, loras, files):  # noqa: F811
    """Load LoRA (Bypass): the host puts its own adapters around the layers that are ours, with or without ours."""
    from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly

    graft, dense = sd3
    base = sample(graft, SD3)
    for model, reference in ((graft, dense), (with_lora(graft, loras[1], 0.5), with_lora(dense, loras[1], 0.5))):
        got = sample(LoraLoaderBypassModelOnly().load_lora_model_only(model, "style.safetensors", 0.7)[0], SD3)
        want = sample(with_lora(reference, loras[0], 0.7), SD3) - sample(reference, SD3)
        assert distance(got - sample(model, SD3), want) < 1e-4
    assert torch.equal(sample(graft, SD3), base)


def test_values_that_come_through_links(sd3, files, classes):  # noqa: F811
    """The host validates before it knows them, and gives None for each."""
    import asyncio

    import execution

    rows = {"lora_1": "style.safetensors", "strength_1": ["name", 0], "lora_2": ["name", 0]}
    prompt = {
        "name": {"class_type": "LinkedValue", "inputs": {}},
        "model": {"class_type": "GraftUNETLoader", "inputs": {"unet_name": ["name", 0]}},
        "stack": {"class_type": "GraftLoraStack", "inputs": {"model": ["model", 0], **rows}},
        "words": {"class_type": "GraftDemoPrompt", "inputs": {"text": ["name", 0]}},
        "end": {"class_type": "GraftInspect", "inputs": {"model": ["stack", 0]}},
        "shown": {"class_type": "LinkedValue", "inputs": {"any": ["words", 0]}},
    }
    result = execution.validate_prompt("x", prompt, None)
    valid, error, _, node_errors = asyncio.run(result) if asyncio.iscoroutine(result) else result
    assert valid and not node_errors, (error, node_errors)
    stack, loader = classes["GraftLoraStack"], classes["GraftUNETLoader"]
    known = stack.IS_CHANGED(lora_1="style.safetensors", strength_1=None, lora_2=None)
    assert known == stack.IS_CHANGED(lora_1="style.safetensors", strength_1=1.0) and len(known) == 1
    assert loader.IS_CHANGED(None) == loader.IS_CHANGED(None)


def test_what_goes_into_pictures_names_no_folder(sd3, files, folders, classes):  # noqa: F811
    """The host writes what IS_CHANGED gives into the prompt that it saves with a picture."""
    shown = [classes["GraftUNETLoader"].IS_CHANGED("sd3-Q4_K.gguf")]
    shown += classes["GraftLoraStack"].IS_CHANGED(lora_1="style.safetensors")
    assert len(shown) == 2 and all(isinstance(s, str) and s for s in shown)
    assert not any(part in s for s in shown for part in ("/", "\\", "style", "sd3"))


@pytest.mark.parametrize("place", ["x_block.attn.proj", "x_block.mlp.fc1"])
def test_pefts_magnitudes_on_a_model_of_another_loader(sd3, folders, classes, place):  # noqa: F811
    """The host reads them as a column, and divides by the norm of the base."""
    _, dense = sd3
    name = f"diffusion_model.joint_blocks.0.{place}"
    weight = dense.model.state_dict()[f"{name}.weight"].float()
    g = torch.Generator().manual_seed(0)
    up, down = (0.1 * torch.randn(*s, generator=g) for s in ((weight.shape[0], 4), (4, weight.shape[1])))
    magnitude = weight.norm(dim=1) * 1.1
    parts = {"lora_A": down, "lora_B": up, "lora_magnitude_vector": magnitude}
    state = {f"{name}.{part}.default.weight": value for part, value in parts.items()}
    comfy.utils.save_torch_file(state, str(folders / "loras" / "dora.safetensors"))
    model = classes["GraftLoraStack"]().apply(dense, lora_1="dora.safetensors")["result"][0]
    merged = comfy.lora.calculate_weight(model.patches[f"{name}.weight"], weight.clone(), name)
    want = (weight + up @ down) * 1.1
    assert (merged - want).norm() < 1e-5 * want.norm()


def test_what_a_second_file_has_rejected_is_in_its_report(sd3, loras, folders, classes):  # noqa: F811
    graft, _ = sd3
    bad = dict(loras[0])
    key = next(k for k in bad if k.endswith("lora_B.weight"))
    bad[key] = bad[key][:-16]
    for name in ("bad1", "bad2"):
        comfy.utils.save_torch_file(bad, str(folders / "loras" / f"{name}.safetensors"))
    report = classes["GraftLoraStack"]().apply(graft, lora_1="bad1.safetensors", lora_2="bad2.safetensors")["result"][2]
    assert [line.count("; 1 left out, such as") for line in report.splitlines() if "×" in line] == [1, 1]


def test_rows_that_are_off_do_nothing(sd3, files, classes):  # noqa: F811
    graft, _ = sd3
    node = classes["GraftLoraStack"]()
    off = {"lora_1": "style.safetensors", "enabled_1": False, "lora_2": "None", "lora_3": "subject.safetensors"}
    model, _, report, *_ = node.apply(graft, **off, strength_3=0.0)["result"]
    assert report == "subject.safetensors ×0.00: does nothing at strength 0"
    assert model is graft
    assert node.apply(graft, lora_1="style.safetensors", enabled_1=False)["result"][2] == "no LoRA is switched on"


def test_errors_say_what_to_do(sd3, files, classes):  # noqa: F811
    graft, _ = sd3
    node = classes["GraftLoraStack"]()
    with pytest.raises(Exception, match=r"trained for Flux, model is SD3 \(0 of 3 layers match\)"):
        node.apply(graft, lora_1="for_flux.safetensors")
    with pytest.raises(Exception, match=r"Git LFS pointer.*pointer\.safetensors"):
        node.apply(graft, lora_1="pointer.safetensors")
    with pytest.raises(Exception, match=r"the file into the loras folder, .* row off: gone\.safetensors \(row 2\)$"):
        node.apply(graft, lora_1="style.safetensors", lora_2="gone.safetensors")
    assert node.apply(graft, lora_2="gone.safetensors", enabled_2=False)["result"][0] is graft
    loader = classes["GraftUNETLoader"]
    with pytest.raises(Exception, match=r"^gone.gguf .* the diffusion_models folder, .*; module.gguf is not there"):
        loader.VALIDATE_INPUTS("gone.gguf", "module.gguf")


LISTED = [
    "Flux/flux1-dev-Q8_0.gguf", "Flux/flux1-dev-Q4_K_S.gguf", "wan/Wan2.2_low.gguf", "wan/Wan2.2_high.gguf",
    "a/two.gguf", "b/two.gguf", "flux/model.gguf", "style.safetensors",
]  # fmt: skip
MEANT = {
    "Flux\\flux1-dev-Q8_0.gguf": "Flux/flux1-dev-Q8_0.gguf",
    "flux/FLUX1-dev-q8_0.gguf": "Flux/flux1-dev-Q8_0.gguf",
    "D:\\models\\unet\\wan2.2_low.GGUF": "wan/Wan2.2_low.gguf",
    "Wan2.2_high.gguf": "wan/Wan2.2_high.gguf",
    "sub/style.safetensors": "style.safetensors",
    "B\\two.gguf": "b/two.gguf",
}
OFFERED = {
    "two.gguf": ("a/two.gguf", "b/two.gguf"),
    "flux1-dev-UD-Q4_K_XL.gguf": ("Flux/flux1-dev-Q8_0.gguf", "Flux/flux1-dev-Q4_K_S.gguf"),
    "flux1-dev_fp8_e4m3fn.safetensors": ("Flux/flux1-dev-Q8_0.gguf", "Flux/flux1-dev-Q4_K_S.gguf"),
    "wan/model.gguf": ("flux/model.gguf",),  # so many are called so
    "gone.gguf": (),
    "": (),
}


def test_which_file_of_this_computer_is_meant(pack):
    match = pack("nodes.model_files").match
    assert {name: match(name, LISTED) for name in MEANT} == {name: (file, ()) for name, file in MEANT.items()}
    assert {name: match(name, LISTED) for name in OFFERED} == {name: ("", files) for name, files in OFFERED.items()}


def test_files_that_lie_elsewhere_here(sd3, loras, files, folders, classes):  # noqa: F811
    graft, _ = sd3
    (folders / "loras" / "sub").mkdir()
    comfy.utils.save_torch_file(loras[0], str(folders / "loras" / "sub" / "soft-fp16.safetensors"))
    torch.save(loras[0], folders / "loras" / "pickle.pt")
    apply, stack = classes["GraftLoraStack"]().apply, classes["GraftLoraStack"]
    shown = apply(graft, lora_1="old\\Style.safetensors", lora_2="sub\\soft-fp16.safetensors")
    want = with_lora(with_lora(graft, loras[0], 1.0), loras[0], 1.0)
    assert torch.equal(sample(shown["result"][0], SD3), sample(want, SD3))
    # a slash the other way is nothing to speak of
    assert shown["ui"]["text"][0].endswith("\nstyle.safetensors is here for old\\Style.safetensors")
    with pytest.raises(Exception, match=r"soft-bf16\.safetensors \(row 1, there is sub/soft-fp16\.safetensors\)$"):
        stack.VALIDATE_INPUTS(lora_1="soft-bf16.safetensors")
    assert stack.VALIDATE_INPUTS(lora_1="soft-bf16.safetensors", enabled_1=False) is True
    assert "pickle.pt" not in stack.INPUT_TYPES()["optional"]["lora_1"][0]
    with pytest.raises(Exception, match="only safetensors are read"):
        apply(graft, lora_1="pickle.pt")
    alone, loader = classes["GraftLora"], classes["GraftUNETLoader"]
    assert alone.VALIDATE_INPUTS("SUB/soft-fp16.safetensors") is True
    assert "there is sub/soft-fp16.safetensors: choose that" in alone.VALIDATE_INPUTS("soft-fp8.safetensors")
    assert loader.VALIDATE_INPUTS("Old\\SD3-q4_k.gguf") is True
    with pytest.raises(Exception, match=r"there is sd3-Q4_K.gguf: choose that"):
        loader.VALIDATE_INPUTS("sd3-Q8_0.gguf", "None")
    text = loader().load("Old\\SD3-q4_k.gguf")["ui"]["text"][0]
    assert text.endswith("\nsd3-Q4_K.gguf is here for Old\\SD3-q4_k.gguf")


def test_nodes_that_call_ours_take_a_dict_or_a_tuple(sd3, classes):  # noqa: F811
    shown = classes["GraftUNETLoader"]().load("sd3-Q4_K.gguf")
    (model,) = shown
    assert shown[0] is model is shown["result"][0] and shown[:1] == (model,)
    assert isinstance(shown, dict) and "result" in shown and dict(shown).keys() == {"ui", "result"}
    assert {**shown}["ui"] == shown["ui"] and len(shown.get("ui")["text"]) == 1


def train(model, bypass=False):
    """ComfyUI's Train LoRA, two steps; newer hosts give it a list of each input, and have more of them."""
    node = comfy_extras.nodes_train.TrainLoraNode
    listed = hasattr(node, "execute")
    values = {
        "model": model, "latents": {"samples": torch.ones(SD3.latent)}, "positive": SD3.conditioning(), "batch_size": 1,
        "steps": 2, "grad_accumulation_steps": 1, "learning_rate": 5e-4, "rank": 4, "optimizer": "AdamW",
        "loss_function": "MSE", "seed": 0, "training_dtype": "bf16", "lora_dtype": "fp32", "algorithm": "LoRA",
        "gradient_checkpointing": False, "existing_lora": "[None]", "quantized_backward": False,
        "checkpoint_depth": 1, "offloading": False, "bucket_mode": False, "bypass_mode": bypass,
    }  # fmt: skip
    run = node.execute if listed else node().train
    known = inspect.signature(run).parameters
    return run(**{name: [value] if listed else value for name, value in values.items() if name in known})


def test_training_says_what_to_do(sd3, pack):  # noqa: F811
    graft, dense = sd3
    before = sample(graft, SD3)
    train(dense)
    for bypass in (False, True):
        with pytest.raises(pack("kernels").GraftError, match="which is quantized: use Train LoRA \\(Graft\\)"):
            train(graft, bypass)
    assert torch.equal(sample(graft, SD3), before)


def test_inspect_says_which_way_each_layer_takes(sd3, loras, classes):  # noqa: F811
    graft, dense = sd3
    inspect_node = classes["GraftInspect"]()
    shown = inspect_node.inspect(with_lora(graft, loras[0], 0.8))
    (text,) = shown["ui"]["text"]
    layers = len({k for k in loras[0] if "lora_A" in k})
    summary, adapters, way, *_ = text.splitlines()
    assert summary == graft.graft.summary
    assert adapters == f"lora, rank 8 ×0.80: {layers} layers"
    assert way.startswith(f"{layers} layers next to the quantized weights: diffusion_model.joint_blocks.")
    assert shown["result"][0] == text
    assert "\nno adapters\n" in inspect_node.inspect(graft)["result"][0]
    assert "of another loader" in inspect_node.inspect(dense)["result"][0]


def test_inspect_shows_types_and_what_loras_change(sd3, loras, files, classes):  # noqa: F811
    graft, _ = sd3
    rows = {"lora_1": "style.safetensors", "strength_1": 0.5, "lora_2": "subject.safetensors", "strength_2": 0.0}
    model = with_lora(classes["GraftLoraStack"]().apply(graft, **rows)["result"][0], loras[1], 0.3)
    text, _, chart = classes["GraftInspect"]().inspect(model)["result"]
    (groups,) = (line for line in text.splitlines() if line.startswith("joint_blocks.x_block.mlp"))
    changes = [line for line in text.splitlines() if " changes the weights by: " in line]
    assert re.fullmatch(r"joint_blocks\.x_block\.mlp: Q4_K \d+ · .* [KM]B", groups)
    assert [line.partition(" changes the weights by: joint_blocks ")[0] for line in changes] == [
        "style.safetensors ×0.50", "lora, rank 20 ×0.30",
    ]  # fmt: skip
    # ΔW of `make_lora` is 0.3 of the weights at strength 1, on some of the layers
    shares = [float(re.search(r"joint_blocks ([\d.]+) %", line)[1]) for line in changes]
    assert 3 < shares[0] <= 15.5 and 2 < shares[1] <= 9.5
    assert chart.shape[0] == 1 and chart.shape[3] == 3 and 0.1 < chart.std() < 0.5
    found = classes["GraftInspect"]().inspect(model, "0 X_BLOCK mlp.fc1")["result"][0].splitlines()[0]
    assert re.fullmatch(
        r"joint_blocks\.0\.x_block\.mlp\.fc1: Q4_K, \d+ × \d+, [\d.]+ [KM]B; style\.safetensors ×0\.50; "
        r"lora, rank 20 ×0\.30", found
    )  # fmt: skip
    assert classes["GraftInspect"]().inspect(model, "*")["result"][0].startswith("general.architecture: ")
    assert classes["GraftInspect"]().inspect(model, "no such")["result"][0].startswith("nothing is called no such\n")


def test_inspect_says_why_a_layer_takes_another_way(sd3, classes):  # noqa: F811
    graft, _ = sd3
    key = next(k for k in graft.graft.layers if k.endswith("attn.proj"))
    shape = graft.graft.layers[key].logical_shape
    up, down = torch.ones(shape[0], 4), torch.ones(4, shape[1])
    model = graft.clone()
    model.add_patches({(f"{key}.weight", None, torch.tanh): ("lora", (up, down, None, None, None, None))})
    _, _, way, *_ = classes["GraftInspect"]().inspect(model)["result"][0].splitlines()
    why = "its difference passes through a function of the host"
    assert way == f"1 layer merged into a decoded copy of the weight ({why}): {key}"


def test_a_changed_file_is_read_again(folders, classes, files):
    changed = classes["GraftLoraStack"].IS_CHANGED
    before = changed(lora_1="style.safetensors")
    assert before == changed(lora_1="style.safetensors")
    path = folders / "loras" / "style.safetensors"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    try:
        assert changed(lora_1="style.safetensors") != before
    finally:
        path.write_bytes(content)


def test_the_stack_also_serves_models_of_other_loaders(sd3, loras, files, classes):  # noqa: F811
    _, dense = sd3
    model, *_ = classes["GraftLoraStack"]().apply(dense, lora_1="style.safetensors", strength_1=0.8)["result"]
    assert torch.equal(sample(model, SD3), sample(with_lora(dense, loras[0], 0.8), SD3))


def test_the_folder_for_gguf_files_is_shared(pack):
    paths, extensions = folder_paths.folder_names_and_paths["unet_gguf"]
    assert ".gguf" in extensions
    pack("nodes.node").share_folder("unet_gguf", "diffusion_models")
    assert folder_paths.folder_names_and_paths["unet_gguf"][0] == paths, "registering twice adds nothing"


def test_nodes_have_what_the_interface_shows(classes, pack):
    for name in pack("nodes").NODE_CLASS_MAPPINGS:
        node = classes[name]
        assert inspect.getdoc(node) and node.DESCRIPTION and node.SEARCH_ALIASES and node.CATEGORY.startswith("Graft")
        assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES)
        page = (pack("nodes.node").WEB / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert "|--" not in page, "the panel of help pages cuts tables off"


def test_the_page_shows_what_nodes_report(classes):
    """Of all that return a text for it."""
    script = (Path(__file__).parents[2] / "web" / "graft.js").read_text(encoding="utf-8")
    shown = re.search(r"const REPORTING = \[(.*?)\]", script, re.DOTALL)[1]
    telling = {
        name for name, node in classes.items()
        if "node.result(" in inspect.getsource(node) or "report" in getattr(node, "RETURN_NAMES", ())
    }  # fmt: skip
    assert telling == set(re.findall(r'"(\w+)"', shown))


def test_a_search_for_gguf_finds_the_models_loader_first(pack):
    """The front end ranks names that have the word by where it stands in them, and by their length."""
    names = pack("nodes").NODE_DISPLAY_NAME_MAPPINGS
    ranks = {key: name.lower().index("gguf") + len(name) / 2 for key, name in names.items() if "GGUF" in name}
    assert min(ranks, key=ranks.__getitem__) == "GraftUNETLoader" and len(ranks) > 1
