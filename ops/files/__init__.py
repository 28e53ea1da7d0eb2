"""What lies on disk: GGUF models and text encoders with their tokenizers, and LoRAs in any trainer's names."""
