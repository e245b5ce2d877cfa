"""Which rule belongs to which op. Anyone may register one for an op of their own::

@fxprune.rule("mylib::scaled_add")            # every overload, or "mylib::scaled_add.out" for one
def scaled_add(op: fxprune.OpSite) -> None:
    for x in op.tensors:
        op.broadcast(x)
"""

from __future__ import annotations

from collections.abc import Callable

from fxprune.compat import OpOverload, is_pointwise
from fxprune.rules.base import OpSite

__all__ = ["find_rule", "register_rule", "rule"]

Rule = Callable[[OpSite], None]

_RULES: dict[str, Rule] = {}


def register_rule(name: str, function: Rule) -> None:
    """Use ``function`` for the op ``name`` (``"namespace::op"`` or ``"namespace::op.overload"``)."""
    _RULES[name if "::" in name else f"aten::{name}"] = function


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule for the ops ``names``; a name without namespace is one of ATen's."""

    def decorate(function: Rule) -> Rule:
        for name in names:
            register_rule(name, function)
        return function

    return decorate


def find_rule(target: object) -> Rule | None:
    """The rule for an op: its overload's, else its own, else the pointwise one where torch marks it so."""
    if not isinstance(target, OpOverload):
        return None
    exact, _, base = target.name(), None, target.name().split(".")[0]
    found = _RULES.get(exact) or _RULES.get(base)
    if found is None and not target._schema.is_mutable and is_pointwise(target):
        return _RULES["aten::add"]
    return found
