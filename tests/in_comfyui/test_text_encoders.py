"""Text encoders from GGUF against the host's own on the same weights, dequantized."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import types
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.text_encoders.llama
import comfy.text_encoders.wan
import comfy.utils
import comfy.weight_adapter
import execution
import folder_paths
import gguf
import nodes
import numpy as np
import pytest
import tokenizer_samples as samples
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from comfy_extras.nodes_model_merging import CLIPMergeSimple
from conftest import DYNAMIC_VRAM
from generation import distance, fingerprint
from gguf import MODEL_ARCH
from gguf_samples import encode, write_gguf
from safetensors.torch import save_file
from small import sd3  # noqa: F401  (fixture)
from text_encoders import (
    LLAMA,
    WORDS,
    clip_l_weights,
    clip_weights,
    dense_clip,
    encoded,
    furthest,
    heads,
    known_as_large,
    llama_shapes,
    lora_error,
    read_tokenizer_by_file,
    shapes_of,
    small,
    small_newer,
    t5_shapes,
    with_vocabulary,
    write,
)


@pytest.fixture(scope="module", autouse=True)
def small_classes():
    with small():
        yield


@pytest.fixture(scope="module")
def folder(folders):
    """A folder that ComfyUI lists text encoders from."""
    folder = folders / "text_encoders"
    folder.mkdir()
    for key in ("text_encoders", "clip_gguf"):
        paths, extensions = folder_paths.folder_names_and_paths[key]
        folder_paths.folder_names_and_paths[key] = ([str(folder), *paths], extensions)
    return folder


@pytest.fixture(scope="module")
def classes():
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def load(pack):
    return pack("nodes.text_encoder").load_text_encoders


@pytest.fixture(scope="module")
def flux(folder, load):
    """``(graft, dense)`` of a T5 in Q8_0 and a CLIP-L that is none of GGUF."""
    t5 = write(folder / "t5xxl.gguf", MODEL_ARCH.T5ENCODER, t5_shapes("t5_config_xxl.json"))
    clip_l = clip_l_weights()
    save_file(clip_l, folder / "clip_l.safetensors")
    return load([str(folder / "clip_l.safetensors"), str(t5.path)], "flux"), dense_clip([clip_l, t5.dense], "flux")


@pytest.fixture(scope="module")
def lora(flux) -> dict[str, torch.Tensor]:
    """On every layer of both text encoders, T5's table of distances included, as OneTrainer names them."""
    model, g = flux[1].cond_stage_model, torch.Generator().manual_seed(7)
    weights, state = model.state_dict(), {}
    for name, key in comfy.lora.model_lora_keys_clip(model, {}).items():
        if name.startswith(("lora_te1_text_model", "lora_te2_encoder")) and weights[key].dim() == 2:
            rows, columns = weights[key].shape
            state[f"{name}.lora_down.weight"] = torch.randn(8, columns, generator=g) / columns**0.5
            state[f"{name}.lora_up.weight"] = torch.randn(rows, 8, generator=g) / 8
    assert len(state) == 2 * (2 * 6 + 4 * 7 + 1)
    return state


def test_flux(flux):
    assert furthest(*(encoded(clip) for clip in flux)) < 1e-5


def test_text_encoders_saved_and_loaded(flux, lora, load, folder, classes):
    """With a LoRA on them, from Graft's CLIP and from the host's own."""
    graft, dense = flux
    want = encoded(comfy.sd.load_lora_for_models(None, dense, lora, 0, 0.5)[1])["cond"]
    for number, clip in enumerate(flux):
        # the file has none, so hosts have whatever lay in that memory
        clip.cond_stage_model.clip_l.transformer.text_projection.weight.data.fill_(1e30)
        tuned = comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.5)[1]
        text = classes["GraftSaveCLIPGGUF"]().save(tuned, "F16", f"saved-{number}", "text_encoders")["result"][0]
        assert "t5encoder · F16" in text and "text_encoder · F16" in text
        paths = [folder / f"saved-{number}-{name}-F16.gguf" for name in ("clip_l", "t5xxl")]
        got = encoded(load([str(path) for path in paths], "flux"))["cond"]
        assert distance(got, want) < 5e-3 < distance(encoded(graft)["cond"], want)
        names = {tensor.name for tensor in gguf.GGUFReader(paths[1]).tensors}
        assert {"token_embd.weight", "enc.blk.0.attn_rel_b.weight", "enc.blk.1.ffn_gate.weight"} <= names
        assert "text_projection.weight" not in {tensor.name for tensor in gguf.GGUFReader(paths[0]).tensors}
        for path in paths:
            path.unlink()


def test_a_projection_that_no_file_had_is_not_saved(pack):
    """Whether a text encoder that has one reads it, and whether it is numbers of a trained one."""
    has, encoder, sound = pack("nodes.save")._has_projection, torch.nn.Module(), torch.eye(4)
    assert has(encoder, sound)
    for weight in (None, torch.zeros(4, 4), torch.full((4, 4), 1e30), torch.full((4, 4), float("nan"))):
        assert not has(encoder, weight)
    encoder.return_projected_pooled = False
    assert not has(encoder, sound)


