"""GGUF files, packed layers and live adapters: everything that needs no host."""
