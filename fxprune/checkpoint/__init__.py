"""Slim models on disk: safetensors, a config, and what made them."""

from fxprune.checkpoint.read import from_pretrained
from fxprune.checkpoint.structure import Structure, describe
from fxprune.checkpoint.write import save_pretrained

__all__ = ["Structure", "describe", "from_pretrained", "save_pretrained"]
