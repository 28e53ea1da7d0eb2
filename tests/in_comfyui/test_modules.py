"""Modules in a file of their own, added to a model when it is loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import comfy.ldm.wan.model
import gguf
import nodes
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, META, write_model
from generation import sample
from gguf_samples import write_gguf
from sweep import known_classes, output_of, sizes_of, write_tiny
from tiny_models import MODELS

VACE = replace(
    ARCHITECTURES["wan"],
    build=partial(
        comfy.ldm.wan.model.VaceWanModel, patch_size=(1, 2, 2), in_dim=16, dim=256, ffn_dim=512, freq_dim=256,
        text_dim=4096, out_dim=16, num_heads=2, num_layers=2, qk_norm=True, cross_attn_norm=True, eps=1e-6,
        vace_layers=1, vace_in_dim=96, **META,
    ),
)  # fmt: skip


def copied(source: Path, path: Path, wanted: bool, part: str = "vace", architecture: str = "wan") -> Path:
    """The tensors of VACE, or all others, in a file of their own."""
    reader, writer = gguf.GGUFReader(str(source)), gguf.GGUFWriter(str(path), architecture)
    names = [t.name for t in reader.tensors if (part in t.name) == wanted]
    for name, field in reader.fields.items():
        if name.startswith("comfy.gguf.orig_shape.") and name.removeprefix("comfy.gguf.orig_shape.") in names:
            writer.add_array(name, [int(n) for n in field.contents()])
    for tensor in reader.tensors:
        if tensor.name in names:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def files(folders):
    folder = folders / "unet_gguf"
    whole = write_model(VACE, "Q8_0", folder / "vace-whole.gguf")
    copied(whole, folder / "wan.gguf", False)
    copied(whole, folder / "vace.gguf", True)
    return folder


def test_vace_in_a_file_of_its_own(files):
    load = nodes.NODE_CLASS_MAPPINGS["GraftUNETLoader"]().load
    shown = load("wan.gguf", "fp32", module_name="vace.gguf")
    model, whole = shown["result"][0], load("vace-whole.gguf", "fp32")["result"][0]
    plain = load("wan.gguf", "fp32")["result"][0]
    assert shown["ui"]["text"][0].splitlines()[0].endswith(" · with vace.gguf") and "Wan" in shown["ui"]["text"][0]
    got, want = (sample(it, VACE) for it in (model, whole))
    assert torch.equal(got, want) and not torch.equal(got, sample(plain, VACE))
    again, arguments = model.cached_patcher_init[:2]
    assert torch.equal(sample(again(*arguments), VACE), want)


@pytest.mark.skipif("LTXAV" not in known_classes(), reason="this ComfyUI does not have LTX-2")
@torch.inference_mode()
def test_text_connectors_in_a_file_of_their_own(pack, tmp_path):
    """LTX-2's, which the host runs on what its text encoder gives, before sampling."""
    words = {"frame_rate": 25, "unprocessed_ltxav_embeds": True}
    tiny = replace(MODELS["LTXAV"], brings=lambda noise: words)
    load = pack("nodes.loader").load_diffusion_model
    with sizes_of(tiny) as module:
        whole = write_tiny(tiny, module, "matrices", tmp_path / "whole.gguf")
        for name, wanted in (("model", False), ("connectors", True)):
            copied(whole, tmp_path / f"{name}.gguf", wanted, "embeddings_connector", "ltxv")
        models = [
            load(str(tmp_path / "whole.gguf"), "fp32"), load(str(tmp_path / "model.gguf"), "fp32"),
            load(str(tmp_path / "model.gguf"), "fp32", module=str(tmp_path / "connectors.gguf")),
        ]  # fmt: skip
    assert "the file has no audio_embeddings_connector" in models[1].graft.summary
    packed = [layer.fmt.name for path, layer in models[2].graft.layers.items() if "embeddings_connector" in path]
    assert len({name for name in packed if name.startswith("Q")}) > 2
    want, got = output_of(models[0], tiny), output_of(models[2], tiny)
    assert torch.equal(got, want) and want.std() > 0
    with pytest.raises(Exception, match=r"embeddings_connector"):
        output_of(models[1], tiny)


def test_modules_that_are_none(files, pack):
    load = nodes.NODE_CLASS_MAPPINGS["GraftUNETLoader"]().load
    with pytest.raises(Exception, match="this is a diffusion model, not a module to add to one: choose a VACE"):
        load("wan.gguf", module_name="vace-whole.gguf")
    with pytest.raises(Exception, match=r"is a VACE module, .*: choose the Wan model, and this file as module"):
        load("vace.gguf")
    write_gguf(
        files / "connectors.gguf", {"video_embeddings_connector.a.weight": (np.ones((8, 8), np.float32), "F16")}, "ltxv"
    )
    with pytest.raises(Exception, match=r"the model has no place for video_embeddings_connector.a: this module is for"):
        load("wan.gguf", module_name="connectors.gguf")
    with pytest.raises(Exception, match=r"gone.gguf is not there"):
        load("wan.gguf", module_name="gone.gguf")
    node = nodes.NODE_CLASS_MAPPINGS["GraftUNETLoader"]
    states = [node.IS_CHANGED("wan.gguf", name) for name in ("None", "vace.gguf", "None")]
    assert states[0] == states[2] != states[1]
