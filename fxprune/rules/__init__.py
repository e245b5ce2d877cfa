"""One small rule per op: the equations between axes of its inputs and outputs, and its effect on values."""

# they register the rules
from fxprune.rules import contraction, convolution, pointwise, recurrent, reduction, routing, shape  # noqa: F401
from fxprune.rules.registry import Values, registered_rules, rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Role, TensorAxes

__all__ = ["OpSite", "Role", "TensorAxes", "Values", "registered_rules", "rule"]
