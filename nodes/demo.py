"""The demo model's two ends in ComfyUI: words in, a picture out, with no text encoder and no VAE to download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths

from ..demo import pictures
from ..demo.scenes import STYLES, draw_scenes
from . import node
from .loader import DEMO_FOLDER
from .lora import DEMO_LORAS

FOLDER = Path(__file__).resolve().parent.parent / "demo"


def register_demo() -> None:
    """Let our own nodes list the demo's model and LoRAs."""
    folder_paths.folder_names_and_paths[DEMO_FOLDER] = ([str(FOLDER)], {".gguf"})
    folder_paths.folder_names_and_paths[DEMO_LORAS] = ([str(FOLDER)], {".safetensors"})


class GraftDemoPrompt:
    """Demo Prompt (Graft)."""

    DESCRIPTION = (
        "A prompt for Graft's demo model, in a few words that it knows: up to three coloured shapes on a ground, "
        "such as 'a red star and a blue ring on mint'. An empty text is for the negative input."
    )
    SEARCH_ALIASES = ["demo", "graft demo", "toy prompt"]  # noqa: RUF012
    CATEGORY = f"{node.CATEGORY}/demo"
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("For the positive or negative input of a sampler.",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        tooltip = f"The colours, shapes and grounds that it knows: {', '.join(pictures.VOCABULARY)}."
        text = {"multiline": True, "default": "a red star on mint", "tooltip": tooltip}
        return {"required": {"text": ("STRING", text)}}

    @classmethod
    def VALIDATE_INPUTS(cls, text: str | None = None) -> bool | str:
        try:
            pictures.prompt(text or "")
        except ValueError as error:
            return str(error)
        return True

    def encode(self, text: str) -> tuple[Any]:
        # a copy: the host may write into it
        return ([[pictures.prompt(text), {"concat_latent_image": pictures.to_host(pictures.places()).clone()}]],)


class GraftDemoDecode:
    """Demo Decode (Graft)."""

    DESCRIPTION = "Makes pictures of the latents of Graft's demo model. It needs no VAE."
    SEARCH_ALIASES = ["demo", "graft demo", "toy decode"]  # noqa: RUF012
    CATEGORY = f"{node.CATEGORY}/demo"
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The pictures, 8×8 pixels for each cell of the latent.",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"samples": ("LATENT", {"tooltip": "Latents from a sampler with the demo model."})}}

    def decode(self, samples: dict) -> tuple[Any]:
        return (pictures.decode(pictures.to_model(samples["samples"].cpu())),)


class GraftDemoPictures:
    """Demo Training Pictures (Graft)."""

    DESCRIPTION = (
        "Draws pictures in a style, with their captions, for Train LoRA (Graft) on Graft's demo model. One in ten "
        "comes without its caption: guidance needs that."
    )
    SEARCH_ALIASES = ["demo", "graft demo", "training data", "dataset"]  # noqa: RUF012
    CATEGORY = f"{node.CATEGORY}/demo"
    RETURN_TYPES = ("LATENT", "CONDITIONING", "IMAGE")
    RETURN_NAMES = ("latents", "positive", "IMAGE")
    OUTPUT_TOOLTIPS = ("The pictures as latents.", "A caption for each, in the same order.", "To look at.")
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        count = {"default": 64, "min": 1, "max": 4096, "tooltip": "How many pictures."}
        seed = {"default": 0, "min": 0, "max": 0xFFFFFFFF, "control_after_generate": True}
        return {
            "required": {
                "style": ([*STYLES], {"tooltip": "How they are drawn. The demo model itself draws in the style toy."}),
                "count": ("INT", count),
                "seed": ("INT", {**seed, "tooltip": "Which shapes, colours and places."}),
            }
        }

    def draw(self, style: str, count: int, seed: int) -> tuple[Any, ...]:
        drawn, captions = draw_scenes(style, count, seed)
        prompt = GraftDemoPrompt().encode
        texts = ["" if index % 10 == 9 else caption for index, caption in enumerate(captions)]
        conds = [cond for text in texts for cond in prompt(text)[0]]
        return {"samples": pictures.to_host(pictures.encode(drawn))}, conds, drawn
