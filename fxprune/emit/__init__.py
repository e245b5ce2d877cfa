"""Slim Hugging Face models: the user's own class, built again with the widths that remain.

``emit`` turns slim tensors into a model that generates, trains and saves like any other; ``rebuild`` repeats the
structure from a dense config and a ``Blueprint``, for loading.
"""

from fxprune.emit.emitter import Agrees, Emission, emit
from fxprune.emit.recipe import Blueprint, rebuild

__all__ = ["Agrees", "Blueprint", "Emission", "emit", "rebuild"]
