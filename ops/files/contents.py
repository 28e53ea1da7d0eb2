"""What a file holds: a diffusion model, or something else, and where that goes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .gguf import GGUFFile


def other_kind(file: GGUFFile, names: Collection[str] | None = None) -> OtherKind | None:
    """What a file without a diffusion model holds, or None: then it may be a diffusion model.

    Args:
        names: of the tensors that may be one, without a prefix; else the file's own names, and what it calls itself.
    """
    found = file.tensors if names is None else names
    architecture = file.architecture if names is None else None
    return next((kind for kind in KINDS if kind.fits(found, architecture)), None)


class OtherKind(NamedTuple):
    """A kind of model that is stored in GGUF files and is not a diffusion model.

    Attributes:
        what: in a sentence.
        remedy: where it goes.
        prefixes: of names that only it has.
        parts: of names that only it has, anywhere in them.
        architectures: what such files call themselves.
        unless: prefixes of names that make it a whole model, which has its own such part.
    """

    what: str
    remedy: str
    prefixes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()

    def fits(self, names: Collection[str], architecture: str | None) -> bool:
        """Whether a file is of this kind, by the names of its tensors or by what it calls itself."""
        if architecture in self.architectures:
            return True
        own = any(n.startswith(self.prefixes) or any(part in n for part in self.parts) for n in names)
        return own and not any(n.startswith(self.unless) for n in names)

    def subject(self, file: GGUFFile) -> str:
        """How a sentence about the file begins."""
        return str(file.architecture) if file.architecture in self.architectures else "this"


OWN_NAMES = "text_encoder"
"""What a text encoder under a host's own names is called where Graft writes it."""

LORA = OtherKind(
    "a LoRA",
    "put it into models/loras, and use LoRA Stack (Graft)",
    parts=(
        *(".lora_A.", ".lora_B.", ".lora_a", ".lora_b", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up."),
        *(".hada_w1_", ".lokr_w1", ".oft_blocks", ".dora_scale"),
    ),
)
IP_ADAPTER = OtherKind(
    "an IP-Adapter",
    "get it as safetensors, for nodes that load IP-Adapters",
    prefixes=("image_proj.", "image_proj_model.", "ip_adapter.", "ip_adapter_proj_model."),
    parts=(".to_k_ip.", ".processor.ip_adapter"),
)
STYLE_MODEL = OtherKind(
    "a style model (Redux)", "get it as safetensors, and use Load Style Model", prefixes=("redux_up.", "redux_down.")
)
MODEL_PATCH = OtherKind(
    "a model patch",
    "put it into models/model_patches, and use Load Model Patch ControlNet (GGUF, Graft)",
    prefixes=(
        *("control_all_x_embedder.", "control_layers.", "controlnet_blocks.0.y_rms.", "lllite_conditioning"),
        *("audio_proj.proj1.", "feature_embedder.", "project_modules.", "model.diffusion_model.project_modules."),
    ),
    unless=("layers.0.", "blocks.0.self_attn."),
)
CONTROLNET = OtherKind(
    "a ControlNet",
    "put it into models/controlnet, and use Load ControlNet Model (GGUF, Graft)",
    prefixes=(
        *("control_model.", "controlnet_", "input_hint_block.", "zero_convs.", "after_proj_list.", "adapter.body."),
        "pos_embed_input.",
    ),
)
VACE = OtherKind(
    "a VACE module, a part of a Wan model",
    "choose the Wan model, and this file as module",
    prefixes=("vace_blocks.", "vace_patch_embedding."),
    unless=("blocks.0.", "patch_embedding."),
)
CONNECTORS = OtherKind(
    "the text connectors of an LTX-2 model",
    "choose the LTX-2 model, and this file as module",
    prefixes=("video_embeddings_connector.", "audio_embeddings_connector.", "text_embedding_projection."),
    unless=("transformer_blocks.", "model.diffusion_model.transformer_blocks.", "token_embd.", "model.embed_tokens."),
)
AUDIO_ENCODER = OtherKind(
    "an audio encoder",
    "get it as safetensors, put that into models/audio_encoders and use Load Audio Encoder",
    prefixes=(
        *("wav2vec2.", "feature_extractor.conv_layers.", "feature_projection.", "encoder.pos_conv_embed."),
        *("encoder.embed_positions.", "model.encoder.embed_positions."),
    ),
    architectures=("whisper",),
)
UPSCALER = OtherKind(
    "an upscaler",
    "get it as safetensors, put that into models/upscale_models and use Load Upscale Model",
    prefixes=("body.0.rdb1.", "RRDB_trunk.", "model.1.sub.", "conv_first.", "layers.0.residual_group."),
)
LATENT_UPSCALER = OtherKind(
    "an upscaler of latents",
    "get it as safetensors, put that into models/latent_upscale_models and use Load Latent Upscale Model",
    prefixes=("post_upsample_res_blocks.", "initial_conv."),
)
# of these three tensor names of llama.cpp first, then those of transformers and diffusers
CLIP_VISION = OtherKind(
    "a CLIP vision model",
    "get it as safetensors, put that into models/clip_vision and use Load CLIP Vision",
    prefixes=("vision_model.", "visual.transformer.resblocks.", "embeddings.patch_embeddings."),
    unless=("text_model.", "transformer.resblocks.", "multi_modal_projector.", "model.embed_tokens."),
)
PROJECTOR = OtherKind(
    "a vision projector (mmproj)",
    "put it beside its text encoder, where the CLIP loader finds it",
    prefixes=("v.blk.", "v.patch_embd.", "v.position_embd.", "mm.", "multi_modal_projector."),
    architectures=("clip",),
    unless=("token_embd.", "model.embed_tokens."),
)
TEXT_ENCODER = OtherKind(
    "a text encoder",
    "use a CLIP loader that reads GGUF",
    prefixes=(
        *("token_embd.", "blk.0.", "enc.blk.", "dec.blk."),
        *("shared.weight", "encoder.block.0.layer.", "text_model.", "model.embed_tokens."),
    ),
    architectures=(
        *("bert", "gemma", "gemma2", "gemma3", "gpt-oss", "llama", "mistral", "mistral3", "phi3", "qwen2"),
        *("qwen2vl", "qwen3", "qwen3vl", "t5", "t5encoder", OWN_NAMES),
    ),
)
VAE = OtherKind(
    "a VAE",
    "use a VAE loader that reads GGUF, such as Load VAE Picture Decoder (GGUF, Graft)",
    prefixes=(
        *("first_stage_model.", "vae.", "encoder.conv_in.", "decoder.conv_in.", "encoder.conv1.", "decoder.conv1."),
        *("taesd_decoder.", "per_channel_statistics.", "post_quant_conv.", "vocoder.", "decoder.up_blocks."),
    ),
    architectures=("vae",),
)

KINDS = (
    *(LORA, IP_ADAPTER, STYLE_MODEL, MODEL_PATCH, CONTROLNET, VACE, CONNECTORS, AUDIO_ENCODER, UPSCALER),
    *(LATENT_UPSCALER, CLIP_VISION, PROJECTOR, TEXT_ENCODER, VAE),
)
"""In the order in which they are asked for. None goes by a name that some diffusion model has, too: ACE-Step, for one,
has tensors under `encoder.` and `decoder.`, and XLabs' ControlNet all of a small Flux."""
