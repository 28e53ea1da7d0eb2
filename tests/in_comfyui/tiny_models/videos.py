"""Transformers for video."""

from __future__ import annotations

from typing import Any

import torch

from .row import Noise, TinyModel, vision

LATENT = (1, 16, 3, 8, 8)
WIDTH = 256  # two heads of 128
TEXT = (20, 64)


def _wan(**others: Any) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2), "in_dim": 16, "dim": WIDTH, "ffn_dim": 512, "freq_dim": 256, "text_dim": 64,
        "out_dim": 16, "num_heads": 2, "num_layers": 2, "window_size": (-1, -1), "qk_norm": True,
        "cross_attn_norm": True, "eps": 1e-6,
    } | others  # fmt: skip


def _seen(noise: Noise) -> dict[str, Any]:
    return {"clip_vision_output": vision(noise, 257, 1280), "concat_latent_image": noise(*LATENT)}


def _hunyuan(**others: Any) -> dict[str, Any]:
    return {
        "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16, "vec_in_dim": 768, "axes_dim": [16, 56, 56],
        "context_in_dim": 64, "hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "theta": 256, "qkv_bias": True, "guidance_embed": True, "byt5": False,
        "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
    } | others  # fmt: skip


def _hunyuan_text(noise: Noise) -> dict[str, Any]:
    return {"pooled_output": noise(1, 768), "attention_mask": torch.ones(1, 20, dtype=torch.long)}


def _cosmos(**others: Any) -> dict[str, Any]:
    return {
        "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "model_channels": WIDTH,
        "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 64, "block_config": "FA-CA-MLP",
        "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop",
        "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 64,
        "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
    } | others  # fmt: skip


def _cogvideo(**others: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 16, "time_embed_dim": 64, "num_layers": 2,
        "patch_size": 2, "text_embed_dim": 64, "use_rotary_positional_embeddings": True,
    } | others  # fmt: skip