@pytest.fixture
def saved_again(load, classes, monkeypatch, tmp_path):
    """Saves a CLIP's text encoder with the types that it has, and loads that file."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], {".gguf"}))

    def run(clip: Any, kind: str = "stable_diffusion", beside: tuple[str, ...] = ()) -> Any:
        classes["GraftSaveCLIPGGUF"]().save(clip, "as it is", "again", "text_encoders", overwrite=True)
        again = load([*map(str, tmp_path.glob("again*.gguf")), *beside], kind)
        before, after = (it.cond_stage_model.graft.layers for it in (clip, again))
        kept = {name: layer.fmt for name, layer in before.items() if layer.weight is not None}
        assert kept.items() <= {name: layer.fmt for name, layer in after.items()}.items()
        return again

    return run


def test_loras_run_beside_the_weights(flux, lora):
    graft, dense = flux
    before, base = fingerprint(graft.cond_stage_model), encoded(graft)["cond"]
    branches = [comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.7)[1] for clip in (graft, dense)]
    got, want = (encoded(clip) for clip in branches)
    effect = want["cond"] - base
    assert distance(got["cond"] - base, effect) < 1e-4 and distance(got["pooled_output"], want["pooled_output"]) < 1e-4
    assert distance(want["cond"], base) > 0.05, "the LoRA does nothing"
    assert torch.equal(encoded(graft)["cond"], base) and fingerprint(graft.cond_stage_model) == before
    assert torch.equal(encoded(branches[0])["cond"], got["cond"]), "the branch has its LoRA when it is used again"


def test_scheduled_loras(flux, lora):
    """A hook with two strengths over the steps: the host encodes the words once for each."""
    conds = []
    for clip in flux:
        hooks = comfy.hooks.create_hook_lora(lora, 0.0, 1.0)
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.25, start_percent=0.5))
        hooks.set_keyframes_on_hooks(frames)
        (clip,) = SetClipHooks().apply_hooks(clip, True, False, hooks)
        conds.append(clip.encode_from_tokens_scheduled(clip.tokenize(WORDS)))
    got, want = conds
    assert len(got) == len(want) == 2 and distance(want[0][0], want[1][0]) > 0.01
    for (cond, _), (expected, _) in zip(got, want, strict=True):
        assert distance(cond, expected) < 1e-4


def test_the_lora_stack_puts_them_on(flux, lora, sd3, folders, classes):  # noqa: F811
    save_file(lora, folders / "loras" / "te.safetensors")
    apply = classes["GraftLoraStack"]().apply
    *_, clip = apply(sd3[0], clip=flux[0], lora_1="te.safetensors", strength_1=0.5)["result"]
    want = comfy.sd.load_lora_for_models(None, flux[0], lora, 0, 0.5)[1]
    assert torch.equal(encoded(clip)["cond"], encoded(want)["cond"])
    assert not torch.equal(encoded(clip)["cond"], encoded(flux[0])["cond"])


def test_it_is_saved_with_its_weights(flux, lora, tmp_path):
    graft, dense = (comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.7)[1] for clip in flux)
    got = graft.get_sd()
    dense.load_model()
    want = dense.get_sd()
    missing = {"clip_l.transformer.text_projection.weight"}  # of the host's, a random one
    assert got.keys() >= want.keys() - missing
    for key in want.keys() - missing:
        assert distance(got[key], want[key]) < 1e-3, key
    # by which newer hosts save
    part = graft.patcher.model_state_dict_for_saving(graft.cond_stage_model.t5xxl, "t5xxl.")
    assert {f"t5xxl.{key}" for key in part} == {key for key in got if key.startswith("t5xxl.")}
    assert all(torch.equal(weight, got[f"t5xxl.{key}"]) for key, weight in part.items())


def write_clip(path: Path, weights: dict[str, torch.Tensor], kind_of: Any) -> dict[str, torch.Tensor]:
    """A CLIP in a GGUF file, its matrices in the types of their names; the weights that are in it."""
    stored, dense = {}, {}
    for name, weight in weights.items():
        kind = gguf.GGMLQuantizationType[kind_of(name) if weight.dim() == 2 else "F32"]
        stored[name] = weight.numpy(), kind.name
        dense[name] = torch.from_numpy(gguf.dequantize(encode(weight.numpy(), kind), kind).astype("float32"))
    write_gguf(path, stored, path.stem)
    return dense


@pytest.fixture(scope="module")
def clip_l(folder, load):
    """``(graft, dense)`` of a CLIP-L whose table of positions is quantized, too."""
    path = folder / "clip_l.gguf"
    dense = write_clip(path, clip_l_weights(seed=6), lambda name: "Q8_0" if "position" in name else "F16")
    return load([str(path)]), dense_clip([dense], "stable_diffusion")


def test_a_quantized_table_of_positions(clip_l, saved_again):
    assert furthest(*(encoded(clip) for clip in clip_l)) < 1e-5
    assert furthest(encoded(saved_again(clip_l[0])), encoded(clip_l[0])) == 0


@pytest.mark.parametrize("kind", ["stable_diffusion", "sdxl"])
def test_clip_g(kind, load, saved_again, tmp_path):
    """Alone, as the refiner of SDXL reads, and beside CLIP-L, as SDXL does; its projection is read and saved."""
    (tmp_path / "from").mkdir()
    paths = [tmp_path / "from" / f"clip_{which}.gguf" for which in "gl"]
    with small(clip_layers=3):  # SDXL reads with the last but one, and its CLIP-L has to have one before it
        weights = [write_clip(paths[0], clip_weights("clip_config_bigg.json", 8), kind_in_clip_g)]
        if kind == "sdxl":
            weights.append(write_clip(paths[1], clip_l_weights(), lambda name: "F16"))
        got = load(list(map(str, paths[: len(weights)])), kind)
        # which is no type of the host's: of two CLIPs it makes SDXL's
        want, again = dense_clip(weights, "stable_diffusion"), saved_again(got, kind)
    assert hasattr(want.cond_stage_model, "clip_l") == (kind == "sdxl") and encoded(want)["pooled_output"].any()
    assert furthest(encoded(got), encoded(want)) < 1e-5 and lora_error((got, want)) < 1e-4
    assert furthest(encoded(again), encoded(got)) == 0 and lora_error((again, want)) < 1e-4


def kind_in_clip_g(name: str) -> str:
    return "Q4_0" if ".mlp." in name else "Q8_0"


def test_a_merge(clip_l, flux):
    """Of the table of positions, too: the host adds its weight and calls no layer."""
    got, want = (encoded(CLIPMergeSimple().merge(*pair, 0.3)[0]) for pair in zip(clip_l, flux, strict=True))
    assert furthest(got, want) < 1e-4 and distance(want["cond"], encoded(clip_l[1])["cond"]) > 0.05


def test_an_encoder_inside_is_called(flux, lora):
    """As nodes for the weights of words call them, once the host has loaded the branch."""
    got, want = [], []
    for clip, found in zip(flux, (got, want), strict=True):
        branch = comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.7)[1]
        for it in (branch, clip):
            it.load_model()
            it.cond_stage_model.reset_clip_options()
            found += [it.cond_stage_model.clip_l.encode_token_weights(it.tokenize(WORDS)["l"])[0]]
    assert all(distance(*pair) < 1e-4 for pair in zip(got, want, strict=True))
    assert distance(want[0], want[1]) > 0.05, "the LoRA does nothing"


def test_adapters_are_put_on_once(flux, lora, monkeypatch):
    branch, calls = comfy.sd.load_lora_for_models(None, flux[0], lora, 0, 0.7)[1], []
    grafted = branch.patcher.grafted
    monkeypatch.setattr(branch.patcher, "grafted", lambda device: calls.append(device) or grafted(device))
    encoded(branch)
    assert len(calls) == 1 and not branch.cond_stage_model.graft.calls.under_way


def test_branches_in_threads(flux, lora):
    """Each encodes with what it has itself loaded, though another one has been loaded since."""
    graft = flux[0]
    branches = [graft, *(comfy.sd.load_lora_for_models(None, graft, lora, 0, s)[1] for s in (0.7, -0.4))]
    tokens, loading = graft.tokenize(WORDS), threading.Lock()

    def encode(clip: Any, after_loading: Any = lambda: None) -> torch.Tensor:
        with loading:  # the host's list of loaded models takes one thread at a time
            clip.load_model()
        after_loading()
        return clip.cond_stage_model.encode_token_weights(tokens)[0]

    wanted = [encode(branch) for branch in branches]
    assert not torch.equal(wanted[0], wanted[1]) and not torch.equal(wanted[1], wanted[2])
    loaded = threading.Barrier(len(branches))
    got: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        with torch.no_grad():
            got[index] = encode(branches[index], loaded.wait)

    with torch.no_grad():
        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(branches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(got[index], want) for index, want in enumerate(wanted))
    assert all(layer.residual is None for layer in graft.cond_stage_model.graft.layers.values())


def test_a_file_that_llama_cpp_wrote_for_llama(folder, load, saved_again):
    """HiDream reads Llama 3; its queries and keys are in another order in GGUF."""
    with small(vocab_size=128256):
        shapes = llama_shapes("Llama2")
    llama = write(folder / "llama.gguf", MODEL_ARCH.LLAMA, shapes, "Q4_0", heads("llama"))
    got, want = load([str(llama.path)], "hidream"), dense_clip([llama.dense], "hidream")
    assert furthest(encoded(got), encoded(want)) < 1e-5
    assert lora_error((got, want), lambda clip: encoded(clip)["conditioning_llama3"]) < 1e-4
    assert furthest(encoded(saved_again(got, "hidream")), encoded(got)) == 0


QWEN = {"num_key_value_heads": 4, "head_dim": 128}  # 4 · 128 rows of keys, by which the host knows it


@pytest.fixture(scope="module")
def qwen_files(folder):
    """Qwen2.5-VL and its projector."""
    with small(**QWEN):
        shapes = llama_shapes("Qwen25_7BVLI")
    seeing = {name: shape for name, shape in shapes.items() if name.startswith("visual.")}
    reading = {name: shape for name, shape in shapes.items() if name not in seeing}
    text = write(folder / "Qwen2.5-VL-Q4_K_M.gguf", MODEL_ARCH.QWEN2VL, reading, "Q4_K", heads("qwen2vl"))
    vision = write(
        folder / "Qwen2.5-VL-mmproj-F16.gguf", MODEL_ARCH.MMPROJ, seeing, "Q8_0",
        lambda writer: writer.add_uint32("clip.vision.projection_dim", LLAMA["hidden_size"]),
    )  # fmt: skip
    return text, vision


@pytest.fixture
def qwen(qwen_files):
    with small(**QWEN):
        yield qwen_files


def test_it_sees_with_the_projector_beside_it(qwen, load, saved_again):
    text, vision = qwen
    got, want = load([str(text.path)], "qwen_image"), dense_clip([text.dense | vision.dense], "qwen_image")
    picture = torch.rand(1, 56, 84, 3, generator=torch.Generator().manual_seed(1))
    assert furthest(encoded(got), encoded(want)) < 1e-5
    assert furthest(encoded(got, images=[picture]), encoded(want, images=[picture])) < 1e-5
    assert lora_error((got, want)) < 1e-4
    assert "sees with Qwen2.5-VL-mmproj-F16.gguf" in got.cond_stage_model.graft.summary
    again = saved_again(got, "qwen_image", (str(vision.path),))
    assert furthest(encoded(again, images=[picture]), encoded(got, images=[picture])) == 0
    assert lora_error((got, want)) < 1e-4


def test_without_a_projector_it_reads(qwen, load, tmp_path):
    (tmp_path / "alone.gguf").symlink_to(qwen[0].path)
    clip = load([str(tmp_path / "alone.gguf")], "qwen_image")
    assert torch.isfinite(encoded(clip)["cond"]).all()
    with pytest.raises(Exception, match=r"put the vision projector \(mmproj\) of this text encoder into its folder"):
        encoded(clip, images=[torch.rand(1, 56, 56, 3)])


def test_a_projector_that_comes_later(qwen, load, folder, classes):
    """The node runs again once it is there; one that cannot be read is not asked for, but complained of."""
    text, projector = folder / "later.gguf", folder / "later-mmproj.gguf"
    text.symlink_to(qwen[0].path)
    hidden = qwen[1].path.rename(qwen[1].path.with_suffix(".away"))
    try:
        states = [classes["GraftCLIPLoader"].IS_CHANGED(clip_name1="later.gguf", type="qwen_image")]
        projector.write_bytes(hidden.read_bytes()[:100_000])
        states.append(classes["GraftCLIPLoader"].IS_CHANGED(clip_name1="later.gguf", type="qwen_image"))
        clip = load([str(text)], "qwen_image")
    finally:
        hidden.rename(qwen[1].path)
        projector.unlink()
    assert states[0] != states[1] and states[0] == states[1][:1]
    assert "the vision projector cannot be read: " in clip.cond_stage_model.graft.summary
    with pytest.raises(Exception, match=r"into its folder; one lies there, but .*incomplete.*later-mmproj\.gguf"):
        encoded(clip, images=[torch.rand(1, 56, 56, 3)])


def test_a_damaged_projector_beside_it_stops_nothing(pack, qwen, load, folder):
    """One that was chosen is an error."""
    text, projector = folder / "good.gguf", folder / "good-mmproj.gguf"
    text.symlink_to(qwen[0].path)
    tensors = {"v.blk.0.attn_q.weight": (np.zeros((32, 32), np.float32), "F16")}
    width = pack("ops.files.gguf").open_gguf(text).metadata["qwen2vl.embedding_length"]
    metadata = {"clip.vision.projection_dim": width}
    try:
        write_gguf(projector, tensors, "clip", metadata)
        clip = load([str(text)], "qwen_image")
        assert "cannot be read: get the projector again: v.blk.0.attn_k.weight" in clip.cond_stage_model.graft.summary
        assert torch.isfinite(encoded(clip)["cond"]).all()
        with pytest.raises(Exception, match=r"get the projector again: .* is missing"):
            load([str(text), str(projector)], "qwen_image")
    finally:
        projector.unlink()
        text.unlink()


@pytest.mark.skipif(not hasattr(comfy.sd.TEModel, "QWEN3_4B"), reason="this ComfyUI does not have it")
def test_qwen3(folder, load, saved_again, monkeypatch):
    """Z-Image reads with the last layer but one, which the host knows by a width that a small one does not have."""
    with small(num_hidden_layers=3):
        file = write(folder / "qwen3.gguf", MODEL_ARCH.QWEN3, llama_shapes("Qwen3_4B"), "Q5_K", heads("qwen3"))
        monkeypatch.setattr(comfy.sd, "detect_te_model", lambda state: comfy.sd.TEModel.QWEN3_4B)
        want, got = dense_clip([file.dense], "stable_diffusion"), load([str(file.path)])
        again = saved_again(got)
    assert furthest(encoded(got), encoded(want)) < 1e-5 and lora_error((got, want)) < 1e-4
    assert furthest(encoded(again), encoded(got)) == 0


NEWER = hasattr(comfy.sd.TEModel, "QWEN3VL_4B")
newer = pytest.mark.skipif(not NEWER, reason="this ComfyUI does not have it")
QWEN3VL = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 3, "vocab_size": 151936}


@pytest.fixture(scope="module")
def sizes():
    with pytest.MonkeyPatch.context() as patch:
        if NEWER:
            small_newer(patch)
        yield


@pytest.fixture(scope="module")
def qwen3vl(folder, sizes):
    """Qwen3-VL and its projector, in files."""
    with small(**QWEN3VL):
        shapes = shapes_of(partial(comfy.text_encoders.qwen3vl._make_qwen3vl_model("qwen3vl_4b"), {}))
    seeing = {name: shape for name, shape in shapes.items() if name.startswith("visual.")}
    reading = {name: shape for name, shape in shapes.items() if name not in seeing}
    below = folder / "qwen3vl"
    below.mkdir()
    text = write(below / "Qwen3-VL-4B-Q4_K_M.gguf", MODEL_ARCH.QWEN3VL, reading, "Q5_0", heads("qwen3vl", **QWEN3VL))
    vision = write(
        below / "mmproj-F16.gguf", MODEL_ARCH.MMPROJ, seeing, "Q8_0",
        lambda writer: writer.add_uint32("clip.vision.projection_dim", QWEN3VL["hidden_size"]),
    )  # fmt: skip
    return text, vision


@newer
def test_qwen3_vl(qwen3vl, load, tmp_path, saved_again):
    """With its projector, which is beside it, and without one, where hosts would take the text model for Qwen3's."""
    text, vision = qwen3vl
    (tmp_path / "alone.gguf").symlink_to(text.path)
    with small(**QWEN3VL):
        seeing = {f"model.{name}": weight for name, weight in vision.dense.items()}
        want = dense_clip([text.dense | seeing], "krea2")
        got, alone = load([str(text.path)], "krea2"), load([str(tmp_path / "alone.gguf")], "krea2")
        again = saved_again(got, "krea2", (str(vision.path),))
    assert furthest(encoded(again), encoded(got)) == 0 and lora_error((got, want)) < 1e-4
    assert furthest(encoded(got), encoded(want)) < 1e-5 and torch.equal(encoded(alone)["cond"], encoded(got)["cond"])
    assert encoded(got)["cond"].shape[-1] == 2 * QWEN3VL["hidden_size"]
    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    assert furthest(encoded(got, images=[picture]), encoded(want, images=[picture])) < 1e-5
    with pytest.raises(Exception, match=r"put the vision projector \(mmproj\) of this text encoder into its folder"):
        encoded(alone, images=[picture])


