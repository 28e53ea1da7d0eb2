"""ComfyUI's nodes. Only this folder knows the host."""

from .loader import GraftUNETLoader, register_folder
from .lora import GraftLoraStack

register_folder()

NODE_CLASS_MAPPINGS = {
    "GraftUNETLoader": GraftUNETLoader,
    "GraftLoraStack": GraftLoraStack,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "GraftUNETLoader": "Load Diffusion Model (GGUF, Graft)",
    "GraftLoraStack": "LoRA Stack (Graft)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
