"""ControlNets from GGUF, and those that share layers with the model, which read its weights and must not meet bytes."""

from __future__ import annotations

import comfy.cldm.cldm
import comfy.cldm.dit_embedder
import comfy.controlnet
import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.sd
import folder_paths
import nodes
import pytest
import torch
from architectures import ARCHITECTURES, META
from generation import both_models, distance, fingerprint, sample, with_lora
from loras import make_lora
from small import SD3, drawn, loras, sd3, small_vae, write_part  # noqa: F401  (fixtures)

TOLERANCE = 1e-5  # fp32 sums in another order


@pytest.fixture(scope="module")
def unets(pack, tmp_path_factory):
    """An SD1.5 UNet as a Graft model, and as ComfyUI's own."""
    with both_models(pack, ARCHITECTURES["sd15"], "Q8_0", tmp_path_factory.mktemp("gguf")) as models:
        yield models


def control_lora(model) -> comfy.controlnet.ControlLora:
    """A Control-LoRA for `model`: the layers that only a ControlNet has in full, and a low rank on some that it shares.

    As in Stability's files; all others come from the model.
    """
    g = torch.Generator().manual_seed(5)
    config = dict(model.model.model_config.unet_config, hint_channels=3, dtype=torch.float32, device="meta")
    config.pop("out_channels")
    shapes = comfy.cldm.cldm.ControlNet(**config, operations=comfy.ops.disable_weight_init).state_dict()
    own, weights = ("input_hint_block", "zero_convs", "middle_block_out"), {"lora_controlnet": torch.tensor([])}
    for key, value in shapes.items():
        if key.startswith(own):
            weights[key] = torch.randn(value.shape, generator=g) * (0.3 / max(1, value[0].numel()) ** 0.5)
        elif key.endswith("to_q.weight"):
            name = key.removesuffix(".weight")
            weights[f"{name}.down"] = torch.randn(4, value.shape[1], generator=g) * 0.05
            weights[f"{name}.up"] = torch.randn(value.shape[0], 4, generator=g) * 0.05
    return comfy.controlnet.ControlLora(weights)


def controlled(model, architecture, control, vae=None) -> torch.Tensor:
    g = torch.Generator().manual_seed(6)
    picture = torch.rand(1, 8 * architecture.latent[2], 8 * architecture.latent[3], 3, generator=g)
    positive, negative = architecture.conditioning(1), architecture.conditioning(2)
    apply = nodes.ControlNetApplyAdvanced().apply_controlnet
    positive, negative = apply(positive, negative, control, picture, 1.0, 0.0, 1.0, vae)
    latent = {"samples": torch.zeros(architecture.latent)}
    return nodes.common_ksampler(model, 3, 1, 1.0, "euler", "simple", positive, negative, latent)[0]["samples"]


def sd15_controlnet() -> torch.nn.Module:
    return comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, hint_channels=3, model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[1, 1], transformer_depth_middle=1, num_heads=8, use_spatial_transformer=True,
        context_dim=768, legacy=False, **META,
    )  # fmt: skip


def sd35_controlnet() -> torch.nn.Module:
    return comfy.cldm.dit_embedder.ControlNetEmbedder(
        img_size=None, patch_size=2, in_chans=16, attention_head_dim=64, num_attention_heads=4, adm_in_channels=2048,
        num_layers=2, main_model_double=4, double_y_emb=False, **META,
    )  # fmt: skip


def from_gguf(net: torch.nn.Module, prefix: str, folders, pack, patch) -> tuple:
    """A ControlNet of seeded weights from GGUF, and the host's own on what that file stands for."""
    state = {f"{prefix}{name}": weight for name, weight in drawn(net.state_dict(), seed=5).items()}
    weights = write_part(folders / "control.gguf", state, pack)
    paths, extensions = folder_paths.folder_names_and_paths["graft_controlnet_gguf"]
    patch.setitem(
        folder_paths.folder_names_and_paths, "graft_controlnet_gguf", ([str(folders), *paths], extensions)
    )
    (ours,) = nodes.NODE_CLASS_MAPPINGS["GraftControlNetLoader"]().load("control.gguf")["result"]
    theirs = comfy.controlnet.load_controlnet_state_dict(dict(weights))
    assert type(ours) is type(theirs)
    got, want = (control.control_model.state_dict() for control in (ours, theirs))
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    return ours, theirs


def test_stable_diffusions_controlnet_from_gguf(unets, folders, pack, monkeypatch):
    architecture, graft, dense = unets
    ours, theirs = from_gguf(sd15_controlnet(), "control_model.", folders, pack, monkeypatch)
    want = controlled(dense, architecture, theirs)
    assert distance(controlled(graft, architecture, ours), want) < TOLERANCE
    assert distance(sample(dense, architecture), want) > 0.01


