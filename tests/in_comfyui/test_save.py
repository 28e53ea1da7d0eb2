"""Save as GGUF: what is in the file is what was on the model, whoever patched it, and others read it."""

from __future__ import annotations

import gc
import importlib
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.sd
import folder_paths
import gguf
import nodes
import numpy as np
import pytest
import torch
from architectures import NARROW, flux_as_wide_as_its_file, flux_of, write_model
from comfy_extras.nodes_model_merging import ModelMergeSimple
from generation import dense_model, distance, forget, sample, with_lora
from loras import make_lora
from PIL import Image
from safetensors.torch import save_file
from small import SD3, loras, sd3, small_vae, stock  # noqa: F401  (fixtures)
from sweep import EVERY, keep, known_classes, output_of, sizes_of, write_tiny
from text_encoders import clip_l_weights
from tiny_models import MODELS

SD_CPP = os.environ.get("GRAFT_SD_CPP", "")
PEER = Path(os.environ.get("COMFYUI_GGUF", Path.home() / "peers" / "ComfyUI-GGUF"))
_RENAMED = re.compile(r"(?:double|single)_blocks\..*(?:query|key)_norm\.weight$|distilled_\w+\.norms\.\d+\.weight$")
SWEPT = ("Stable_Zero123", "Flux", "PixelDiTT2I", "WAN21_T2V", "StableAudio", "HunyuanVideo")
"""Of the sweep; all of it where `make architectures` runs it."""


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """The host's output folder, and its folder for diffusion models."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    place = tmp_path / "diffusion_models"
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path / "unet"), str(place)], {".gguf"})
    )
    yield tmp_path
    gc.collect()


@pytest.fixture
def save(pack):
    """Runs the node; gives the file and the text on the node."""
    module = pack("nodes.save")

    def run(model, type_name="Q8_0", name="saved", folder="output", **more):
        loaded, text = module.GraftSaveGGUF().save(model, type_name, name, folder, **more)["result"]
        assert loaded is None, "nothing is connected"
        return module.place_for(folder, name, type_name), text

    return run


def merged_by_the_host(model) -> dict[str, torch.Tensor]:
    """The weights with all patches in them, in fp32, by their names in a file."""
    return {
        key.removeprefix("diffusion_model."): comfy.lora.calculate_weight(
            patches, convert(weight.detach().float().clone(), inplace=True), key
        )
        for key, ((weight, convert), *patches) in model.get_key_patches("diffusion_model.").items()
    }


def held(pack, path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors in fp32."""
    file = pack("ops.files.gguf").open_gguf(path)
    packed = pack("ops.packed")
    return {name: packed.in_fp32(packed.as_weight(tensor)) for name, tensor in file.tensors.items()}


def rounded(pack, path: Path, weights: dict[str, torch.Tensor]) -> float:
    """The largest difference of a file from `weights` rounded to its types by libgguf itself, relative."""
    file, quantize = pack("ops.files.gguf").open_gguf(path), pack("ops.quantize").quantize
    assert file.tensors.keys() == {name for name, weight in weights.items() if weight.numel()}
    largest = 0.0
    for name, tensor in file.tensors.items():
        data = quantize(weights[name].reshape(-1, tensor.stored_shape[-1]), tensor.fmt).flatten()
        assert tensor.shape == (tuple(weights[name].shape) or (1,)), name
        if not torch.equal(data, tensor.data):
            want = pack("kernels").dequantize(data, tensor.fmt, tensor.shape, torch.float32)
            got = pack("kernels").dequantize(tensor.data, tensor.fmt, tensor.shape, torch.float32)
            largest = max(largest, distance(got, want))
    return largest


def test_any_model_with_what_is_patched_onto_it(pack, sd3, stock, loras, save):  # noqa: F811
    """Stock, merged, with LoRAs by stock nodes, and Graft ones: rounded once, from the host's own merge in fp32."""
    graft, dense = sd3
    merge = ModelMergeSimple().merge
    cases = (
        (merge(stock, with_lora(graft, loras[0]), 0.3)[0], merge(dense, with_lora(dense, loras[0]), 0.3)[0]),
        *((with_lora(with_lora(m, loras[0], 0.7), loras[1], -0.4) for m in models) for models in ((graft, dense),)),
    )
    for number, (model, reference) in enumerate(cases):
        path, text = save(model, "Q8_0", f"tuned-{number}")
        # sums in another order may fall on the other side of a step, here and there
        assert rounded(pack, path, merged_by_the_host(reference)) < 1e-3
        assert "sd3 · Q8_0" in text and str(path) in text


