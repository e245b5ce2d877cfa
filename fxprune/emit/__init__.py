"""Slim Hugging Face models: the user's own class, built again with the widths that remain."""
