"""One small rule per op: which axes of its inputs and outputs are the same, and what it does with values."""

from fxprune.rules import contraction, convolution, pointwise, reduction, routing, shape  # registers their rules
from fxprune.rules.apply import describe
from fxprune.rules.registry import Values, find_rule, register_rule, registered_rules, rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Axis, Role, SizeArgument, TensorAxes

__all__ = [
    "Axis",
    "OpSite",
    "Role",
    "SizeArgument",
    "TensorAxes",
    "Values",
    "contraction",
    "convolution",
    "describe",
    "find_rule",
    "pointwise",
    "reduction",
    "register_rule",
    "registered_rules",
    "routing",
    "rule",
    "shape",
]