@newer
def test_a_type_that_does_not_fit_is_refused(qwen3vl, load):
    """Boogu reads with the Qwen3-VL of 8B."""
    message = r"the type boogu does not fit this text encoder, which ComfyUI reads as that of qwen3vl: choose the text"
    with small(**QWEN3VL), pytest.raises(Exception, match=message):
        load([str(qwen3vl[0].path)], "boogu")


@newer
def test_qwen3_5_reads_and_sees(folder, sizes, load, monkeypatch, saved_again):
    """Its value heads lie in another order in GGUF: rows of most weights, columns of one."""
    from comfy.text_encoders import qwen35

    # a tokenizer that every checkout has
    (folder / "qwen35_tokenizer").symlink_to(Path(qwen35.__file__).parent / "qwen25_tokenizer")
    monkeypatch.setattr(qwen35, "__file__", str(folder / "qwen35.py"))
    shapes = shapes_of(partial(qwen35.Qwen35, {}))
    seeing = {name: shape for name, shape in shapes.items() if name.startswith("visual.")}
    reading = {name: shape for name, shape in shapes.items() if name not in seeing}

    def linear_attention(writer: gguf.GGUFWriter) -> None:
        heads("qwen35")(writer)
        for name, count in (("group_count", 2), ("time_step_rank", 4), ("inner_size", 256)):
            writer.add_uint32(f"qwen35.ssm.{name}", count)

    below = folder / "qwen35"
    below.mkdir()
    text = write(below / "qwen35.gguf", MODEL_ARCH.QWEN35, reading, "Q5_0", linear_attention)
    vision = write(
        below / "mmproj.gguf", MODEL_ARCH.MMPROJ, seeing, "Q8_0",
        lambda writer: writer.add_uint32("clip.vision.projection_dim", 256),
    )  # fmt: skip
    both = {f"model.{name}": weight for name, weight in vision.dense.items()}
    both |= {name.replace("model.", "model.language_model.", 1): weight for name, weight in text.dense.items()}
    want = dense_clip([both], "stable_diffusion")
    got = load([str(text.path)])
    packed = [layer for path, layer in got.cond_stage_model.graft.layers.items() if path.endswith("out_proj")]
    assert len(packed) == 3 and all(layer.fmt.name == "Q5_0" for layer in packed)
    assert furthest(encoded(got), encoded(want)) < 1e-5
    picture = {"type": "image", "data": torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))}
    again = saved_again(got)
    assert furthest(encoded(again), encoded(got)) < 1e-6 and lora_error((got, want)) < 1e-4
    clips = (got, want, again)
    seen = [clip.cond_stage_model.qwen35_2b.transformer.preprocess_embed(picture, "cpu")[0] for clip in clips]
    assert distance(*seen[:2]) < 1e-5 and distance(seen[2], seen[0]) < 1e-6