def test_the_saved_model_runs(pack, sd3, loras):  # noqa: F811
    """With the LoRA's effect in it, as exactly as the type is; the node gives it where one is connected."""
    graft, dense = sd3
    prompt = {"7": {"inputs": {}}, "8": {"inputs": {"model": ["7", 0]}}}
    node = pack("nodes.save").GraftSaveGGUF()
    saved = node.save(with_lora(graft, loras[0]), "F16", "half", "output", prompt=prompt, unique_id="7")["result"][0]
    assert type(saved.model.model_config) is type(graft.model.model_config) and not saved.residuals
    want = sample(with_lora(dense, loras[0]), SD3)
    assert distance(sample(saved, SD3), want) < 5e-3 < distance(sample(graft, SD3), want)


def test_as_it_is(pack, sd3, loras, save):  # noqa: F811
    """Without a LoRA the bytes of the file; with one the layers that it reaches are quantized again, and only these."""
    graft, _ = sd3
    (source,) = (file.path for file in graft.graft.files)
    first = pack("ops.files.gguf").open_gguf(source).tensors
    path, text = save(graft, "as it is")
    second = pack("ops.files.gguf").open_gguf(path).tensors
    assert {n: (t.fmt, t.shape) for n, t in second.items()} == {n: (t.fmt, t.shape) for n, t in first.items()}
    assert all(torch.equal(second[name].data, tensor.data) for name, tensor in first.items())
    assert "again" not in text and path.name == "saved-as-it-is.gguf"
    tuned = with_lora(graft, loras[0])
    path, text = save(tuned, "as it is", "tuned")
    third = pack("ops.files.gguf").open_gguf(path).tensors
    reached = {key.removeprefix("diffusion_model.") for key in tuned.residuals.patches}
    assert {name for name, tensor in third.items() if not torch.equal(tensor.data, first[name].data)} == reached
    assert all(third[name].fmt == tensor.fmt for name, tensor in first.items()) and "quantized again" in text


def test_rules_and_importance(pack, sd3, save):  # noqa: F811
    graft, _ = sd3
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    columns = held(pack, graft.graft.files[0].path)[name].shape[-1]
    measured = {name: torch.rand(columns) + 0.1}
    path, text = save(graft, "Q3_K_S", "ruled", rules="x_block.attn.qkv = Q6_K", importance=measured)
    file = pack("ops.files.gguf").open_gguf(path)
    types = {key: tensor.fmt.name for key, tensor in file.tensors.items()}
    assert types["joint_blocks.0.x_block.attn.qkv.weight"] == "Q6_K" and types[name] == "Q3_K"
    weight = held(pack, graft.graft.files[0].path)[name]
    want = pack("ops.quantize").quantize(weight, file.tensors[name].fmt, measured[name])
    assert torch.equal(file.tensors[name].data, want.flatten()) and "no data for" in text
    assert file.metadata["graft.rules"] == ["x_block.attn.qkv = Q6_K"] and file.metadata["graft.importance"] == "yes"


def test_a_calibration_counts_where_files_have_other_names(pack, sd3, save, monkeypatch):  # noqa: F811
    """PixelDiT's begin with ``core.`` there; a calibration has the names of layers, a file of it may have either."""
    graft, module = sd3[0], pack("nodes.save")
    monkeypatch.setitem(module._KNOWN_UNDER, type(graft.model.model_config).__name__, "core.")
    state = module.in_a_file(graft)
    assert state and all(name.startswith("core.") for name in state)
    for prefix in ("", "core."):
        columns = {name: t.shape[-1] for name, t in state.items() if t.dim() == 2}
        known = {prefix + name.removeprefix("core."): torch.ones(count) for name, count in columns.items()}
        _, text = save(graft, "Q3_K_S", f"calibrated{len(prefix)}", importance=known)
        assert "no data for" not in text, text


