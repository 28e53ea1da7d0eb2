"""Where ComfyUI reads a weight itself: its shape, to know how many channels a model takes, its dtype, its numbers."""

from __future__ import annotations

import ast
import copy
import inspect
import math
from pathlib import Path

import architectures
import comfy.ldm.hunyuan3dv2_1.hunyuandit
import comfy.ldm.wan.model
import pytest
import torch
from architectures import ARCHITECTURES, META, Architecture, write_model
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


def _hunyuan3d() -> torch.nn.Module:
    return comfy.ldm.hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain(
        hidden_size=256, depth=2, guidance_cond_proj_dim=None, **META
    )


HUNYUAN3D = Architecture("hunyuan3d", _hunyuan3d, (1, 64, 16), (20, 1024), None, ("blocks.0", "blocks.1"))


def test_hunyuan3d_casts_to_the_dtype_of_packed_layers(pack, tmp_path, monkeypatch):
    """What goes into three of them, and the whole of the model after it."""

    def packed_rows(name: str, shape: tuple[int, ...], block: int) -> tuple[int, int] | None:
        return shape if len(shape) == 2 and math.prod(shape) >= 1 << 14 else None

    monkeypatch.setattr(architectures, "_packed_rows", packed_rows)
    path = write_model(HUNYUAN3D, "Q8_0", tmp_path / "hunyuan3d.gguf")
    load = pack("nodes.loader").load_diffusion_model
    graft, dense = load(str(path), compute_dtype="fp32"), dense_model(pack, path)
    want = sample(dense, HUNYUAN3D, cfg=2.0)
    assert distance(sample(graft, HUNYUAN3D, cfg=2.0), want) < 1e-5
    layers = load(str(path), compute_dtype="bf16").graft.layers
    assert layers["diffusion_model.t_embedder.mlp.0"].weight.dtype == torch.bfloat16
    assert layers["diffusion_model.t_embedder.mlp.2"].weight.dtype == torch.uint8
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


def _wan_s2v() -> torch.nn.Module:
    return comfy.ldm.wan.model.WanModel_S2V(
        in_dim=16, dim=256, ffn_dim=512, text_dim=4096, num_heads=2, num_layers=2, cond_dim=16, audio_inject_layers=[0],
        **META,
    )  # fmt: skip


WAN_S2V = Architecture("wan", _wan_s2v, (1, 16, 3, 8, 8), (20, 4096), None, ())


def test_wan_s2v_reads_rows_of_a_packed_table(pack, tmp_path, monkeypatch):
    """The table's Embedding is never called."""
    plain = architectures._packed_rows

    def packed_rows(name: str, shape: tuple[int, ...], block: int) -> tuple[int, int] | None:
        return shape if name == "trainable_cond_mask.weight" else plain(name, shape, block)

    monkeypatch.setattr(architectures, "_packed_rows", packed_rows)
    path = write_model(WAN_S2V, "Q8_0", tmp_path / "s2v.gguf")
    graft, dense = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32"), dense_model(pack, path)
    assert distance(sample(graft, WAN_S2V), sample(dense, WAN_S2V)) < 1e-5
    forget()


# What the code of ComfyUI's diffusion models, in 0.3.64 to 0.19.3, reads of a layer other than by calling it.
_PROBED, _FOLLOWED = "decoded: PROBED in nodes/loader.py", "decoded: FOLLOWED in nodes/loader.py"
_INITIALIZED = "a first value on a layer of torch's own, or in a method that is never called"
KNOWN_READS = {
    "model_base.py": {
        "self.diffusion_model.img_in.weight": "Flux: on flat bytes it falls back to the latent's channels",
        "self.diffusion_model.img_in.proj.weight": _PROBED,
        "self.diffusion_model.patch_embedding.weight": _PROBED,
        "self.cc_projection.weight": "Stable Zero123 builds it from the host's own layers",
        "self.cc_projection.bias": "Stable Zero123 builds it from the host's own layers",
    },
    "ldm/anima/model.py": {"self.mlp[2].weight": _INITIALIZED, "self.o_proj.weight": _INITIALIZED},
    "ldm/audio/dit.py": {"self.to_scale_shift_gate[1].weight": _INITIALIZED},
    "ldm/audio/embedders.py": {
        "next(self.embedder.parameters()).dtype": "Stable Audio builds it from the host's own layers",
    },
    "ldm/hunyuan3dv2_1/hunyuandit.py": {
        "self.mlp[0].weight": _FOLLOWED,
        "next(self.to_k.parameters()).dtype": _FOLLOWED,
        "next(self.x_embedder.parameters()).dtype": _FOLLOWED,
    },
    "ldm/lumina/model.py": {"self.cond_embed.weight": _PROBED},
    "ldm/wan/model.py": {"self.trainable_cond_mask.weight": "decoded: a table below SMALL_TABLE in nodes/loader.py"},
}  # fmt: skip
# VAEs, ControlNets and SAM3, which Graft does not load
NO_DIFFUSION_MODELS = (
    "*/vae/*", "*/controlnet.py", "ldm/sam3/*", "ldm/cascade/stage_a.py", "ldm/modules/temporal_ae.py",
    "ldm/modules/diffusionmodules/model.py",
)  # fmt: skip


def weight_reads(source: str) -> set[str]:
    """Where code reads a parameter of another module, e.g. ``self.table.weight`` or ``next(x.parameters()).dtype``.

    ``self.weight`` is a module's own parameter: our layers are made by name and nobody derives from them.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        owner = ast.unparse(node.value)
        parameter = node.attr in ("weight", "bias") and owner != "self"
        if parameter or (node.attr in ("dtype", "shape") and owner.startswith("next(")):
            found.add(ast.unparse(node))
    return found


def unknown_reads(comfy_folder: Path) -> list[str]:
    """Such reads in the code of diffusion models that `KNOWN_READS` gives no reason for."""
    unknown = []
    for path in [comfy_folder / "model_base.py", *sorted((comfy_folder / "ldm").rglob("*.py"))]:
        place = path.relative_to(comfy_folder)
        if not any(place.match(pattern) for pattern in NO_DIFFUSION_MODELS):
            reads = weight_reads(path.read_text(encoding="utf-8"))
            unknown += [f"{place}: {read}" for read in sorted(reads - KNOWN_READS.get(place.as_posix(), {}).keys())]
    return unknown


def test_every_read_of_a_weight_is_known():
    """Of a packed layer the host would read bytes: hold it decoded, or note here why it does no harm."""
    unknown = unknown_reads(Path(inspect.getfile(comfy.ldm.wan.model)).parents[2])
    assert not unknown, "\n".join(unknown)


def test_a_new_read_of_a_weight_is_found(tmp_path):
    model = tmp_path / "ldm" / "new" / "model.py"
    vae = tmp_path / "ldm" / "new" / "vae" / "model.py"
    for path in (model, vae):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "class New(Module):\n"
            "    def forward(self, x):\n"
            "        x = self.norm(x) * self.weight + cast_to(self.blocks[0].table.weight, x)\n"
            "        return x.to(next(self.parameters()).dtype) + [layer.bias for layer in self.blocks]\n"
        )
    (tmp_path / "model_base.py").write_text("channels = self.diffusion_model.img_in.weight.shape[1]\n")
    place = model.relative_to(tmp_path)
    assert unknown_reads(tmp_path) == [
        f"{place}: layer.bias", f"{place}: next(self.parameters()).dtype", f"{place}: self.blocks[0].table.weight",
    ]  # fmt: skip
