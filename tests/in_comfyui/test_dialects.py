"""Our names of a model's layers against ComfyUI's own key maps, and what its loader makes of the dialects we add."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.lora
import comfy.lora_convert
import comfy.model_base
import comfy.weight_adapter
import pytest
import torch
from architectures import ARCHITECTURES, META
from graft.ops.adapters import Region, from_host
from graft.ops.files.dialects import LayerNames, extra_dialects

H = 3072
UNETS = {
    "sd15": {"num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
             "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
             "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1},
    "sdxl": {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
             "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
             "num_classes": "sequential", "adm_in_channels": 2816},
}  # fmt: skip


def weights_of(name: str) -> tuple[dict[str, torch.Tensor], dict, type]:
    """A model's parameters on no device, its configuration and ComfyUI's class for it."""
    if name in UNETS:
        config = {"model_channels": 320, "in_channels": 4, "out_channels": 4, "context_dim": 768, **UNETS[name]}
        model = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
            image_size=32, num_heads=8, use_spatial_transformer=True, use_linear_in_transformer=name == "sdxl",
            use_checkpoint=False, legacy=False, **config, **META,
        )  # fmt: skip
        kind = comfy.model_base.BaseModel if name == "sd15" else comfy.model_base.SDXL
    else:
        model = ARCHITECTURES[name].build()
        config = {"flux": {"depth": 1, "depth_single_blocks": 1, "hidden_size": H}, "sd3": {"depth": 4}}.get(name, {})
        kind = {"flux": comfy.model_base.Flux, "sd3": comfy.model_base.SD3, "wan": comfy.model_base.WAN21}[name]
    return {f"diffusion_model.{k}": v for k, v in model.state_dict().items()}, config, kind


def key_map(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """ComfyUI's names of a model's parameters, and those."""
    state, config, kind = weights_of(name)
    model = kind.__new__(kind)
    model.__dict__.update(state_dict=lambda: state, model_config=SimpleNamespace(unet_config=config))
    return comfy.lora.model_lora_keys_unet(model, {}), state


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "sd15", "sdxl"])
def test_our_names_are_the_hosts(name: str) -> None:
    theirs, state = key_map(name)
    shapes = {k.removesuffix(".weight"): v.shape for k, v in state.items() if k.endswith(".weight") and v.dim() > 1}
    ours = LayerNames(shapes)
    compared = 0
    for lora_name, target in theirs.items():
        key, region, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        if key.removesuffix(".weight") not in shapes:
            continue
        (mine,) = ours.targets(lora_name) or [None]
        assert mine is not None, f"{lora_name} is missing"
        assert (mine.key, mine.region and tuple(mine.region)) == (key, region and tuple(region)), lora_name
        if function is not None:
            rows = torch.arange(6.0).unsqueeze(1)
            assert mine.function is not None and torch.equal(mine.function(rows), function(rows)), lora_name
        compared += 1
    assert compared >= 2 * len(shapes)


def pair(rows: int, columns: int, prefix: str, down: str, up: str) -> dict[str, torch.Tensor]:
    return {prefix + down: torch.ones(4, columns), prefix + up: torch.ones(rows, 4)}


ADDED = {
    "XLabs": pair(3 * H, H, "double_blocks.0.processor.qkv_lora1", ".down.weight", ".up.weight")
    | pair(H, H, "double_blocks.0.processor.proj_lora2", ".down.weight", ".up.weight")
    | pair(3 * H, H, "single_blocks.0.processor.qkv_lora", ".down.weight", ".up.weight"),
    "fal Kontext": pair(H, H, "base_model.model.double_blocks.0.img_attn.proj", ".lora_A.weight", ".lora_B.weight"),
    "named PEFT": pair(H, H, "transformer.transformer_blocks.0.attn.to_k", ".lora_A.x.weight", ".lora_B.x.weight"),
    "magnitudes": pair(H, H, "transformer.transformer_blocks.0.attn.to_out.0", ".lora_A.weight", ".lora_B.weight")
    | {"transformer.transformer_blocks.0.attn.to_out.0.lora_magnitude_vector": torch.ones(H)},
    "bias of B": pair(H, H, "transformer.transformer_blocks.0.attn.to_out.0", ".lora_A.weight", ".lora_B.weight")
    | {"transformer.transformer_blocks.0.attn.to_out.0.lora_B.bias": torch.ones(H)},
    "SimpleTuner": {
        "lycoris_single_transformer_blocks_0_attn_to_qkv.lokr_w1": torch.ones(4, 4),
        "lycoris_single_transformer_blocks_0_attn_to_qkv.lokr_w2": torch.ones(3 * H // 4, H // 4),
    },
}


@pytest.mark.parametrize("dialect", ADDED)
def test_the_hosts_loader_takes_what_we_rename(dialect: str, caplog) -> None:
    names, state = key_map("flux")
    before = comfy.lora.load_lora(ADDED[dialect], names, log_missing=False)
    renamed = extra_dialects(comfy.lora_convert.convert_lora(ADDED[dialect]))
    patches = comfy.lora.load_lora(renamed, names)
    assert "lora key not loaded" not in caplog.text
    assert len(patches) > len(before) or dialect == "magnitudes"
    wanted = {"magnitudes": "dora", "SimpleTuner": "lokr"}.get(dialect, "lora")
    for target, value in patches.items():
        key, offset = (target, None) if isinstance(target, str) else target[:2]
        adapter = from_host(value, state[key].shape, offset and Region(*offset))
        assert adapter.kind == ("diff" if key.endswith("bias") else wanted)


def test_diff_m_reaches_the_modulation_of_wan() -> None:
    names, _ = key_map("wan")
    state = {f"diffusion_model.{k}.diff_m": torch.ones(1, n, 256) for k, n in (("blocks.0", 6), ("head", 2))}
    patches = comfy.lora.load_lora(extra_dialects(state), names)
    assert sorted(patches) == ["diffusion_model.blocks.0.modulation", "diffusion_model.head.modulation"]
