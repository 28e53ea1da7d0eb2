"""What files call an architecture, ``general.architecture``, by the tensors that it has.

Readers go by it: ComfyUI-GGUF takes those of the first table and no other, so models that it runs under another's name
(Chroma and Flux.2 as flux, Z-Image as lumina2) get that one. What no reader asks for has the name that people use.
"""

from __future__ import annotations

from collections.abc import Collection

KNOWN_TO_PEERS: dict[str, tuple[str, ...]] = {
    "hyvid": ("txt_in.individual_token_refiner.blocks.0.norm1.weight",),
    "flux": ("double_blocks.0.img_attn.proj.weight",),
    "sd3": ("joint_blocks.0.x_block.attn.qkv.weight",),
    "aura": ("double_layers.0.modX.1.weight",),
    "hidream": ("caption_projection.0.linear.weight", "double_stream_blocks.0.block.ff_i.shared_experts.w3.weight"),
    "cosmos": ("blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_cross_attn.1.weight"),
    "ltxv": ("adaln_single.emb.timestep_embedder.linear_2.weight", "patchify_proj.weight"),
    "wan": ("blocks.0.self_attn.norm_q.weight", "text_embedding.2.weight", "head.modulation"),
    "qwen_image": ("transformer_blocks.0.attn.add_q_proj.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight"),
    "lumina2": ("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"),
    "sdxl": ("input_blocks.0.0.weight", "label_emb.0.0.weight"),
    "sd1": ("input_blocks.0.0.weight", "time_embed.0.weight"),
}
"""Names of tensors that are all there; the more particular before the more general."""

OTHERS: dict[str, tuple[str, ...]] = {
    "hunyuan_dit": ("mlp_t5.0.weight", "blocks.0.attn1.Wqkv.weight"),
    "hunyuan3d": ("latent_in.weight", "cond_in.weight"),
    "pixart": ("t_block.1.weight", "y_embedder.y_proj.fc1.weight"),
    "mochi": ("t5_yproj.weight", "blocks.0.attn.qkv_x.weight"),
    "omnigen2": ("time_caption_embed.timestep_embedder.linear_1.weight", "layers.0.attn.to_q.weight"),
    "acestep": ("genre_embedder.weight", "speaker_embedder.weight"),
    "stable_audio": ("preprocess_conv.weight", "transformer.rotary_pos_emb.inv_freq"),
    "stable_cascade": ("clip_txt_mapper.weight",),
    "krea2": ("blocks.0.attn.wq.weight", "txtmlp.1.weight"),
    "svd": ("input_blocks.0.0.weight", "input_blocks.1.0.time_stack.emb_layers.1.weight"),
}

_DIFFUSERS = (
    "transformer_blocks.0.attn.norm_added_k.weight", "single_transformer_blocks.0.attn.to_q.weight",
    "joint_transformer_blocks.3.ff_context.out_projection.weight", "down_blocks.0.resnets.0.conv1.weight",
)  # fmt: skip
"""Of diffusers' names for models whose readers want the original ones."""


def architecture_named(names: Collection[str]) -> str | None:
    """``general.architecture`` of a diffusion model with tensors of these names; None if it is in no table."""
    tables = ({"svd": OTHERS["svd"]}, KNOWN_TO_PEERS, OTHERS)
    for table in tables:
        for architecture, marks in table.items():
            if all(mark in names for mark in marks):
                return architecture
    return None


def has_diffusers_names(names: Collection[str]) -> bool:
    """Whether a Flux, SD3, AuraFlow or Stable Diffusion has the names of diffusers, which other readers refuse."""
    return any(mark in names for mark in _DIFFUSERS) and architecture_named(names) != "qwen_image"


__all__ = ["KNOWN_TO_PEERS", "architecture_named", "has_diffusers_names"]
