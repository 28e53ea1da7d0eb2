"""How small the toy models are: blocks and widths that every GGUF type can hold whole, and two blocks of each kind."""

from __future__ import annotations

WIDTH = 256
FLUX = {
    "hidden_size": WIDTH, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "context_in_dim": WIDTH,
}  # fmt: skip
T5 = {"d_model": WIDTH, "d_ff": 512, "num_heads": 4, "num_layers": 2}
# Forge knows CLIP-L by its width of 768, which so stays
CLIP = {"intermediate_size": 512, "num_hidden_layers": 2}
VAE = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
# of the language models among the text encoders; their widths are what Neo knows them by
ENCODER = {"num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 256}