def test_what_it_was_made_from(pack, sd3, save, folders):  # noqa: F811
    """By the graph before the node: model files, LoRAs of any loader with their strengths."""
    graft, _ = sd3
    name = Path(graft.graft.files[0].path).name
    prompt = {
        "1": {"class_type": "GraftUNETLoader", "inputs": {"unet_name": name}},
        "2": {"class_type": "LoraLoaderModelOnly",
              "inputs": {"model": ["1", 0], "lora_name": "a.safetensors", "strength_model": 0.5}},
        "3": {"class_type": "GraftLoraStack",
              "inputs": {"model": ["2", 0], "lora_1": "b.safetensors", "strength_1": 0.25, "enabled_1": True,
                         "lora_2": "c.safetensors", "strength_2": 1.0, "enabled_2": False, "lora_3": "None"}},
        "4": {"class_type": "GraftSaveGGUF", "inputs": {"model": ["3", 0], "importance": ["5", 0]}},
        "5": {"class_type": "Other", "inputs": {"lora_name": "not-mine.safetensors", "strength_model": 1.0}},
    }  # fmt: skip
    path, _ = save(graft, "Q8_0", "made", prompt=prompt, unique_id="4")
    metadata = pack("ops.files.gguf").open_gguf(path).metadata
    assert metadata["graft.loras"] == ["a.safetensors ×0.5", "b.safetensors ×0.25"]
    assert metadata["graft.source"] == name and len(metadata["graft.source.sha256"]) == 64
    assert metadata["general.architecture"] == "sd3" and metadata["general.file_type"] == 7
    said = pack("nodes.inspect").report(pack("nodes.loader").load_diffusion_model(str(path))).splitlines()[1]
    assert said == f"made by Graft: Q8_0 · of {name} · with a.safetensors ×0.5, b.safetensors ×0.25"


@pytest.mark.parametrize(
    "name", ["../out", "/tmp/out", "a/../../out", "", "  ", "a/..", "C:/out", "a\x00b", "a?b", "~/../../x"]
)
def test_names_that_lead_elsewhere(pack, sd3, save, output, name):  # noqa: F811
    with pytest.raises(pack("kernels").GraftError, match="name"):
        save(sd3[0], "Q8_0", name)
    assert not list(output.rglob("*.gguf"))


def test_a_link_out_of_the_folder(pack, sd3, save, output, tmp_path_factory):  # noqa: F811
    (output / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(pack("kernels").GraftError, match="leads out"):
        save(sd3[0], "Q8_0", "link/out")


def test_where_files_go(pack, sd3, save, output):  # noqa: F811
    path, _ = save(sd3[0], "Q8_0", "sub folder/my model", "diffusion_models")
    assert path == output / "diffusion_models" / "sub folder" / "my model-Q8_0.gguf" and path.is_file()
    before = path.stat().st_mtime_ns
    with pytest.raises(pack("kernels").GraftError, match="already"):
        save(sd3[0], "Q8_0", "sub folder/my model", "diffusion_models")
    assert path.stat().st_mtime_ns == before
    save(sd3[0], "Q8_0", "sub folder/my model", "diffusion_models", overwrite=True)
    loaded = pack("nodes.loader").load_diffusion_model(str(path))
    with pytest.raises(pack("kernels").GraftError, match="is loaded"):
        save(sd3[0], "Q8_0", "sub folder/my model", "diffusion_models", overwrite=True)
    assert loaded and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_run_that_is_stopped(sd3, save, output):  # noqa: F811
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(sd3[0])
    assert not list(output.iterdir())
    comfy.model_management.interrupt_current_processing(False)


def test_models_in_fp8(pack, sd3, save, output):  # noqa: F811
    """Plain fp8 is read and told; scaled fp8, of which numbers mean something else, is refused."""
    state = held(pack, sd3[0].graft.files[0].path)
    fp8 = {k: v.to(torch.float8_e4m3fn) if v.dim() == 2 else v for k, v in state.items()}
    model = comfy.sd.load_diffusion_model_state_dict(dict(fp8), model_options={"dtype": torch.float8_e4m3fn})
    path, text = save(model, "Q8_0", "fp8")
    assert "in fp8" in text and path.is_file()
    layer = "joint_blocks.0.x_block.mlp.fc1"
    scaled = {**fp8, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), f"{layer}.scale_weight": torch.tensor(2.0)}
    model = comfy.sd.load_diffusion_model_state_dict(scaled, model_options={})
    with pytest.raises(pack("kernels").GraftError, match=r"load the model in bf16 or fp16"):
        save(model, "Q8_0", "scaled")
    assert [p.name for p in output.rglob("*.gguf")] == [path.name]


