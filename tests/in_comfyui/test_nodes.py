"""Our nodes as a workflow calls them."""

from __future__ import annotations

import inspect

import comfy.utils
import folder_paths
import pytest
import torch
from generation import sample, with_lora
from loras import make_lora
from small import SD3, loras, sd3  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def classes():
    import nodes

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
    assert text.startswith("SD3 · ") and "Q4_K" in text and "float32" in text and text.endswith("cpu"), text
    assert type(shown["result"][0]).__name__ == "GraftModelPatcher"


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
    assert list(loader["optional"]) == ["compute_dtype", "backend"]
    rows = [f"{what}_{row}" for row in range(1, 9) for what in ("enabled", "lora", "strength")]
    assert list(stack["required"]) == ["model"]
    assert list(stack["optional"]) == ["lora_stack", *rows]
    for inputs in (loader, stack):
        for group in ("required", "optional"):
            for name, (_, *options) in inputs[group].items():
                assert options and options[0].get("tooltip"), f"{name} has no tooltip"


def test_the_stack_is_the_stock_loader_twice(sd3, loras, files, classes):  # noqa: F811
    graft, _ = sd3
    rows = {"lora_1": "style.safetensors", "strength_1": 0.8, "lora_3": "subject.safetensors", "strength_3": -0.5}
    model, stack, report, words = classes["GraftLoraStack"]().apply(graft, **rows)["result"]
    want = with_lora(with_lora(graft, loras[0], 0.8), loras[1], -0.5)
    assert torch.equal(sample(model, SD3), sample(want, SD3))
    assert stack == [("style.safetensors", 0.8, 0.8), ("subject.safetensors", -0.5, -0.5)]
    layers = len({k for k in loras[0] if "lora_A" in k})
    assert report.splitlines() == [
        f"style.safetensors ×0.80: {layers}/{layers} layers, rank 8",
        f"  native names; {layers} layers beside the packed weight",
        f"subject.safetensors ×-0.50: {layers}/{layers} layers, rank 20",
        f"  kohya names; {layers} layers beside the packed weight",
    ]
    assert words == "in my style, soft light"


def test_parts_of_a_fused_layer_are_counted_as_the_file_has_them(sd3, folders, classes):  # noqa: F811
    graft, dense = sd3
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    lora = make_lora(dense.model, shapes, "diffusers", ("joint_blocks.0.x_block.attn.qkv",), rank=8)
    comfy.utils.save_torch_file(lora, str(folders / "loras" / "qkv.safetensors"))
    report = classes["GraftLoraStack"]().apply(graft, lora_1="qkv.safetensors")["result"][2]
    assert report.splitlines() == [
        "qkv.safetensors ×1.00: 3/3 layers, rank 8", "  diffusers names; 3 layers beside the packed weight",
    ]  # fmt: skip


def test_a_stack_passes_through_other_stackers(sd3, loras, files, classes):  # noqa: F811
    graft, _ = sd3
    node = classes["GraftLoraStack"]()
    incoming = [("style.safetensors", 0.8, 1.0)]
    model, stack, _, _ = node.apply(graft, lora_stack=incoming, lora_1="subject.safetensors", strength_1=0.3)["result"]
    assert stack == [("style.safetensors", 0.8, 1.0), ("subject.safetensors", 0.3, 0.3)]
    want = with_lora(with_lora(graft, loras[0], 0.8), loras[1], 0.3)
    assert torch.equal(sample(model, SD3), sample(want, SD3))


def test_rows_that_are_off_do_nothing(sd3, files, classes):  # noqa: F811
    graft, _ = sd3
    node = classes["GraftLoraStack"]()
    off = {"lora_1": "style.safetensors", "enabled_1": False, "lora_2": "None", "lora_3": "subject.safetensors"}
    model, _, report, _ = node.apply(graft, **off, strength_3=0.0)["result"]
    assert report == "no LoRA is switched on"
    assert model is graft


def test_errors_say_what_to_do(sd3, files, classes):  # noqa: F811
    graft, _ = sd3
    node = classes["GraftLoraStack"]()
    with pytest.raises(Exception, match=r"trained for Flux, model is SD3 \(0 of 3 layers match\)"):
        node.apply(graft, lora_1="for_flux.safetensors")
    with pytest.raises(Exception, match=r"Git LFS pointer.*pointer\.safetensors"):
        node.apply(graft, lora_1="pointer.safetensors")
    assert "put it into models/loras" in node.VALIDATE_INPUTS(lora_2="gone.safetensors")
    assert node.VALIDATE_INPUTS(lora_2="gone.safetensors", enabled_2=False) is True
    loader = classes["GraftUNETLoader"]
    assert "models/diffusion_models" in loader.VALIDATE_INPUTS("gone.gguf")


def test_inspect_says_which_way_each_layer_takes(sd3, loras, classes):  # noqa: F811
    graft, dense = sd3
    inspect_node = classes["GraftInspect"]()
    shown = inspect_node.inspect(with_lora(graft, loras[0], 0.8))
    (text,) = shown["ui"]["text"]
    layers = len({k for k in loras[0] if "lora_A" in k})
    summary, way = text.splitlines()
    assert summary == graft.graft.summary
    assert way.startswith(f"{layers} layers beside the packed weight: diffusion_model.joint_blocks.")
    assert shown["result"] == (text,)
    assert inspect_node.inspect(graft)["result"][0].endswith("no adapters")
    assert "of another loader" in inspect_node.inspect(dense)["result"][0]


def test_inspect_says_why_a_layer_takes_another_way(sd3, classes):  # noqa: F811
    graft, _ = sd3
    key = next(k for k in graft.graft.layers if k.endswith("attn.proj"))
    shape = graft.graft.layers[key].logical_shape
    up, down = torch.ones(shape[0], 4), torch.ones(4, shape[1])
    model = graft.clone()
    model.add_patches({(f"{key}.weight", None, torch.tanh): ("lora", (up, down, None, None, None, None))})
    _, way = classes["GraftInspect"]().inspect(model)["result"][0].splitlines()
    why = "its difference passes through a function of the host"
    assert way == f"1 layer by the host's own merge on the decoded weight ({why}): {key}"


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
    pack("nodes.loader").register_folder()
    assert folder_paths.folder_names_and_paths["unet_gguf"][0] == paths, "registering twice adds nothing"


def test_nodes_have_what_the_interface_shows(classes, pack):
    for name in pack("nodes").NODE_CLASS_MAPPINGS:
        node = classes[name]
        assert inspect.getdoc(node) and node.DESCRIPTION and node.SEARCH_ALIASES and node.CATEGORY.startswith("Graft")
        assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES)
        assert (pack("nodes.node").WEB / "docs" / f"{name}.md").is_file()
