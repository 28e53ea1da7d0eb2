"""ComfyUI's nodes. Only this folder knows the host."""

from . import loader, text_encoder
from .demo import GraftDemoDecode, GraftDemoPrompt, register_demo
from .inspect import GraftInspect
from .loader import GraftUNETLoader
from .lora import GraftLoraStack
from .node import share_folder
from .replacements import offer_replacements
from .text_encoder import GraftCLIPLoader

share_folder(loader.FOLDER, "diffusion_models")
share_folder(text_encoder.FOLDER, text_encoder.ALL_FILES)
register_demo()
offer_replacements()

NODE_CLASS_MAPPINGS = {
    "GraftUNETLoader": GraftUNETLoader,
    "GraftCLIPLoader": GraftCLIPLoader,
    "GraftLoraStack": GraftLoraStack,
    "GraftInspect": GraftInspect,
    "GraftDemoPrompt": GraftDemoPrompt,
    "GraftDemoDecode": GraftDemoDecode,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "GraftUNETLoader": "Load Diffusion Model (GGUF, Graft)",
    "GraftCLIPLoader": "Load CLIP (GGUF, Graft)",
    "GraftLoraStack": "LoRA Stack (Graft)",
    "GraftInspect": "Inspect Model (Graft)",
    "GraftDemoPrompt": "Demo Prompt (Graft)",
    "GraftDemoDecode": "Demo Decode (Graft)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