@pytest.mark.parametrize("name", [name for name in MODELS if name in known_classes() and (name in SWEPT or EVERY)])
@torch.inference_mode()
def test_an_architecture_saved_and_loaded(pack, tmp_path, save, name):
    """The host knows it again, every tensor is there in its shape, and its error is that of the type alone."""
    tiny = MODELS[name]
    try:
        result = _saved_and_loaded(pack, tiny, tmp_path, save)
    except Exception as e:
        keep(name, "saved", error=" ".join(f"{type(e).__name__}: {e}".split()))
        raise
    keep(name, "saved", **result)
    assert result["base"] <= 1e-5


def _saved_and_loaded(pack, tiny, folder, save) -> dict:
    try:
        with sizes_of(tiny) as module:
            source = write_tiny(tiny, module, "halves", folder / "source.gguf")
            first = pack("nodes.loader").load_diffusion_model(str(source), compute_dtype="fp32")
            state = {k: pack("ops.packed").in_fp32(v) for k, v in pack("nodes.save").in_a_file(first).items()}
            path, text = save(first, "Q4_K_M")
            # hosts rename these as they load them, and no other reader does; LongCat's have no other name
            renamed = [name for name in state if _RENAMED.search(name)]
            assert not renamed or tiny.host_class == "LongCatImage", "other readers look for these as scale"
            counted = {name: weight for name, weight in state.items() if not name.endswith("num_batches_tracked")}
            assert rounded(pack, path, counted) < 1e-6, text
            second = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
            dense = dense_model(pack, path)
        assert type(second.model.model_config) is type(first.model.model_config)
        got = output_of(second, tiny)
        cost = distance(got, output_of(first, tiny))
        assert 0 < cost < 0.5
        return {"base": distance(got, output_of(dense, tiny)), "cost": cost}
    finally:
        first = second = dense = None
        forget()


@pytest.fixture(scope="module")
def peer():
    """`peer("loader")` is a module of ComfyUI-GGUF."""
    if not (PEER / "loader.py").is_file():
        pytest.skip("no ComfyUI-GGUF found: set COMFYUI_GGUF")
    package = types.ModuleType("peer")
    package.__path__ = [str(PEER)]
    sys.modules["peer"] = package
    # as it is imported it puts lists of its own in the place of those of the tests
    known = dict(folder_paths.folder_names_and_paths)
    importlib.import_module("peer.nodes")
    folder_paths.folder_names_and_paths.update(known)
    return lambda name: importlib.import_module(f"peer.{name}")


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_comfyui_gguf_draws_the_same(pack, peer, save, output, name):
    """A model with a LoRA baked in, through that pack's own node."""
    small_flux = replace(NARROW["flux"], build=partial(flux_of, 512))
    architecture = small_flux if name == "flux" else NARROW[name]
    with flux_as_wide_as_its_file():
        source = write_model(architecture, "Q8_0", output / "source.gguf")
        model = pack("nodes.loader").load_diffusion_model(str(source), compute_dtype="fp32")
        held = pack("nodes.save").weights_of_model(model)
        shapes = {f"diffusion_model.{key}": weight.shape for key, weight in held.items()}
        lora = make_lora(model.model, shapes, "native", architecture.lora_layers, rank=8)
        path, _ = save(with_lora(model, lora), "Q4_K_M", "baked", "diffusion_models")
        ours = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
        theirs = peer("nodes").UnetLoaderGGUF().load_unet(path.name)[0]
    got, want, before = (sample(it, architecture, steps=2) for it in (theirs, ours, model))
    # it decodes to fp16
    assert distance(got, want) < 2e-3 < 0.01 < distance(before, want)


