"""LoRA files that we write: names, forms, and that our own reader takes them."""

from __future__ import annotations

import pytest
import torch
from graft.kernels import GraftError
from graft.ops import load_adapters, open_gguf
from graft.ops.extract import Change
from graft.ops.files.lora_writer import Name, diffusers_state, kohya_state, write_lora
from graft.ops.kinds import Region
from safetensors import safe_open

SHAPES = {"blocks.0.attn.qkv": (96, 64), "blocks.0.conv": (32, 8, 3, 3), "blocks.0.norm": (64,)}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changes() -> dict[str, Change]:
    return {
        "blocks.0.attn.qkv.weight": Change(torch.Size((96, 64)), noise(96, 5), noise(5, 64, seed=1)),
        "blocks.0.attn.qkv.bias": Change(torch.Size((96,)), full=noise(96, seed=2)),
        "blocks.0.conv.weight": Change(torch.Size((32, 8, 3, 3)), noise(32, 4, seed=3), noise(4, 72, seed=4)),
        "blocks.0.norm.weight": Change(torch.Size((64,)), full=noise(64, seed=5)),
        "blocks.0.modulation": Change(torch.Size((1, 6, 64)), full=noise(1, 6, 64, seed=6)),
    }


def test_kohyas_names():
    state = kohya_state(changes())
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "lora_unet_blocks_0_attn_qkv.lora_down.weight": (5, 64),
        "lora_unet_blocks_0_attn_qkv.lora_up.weight": (96, 5),
        "lora_unet_blocks_0_attn_qkv.alpha": (),
        "lora_unet_blocks_0_attn_qkv.diff_b": (96,),
        "lora_unet_blocks_0_conv.lora_down.weight": (4, 8, 3, 3),
        "lora_unet_blocks_0_conv.lora_up.weight": (32, 4, 1, 1),
        "lora_unet_blocks_0_conv.alpha": (),
        "lora_unet_blocks_0_norm.diff": (64,),
        "diffusion_model.blocks.0.modulation.diff": (1, 6, 64),
    }
    assert state["lora_unet_blocks_0_attn_qkv.alpha"] == 5


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def test_diffusers_names_of_the_parts_of_a_layer():
    parts = [Name(f"transformer.to_{part}", Region(0, 32 * i, 32)) for i, part in enumerate("qkv")]
    names = {"blocks.0.attn.qkv.weight": parts, "blocks.0.conv.weight": [Name("transformer.conv", None, swapped)]}
    state = diffusers_state(changes(), names)
    change = changes()["blocks.0.attn.qkv.weight"]
    for i, part in enumerate("qkv"):
        assert torch.equal(state[f"transformer.to_{part}.lora_A.weight"], change.down)
        assert torch.equal(state[f"transformer.to_{part}.lora_B.weight"], change.up[32 * i : 32 * i + 32])
    up = changes()["blocks.0.conv.weight"].up[..., None, None]
    assert torch.equal(state["transformer.conv.lora_B.weight"], swapped(up))
    assert "diffusion_model.blocks.0.attn.qkv.diff_b" in state and not any("alpha" in name for name in state)


@pytest.mark.parametrize("form, tolerance", [("fp32", 0.0), ("fp16", 2**-10), ("bf16", 2**-7)])
@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_what_is_written_is_read(tmp_path, form, tolerance, names):
    state = kohya_state(changes()) if names == "kohya" else diffusers_state(changes(), {})
    path = tmp_path / "loras" / "a.safetensors"
    size = write_lora(path, state, form, {"graft.made_from": "neon ×0.60"})
    assert size == path.stat().st_size and list(path.parent.iterdir()) == [path]
    with safe_open(path, "pt") as file:
        assert file.metadata()["graft.made_from"] == "neon ×0.60"
    fitted = load_adapters(path).on(SHAPES)
    assert not fitted.rejected
    found = {placed.key: placed.adapter for placed in fitted.placed}
    for key, change in changes().items():
        if key == "blocks.0.modulation":
            continue
        delta = found[key].delta(torch.zeros(change.shape, dtype=torch.float64))
        wanted = change.matrix().double().reshape(change.shape)
        error = float((delta - wanted).norm() / wanted.norm())
        assert error <= max(2 * tolerance, 1e-6), key


