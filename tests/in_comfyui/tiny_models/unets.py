"""Stable Diffusion and its relatives: what the host builds as a U-Net."""

from __future__ import annotations

from typing import Any

from .row import Noise, TinyModel

_LEVELS = [0, 0, 1, 1, 1, 1]  # SDXL's, with one transformer where it has two and ten
_OUT = [0, 0, 0, 1, 1, 1, 1, 1, 1]


def _unet(width: int = 64, levels: int = 2, **others: Any) -> dict[str, Any]:
    return {
        "image_size": 32, "use_checkpoint": False, "legacy": False, "use_spatial_transformer": True,
        "in_channels": 4, "out_channels": 4, "model_channels": width, "num_res_blocks": [1] * levels,
        "channel_mult": [1] * levels, "transformer_depth": [1] * levels, "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * 2 * levels, "use_temporal_resblock": False,
    } | others  # fmt: skip


def _sdxl(**others: Any) -> dict[str, Any]:
    depths = {"transformer_depth": _LEVELS, "transformer_depth_output": _OUT, "num_res_blocks": [2, 2, 2]}
    return _unet(levels=3, num_classes="sequential", **{**depths, **others})


def _koala() -> dict[str, Any]:
    return _sdxl(num_res_blocks=[1, 1, 1], transformer_depth=[0, 1, 1], transformer_depth_output=[0, 0, 1, 1, 1, 1])


def _video() -> dict[str, Any]:
    return _unet(
        in_channels=8, num_classes="sequential", extra_ff_mix_layer=True, use_spatial_context=True,
        merge_strategy="learned_with_images", merge_factor=0.0,
        video_kernel_size=[3, 1, 1], use_temporal_resblock=True, disable_temporal_crossattention=False,
    )  # fmt: skip


def _pooled(width: int):
    return lambda noise: {"pooled_output": noise(1, width)}


def _image(noise: Noise) -> dict[str, Any]:
    return {"concat_latent_image": noise(1, 4, 8, 8)}


WIDE = {"model_channels": 320}
LATENT = (1, 4, 8, 8)
VIDEO = {**WIDE, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0]}
XL = {**WIDE, "transformer_depth": [0, 0, 2, 2, 10, 10]}

MODELS = [
    TinyModel("SD15", _unet(), LATENT, (20, 768), shown=WIDE),
    TinyModel("SD20", _unet(), LATENT, (20, 1024), shown=WIDE),
    TinyModel("SD21UnclipL", _unet(num_classes="sequential"), LATENT, (20, 1024), shown=WIDE),
    TinyModel("SD21UnclipH", _unet(num_classes="sequential"), LATENT, (20, 1024), shown=WIDE),
    TinyModel("SD15_instructpix2pix", _unet(in_channels=8), LATENT, (20, 768), _image, WIDE),
    TinyModel(
        "Stable_Zero123", _unet(in_channels=8), LATENT, (1, 772), _image, WIDE,
        beside={"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)},
    ),
    TinyModel(
        "LotusD", _unet(num_classes="sequential", context_dim=64, num_head_channels=64), LATENT, (20, 64), shown=WIDE
    ),
    TinyModel(
        "SD_X4Upscaler",
        _unet(
            levels=4, in_channels=7, num_classes=1000, transformer_depth=[0, 1, 1, 1],
            transformer_depth_output=[1, 1, 1, 1, 1, 1, 0, 0], disable_self_attentions=[True, True, True, False],
        ),
        LATENT, (20, 1024), lambda noise: {"concat_image": noise(1, 3, 8, 8)}, {"model_channels": 256},
    ),
    TinyModel("SDXL", _sdxl(), LATENT, (20, 2048), _pooled(1280), XL),
    TinyModel(
        "SDXL_instructpix2pix", _sdxl(in_channels=8), LATENT, (20, 2048),
        lambda noise: _pooled(1280)(noise) | _image(noise), XL,
    ),
    TinyModel(
        "SDXLRefiner",
        _unet(
            levels=3, num_classes="sequential", transformer_depth=[0, 1, 0], transformer_depth_output=[0, 0, 1, 1, 0, 0]
        ),
        LATENT, (20, 1280), _pooled(1280),
        {"model_channels": 384, "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0]},
    ),
    TinyModel("SSD1B", _sdxl(), LATENT, (20, 2048), _pooled(1280), {**XL, "transformer_depth": [0, 0, 2, 2, 4, 4]}),
    TinyModel(
        "Segmind_Vega", _sdxl(), LATENT, (20, 2048), _pooled(1280), {**XL, "transformer_depth": [0, 0, 1, 1, 2, 2]}
    ),
    TinyModel("KOALA_700M", _koala(), LATENT, (20, 2048), _pooled(1280), {**XL, "transformer_depth": [0, 2, 5]}),
    TinyModel("KOALA_1B", _koala(), LATENT, (20, 2048), _pooled(1280), {**XL, "transformer_depth": [0, 2, 6]}),
    TinyModel("SVD_img2vid", _video(), (3, 4, 8, 8), (1, 1024), _image, VIDEO),
    TinyModel("SV3D_u", _video(), (3, 4, 8, 8), (1, 1024), _image, VIDEO),
    TinyModel("SV3D_p", _video(), (3, 4, 8, 8), (1, 1024), _image, VIDEO),
    TinyModel(
        "Stable_Cascade_C",
        {
            "c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
            "c_clip_text": 64, "c_clip_text_pooled": 64,
        },
        (1, 16, 8, 8), (20, 64), _pooled(64),
    ),
    TinyModel(
        "Stable_Cascade_B",
        {
            "c_cond": 64, "c_hidden": [64, 64, 64, 64], "nhead": [-1, -1, 2, 2], "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]], "c_clip": 64,
        },
        (1, 4, 16, 16), None,
        lambda noise: {"pooled_output": noise(1, 1, 64), "stable_cascade_prior": noise(1, 16, 4, 4)},
    ),
]  # fmt: skip
