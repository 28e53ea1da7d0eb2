"""Where ComfyUI reads a weight itself on whole models: how many channels one takes, its dtype, its numbers."""

from __future__ import annotations

import copy
import inspect

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, write_model
from comfy.model_base import BaseModel
from generation import dense_model, distance, fingerprint, forget, sample, with_lora

FLUX = ARCHITECTURES["flux"]


class WithImage:
    """An architecture whose conditioning brings a control image."""

    latent = FLUX.latent

    def conditioning(self, seed: int) -> list:
        image = torch.randn(FLUX.latent, generator=torch.Generator().manual_seed(100))
        return [[context, {**extra, "concat_latent_image": image}] for context, extra in FLUX.conditioning(seed)]


def control_lora(rank: int = 16) -> dict[str, torch.Tensor]:
    """What Flux Tools' control LoRAs do to `img_in`: twice the channels in, a LoRA on all of them."""
    g = torch.Generator().manual_seed(7)
    return {
        "diffusion_model.img_in.lora_up.weight": torch.randn(3072, rank, generator=g) * 0.1,
        "diffusion_model.img_in.lora_down.weight": torch.randn(rank, 128, generator=g) * 0.1,
        "diffusion_model.img_in.reshape_weight": torch.tensor([3072, 128]),
        "diffusion_model.single_blocks.0.linear2.lora_up.weight": torch.randn(3072, rank, generator=g) * 0.01,
        "diffusion_model.single_blocks.0.linear2.lora_down.weight": torch.randn(rank, 15360, generator=g) * 0.01,
    }


def test_a_control_lora_of_flux_sees_its_image(pack, tmp_path):
    path = write_model(FLUX, "Q8_0", tmp_path / "flux.gguf")
    graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
    dense = dense_model(pack, path)
    before, base = fingerprint(graft), sample(graft, FLUX)
    want, got = (sample(with_lora(model, control_lora()), WithImage()) for model in (dense, graft))
    blind = sample(with_lora(graft, control_lora()), FLUX)
    assert distance(got, want) < 1e-5
    assert distance(blind, want) > 0.01, "the control image has no effect"
    assert torch.equal(sample(graft, FLUX), base) and fingerprint(graft) == before
    config = graft.model.model_config  # which newer hosts cannot copy
    copied = copy.deepcopy(with_lora(graft, control_lora()), {id(config): config})
    assert copied.object_patches["concat_cond"].args[0] is copied.model is not graft.model
    assert torch.equal(sample(copied, WithImage()), got)
    del graft, dense, copied
    forget()


def test_wan_counts_the_channels_of_a_packed_patch_embedding(pack, tmp_path, monkeypatch):
    plain = architectures._packed_rows

    def packed_rows(name: str, shape: tuple[int, ...], block: int) -> tuple[int, int] | None:
        return (64, 256) if name == "patch_embedding.weight" else plain(name, shape, block)

    monkeypatch.setattr(architectures, "_packed_rows", packed_rows)
    wan = ARCHITECTURES["wan"]
    path = write_model(wan, "Q8_0", tmp_path / "wan.gguf")
    graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
    assert "Q8_0" in graft.graft.summary
    assert graft.graft.layers["diffusion_model.patch_embedding"].weight.shape == (256, 16, 1, 2, 2)
    assert distance(sample(graft, wan), sample(dense_model(pack, path), wan)) < 1e-5
    forget()


def test_a_table_that_takes_the_place_of_the_models_own_has_its_dtype(pack, tmp_path, monkeypatch):
    """As the host loads with dynamic VRAM, which it has on no CPU."""
    load = BaseModel.load_model_weights
    if "assign" not in inspect.signature(load).parameters:
        pytest.skip("this ComfyUI copies what it loads")
    plain = architectures._packed_rows

    def packed_rows(name: str, shape: tuple[int, ...], block: int) -> tuple[int, int] | None:
        return (1024, 256) if name == "pos_embed" else plain(name, shape, block)

    monkeypatch.setattr(architectures, "_packed_rows", packed_rows)
    monkeypatch.setattr(
        BaseModel, "load_model_weights", lambda *args, **kwargs: load(*args, **{**kwargs, "assign": True})
    )
    sd3 = ARCHITECTURES["sd3"]
    path = write_model(sd3, "Q8_0", tmp_path / "sd3.gguf")
    load_graft = pack("nodes.loader").load_diffusion_model
    graft, dense = load_graft(str(path), compute_dtype="fp32"), dense_model(pack, path)
    assert type(graft.model.diffusion_model.pos_embed) is torch.Tensor
    assert distance(sample(graft, sd3), sample(dense, sd3)) < 1e-5
    narrow = load_graft(str(path), compute_dtype="bf16").model.diffusion_model
    assert narrow.pos_embed.dtype == torch.bfloat16
    forget()
