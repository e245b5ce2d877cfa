"""GGUF files: a model's tensors under the names and in the layout of the format."""