@pytest.mark.parametrize(
    ("name", "cls", "arch", "kind", "sizes"),
    [
        ("MINISTRAL_3_3B", "Ministral3_3B", MODEL_ARCH.MISTRAL3, "stable_diffusion", {}),
        # Flux.2 reads with three of its layers, the last of which is the 31st
        (
            "MISTRAL3_24B", "Mistral3Small24B", MODEL_ARCH.LLAMA, "flux2",
            {"num_hidden_layers": 31, "intermediate_size": 128},
        ),
    ],
)  # fmt: skip
def test_mistral_3(name, cls, arch, kind, sizes, pack, folder, load, saved_again, monkeypatch, tmp_path):
    """Queries and keys are in another order in GGUF, and the tokenizer comes with it."""
    if not hasattr(comfy.sd.TEModel, name):
        pytest.skip("this ComfyUI does not have it")
    read_tokenizer_by_file(monkeypatch, tmp_path / "tekken.json")
    original = samples.train_tekken(samples.DEFAULT_PATTERN)
    rows = original.get_vocab_size()

    def metadata(writer: gguf.GGUFWriter) -> None:
        heads(gguf.MODEL_ARCH_NAMES[arch])(writer)
        samples.add_tekken(writer, original)

    large = partial(getattr(comfy.text_encoders.llama, cls), {})
    with small(vocab_size=rows, **sizes), known_as_large(large) as taken_for:
        shapes = llama_shapes(cls)
        file = write(folder / f"{name}.gguf", arch, shapes, "Q8_0", metadata)
        rebuilt = pack("ops.files.tokenizers").tekken_model(pack("ops.files.gguf").open_gguf(file.path))
        tokenizer = {"tekken_model": samples.stored(rebuilt)}
        want = dense_clip([file.dense | tokenizer], kind)
        got = load([str(file.path)], kind)
        again = saved_again(got, kind)
    assert set(taken_for) == {comfy.sd.TEModel[name]}
    assert furthest(encoded(got), encoded(want)) < 1e-5 and lora_error((got, want)) < 1e-4
    assert furthest(encoded(again), encoded(got)) == 0 and again.tokenize(WORDS) == got.tokenize(WORDS)


