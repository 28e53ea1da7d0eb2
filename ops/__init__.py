"""GGUF files, packed layers and live adapters: everything that needs no host.

    open_gguf(path)         a memory-mapped model file
    load_adapters(path)     a LoRA file of any trainer
"""

from .files.gguf import open_gguf
from .files.lora import load_adapters

__all__ = ["load_adapters", "open_gguf"]