def test_comfyui_gguf_reads_the_same_numbers(pack, peer, sd3, loras, save, tmp_path):  # noqa: F811
    loader, dequant = peer("loader"), peer("dequant")
    saved, _ = save(with_lora(sd3[0], loras[0]), "Q3_K_M", "peer")
    g, make = torch.Generator().manual_seed(0), pack("ops.make")
    unet = {  # whose convolutions are folded
        "input_blocks.0.0.weight": torch.randn(320, 4, 3, 3, generator=g), "label_emb.0.0.weight": torch.randn(64, 32),
        "input_blocks.1.0.in_layers.2.weight": torch.randn(64, 64, 3, 3, generator=g),
        "input_blocks.1.0.in_layers.2.bias": torch.randn(64, generator=g),
    }  # fmt: skip
    make.write_model(tmp_path / "unet.gguf", make.plan_model(unet, pack("ops.recipes").recipe_named("Q4_0"), "sdxl"))
    for path in (saved, tmp_path / "unet.gguf"):
        theirs, architecture = loader.gguf_sd_loader(str(path), return_arch=True)
        assert architecture == pack("ops.files.gguf").open_gguf(path).architecture
        ours = held(pack, path)
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            got = dequant.dequantize_tensor(tensor, torch.float32) if isinstance(tensor, loader.GGMLTensor) else tensor
            got = torch.Tensor(got).float()
            assert got.shape == ours[name].shape, name
            # it decodes in fp16
            assert not ours[name].any() or distance(got, ours[name]) < 2e-3, name
        reader = gguf.GGUFReader(path)
        assert len(reader.tensors) == len(ours)
        for tensor in reader.tensors:
            numbers = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(numbers.flatten(), ours[tensor.name].flatten()), tensor.name
        del theirs, ours, reader, tensor
        gc.collect()


@pytest.mark.skipif(not SD_CPP, reason="no stable-diffusion.cpp: set GRAFT_SD_CPP to its sd-cli")
def test_stable_diffusion_cpp_draws_the_same(pack, save, tmp_path):
    """A small Flux and CLIP-L in files of ours, and in float safetensors of the same numbers; another model differs."""
    pictures = {}
    for seed in (0, 1):
        source = write_model(NARROW["flux"], "F16", tmp_path / f"source-{seed}.gguf", seed)
        with flux_as_wide_as_its_file():
            model = pack("nodes.loader").load_diffusion_model(str(source), compute_dtype="fp32")
        pictures[seed] = [save(model, "Q4_K_M", f"flux-{seed}")[0]]
    clip = comfy.sd.load_text_encoder_state_dicts([clip_l_weights()], model_options={"dtype": torch.float32})
    pack("nodes.save").GraftSaveCLIPGGUF().save(clip, "Q8_0", "clip", "output")
    words = tmp_path / "clip-Q8_0.gguf"
    for path in (pictures[0][0], words):
        save_file({k: w.clone().contiguous() for k, w in held(pack, path).items()}, path.with_suffix(".safetensors"))
    decoder = {}
    for name, weight in small_vae().items():  # under diffusers' names
        part = re.match(r"taesd_(en|de)coder\.(\d+)\.(.+)", name)
        if part:
            scale = 0.01 if name.startswith("taesd_decoder.19.") else 1  # or it is all black and white
            decoder[f"{part[1]}coder.layers.{int(part[2]) - (part[1] == 'de')}.{part[3]}"] = weight.contiguous() * scale
    save_file(decoder, tmp_path / "tae.safetensors")

    def drawn(model: Path, text_encoder: Path) -> torch.Tensor:
        picture = tmp_path / f"{model.name}.png"
        files = ["--diffusion-model", model, "--clip_l", text_encoder, "--taesd", tmp_path / "tae.safetensors"]
        options = ["-p", "fox", "--cfg-scale", "1", "--steps", "2", "-W", "128", "-H", "128", "--rng", "cpu", "-s", "3"]
        ran = subprocess.run([SD_CPP, *map(str, files), *options, "-o", picture], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout[-2000:]
        return torch.from_numpy(np.asarray(Image.open(picture).convert("RGB")).astype(np.int32))

    ours = drawn(pictures[0][0], words)
    floats = drawn(pictures[0][0].with_suffix(".safetensors"), words.with_suffix(".safetensors"))
    # it multiplies in int8, and cuts to 8 bits
    assert (ours - floats).abs().max() <= 2 and ours.float().std() > 1
    assert (drawn(pictures[1][0], words) - ours).abs().max() > 2


def test_the_node_is_listed(pack):
    mapped = pack("nodes").NODE_CLASS_MAPPINGS["GraftSaveGGUF"]
    assert mapped is nodes.NODE_CLASS_MAPPINGS["GraftSaveGGUF"]
    inputs = mapped.INPUT_TYPES()
    assert list(inputs["required"]) == ["model", "type", "filename_prefix", "folder"]
    assert all("tooltip" in options for group in ("required", "optional") for _, options in inputs[group].values())