MODELS = [
    TinyModel(
        "GenmoMochi",
        {
            "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 128, "hidden_size_y": 64, "mlp_ratio_x": 96.0,
            "mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
            "out_bias": True, "attn_drop": 0.0, "posenc_preserve_area": True, "timestep_scale": 1000.0, "use_t5": True,
            "t5_feat_dim": 64, "t5_token_length": 20,
        },
        (1, 12, 3, 8, 8), TEXT, lambda noise: {"attention_mask": torch.ones(1, 20, dtype=torch.long)},
    ),
    TinyModel(
        "LTXV", {"num_layers": 2, "attention_head_dim": 8, "cross_attention_dim": 256, "caption_channels": 64},
        (1, 128, 3, 4, 4), TEXT, lambda noise: {"attention_mask": torch.ones(1, 20, dtype=torch.long)},
    ),
    TinyModel(
        "LTXAV",
        {
            "num_layers": 2, "attention_head_dim": 8, "cross_attention_dim": 256, "caption_channels": 64,
            "audio_attention_head_dim": 4, "audio_cross_attention_dim": 128, "connector_attention_head_dim": 32,
            "connector_num_attention_heads": 2, "connector_num_layers": 1,
        },
        ((1, 128, 3, 4, 4), (1, 8, 6, 16)), (128, 64), lambda noise: {"frame_rate": 25},
    ),
    TinyModel("HunyuanVideo", _hunyuan(), LATENT, TEXT, _hunyuan_text),
    TinyModel("HunyuanVideoI2V", _hunyuan(in_channels=33), LATENT, TEXT, _hunyuan_text),
    TinyModel("HunyuanVideoSkyreelsI2V", _hunyuan(in_channels=32), LATENT, TEXT, _hunyuan_text),
    TinyModel(
        "HunyuanImage21",
        _hunyuan(in_channels=64, out_channels=64, patch_size=[2, 2], vec_in_dim=None, axes_dim=[64, 64]),
        (1, 64, 8, 8), TEXT,
    ),
    TinyModel(
        "HunyuanImage21Refiner",
        _hunyuan(in_channels=128, out_channels=64, patch_size=[1, 1, 1], vec_in_dim=None), (1, 64, 1, 4, 4), TEXT,
    ),
    TinyModel(
        "HunyuanVideo15",
        _hunyuan(
            in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, vision_in_dim=1152, byt5=True,
            use_cond_type_embedding=True, meanflow_sum=True,
        ),
        (1, 32, 2, 4, 4), TEXT,
        lambda noise: {
            "pooled_output": None, "clip_vision_output": vision(noise, 16, 1152),
            "conditioning_byt5small": noise(1, 8, 1472),
        },
    ),
    TinyModel(
        "HunyuanVideo15_SR_Distilled",
        _hunyuan(
            in_channels=98, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, vision_in_dim=1152, byt5=True,
            use_cond_type_embedding=True, meanflow=True, meanflow_sum=True,
        ),
        (1, 32, 2, 4, 4), TEXT, lambda noise: {"pooled_output": None},
    ),
    TinyModel("CosmosT2V", _cosmos(), LATENT, TEXT),
    TinyModel("CosmosI2V", _cosmos(in_channels=17), LATENT, TEXT),
    TinyModel("WAN21_T2V", _wan(), LATENT, TEXT),
    TinyModel("WAN21_CausalAR_T2V", _wan(), LATENT, TEXT, shown={"causal_ar": True}),
    TinyModel("WAN21_I2V", _wan(in_dim=36), LATENT, TEXT, _seen),
    TinyModel("WAN21_FunControl2V", _wan(in_dim=48), LATENT, TEXT,
        lambda noise: _seen(noise) | {"concat_latent_image": noise(1, 32, 3, 8, 8)},
    ),
    TinyModel("WAN21_Vace", _wan(vace_layers=1, vace_in_dim=96), LATENT, TEXT),
    TinyModel(
        "WAN21_Camera", _wan(in_dim=32), LATENT, TEXT,
        lambda noise: _seen(noise) | {"camera_conditions": noise(1, 24, 3, 64, 64)},
    ),
    TinyModel(
        "WAN22_Camera", _wan(in_dim=36), LATENT, TEXT,
        lambda noise: {"camera_conditions": noise(1, 24, 3, 64, 64), "concat_latent_image": noise(*LATENT)},
    ),
    TinyModel(
        "WAN22_S2V", _wan(cond_dim=16, audio_inject_layers=[0], audio_dim=64), LATENT, TEXT,
        lambda noise: {
            "audio_embed": noise(1, 25, 64, 12), "reference_latents": [noise(1, 16, 1, 8, 8)],
            "control_video": noise(*LATENT), "reference_motion": noise(1, 16, 19, 8, 8),
        },
    ),
    TinyModel(
        "WAN21_HuMo", _wan(in_dim=36), LATENT, TEXT, lambda noise: {"audio_embed": noise(1, 3, 8, 5, 1280)},
        within={"comfy.ldm.wan.model.AudioProjModel": {"intermediate_dim": 64}},
    ),
    TinyModel(
        "WAN22_Animate", _wan(in_dim=36, num_layers=5), (1, 16, 2, 8, 8), TEXT,
        lambda noise: {
            "clip_vision_output": vision(noise, 257, 1280), "face_video_pixels": noise(1, 3, 1, 512, 512),
            "pose_video_latent": noise(1, 16, 1, 8, 8),
        },
    ),
    TinyModel("WAN22_T2V", _wan(in_dim=48, out_dim=48), (1, 48, 3, 8, 8), TEXT),
    TinyModel("WAN21_FlowRVS", _wan(), LATENT, TEXT, shown={"model_type": "flow_rvs"}),
    TinyModel(
        "WAN21_SCAIL", _wan(in_dim=20), LATENT, TEXT,
        lambda noise: {
            "clip_vision_output": vision(noise, 257, 1280), "reference_latents": [noise(1, 16, 1, 8, 8)],
            "pose_video_latent": noise(1, 16, 3, 4, 4),
        },
    ),
    TinyModel(
        "WAN21_SCAIL2", _wan(in_dim=20), LATENT, TEXT,
        lambda noise: {
            "clip_vision_output": vision(noise, 257, 1280), "reference_latents": [noise(1, 16, 1, 8, 8)],
            "pose_video_latent": noise(1, 16, 3, 4, 4), "driving_mask_28ch": noise(1, 3, 28, 4, 4),
            "ref_mask_28ch": noise(1, 4, 28, 8, 8),
        },
    ),
    TinyModel(
        "WAN22_WanDancer", _wan(in_dim=36, audio_inject_layers=[0]), LATENT, TEXT,
        lambda noise: _seen(noise) | {"audio_embed": noise(1, 16, 35), "fps": 30.0},
    ),
    TinyModel(
        "SeedVR2",
        {
            "vid_dim": 64, "heads": 2, "head_dim": 32, "num_layers": 32, "norm_eps": 1e-5, "mlp_type": "swiglu",
            "vid_out_norm": True, "rope_dim": 32, "mm_layers": 2,
        },
        (1, 16, 2, 8, 8), (20, 5120), lambda noise: {"condition": noise(1, 17, 2, 8, 8)},
    ),
    TinyModel(
        "Kandinsky5",
        {
            "model_dim": WIDTH, "axes_dims": (32, 48, 48), "time_dim": 64, "ff_dim": 512, "visual_embed_dim": 132,
            "num_text_blocks": 1, "num_visual_blocks": 1, "in_text_dim": 64, "in_text_dim2": 64,
        },
        LATENT, TEXT, lambda noise: {"pooled_output": noise(1, 64)},
    ),
    TinyModel("CogVideoX_T2V", _cogvideo(), LATENT, TEXT),
    TinyModel("CogVideoX_I2V", _cogvideo(in_channels=32), LATENT, TEXT),
    TinyModel(
        "CogVideoX_Inpaint", _cogvideo(in_channels=48, patch_size_t=2, ofs_embed_dim=64), (1, 16, 2, 8, 8), TEXT,
    ),
]  # fmt: skip
