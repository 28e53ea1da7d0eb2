"""ComfyUI's nodes. Only this folder knows the host."""

from .demo import GraftDemoDecode, GraftDemoPrompt, register_demo
from .inspect import GraftInspect
from .loader import GraftUNETLoader, register_folder
from .lora import GraftLoraStack
from .replacements import offer_replacements

register_folder()
register_demo()
offer_replacements()

NODE_CLASS_MAPPINGS = {
    "GraftUNETLoader": GraftUNETLoader,
    "GraftLoraStack": GraftLoraStack,
    "GraftInspect": GraftInspect,
    "GraftDemoPrompt": GraftDemoPrompt,
    "GraftDemoDecode": GraftDemoDecode,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "GraftUNETLoader": "Load Diffusion Model (GGUF, Graft)",
    "GraftLoraStack": "LoRA Stack (Graft)",
    "GraftInspect": "Inspect Model (Graft)",
    "GraftDemoPrompt": "Demo Prompt (Graft)",
    "GraftDemoDecode": "Demo Decode (Graft)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