@newer
def test_gemma_4(folder, load, saved_again):
    from comfy.text_encoders import gemma4

    original = samples.train_gemma4()
    rows = original.get_vocab_size()

    def metadata(writer: gguf.GGUFWriter) -> None:
        heads("gemma4")(writer)
        samples.add_bpe(writer, original, "gemma4")

    with pytest.MonkeyPatch.context() as patch:
        small_newer(patch, rows)
        shapes = shapes_of(partial(gemma4.Gemma4_E4B, {}))
        reading = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
        file = write(folder / "gemma4.gguf", MODEL_ARCH.GEMMA4, reading, "Q8_0", metadata)
        tokenizer = {"tokenizer_json": samples.stored(original.to_str().encode())}
        want = dense_clip([file.dense | tokenizer], "stable_diffusion")
        got = load([str(file.path)])
        again = saved_again(got)
    # which hosts only write text with
    clips = (got, want, again)
    written = [clip.generate(clip.tokenize("the fox"), do_sample=False, max_length=3) for clip in clips]
    assert written[0] == written[1] == written[2] and len(written[0]) == 3
    tokens = torch.tensor([original.encode(samples.TEXTS[1]).ids])
    models = [clip.cond_stage_model.gemma4.transformer for clip in (got, want)]

    def hidden(clip: Any) -> torch.Tensor:
        grafted = getattr(clip.patcher, "grafted", lambda device: contextlib.nullcontext())
        with grafted(clip.patcher.load_device):
            return clip.cond_stage_model.gemma4.transformer.model(tokens, input_ids=tokens)[0]

    with torch.no_grad():
        assert distance(hidden(got), hidden(want)) < 1e-5
    assert lora_error((got, want), hidden) < 1e-4
    with pytest.raises(Exception, match="to read pictures, take this text encoder as safetensors"):
        models[0].preprocess_embed({"type": "image", "data": torch.rand(1, 96, 96, 3)}, "cpu")


@newer
@pytest.mark.parametrize("kind", ["MXFP4", "F16"])
def test_gpt_oss(kind, pack, folder, sizes, load, saved_again):
    """Its experts, of which gate and up are two tensors in GGUF, stay packed."""
    original = samples.train_harmony()
    rows = original.get_vocab_size()

    def metadata(writer: gguf.GGUFWriter) -> None:
        heads("gpt-oss")(writer)
        samples.add_bpe(writer, original, "gpt2", "gpt-4o")

    from comfy.text_encoders import gpt_oss

    build = partial(gpt_oss.GptOssModel, gpt_oss.GptOss20BConfig())
    model = build(dtype=torch.float32, device="meta", ops=pack("nodes.ops").GraftOps)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes |= {
        f"{n}.weight": tuple(layer.logical_shape) for n, layer in pack("ops.layers").packed_layers(model).items()
    }
    shapes = with_vocabulary({f"model.{name}": s for name, s in shapes.items()}, "model.embed_tokens.weight", rows)
    file = write(folder / f"gpt-oss-{kind}.gguf", MODEL_ARCH.GPT_OSS, shapes, kind, metadata)
    dense = {name.removeprefix("model."): weight for name, weight in file.dense.items()}
    tokenizer = {"tokenizer_json": samples.stored(original.to_str().encode())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_oss, "GptOss20BConfig", partial(gpt_oss.GptOss20BConfig, vocab_size=rows))
        want = dense_clip([dense | tokenizer], "lens")
    got = load([str(file.path)], "lens")
    layers = got.cond_stage_model.graft.layers
    assert {layers[path].fmt.name for path in layers if ".experts." in path} == {kind}
    assert furthest(encoded(got), encoded(want)) < 1e-5
    assert encoded(got)["cond"].shape[1] > 8
    assert furthest(encoded(saved_again(got, "lens")), encoded(got)) == 0 and lora_error((got, want)) < 1e-4


