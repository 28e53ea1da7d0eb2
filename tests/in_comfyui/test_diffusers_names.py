"""Files with diffusers' names, which ComfyUI turns into its own: joined layers, swapped halves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.model_detection
import comfy.utils
import gguf
import numpy as np
import pytest
import torch
from architectures import NARROW, flux_as_wide_as_its_file, write_model
from generation import forget, sample
from gguf_samples import write_gguf

HIDDEN = 1152  # PixArt's, which its map does not ask for


Part = tuple[str, tuple[int, int, int] | None, Callable | None]
SECOND_NAMES = (".linear_in.", ".linear_out.", "qkv_mlp", "attn.to_out.weight")
"""Of layers that the same map has another name for."""


def names_of(function: str, **sizes: int) -> dict[str, Part]:
    """The host's map: diffusers' name to its own, the part of it and what that passes through."""
    if not hasattr(comfy.utils, function):
        pytest.skip("this ComfyUI has no such conversion")
    names = getattr(comfy.utils, function)({"hidden_size": HIDDEN, **sizes})
    targets = {name: (t, None, None) if isinstance(t, str) else (*t, None)[:3] for name, t in names.items()}
    return {name: target for name, target in targets.items() if not any(second in name for second in SECOND_NAMES)}


MAPS = {
    "flux_to_diffusers": {"depth": 1, "depth_single_blocks": 1},
    "mmdit_to_diffusers": {"depth": HIDDEN // 64, "num_blocks": HIDDEN // 64},
    "pixart_to_diffusers": {"depth": 1},
    "auraflow_to_diffusers": {"n_double_layers": 1, "n_layers": 2},
    "z_image_to_diffusers": {"n_layers": 1, "dim": HIDDEN},
}


@pytest.mark.parametrize("name", MAPS)
def test_a_state_dict_becomes_what_the_host_makes_of_it(pack, tmp_path, name):
    """In every map that it has, on weights a few columns wide."""
    rng = np.random.default_rng(0)
    tensors = {}
    for key, (_, part, _) in names_of(name, **MAPS[name]).items():
        rows = HIDDEN if part is None else part[2]
        if key.endswith(".bias") or ".norm_" in key:
            tensors[key] = (rng.standard_normal(rows, dtype=np.float32), "F32")
        else:
            tensors[key] = (rng.standard_normal((rows, 32), dtype=np.float32), "Q8_0")
    reader, packed = pack("ops.files.gguf"), pack("ops.packed")
    file = reader.open_gguf(write_gguf(tmp_path / "model.gguf", tensors))
    state = {key: packed.as_weight(tensor) for key, tensor in file.tensors.items()}
    decoded = {key: t.to(torch.float32) for key, t in state.items()}
    convert = comfy.model_detection.convert_diffusers_mmdit
    got, want = packed.convert_rows(state, convert), convert(decoded)
    assert got.keys() == want.keys() and len(got) > 10
    for key, weight in want.items():
        assert isinstance(got[key], packed.PackedTensor) == (weight.dim() == 2), key
        assert torch.equal(got[key].to(torch.float32), weight), key


def in_diffusers_names(pack, path: Path, names: dict[str, Part]) -> Path:
    """The bytes of a file under other names, cut into the parts that diffusers has."""
    file = pack("ops.files.gguf").open_gguf(path)
    renamed = path.with_name("diffusers.gguf")
    writer = gguf.GGUFWriter(str(renamed), file.architecture)
    for name, (native, part, function) in names.items():
        tensor = file.tensors.get(native)
        if tensor is None:
            continue
        rows = tensor.data.view(tensor.stored_shape[0], -1)
        rows = rows if part is None else rows.narrow(*part)
        rows = rows if function is None else function(rows)
        if tensor.fmt.is_quantized:
            writer.add_tensor(name, rows.numpy(), raw_dtype=gguf.GGMLQuantizationType(tensor.fmt.ggml_type))
        else:
            writer.add_tensor(name, rows.view(tensor.fmt.dtype).view(-1, *tensor.stored_shape[1:]).numpy())
        if tensor.shape != tensor.stored_shape:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return renamed


SIZES = {
    "flux": ("flux_to_diffusers", {"depth": 1, "depth_single_blocks": 1, "hidden_size": 1024}),
    "sd3": ("mmdit_to_diffusers", {"depth": 4}),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_picture_is_that_of_the_native_names(pack, tmp_path, name):
    architecture, (function, sizes) = NARROW[name], SIZES[name]
    native = write_model(architecture, "Q4_K", tmp_path / "native.gguf")
    paths = native, in_diffusers_names(pack, native, names_of(function, **sizes))
    with flux_as_wide_as_its_file():
        plain, renamed = (pack("nodes.loader").load_diffusion_model(str(p), compute_dtype="fp32") for p in paths)
    for path, layer in plain.graft.layers.items():
        other = renamed.graft.layers[path]
        assert other.fmt == layer.fmt and torch.equal(other.weight, layer.weight), path
    assert torch.equal(sample(renamed, architecture), sample(plain, architecture))
    forget()
