"""One small rule per ATen op: which axes of its inputs and outputs are the same."""

from fxprune.rules import (
    attention,
    complex,
    contraction,
    convolution,
    creation,
    indexing,
    norm,
    pointwise,
    reduction,
    routing,
    shape,
)
from fxprune.rules.base import Literal, OpSite, TensorAxes
from fxprune.rules.registry import find_rule, register_rule, rule

__all__ = [
    "Literal",
    "OpSite",
    "TensorAxes",
    "attention",
    "complex",
    "contraction",
    "convolution",
    "creation",
    "find_rule",
    "indexing",
    "norm",
    "pointwise",
    "reduction",
    "register_rule",
    "routing",
    "rule",
    "shape",
]