@pytest.mark.skipif(NEWER, reason="this ComfyUI has Qwen3-VL")
def test_a_host_without_qwen3_vl_takes_it_for_no_other(load, tmp_path):
    file = write(tmp_path / "a.gguf", MODEL_ARCH.QWEN3VL, {"model.layers.0.input_layernorm.weight": (256,)})
    with pytest.raises(Exception, match=r"this ComfyUI does not know Qwen3-VL: update ComfyUI \(a.gguf\)"):
        load([str(file.path)], "stable_diffusion")


def test_gemma_3_sees_from_safetensors_only(pack):
    model, ops = torch.nn.Module(), pack("nodes.ops").TextEncoderOps
    model.vision = torch.nn.Module()
    model.vision.vision_model = torch.nn.Sequential(ops.Linear(8, 8))
    pack("nodes.text_encoder")._complete(model, [])
    with pytest.raises(Exception, match="to read pictures, take this text encoder as safetensors"):
        model.vision.vision_model(torch.zeros(1, 8))


def test_a_projector_that_no_encoder_sees_with(qwen, flux, load, folder):
    clip = load([str(folder / "clip_l.safetensors"), str(folder / "t5xxl.gguf"), str(qwen[1].path)], "flux")
    line = "Qwen2.5-VL-mmproj-F16.gguf: not used, none of these text encoders sees with it"
    assert line in clip.cond_stage_model.graft.summary.splitlines()


def test_wan_reads_with_the_tokenizer_in_the_file(folder, load, saved_again):
    original = samples.train_umt5(byte_fallback=True)
    rows = samples.processor(original).vocab_size() + 28
    shapes = with_vocabulary(t5_shapes("umt5_config_xxl.json"), "shared.weight", rows)
    tokenizer = partial(samples.add_t5, model=original, vocab_size=rows)
    umt5 = write(folder / "umt5.gguf", MODEL_ARCH.T5ENCODER, shapes, "Q6_K", tokenizer)
    with small(vocab_size=rows):
        want = dense_clip([umt5.dense | {"spiece_model": samples.stored(original)}], "wan")
    got = load([str(umt5.path)], "wan")
    for clip in (got, want):
        assert isinstance(clip.cond_stage_model, comfy.text_encoders.wan.WanT5Model)
        assert isinstance(clip.tokenizer, comfy.text_encoders.wan.WanT5Tokenizer)
    assert furthest(encoded(got, samples.TEXTS[3]), encoded(want, samples.TEXTS[3])) < 1e-5
    assert torch.equal(got.get_sd()["spiece_model"], got.tokenizer.state_dict()["spiece_model"])
    again = saved_again(got, "wan")
    for sample in samples.TEXTS[:20]:
        assert again.tokenize(sample) == got.tokenize(sample), sample
    assert furthest(encoded(again, samples.TEXTS[3]), encoded(got, samples.TEXTS[3])) == 0
    assert lora_error((got, want)) < 1e-4
    for kind in ("mochi", "stable_diffusion"):
        with pytest.raises(
            Exception, match=r"this text encoder is a UMT5, which ComfyUI reads only for Wan: choose wan"
        ):
            load([str(umt5.path)], kind)


def test_a_t5_that_is_no_umt5(flux, load, folder):
    with pytest.raises(
        Exception, match=r"Wan reads with a UMT5, and this text encoder is another T5: choose a umt5_xxl"
    ):
        load([str(folder / "t5xxl.gguf")], "wan")


@pytest.fixture(scope="module")
def gemma(folder, load):
    original = samples.train_gemma()
    rows = samples.processor(original).vocab_size()
    shapes = with_vocabulary(llama_shapes("Gemma2_2B"), "model.embed_tokens.weight", rows)

    def metadata(writer: gguf.GGUFWriter) -> None:
        heads("gemma2")(writer)
        samples.add_gemma(writer, original, rows)

    file = write(folder / "gemma.gguf", MODEL_ARCH.GEMMA2, shapes, "Q8_0", metadata)
    with small(vocab_size=rows):
        want = dense_clip([file.dense | {"spiece_model": samples.stored(original)}], "lumina2")
    return load([str(file.path)], "lumina2"), want


@pytest.mark.skipif(not hasattr(comfy.sd.TEModel, "GEMMA_3_12B"), reason="this ComfyUI does not have LTX-2")
def test_ltx_2_reads_through_a_text_projection(folder, load, monkeypatch, saved_again):
    """In a file of its own, which stays packed, and is saved as such."""
    from comfy.text_encoders import lt

    if not hasattr(lt, "DualLinearProjection"):
        pytest.skip("this ComfyUI does not have the projection of LTX-2.3")
    original = samples.train_gemma()
    rows, width, layers = samples.processor(original).vocab_size(), 64, 48
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 128, "vocab_size": rows}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    dual, eyes = lt.DualLinearProjection, comfy.clip_model.CLIPVision
    few = {"num_hidden_layers": 1, "intermediate_size": 64}
    monkeypatch.setattr(comfy.clip_model, "CLIPVision", lambda config, *more: eyes(config | few, *more))
    monkeypatch.setattr(lt, "DualLinearProjection", lambda *_, **more: dual((layers + 1) * width, 64, 32, **more))

    def metadata(writer: gguf.GGUFWriter) -> None:
        heads("gemma3", **sizes)(writer)
        samples.add_gemma(writer, original, rows)

    g = torch.Generator().manual_seed(9)
    projection, stored = {}, {}
    for name, size in (("audio_aggregate_embed", 32), ("video_aggregate_embed", 64)):
        for kind, part, shape in (("Q8_0", "weight", (size, (layers + 1) * width)), ("F32", "bias", (size,))):
            weight, key = torch.randn(shape, generator=g) / 32, f"text_embedding_projection.{name}.{part}"
            data = encode(weight.numpy(), gguf.GGMLQuantizationType[kind])
            projection[key] = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(shape))
            stored[key] = weight.numpy(), kind
    write_gguf(folder / "ltx-projection.gguf", stored, "ltxv")
    with small(**sizes):
        shapes = llama_shapes("Gemma3_12B")
        reading = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
        file = write(folder / "gemma3-12b.gguf", MODEL_ARCH.GEMMA3, reading, "Q8_0", metadata)
        want = dense_clip([file.dense | {"spiece_model": samples.stored(original)}, projection], "ltxv")
        # which hosts want second
        got = load([str(folder / "ltx-projection.gguf"), str(file.path)], "ltxv")
        again = saved_again(got, "ltxv")
    for clip in (got, want, again):
        clip.tokenizer.gemma3_12b.min_length = 16
    assert furthest(encoded(again), encoded(got)) < 1e-6
    assert furthest(encoded(got), encoded(want)) < 1e-5
    layers = got.cond_stage_model.graft.layers
    assert [layers[path].fmt.name for path in layers if "projection" in path] == ["Q8_0", "Q8_0"]
    assert "ltx-projection.gguf: ltxv" in got.cond_stage_model.graft.summary
    assert lora_error((got, want)) < 1e-4


