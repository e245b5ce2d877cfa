"""One small rule per op: the equations between axes of its inputs and outputs, and its effect on values."""

from fxprune.rules import contraction, convolution, pointwise, recurrent, reduction, routing, shape  # registers rules
from fxprune.rules.apply import describe_rule
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
    "describe_rule",
    "find_rule",
    "pointwise",
    "recurrent",
    "reduction",
    "register_rule",
    "registered_rules",
    "routing",
    "rule",
    "shape",
]
