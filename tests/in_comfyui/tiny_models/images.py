"""Transformers for images."""

from __future__ import annotations

from typing import Any

import torch

from .row import Noise, TinyModel

LATENT = (1, 16, 8, 8)
WIDTH = 256  # two heads of 128


def _flux(**others: Any) -> dict[str, Any]:
    return {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 64, "context_in_dim": 64,
        "hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
        "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
    } | others  # fmt: skip


def _chroma(**others: Any) -> dict[str, Any]:
    config = _flux(in_channels=64, out_channels=64, in_dim=64, out_dim=WIDTH, hidden_dim=WIDTH, n_layers=2)
    return {k: v for k, v in config.items() if k != "guidance_embed"} | {"vec_in_dim": None} | others


def _pooled(width: int):
    return lambda noise: {"pooled_output": noise(1, width)}


def _mask(noise: Noise) -> dict[str, Any]:
    return {"attention_mask": torch.ones(1, 20, dtype=torch.long)}


def _hydit(noise: Noise) -> dict[str, Any]:
    return {
        "attention_mask": torch.ones(1, 20, dtype=torch.long), "conditioning_mt5xl": noise(1, 24, 64),
        "attention_mask_mt5xl": torch.ones(1, 24),
    }  # fmt: skip


def _lumina(**others: Any) -> dict[str, Any]:
    return {
        "patch_size": 2, "in_channels": 16, "dim": WIDTH, "n_layers": 1, "n_refiner_layers": 1, "qk_norm": True,
        "cap_feat_dim": 64, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [32, 48, 48], "axes_lens": [300, 512, 512],
        "ffn_dim_multiplier": 1.0,
    } | others  # fmt: skip


Z_IMAGE = {"n_kv_heads": 2, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}