def test_sd35s_controlnet_from_gguf(sd3, folders, pack, monkeypatch):  # noqa: F811
    """Which reads a picture through the VAE."""
    ours, theirs = from_gguf(sd35_controlnet(), "", folders, pack, monkeypatch)
    vae = comfy.sd.VAE(sd=small_vae())
    want = controlled(sd3[1], SD3, theirs, vae)
    assert distance(controlled(sd3[0], SD3, ours, vae), want) < TOLERANCE
    assert distance(sample(sd3[1], SD3), want) > 0.01


def test_a_control_lora_runs_on_the_models_own_weights(unets):
    architecture, graft, dense = unets
    before = fingerprint(graft)
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    lora = make_lora(dense.model, shapes, "native", architecture.lora_layers)
    for patched in (False, True):
        ours, theirs = (with_lora(m, lora, 0.8) if patched else m for m in (graft, dense))
        want = controlled(theirs, architecture, control_lora(dense))
        plain = nodes.common_ksampler(
            theirs, 3, 1, 1.0, "euler", "simple", architecture.conditioning(1), architecture.conditioning(2),
            {"samples": torch.zeros(architecture.latent)},
        )[0]["samples"]  # fmt: skip
        assert distance(want, plain) > 0.01, "the control has no effect to compare"
        assert distance(controlled(ours, architecture, control_lora(graft)), want) < TOLERANCE
    assert fingerprint(graft) == before


def test_a_lora_by_region_or_step_stays_out_of_a_control_lora(pack, unets, caplog):
    """Where the mask is black it is nowhere: the control is the one of the model without it, and with the others."""
    architecture, graft, dense = unets
    strengths = pack("ops.strengths")
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    first, second = (make_lora(dense.model, shapes, "native", architecture.lora_layers, seed=seed) for seed in (3, 4))
    patches = comfy.lora.load_lora(first, comfy.lora.model_lora_keys_unet(graft.model, {}))
    nowhere = strengths.Strength(mask=torch.zeros(1, 8, 8))
    half = strengths.Strength(blocks=strengths.Blocks.parse("* = 0.5"))
    for when, more, strength in ((nowhere, {}, 0.0), (nowhere, second, 0.0), (half, second, 0.4)):
        plain, theirs = (with_lora(m, more, 0.6) if more else m.clone() for m in (graft, dense))
        branch = plain.clone()
        assert branch.add_patches(patches, 0.8, when=when)
        theirs = with_lora(theirs, first, strength) if strength else theirs
        caplog.clear()
        want = controlled(theirs, architecture, control_lora(dense))
        assert distance(controlled(branch, architecture, control_lora(branch)), want) < TOLERANCE
        assert caplog.text.count("such as a Control-LoRA, works without") == (when is nowhere)


def test_what_a_controlnet_of_sd35_copies_are_weights(sd3, loras):  # noqa: F811
    """It loads the state dict of the model's y_embedder into one of its own."""
    graft, dense = sd3
    embedder = "diffusion_model.y_embedder"
    patched = graft.clone()
    patched.add_patches({f"{embedder}.mlp.0.weight": ("diff", (torch.full((256, 2048), 0.02),))}, 0.5)
    theirs = {k: v.float() for k, v in dense.model.diffusion_model.y_embedder.state_dict().items()}
    for model, change in ((graft, 0.0), (patched, 0.01)):
        sample(model, SD3)  # the branch that was loaded last is the one that is shown
        shown = model.model.diffusion_model.y_embedder.state_dict()
        own = torch.nn.ModuleDict({"mlp": torch.nn.Sequential(
            torch.nn.Linear(2048, 256), torch.nn.SiLU(), torch.nn.Linear(256, 256),
        )})  # fmt: skip
        own.load_state_dict(shown)
        wanted = theirs | {"mlp.0.weight": theirs["mlp.0.weight"] + change}
        for key, value in own.state_dict().items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=1e-6)
        assert change or torch.equal(own.mlp[0].weight, theirs["mlp.0.weight"])


def test_the_host_counts_bytes(sd3, loras):  # noqa: F811
    graft, dense = sd3
    patched, size = with_lora(graft, loras[0]), comfy.model_management.module_size
    sample(patched, SD3)
    patched.size = 0  # else it remembers
    assert patched.model_size() < 0.4 * dense.model_size()  # Q4_K and fp16 against fp32
    for layer in graft.graft.layers.values():
        held = [p for p in (layer.weight, layer.bias) if p is not None]
        assert size(layer) == sum(p.nbytes for p in held)