def test_lumina_reads_with_the_tokenizer_in_the_file(gemma, saved_again):
    assert furthest(*(encoded(clip, samples.TEXTS[1]) for clip in gemma)) < 1e-5 and lora_error(gemma) < 1e-4
    again = saved_again(gemma[0], "lumina2")
    assert furthest(encoded(again, samples.TEXTS[1]), encoded(gemma[0], samples.TEXTS[1])) < 1e-6


@pytest.mark.skipif(not hasattr(comfy.text_encoders.llama, "BaseGenerate"), reason="this ComfyUI writes no text")
def test_it_writes_text(gemma):
    got, want = (clip.generate(clip.tokenize("the fox"), do_sample=False, max_length=8) for clip in gemma)
    assert got == want and len(got) == 8


@pytest.mark.skipif(not hasattr(comfy.text_encoders.llama, "BaseGenerate"), reason="this ComfyUI writes no text")
@pytest.mark.parametrize("kind", ["lora", "diff"])
def test_patches_of_the_vocabulary_change_what_it_writes(kind, gemma):
    """Its rows give the scores of the next token, too."""
    key = "gemma2_2b.transformer.model.embed_tokens.weight"
    rows, width = gemma[0].cond_stage_model.graft.layers[key.removesuffix(".weight")].logical_shape
    g = torch.Generator().manual_seed(3)
    up, down = torch.randn(rows, 4, generator=g) / 4, torch.randn(4, width, generator=g) / width**0.5
    lora = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 4.0, None, None, None))
    written = []
    for clip in (gemma[1], *gemma):
        branch = clip.clone()
        if written:
            assert branch.add_patches({key: lora if kind == "lora" else ("diff", (up @ down,))})
        written.append(branch.generate(branch.tokenize("the fox"), do_sample=False, max_length=8))
    base, got, want = written
    assert got == want != base


def test_fp8_files_beside_a_gguf(flux, load, folder, tmp_path):
    """Weights in fp8 with scales, as ComfyUI's own files have them, count as scale · weight."""
    scaled, plain = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for name, weight in clip_l_weights().items():
        if ".mlp.fc1.weight" in name:
            scale = weight.abs().max() / 448
            scaled[name] = (weight / scale).to(torch.float8_e4m3fn)
            scaled[name.replace("weight", "scale_weight")] = scale
            scaled[name.replace("weight", "scale_input")] = torch.ones(())
            weight = (scaled[name].float() * scale).to(torch.bfloat16)
        elif ".q_proj.weight" in name:
            scale = weight.abs().amax(1) / 448
            scaled[name] = (weight / scale[:, None]).to(torch.float8_e4m3fn)
            scaled[name.replace("weight", "weight_scale")] = scale
            weight = (scaled[name].float() * scale[:, None]).to(torch.bfloat16)
        elif ".mlp.fc2.weight" in name:
            scaled[name] = weight.to(torch.float8_e5m2)
            weight = scaled[name].float()
        else:
            scaled[name] = weight
        plain[name] = weight
    clips = []
    for name, state in (("scaled", scaled), ("plain", plain)):
        save_file(state, tmp_path / f"{name}.safetensors")
        clips.append(load([str(tmp_path / f"{name}.safetensors"), str(folder / "t5xxl.gguf")], "flux"))
    assert furthest(*(encoded(clip) for clip in clips)) == 0


FORMATS = {
    "comfy_quant": ((torch.uint8, (8, 32)), (torch.uint8, (4,))),
    "weight_scale": ((torch.uint8, (8, 32)), (torch.float8_e4m3fn, (8, 4))),  # nvfp4
    "scale_weight": ((torch.float8_e4m3fn, (8, 64)), (torch.uint8, (8, 2))),  # mxfp8
}


@pytest.mark.parametrize("mark", FORMATS)
def test_a_format_that_cannot_stand_beside_ours(mark, load, tmp_path):
    """Marked as such, or known by its scales, where a file says in its header alone what its formats are."""
    (kind, shape), (kind_of_scale, shape_of_scale) = FORMATS[mark]
    state = {"fc1.weight": torch.zeros(shape).to(kind), f"fc1.{mark}": torch.zeros(shape_of_scale).to(kind_of_scale)}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(Exception, match=r"fc1 is in a format .*choose the text encoder in fp16, fp8 or as GGUF"):
        load([str(tmp_path / "other.safetensors")], "flux")


@pytest.mark.parametrize(("file", "wanted"), [("clip_l.safetensors", "t5xxl"), ("t5xxl.gguf", "clip_l")])
def test_files_that_do_not_make_up_the_type(file, wanted, flux, load, folder):
    message = f"none of these files is the {wanted} that ComfyUI wants: choose other files, or another type than flux"
    with pytest.raises(Exception, match=message):
        load([str(folder / file)] * 2, "flux")


def test_the_node(flux, classes):
    """What the interface shows and what runs; names that a link brings are not known before."""
    node = classes["GraftCLIPLoader"]
    inputs = node.INPUT_TYPES()
    assert list(inputs["required"]) == ["clip_name1", "type"]
    assert list(inputs["optional"]) == ["clip_name2", "clip_name3", "clip_name4", "device", "backend"]
    assert all(options[0].get("tooltip") for group in inputs.values() for _, *options in group.values())
    files, kinds = inputs["required"]["clip_name1"][0], inputs["required"]["type"][0]
    assert files.index("t5xxl.gguf") < files.index("clip_l.safetensors") and {"flux", "wan", "sdxl"} <= set(kinds)
    shown = node().load("clip_l.safetensors", "flux", clip_name2="t5xxl.gguf", device="cpu")
    assert furthest(encoded(shown["result"][0]), encoded(flux[0])) == 0
    first, second, backend = shown["ui"]["text"][0].splitlines()
    assert first == "clip_l.safetensors" and second.startswith("t5xxl.gguf: t5encoder · ") and backend == "cpu"
    assert node.VALIDATE_INPUTS("t5xxl.gguf") is True and node.VALIDATE_INPUTS(None) is True
    with pytest.raises(Exception, match=r"gone.gguf is not there: put it into the text_encoders folder"):
        node().load("gone.gguf", "flux")
    assert node.IS_CHANGED(clip_name1="t5xxl.gguf") != node.IS_CHANGED(clip_name1="clip_l.safetensors")


