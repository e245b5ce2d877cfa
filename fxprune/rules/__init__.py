"""One small rule per ATen op: which axes of its inputs and outputs are the same."""

from fxprune.rules import attention, contraction, creation, indexing, norm, pointwise, reduction, shape
from fxprune.rules.base import Literal, OpSite, TensorAxes
from fxprune.rules.registry import find_rule, register_rule, rule

__all__ = [
    "Literal",
    "OpSite",
    "TensorAxes",
    "attention",
    "contraction",
    "creation",
    "find_rule",
    "indexing",
    "norm",
    "pointwise",
    "reduction",
    "register_rule",
    "rule",
    "shape",
]
