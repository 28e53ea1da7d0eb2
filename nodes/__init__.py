"""ComfyUI's nodes. Only this folder knows the host."""

from . import checkpoint, loader, lora, parts, text_encoder
from .calibrate import GraftCalibrate, GraftImportance, GraftLoadImatrix, GraftSaveImatrix, register_folder
from .checkpoint import GraftCheckpointLoader
from .demo import GraftDemoDecode, GraftDemoPictures, GraftDemoPrompt, register_demo
from .hashes import offer_hashes
from .inspect import GraftInspect
from .loader import GraftUNETLoader
from .lora import GraftLoraStack
from .lora_names import extend_host
from .lora_page import register_addresses
from .multigpu import offer_wrapped
from .node import share_folder
from .parts import GraftControlNetLoader, GraftModelPatchLoader, GraftVAELoader
from .raylight import offer_to_raylight
from .replacements import offer_replacements
from .save import GraftSaveCLIPGGUF, GraftSaveGGUF
from .save_lora import GraftSaveLora
from .strengths import GraftLora, GraftRegions, GraftStrength
from .text_encoder import GraftCLIPLoader
from .train import GraftTrainLora

share_folder(loader.FOLDER, "diffusion_models")
share_folder(text_encoder.FOLDER, text_encoder.ALL_FILES)
share_folder(lora.GGUF_LORAS, "loras")
share_folder(checkpoint.FOLDER, "checkpoints")
share_folder(parts.VAES, "vae")
share_folder(parts.CONTROLNETS, "controlnet")
share_folder(parts.MODEL_PATCHES, "model_patches")
register_demo()
register_folder()
offer_replacements()
offer_hashes(
    {
        "diffusion_models": (loader.FOLDER, loader.DEMO_FOLDER),
        "text_encoders": (text_encoder.FOLDER, text_encoder.ALL_FILES),
        "loras": ("loras", lora.GGUF_LORAS, lora.DEMO_LORAS),
        "checkpoints": (checkpoint.FOLDER,),
        "vae": (parts.VAES,),
        "controlnet": (parts.CONTROLNETS,),
        "model_patches": (parts.MODEL_PATCHES,),
    }
)
extend_host()
register_addresses()
offer_wrapped()
offer_to_raylight()

NODE_CLASS_MAPPINGS = {
    "GraftUNETLoader": GraftUNETLoader,
    "GraftCLIPLoader": GraftCLIPLoader,
    "GraftCheckpointLoader": GraftCheckpointLoader,
    "GraftVAELoader": GraftVAELoader,
    "GraftControlNetLoader": GraftControlNetLoader,
    "GraftModelPatchLoader": GraftModelPatchLoader,
    "GraftLoraStack": GraftLoraStack,
    "GraftLora": GraftLora,
    "GraftRegions": GraftRegions,
    "GraftStrength": GraftStrength,
    "GraftInspect": GraftInspect,
    "GraftSaveGGUF": GraftSaveGGUF,
    "GraftSaveCLIPGGUF": GraftSaveCLIPGGUF,
    "GraftCalibrate": GraftCalibrate,
    "GraftImportance": GraftImportance,
    "GraftSaveImatrix": GraftSaveImatrix,
    "GraftLoadImatrix": GraftLoadImatrix,
    "GraftSaveLora": GraftSaveLora,
    "GraftTrainLora": GraftTrainLora,
    "GraftDemoPrompt": GraftDemoPrompt,
    "GraftDemoDecode": GraftDemoDecode,
    "GraftDemoPictures": GraftDemoPictures,
}

# the front end's search for "gguf" puts names first in which it comes early: most want the diffusion model's loader
NODE_DISPLAY_NAME_MAPPINGS = {
    "GraftUNETLoader": "Load Diffusion Model (GGUF, Graft)",
    "GraftCLIPLoader": "Load CLIP Text Encoders (GGUF, Graft)",
    "GraftCheckpointLoader": "Load Whole Checkpoint (GGUF, Graft)",
    "GraftVAELoader": "Load VAE Picture Decoder (GGUF, Graft)",
    "GraftControlNetLoader": "Load ControlNet Model (GGUF, Graft)",
    "GraftModelPatchLoader": "Load Model Patch ControlNet (GGUF, Graft)",
    "GraftLoraStack": "LoRA Stack (Graft)",
    "GraftLora": "LoRA by Region and Step (Graft)",
    "GraftRegions": "Split into Regions (Graft)",
    "GraftStrength": "LoRA Where and When (Graft)",
    "GraftInspect": "Inspect Model (Graft)",
    "GraftSaveGGUF": "Save Diffusion Model as GGUF (Graft)",
    "GraftSaveCLIPGGUF": "Save CLIP Text Encoder as GGUF (Graft)",
    "GraftCalibrate": "Calibrate (Graft)",
    "GraftImportance": "Importance (Graft)",
    "GraftSaveImatrix": "Save Importance (Graft)",
    "GraftLoadImatrix": "Load Importance (Graft)",
    "GraftSaveLora": "Save LoRA (Graft)",
    "GraftTrainLora": "Train LoRA (Graft)",
    "GraftDemoPrompt": "Demo Prompt (Graft)",
    "GraftDemoDecode": "Demo Decode (Graft)",
    "GraftDemoPictures": "Demo Training Pictures (Graft)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
