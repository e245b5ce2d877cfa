"""GGUF files: a model's tensors under the names and in the layout that the format has for them."""
