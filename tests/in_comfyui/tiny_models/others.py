"""Sound, shapes, and what looks at pictures."""

from __future__ import annotations

from typing import Any

import torch

from .row import Noise, TinyModel

_EMBEDDER = {
    "embedding.0.weights": (128,), "embedding.1.weight": (768, 257), "embedding.1.bias": (768,),
}  # fmt: skip


def _conditioner(*names: str) -> dict[str, tuple[int, ...]]:
    return {
        f"conditioner.conditioners.{name}.embedder.{part}": shape
        for name in names for part, shape in _EMBEDDER.items()
    }  # fmt: skip


def _audio(**others: Any) -> dict[str, Any]:
    return {"io_channels": 64, "embed_dim": 128, "depth": 2, "num_heads": 2, "project_cond_tokens": True} | others



def _detections(model: torch.nn.Module, noise: Noise) -> list[torch.Tensor]:
    """Each number sorted: queries come in the order of their scores, which two models round in two ways."""
    return [value.sort(dim=1).values for value in model._forward(noise(1, 3, 128, 128)).values()]


SAM = {"embed_dim": 256, "depth": 2, "img_size": 336, "global_att_blocks": (1,)}
SAM_MODULES = {
    "comfy.ldm.sam3.detector.Transformer": {"dim_ff": 128, "enc_layers": 1, "dec_layers": 1},
    "comfy.ldm.sam3.detector.GeometryEncoder": {"num_layers": 1},
}


def _segments(model: torch.nn.Module, noise: Noise) -> Any:
    return model(noise(1, 3, 336, 336), text_embeddings=noise(1, 8, SAM["embed_dim"]))


MODELS = [
    TinyModel(
        "StableAudio", _audio(global_cond_dim=1536), (1, 64, 32), (20, 768),
        beside=_conditioner("seconds_start", "seconds_total"),
    ),
    TinyModel(
        "StableAudio3",
        _audio(
            global_cond_dim=768, global_cond_type="adaLN", local_add_cond_dim=257, io_channels=256,
            timestep_features_type="expo", attn_kwargs={"qk_norm": "rms", "differential": False}, norm_type="rms_norm",
        ),
        (1, 256, 32), (20, 768),
        beside={
            "conditioner.conditioners.seconds_total.embedder.embedding.1.weight": (768, 256),
            "conditioner.conditioners.seconds_total.embedder.embedding.1.bias": (768,),
        },
    ),
    TinyModel(
        "ACEStep",
        {
            "attention_head_dim": 64, "in_channels": 8, "inner_dim": 128, "max_height": 16, "max_position": 32768,
            "max_width": 32768, "mlp_ratio": 2.5, "num_attention_heads": 2, "num_layers": 2, "out_channels": 8,
            "patch_size": [16, 1], "rope_theta": 1000000.0, "speaker_embedding_dim": 512, "text_embedding_dim": 64,
            "ssl_encoder_depths": [8, 8], "ssl_latent_dims": [64, 64], "ssl_names": ["mert", "m-hubert"],
            "lyric_encoder_vocab_size": 128, "lyric_hidden_size": 64,
        },
        (1, 8, 16, 16), (20, 64), lambda noise: {"conditioning_lyrics": torch.arange(12)[None]},
        within={"comfy.ldm.ace.model.LyricEncoder": {
            "output_size": 64, "attention_heads": 2, "linear_units": 128, "num_blocks": 1,
        }},
    ),
    TinyModel(
        "ACEStep15",
        {
            "hidden_size": 256, "intermediate_size": 512, "num_heads": 2, "num_kv_heads": 1, "encoder_hidden_size": 256,
            "encoder_num_heads": 2, "encoder_intermediate_size": 512, "num_dit_layers": 2, "num_lyric_layers": 1,
            "num_timbre_layers": 1, "text_hidden_dim": 64, "fsq_dim": 256,
        },
        (1, 64, 20), (20, 64), lambda noise: {"conditioning_lyrics": noise(1, 12, 64)},
    ),
    TinyModel(
        "Hunyuan3Dv2", {"hidden_size": 256, "context_in_dim": 64, "depth": 1, "depth_single_blocks": 1},
        (1, 64, 16), (20, 64),
    ),
    TinyModel(
        "Hunyuan3Dv2mini", {"hidden_size": 128, "context_in_dim": 64, "depth": 8, "depth_single_blocks": 1},
        (1, 64, 16), (20, 64),
    ),
    TinyModel(
        "Hunyuan3Dv2_1",
        {"hidden_size": 256, "depth": 2, "context_dim": 64, "guidance_cond_proj_dim": None, "num_moe_layers": 1},
        (1, 64, 16), (20, 64), cfg=2.0,
    ),
    TinyModel(
        "TripoSplat",
        {"q_token_length": 32, "model_channels": 128, "cond_channels": 64, "num_blocks": 2, "num_refiner_blocks": 1},
        ((1, 32, 16), (1, 1, 5)), (20, 64), lambda noise: {"reference_latents": [noise(1, 128, 4, 4)]},
    ),
    TinyModel(
        "RT_DETR_v4", {"num_queries": 336},
        within={
            f"comfy.ldm.rt_detr.rtdetr_v4.{name}": {"eval_spatial_size": (128, 128)}
            for name in ("HybridEncoder", "DFINETransformer")
        },
        called=_detections,
    ),
    TinyModel(
        "DepthAnything3",
        {
            "backbone_name": "vits", "out_layers": [0, 1, 2, 3], "head_dim_in": 384, "head_features": 64,
            "head_out_channels": [48, 96, 192, 384], "head_type": "dpt", "head_use_sky_head": False,
        },
        called=lambda model, noise: model(noise(1, 3, 28, 28)),
    ),
    TinyModel("SAM3", SAM, within=SAM_MODULES, called=_segments),
    TinyModel("SAM31", SAM, within=SAM_MODULES, called=_segments),
]  # fmt: skip
