"""Slim Hugging Face models: the user's own class, built again with the widths that remain.

``emit`` turns slim tensors into a model that generates, trains and saves like any other; ``rebuild`` repeats the
structure from a dense config and a ``Blueprint``; ``describe_structure`` reports how a model differs from the
one that its class builds from its config, and ``stock_check`` whether a plan leaves a model without such differences.
``inexpressible`` finds the groups of a removal that no model of the class can do without.
"""

from fxprune.emit.emitted import inexpressible, stock_check
from fxprune.emit.emitter import Agrees, Blueprint, Emission, emit, rebuild
from fxprune.emit.structure import Structure, describe_structure

__all__ = [
    "Agrees",
    "Blueprint",
    "Emission",
    "Structure",
    "describe_structure",
    "emit",
    "inexpressible",
    "rebuild",
    "stock_check",
]