def _pixeldit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The host splits the modulation of pixel blocks in two."""
    width = state["pixel_embedder.proj.weight"].shape[0]
    out = {}
    for name, value in state.items():
        base, found, suffix = name.partition(".adaLN_modulation_msa.")
        if found:
            parts = [value, state[f"{base}.adaLN_modulation_mlp.{suffix}"]]
            parts = [p.reshape(-1, 3, width, *p.shape[1:]) for p in parts]
            out[f"core.{base}.adaLN_modulation.0.{suffix}"] = torch.cat(parts, 1).reshape(-1, *value.shape[1:])
        elif ".adaLN_modulation_mlp." not in name:
            out[name if name.startswith("lq_proj.") else f"core.{name}"] = value
    return out


PIXELDIT = {
    "num_groups": 2, "hidden_size": 128, "pixel_hidden_size": 16, "pixel_attn_hidden_size": 64, "pixel_num_groups": 2,
    "patch_depth": 2, "pixel_depth": 1, "txt_embed_dim": 64,
}  # fmt: skip


def _cosmos2(**others: Any) -> dict[str, Any]:
    return {
        "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "model_channels": WIDTH,
        "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 64, "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
        "use_adaln_lora": True, "adaln_lora_dim": 64, "extra_per_block_abs_pos_emb": False,
        "rope_enable_fps_modulation": False,
    } | others  # fmt: skip


def _omnigen(noise: Noise) -> dict[str, Any]:
    return _mask(noise) | {"reference_latents": [noise(1, 16, 8, 8)]}


def _hidream_o1(noise: Noise) -> dict[str, Any]:
    ids = torch.arange(100, 116)
    return {"text_input_ids": ids[None], "reference_latents": [noise(1, 64, 64, 3).sigmoid()]}


MODELS = [
    TinyModel(
        "SD3",
        {
            "input_size": None, "pos_embed_max_size": 32, "num_patches": 1024, "patch_size": 2, "depth": 2,
            "adm_in_channels": 64, "out_channels": 16,
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128},
            },
        },
        LATENT, (20, 64), _pooled(64),
    ),
    TinyModel(
        "AuraFlow",
        {"dim": WIDTH, "n_layers": 2, "n_double_layers": 1, "n_heads": 2, "global_conddim": WIDTH, "max_seq": 1024},
        (1, 4, 8, 8), (20, 2048),
    ),
    TinyModel(
        "PixArtAlpha",
        {
            "hidden_size": 192, "num_heads": 2, "depth": 2, "input_size": 64, "pe_interpolation": 1,
            "caption_channels": 64, "micro_condition": True, "in_channels": 4, "patch_size": 2,
        },
        (1, 4, 48, 48), (20, 64), lambda noise: {"width": 64, "height": 64},
    ),
    TinyModel(
        "PixArtSigma",
        {
            "hidden_size": 128, "num_heads": 2, "depth": 2, "input_size": 64, "pe_interpolation": 1,
            "caption_channels": 64, "micro_condition": False, "in_channels": 4, "patch_size": 2,
        },
        (1, 4, 48, 48), (20, 64),
    ),
    TinyModel(
        "HunyuanDiT",
        {
            "hidden_size": 128, "depth": 4, "num_heads": 2, "text_states_dim": 64, "text_states_dim_t5": 64,
            "text_len": 20, "text_len_t5": 24,
        },
        (1, 4, 8, 8), (20, 64), _hydit,
    ),
    TinyModel(
        "HunyuanDiT1",
        {
            "hidden_size": 128, "depth": 2, "num_heads": 2, "text_states_dim": 64,
            "text_states_dim_t5": 64, "text_len": 20, "text_len_t5": 24, "size_cond": True, "use_style_cond": True,
        },
        (1, 4, 8, 8), (20, 64), _hydit, {"image_model": "hydit1"},
    ),
    TinyModel("Flux", _flux(), LATENT, (20, 64), _pooled(64)),
    TinyModel("FluxInpaint", _flux(in_channels=96), LATENT, (20, 64), _pooled(64)),
    TinyModel("FluxSchnell", _flux(guidance_embed=False), LATENT, (20, 64), _pooled(64)),
    TinyModel("LongCatImage", _flux(guidance_embed=False, vec_in_dim=None, context_in_dim=3584, txt_ids_dims=[1, 2]),
              LATENT, (20, 3584)),
    TinyModel(
        "Flux2",
        _flux(
            in_channels=128, out_channels=128, patch_size=1, vec_in_dim=None, axes_dim=[32] * 4, mlp_ratio=3.0,
            theta=2000, qkv_bias=False, global_modulation=True, mlp_silu_act=True, ops_bias=False,
            default_ref_method="index", ref_index_scale=10.0, txt_ids_dims=[3],
        ),
        (1, 128, 4, 4), (20, 64), lambda noise: {"reference_latents": [noise(1, 128, 4, 4)]},
    ),
    TinyModel(
        "Lens",
        {
            "in_channels": 128, "out_channels": 32, "num_layers": 2, "num_attention_heads": 2, "enc_hidden_dim": 64,
            "multi_layer_encoder_feature": True, "selected_layer_index": (0, 1),
        },
        (1, 128, 4, 4), (20, 128),
    ),
    TinyModel("Lumina2", _lumina(), LATENT, (20, 64), _mask),
    TinyModel("ZImage", _lumina(**Z_IMAGE), LATENT, (20, 64), _mask, {"dim": 3840}),
    TinyModel(
        "ZImagePixelSpace",
        _lumina(
            **Z_IMAGE, in_channels=3, patch_size=16, decoder_in_channels=768, decoder_hidden_size=64,
            decoder_num_res_blocks=1, decoder_max_freqs=8,
        ),
        (1, 3, 32, 32), (20, 64), _mask, {"dim": 3840, "image_model": "zimage_pixel"},
    ),
    TinyModel("PixelDiTT2I", PIXELDIT, (1, 3, 32, 32), (20, 64), named=_pixeldit),
    TinyModel(
        "PiD", PIXELDIT | {"lq_hidden_dim": 64, "lq_latent_channels": 16, "lq_num_res_blocks": 1, "lq_interval": 1},
        (1, 3, 64, 64), (20, 64),
        lambda noise: {"lq_latent": noise(1, 16, 2, 2), "degrade_sigma": torch.tensor([0.1])}, named=_pixeldit,
    ),
    TinyModel("CosmosT2IPredict2", _cosmos2(), (1, 16, 1, 8, 8), (20, 64)),
    TinyModel("CosmosI2VPredict2", _cosmos2(in_channels=17), (1, 16, 3, 8, 8), (20, 64)),
    TinyModel(
        "Anima", _cosmos2(crossattn_emb_channels=256), (1, 16, 1, 8, 8), (20, 64),
        lambda noise: {"t5xxl_ids": torch.arange(20), "t5xxl_weights": torch.ones(20)},
        within={"comfy.ldm.anima.model.LLMAdapter": {
            "source_dim": 64, "target_dim": 256, "model_dim": 256, "num_heads": 4, "num_layers": 1,
        }},
    ),
    TinyModel(
        "HiDream",
        {
            "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "caption_channels": [64, 64],
            "max_resolution": [128, 128], "in_channels": 16, "out_channels": 16, "llama_layers": [0, 1],
            "num_attention_heads": 2, "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 1,
            "num_single_layers": 1, "patch_size": 2, "text_emb_dim": 64,
        },
        LATENT, (20, 64),
        lambda noise: {"pooled_output": noise(1, 64), "conditioning_llama3": noise(1, 2, 20, 64)},
    ),
    TinyModel(
        "HiDreamO1",
        {
            "text_config_overrides": {
                "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "vocab_size": 151936,
            },
            "vision_config_overrides": {"hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "depth": 2},
        },
        (1, 3, 64, 64), None, _hidream_o1,
    ),
    TinyModel("Chroma", _chroma(), LATENT, (20, 64), _pooled(64)),
    TinyModel(
        "ChromaRadiance",
        _chroma(
            in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=32, nerf_mlp_ratio=4, nerf_depth=1,
            nerf_max_freqs=8, nerf_tile_size=512, nerf_final_head_type="conv", nerf_embedder_dtype=torch.float32,
            use_x0=False, use_sequential_txt_ids=False,
        ),
        (1, 3, 32, 32), (20, 64), _pooled(64),
    ),
    TinyModel(
        "Omnigen2",
        {
            "axes_dim_rope": [40, 40, 40], "axes_lens": [1024, 1664, 1664], "hidden_size": 240, "in_channels": 16,
            "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 1, "num_refiner_layers": 1, "text_feat_dim": 64,
            "timestep_scale": 1000.0, "patch_size": 2,
        },
        LATENT, (20, 64), _omnigen,
    ),
    TinyModel(
        "Boogu",
        {
            "hidden_size": 240, "num_layers": 1, "num_double_stream_layers": 1, "num_refiner_layers": 1,
            "num_attention_heads": 2, "num_kv_heads": 1, "instruction_feat_dim": 64,
        },
        LATENT, (20, 64), _omnigen,
    ),
    TinyModel(
        "QwenImage",
        {"in_channels": 64, "num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64},
        (1, 16, 1, 8, 8), (20, 64), lambda noise: {"reference_latents": [noise(1, 16, 1, 8, 8)]},
    ),
    TinyModel(
        "JoyImage",
        {
            "in_channels": 16, "hidden_size": WIDTH, "patch_size": [1, 2, 2], "num_layers": 2,
            "num_attention_heads": 2, "text_dim": 64,
        },
        (1, 16, 1, 8, 8), (20, 64),
    ),
    TinyModel(
        "Ideogram4",
        {
            "in_channels": 128, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 128,
            "intermediate_size": 512, "adaln_dim": 64, "llm_features_dim": 64, "mrope_section": [24, 20, 20],
        },
        (1, 128, 4, 4), (20, 64),
    ),
    TinyModel(
        "Krea2",
        {
            "features": WIDTH, "channels": 16, "patch": 2, "layers": 2, "heads": 2, "kvheads": 1, "txtlayers": 2,
            "txtdim": 128, "txtheads": 1, "txtkvheads": 1,
        },
        LATENT, (20, 256),
    ),
    TinyModel(
        "Kandinsky5Image",
        {
            "model_dim": WIDTH, "axes_dims": (32, 48, 48), "rope_scale_factor": (1.0, 1.0, 1.0), "time_dim": 64,
            "ff_dim": 512, "visual_embed_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1, "in_text_dim": 64,
            "in_text_dim2": 64,
        },
        (1, 16, 1, 8, 8), (20, 64), _pooled(64), {"model_dim": 2560},
    ),
    TinyModel(
        "ErnieImage",
        {
            "hidden_size": WIDTH, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 512, "text_in_dim": 64,
        },
        (1, 128, 4, 4), (20, 64),
    ),
]  # fmt: skip