def test_gguf(tmp_path):
    """Q8_0 where rows fill blocks of 32, F16 where they do not: a rank of 5, a kernel of 3."""
    path = tmp_path / "a.gguf"
    write_lora(path, kohya_state(changes()), "Q8_0 (GGUF)", {"ss_network_dim": "5"})
    file = open_gguf(path)
    assert file.metadata["general.type"] == "adapter" and file.metadata["ss_network_dim"] == "5"
    formats = {name.removeprefix("lora_unet_blocks_0_"): tensor.fmt.name for name, tensor in file.tensors.items()}
    assert formats["attn_qkv.lora_down.weight"] == "Q8_0" and formats["attn_qkv.lora_up.weight"] == "F16"
    assert formats["attn_qkv.alpha"] == "F32" and formats["norm.diff"] == "F32"
    assert file.tensors["lora_unet_blocks_0_conv.lora_down.weight"].shape == (4, 8, 3, 3)
    fitted = load_adapters(path).on(SHAPES)
    assert not fitted.rejected
    found = {placed.key: placed.adapter for placed in fitted.placed}
    for key in ("blocks.0.attn.qkv.weight", "blocks.0.conv.weight", "blocks.0.norm.weight"):
        change = changes()[key]
        wanted = change.matrix().double().reshape(change.shape)
        delta = found[key].delta(torch.zeros(change.shape, dtype=torch.float64))
        assert float((delta - wanted).norm() / wanted.norm()) < 0.01, key  # Q8_0 is half a percent


def test_what_fp16_cannot_hold(tmp_path):
    huge = {"a.weight": Change(torch.Size((8, 8)), full=torch.full((8, 8), 1e5))}
    with pytest.raises(GraftError, match="more than fp16 can: choose bf16"):
        write_lora(tmp_path / "a.safetensors", kohya_state(huge), "fp16", {})
    assert not list(tmp_path.iterdir())
    write_lora(tmp_path / "a.safetensors", kohya_state(huge), "bf16", {})
    with pytest.raises(GraftError, match="already"):
        write_lora(tmp_path / "a.safetensors", kohya_state(huge), "bf16", {})


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_factors_of_what_is_no_layers_weight_are_written_in_full(names):
    up, down = noise(1, 1), noise(1, 384, seed=1)
    found = {"blocks.0.modulation": Change(torch.Size((1, 6, 64)), up, down)}
    state = kohya_state(found) if names == "kohya" else diffusers_state(found, {})
    assert list(state) == ["diffusion_model.blocks.0.modulation.diff"]
    assert torch.equal(*state.values(), (up @ down).view(1, 6, 64))


@pytest.mark.parametrize("form", ["fp16", "bf16", "Q8_0 (GGUF)"])
def test_alpha_is_the_rank_in_every_form(tmp_path, form):
    """259 is no number of bf16, nor 2049 of fp16."""
    state = {"x.lora_down.weight": noise(4, 32), "x.alpha": torch.tensor(2049.0), "y.alpha": torch.tensor(259.0)}
    path = tmp_path / "a.gguf" if "GGUF" in form else tmp_path / "a.safetensors"
    write_lora(path, state, form, {})
    read = load_adapters(path).state
    assert [float(read[name]) for name in ("x.alpha", "y.alpha")] == [2049, 259]


@pytest.mark.parametrize("form", ["fp32", "Q8_0 (GGUF)"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, form):
    with pytest.raises(GraftError, match=r"x\.diff holds numbers that are not finite"):
        write_lora(tmp_path / "a", {"x.diff": torch.tensor([[1.0, float("nan")]])}, form, {})
    assert not list(tmp_path.iterdir())
