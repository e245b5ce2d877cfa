"""Slim models on disk: safetensors, a config, the plan and the report."""

from fxprune.checkpoint.read import from_pretrained
from fxprune.checkpoint.write import save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
