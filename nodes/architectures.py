"""What people call the models that the host knows under the names of its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OLDEST = "0.3.64"
"""The oldest ComfyUI that the pack supports."""


@dataclass(frozen=True)
class Known:
    """An architecture.

    Attributes:
        name: what people call it.
        since: the first ComfyUI that knows it, or `OLDEST`.
        variants: names of single models in it, each with what the host reads from their files.
    """

    name: str
    since: str = OLDEST
    variants: tuple[tuple[str, dict[str, Any]], ...] = ()


ARCHITECTURES = {
    "SD15": Known("Stable Diffusion 1.5"),
    "SD20": Known("Stable Diffusion 2"),
    "SD21UnclipL": Known("Stable Diffusion 2.1 unCLIP-L"),
    "SD21UnclipH": Known("Stable Diffusion 2.1 unCLIP-H"),
    "SD15_instructpix2pix": Known("InstructPix2Pix (SD 1.5)"),
    "Stable_Zero123": Known("Stable Zero123"),
    "LotusD": Known("Lotus-D"),
    "SD_X4Upscaler": Known("Stable Diffusion x4 Upscaler"),
    "SDXL": Known("SDXL"),
    "SDXL_instructpix2pix": Known("InstructPix2Pix (SDXL), CosXL Edit"),
    "SDXLRefiner": Known("SDXL Refiner"),
    "SSD1B": Known("SSD-1B"),
    "Segmind_Vega": Known("Segmind Vega"),
    "KOALA_700M": Known("KOALA 700M"),
    "KOALA_1B": Known("KOALA 1B"),
    "SVD_img2vid": Known("Stable Video Diffusion"),
    "SV3D_u": Known("SV3D u"),
    "SV3D_p": Known("SV3D p"),
    "Stable_Cascade_C": Known("Stable Cascade, stage C"),
    "Stable_Cascade_B": Known("Stable Cascade, stage B"),
    "SD3": Known("Stable Diffusion 3 / 3.5"),
    "AuraFlow": Known("AuraFlow"),
    "PixArtAlpha": Known("PixArt-α"),
    "PixArtSigma": Known("PixArt-Σ"),
    "HunyuanDiT": Known("Hunyuan-DiT 1.2"),
    "HunyuanDiT1": Known("Hunyuan-DiT 1.0 / 1.1"),
    "Flux": Known("Flux.1 dev", variants=(("Flux.1 Canny / Depth", {"in_channels": 32}),)),
    "FluxInpaint": Known("Flux.1 Fill"),
    "FluxSchnell": Known("Flux.1 schnell", variants=(("Ovis-Image", {"yak_mlp": True, "txt_norm": True}),)),
    "Flux2": Known(
        "Flux.2", "0.3.72",
        (
            ("Flux.2 dev", {"hidden_size": 6144}),
            ("Flux.2 klein 9B", {"hidden_size": 4096}),
            ("Flux.2 klein 4B", {"hidden_size": 3072}),
        ),
    ),
    "LongCatImage": Known("LongCat-Image", "0.16.0"),
    "Lens": Known("Microsoft Lens", "0.23.0"),
    "Lumina2": Known("Lumina Image 2.0", variants=(("NewBie-image", {"clip_text_dim": 1024}),)),
    "ZImage": Known("Z-Image", "0.3.74", (("Z-Image Omni", {"siglip_feat_dim": 1152}),)),
    "ZImagePixelSpace": Known("Z-Image in pixel space", "0.16.0"),
    "PixelDiTT2I": Known("PixelDiT", "0.23.0"),
    "PiD": Known("PiD (pixel diffusion decoder)", "0.23.0"),
    "CosmosT2IPredict2": Known("Cosmos-Predict2 Text2Image"),
    "CosmosI2VPredict2": Known("Cosmos-Predict2 Video2World"),
    "Anima": Known("Anima", "0.11.0"),
    "HiDream": Known("HiDream-I1 / E1"),
    "HiDreamO1": Known("HiDream-O1", "0.21.1"),
    "Chroma": Known("Chroma"),
    "ChromaRadiance": Known("Chroma Radiance"),
    "Omnigen2": Known("OmniGen2"),
    "Boogu": Known("Boogu-Image", "0.26.0"),
    "QwenImage": Known(
        "Qwen-Image",
        variants=(
            ("Qwen-Image-Layered", {"use_additional_t_cond": True}),
            ("Qwen-Image-Edit 2511", {"default_ref_method": "index_timestep_zero"}),
        ),
    ),
    "JoyImage": Known("JoyImage", "0.28.0"),
    "Ideogram4": Known("Ideogram 4", "0.24.0"),
    "Krea2": Known("Krea 2", "0.26.0"),
    "Kandinsky5Image": Known("Kandinsky 5 Image", "0.4.0"),
    "ErnieImage": Known("ERNIE-Image", "0.19.0"),
    "HunyuanImage21": Known("HunyuanImage 2.1"),
    "HunyuanImage21Refiner": Known("HunyuanImage 2.1 Refiner"),
    "GenmoMochi": Known("Mochi 1"),
    "LTXV": Known("LTX-Video"),
    "LTXAV": Known("LTX-2", "0.8.0"),
    "HunyuanVideo": Known("HunyuanVideo"),
    "HunyuanVideoI2V": Known("HunyuanVideo I2V"),
    "HunyuanVideoSkyreelsI2V": Known("SkyReels I2V (HunyuanVideo)"),
    "HunyuanVideo15": Known("HunyuanVideo 1.5", "0.3.71"),
    "HunyuanVideo15_SR_Distilled": Known("HunyuanVideo 1.5 Super-Resolution", "0.3.71"),
    "CosmosT2V": Known("Cosmos 1.0 Text2World"),
    "CosmosI2V": Known("Cosmos 1.0 Video2World"),
    "WAN21_T2V": Known(
        "Wan 2.1 / 2.2 T2V", variants=(("Wan 2.2 I2V", {"in_dim": 36}), ("Wan 2.2 Fun Control", {"in_dim": 52}))
    ),
    "WAN21_CausalAR_T2V": Known("Wan 2.1 Causal (autoregressive)", "0.21.0"),
    "WAN21_I2V": Known("Wan 2.1 I2V", variants=(("Wan 2.1 FLF2V", {"flf_pos_embed_token_number": 514}),)),
    "WAN21_FunControl2V": Known("Wan 2.1 Fun Control"),
    "WAN21_Vace": Known("Wan 2.1 / 2.2 VACE"),
    "WAN21_Camera": Known("Wan 2.1 Fun Camera"),
    "WAN22_Camera": Known("Wan 2.2 Fun Camera"),
    "WAN22_S2V": Known("Wan 2.2 S2V"),
    "WAN21_HuMo": Known("HuMo (Wan 2.1)"),
    "WAN22_Animate": Known("Wan 2.2 Animate"),
    "WAN22_T2V": Known("Wan 2.2 TI2V 5B"),
    "WAN21_FlowRVS": Known("FlowRVS (Wan 2.1)", "0.15.1"),
    "WAN21_SCAIL": Known("SCAIL (Wan 2.1)", "0.16.0"),
    "WAN21_SCAIL2": Known("SCAIL-2 (Wan 2.1)", "0.25.0"),
    "WAN22_WanDancer": Known("WanDancer", "0.21.0"),
    "SeedVR2": Known("SeedVR2", "0.25.0"),
    "Kandinsky5": Known("Kandinsky 5 Video", "0.4.0"),
    "CogVideoX_T2V": Known("CogVideoX T2V", "0.21.0"),
    "CogVideoX_I2V": Known("CogVideoX I2V", "0.21.0"),
    "CogVideoX_Inpaint": Known("CogVideoX Fun inpainting", "0.21.0"),
    "StableAudio": Known("Stable Audio Open 1.0"),
    "StableAudio3": Known("Stable Audio 3", "0.22.0"),
    "ACEStep": Known("ACE-Step"),
    "ACEStep15": Known("ACE-Step 1.5", "0.12.0"),
    "Hunyuan3Dv2": Known("Hunyuan3D 2.0"),
    "Hunyuan3Dv2mini": Known("Hunyuan3D 2.0 mini"),
    "Hunyuan3Dv2_1": Known("Hunyuan3D 2.1"),
    "TripoSplat": Known("TripoSplat", "0.23.0"),
    "RT_DETR_v4": Known("RT-DETRv4", "0.19.0"),
    "SAM3": Known("SAM 3", "0.20.0"),
    "SAM31": Known("SAM 3.1", "0.20.0"),
    "DepthAnything3": Known("Depth Anything 3", "0.25.0"),
}  # fmt: skip
"""By the name of the host's class, in the order of the documentation."""


def name_of(model_config: Any) -> str:
    """What people call the model that the host has detected; its class's name where we have none."""
    host_class, config = type(model_config).__name__, model_config.unet_config
    known = ARCHITECTURES.get(host_class, Known(host_class))
    matching = (name for name, sizes in known.variants if all(config.get(k) == v for k, v in sizes.items()))
    return next(matching, known.name)