FILES = ("clip_name1", "clip_name2")
WRONG = [
    *((name, "gone is not there: put it into the text_encoders folder, or choose another file") for name in FILES),
    *((name, f"{name}: 'gone' not in ") for name in ("type", "device", "backend")),
]


@pytest.mark.parametrize(("name", "message"), WRONG)
def test_each_wrong_input_is_reported_once(name, message, flux, classes):
    inputs = {"clip_name1": "t5xxl.gguf", "clip_name2": "clip_l.safetensors", "type": "flux"} | {name: "gone"}
    prompt = {"1": {"class_type": "GraftCLIPLoader", "inputs": inputs}}
    prompt["2"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 0], "text": ""}}
    validated: dict = {}
    asyncio.run(execution.validate_inputs("test", prompt, "2", validated))
    valid, errors, _ = validated["1"]
    assert not valid and len(errors) == 1 and errors[0]["details"].startswith(message)


def test_an_unknown_type_is_refused(flux, load, folder):
    with pytest.raises(Exception, match=r"has no type flux9 of text encoders: choose one of stable_diffusion, .*sdxl"):
        load([str(folder / "t5xxl.gguf")], "flux9")


def test_clones_share_the_weights(flux, lora):
    graft = flux[0]
    branch = comfy.sd.load_lora_for_models(None, graft, lora, 0, 0.7)[1]
    assert type(branch) is type(graft) and branch.cond_stage_model is graft.cond_stage_model
    assert branch.patcher.patches_uuid == graft.patcher.patches_uuid, "a LoRA has the host load the model again"


def test_a_clone_on_another_copy_of_the_model(flux, clip_l, monkeypatch):
    """As hosts with dynamic VRAM make one for scheduled LoRAs."""
    clone = clip_l[0].patcher.clone
    monkeypatch.setattr(flux[0].patcher, "clone", lambda *args, **kwargs: clone())
    assert flux[0].clone().cond_stage_model is clip_l[0].cond_stage_model


@pytest.mark.skipif(DYNAMIC_VRAM, reason="what plays a GPU is one device")
def test_it_encodes_on_the_device_that_is_selected(flux, lora):
    """Select CLIP Device puts the patcher on a model of its own there."""
    multigpu = pytest.importorskip("comfy_extras.nodes_multigpu", reason="this ComfyUI has one device")
    branch = comfy.sd.load_lora_for_models(None, flux[0], lora, 0, 0.7)[1]
    base, want = encoded(flux[0])["cond"], encoded(branch)["cond"]
    moved = branch.clone()
    moved.patcher = multigpu._retarget_patcher(moved.patcher, torch.device("cpu:1"), torch.device("cpu"))
    assert moved.cond_stage_model is moved.patcher.model is not branch.cond_stage_model
    assert torch.equal(encoded(moved)["cond"], want) and torch.equal(encoded(moved.clone())["cond"], want)
    assert torch.equal(encoded(flux[0])["cond"], base) and not torch.equal(base, want)


def test_a_whole_text_encoder_shows_its_weights(flux):
    for clip in flux:
        encoded(clip)  # the host's own has still the LoRA of another test in its weights
    ours, theirs = (comfy.hooks.get_patch_weights_from_model(clip.patcher) for clip in flux)
    assert ours.keys() == theirs.keys()
    # which this file lacks, and hosts leave to chance
    brought = [key for key in ours if not key.endswith("text_projection.weight") and theirs[key].any()]
    assert len(brought) > 20
    assert all(distance(ours[key].to(torch.float32), theirs[key]) < 1e-6 for key in brought)


def test_nothing_stays_of_one_that_nobody_needs(flux, load, folder, lora):
    def loaded() -> list[weakref.ref]:
        clip = load([str(folder / "clip_l.safetensors"), str(folder / "t5xxl.gguf")], "flux")
        branch = comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.7)[1]
        encoded(branch)
        model = clip.cond_stage_model
        return [weakref.ref(it) for it in (clip.patcher, branch.patcher, model, type(model), model.t5xxl.transformer)]

    left = loaded()
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)


OLD = {
    "CLIPLoaderGGUF": ({"clip_name": "a", "type": "wan"}, {"clip_name1": "a", "type": "wan"}),
    "DualCLIPLoaderGGUF": (
        {"clip_name1": "a", "clip_name2": "b", "type": "flux"}, {"clip_name1": "a", "clip_name2": "b", "type": "flux"},
    ),
    "TripleCLIPLoaderGGUF": (
        {"clip_name1": "a", "clip_name2": "b", "clip_name3": "c"},
        {"clip_name1": "a", "clip_name2": "b", "clip_name3": "c", "type": "sd3"},
    ),
    "QuadrupleCLIPLoaderGGUF": (
        {f"clip_name{i}": "abcd"[i - 1] for i in range(1, 5)},
        {f"clip_name{i}": "abcd"[i - 1] for i in range(1, 5)} | {"type": "hidream"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("old", OLD)
def test_it_takes_the_place_of_comfyui_ggufs_loaders(old, pack, classes, monkeypatch):
    manage = pytest.importorskip("app.node_replace_manager", reason="this ComfyUI does not replace nodes")
    manager = manage.NodeReplaceManager()
    server = types.SimpleNamespace(PromptServer=types.SimpleNamespace())
    server.PromptServer.instance = types.SimpleNamespace(node_replace_manager=manager)
    monkeypatch.setitem(sys.modules, "server", server)
    pack("nodes.replacements").offer_replacements()
    inputs, want = OLD[old]
    prompt = {"1": {"class_type": old, "inputs": dict(inputs), "_meta": {"title": ""}}}
    manager.apply_replacements(prompt)
    assert prompt["1"]["class_type"] == "GraftCLIPLoader" and prompt["1"]["inputs"] == want
    assert classes["GraftCLIPLoader"].INPUT_TYPES()["required"]["type"][0].count(want["type"]) == 1
