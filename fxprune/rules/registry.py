"""The registry of rules by op; users add rules for ops of their own.

Regular rules are a line of text (:mod:`fxprune.rules.notation`), others a function::

    fxprune.rule("mylib::project", notation="x[*b, i], weight[o, i] -> out[*b, o]  sums i", values="product")

    @fxprune.rule("mylib::scaled_add", values="pointwise")  # every overload, or "mylib::scaled_add.out" for one
    def scaled_add(op: fxprune.OpSite) -> None:
        for x in op.tensors:
            op.broadcast(x)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from torch import fx

from fxprune.errors import UnknownNameError
from fxprune.graph.compat import OpOverload, is_pointwise
from fxprune.pipeline.arguments import function, instance, refuse
from fxprune.rules.notation import read_notation
from fxprune.rules.site import OpSite

__all__ = ["Values", "find_rule", "is_sum", "moves_values", "register_rule", "registered_rules", "rule"]

Decorated = TypeVar("Decorated")


class Values(StrEnum):
    """Effect of an op on the values of its inputs."""

    MOVED = "moved"
    """Results hold the values of the first tensor, or list of tensors, at other places; repeats are allowed."""
    PICKED = "picked"
    """Results hold values of the first tensor, at the places that another tensor gives."""
    CAST = "cast"
    """Each element by itself, as another type or on another device; positions stay positions."""
    POINTWISE = "pointwise"
    """Each element by itself. Whether zeros stay zero is found by calling the op."""
    COMPARED = "compared"
    """Pointwise, with a result that is the same for the new positions of two units as for the old ones."""
    SHAPE = "shape"
    """Reads shapes alone."""
    PRODUCT = "product"
    """A product or a sum of products: zero where one factor and the added tensor are zero."""
    REDUCED = "reduced"
    """Maps zeros to zeros; nothing is known of other numbers."""


@dataclass(frozen=True)
class Rule:
    """The rule of an op, which makes the statements about one use of it, and the properties given to :func:`rule`."""

    state: Callable[[OpSite], None]
    values: Values | None = None
    added: str = ""
    may_alias: bool = False
    regroups: bool = False
    adds: bool = False


_RULES: dict[str, Rule] = {}

_TAGGED = "aten::mul"
"""The op whose rule applies to every op that torch itself marks as pointwise."""


def rule(
    *names: str,
    notation: str | None = None,
    values: Values | str | None = None,
    added: str = "",
    may_alias: bool = False,
    regroups: bool = False,
    adds: bool = False,
) -> Callable[[Decorated], Decorated]:
    """Register a rule for the ops ``names``: the decorated function, or ``notation``, with which nothing is decorated.

    Args:
        names: ``"namespace::op"`` or ``"namespace::op.overload"``; a name without namespace is one of ATen's.
        notation: the rule as text.
        values: the effect of the op on values, one of :class:`Values`; None if unknown.
        added: for a product, the argument that is added to it; derived from a notation.
        may_alias: whether the op may return its input itself although its schema does not declare it.
        regroups: whether the op regroups axes, which a view cannot do for every memory layout.
        adds: whether the op is the sum of its first two arguments.

    Raises:
        ArgumentError: there is no name, or an argument is of the wrong type.
        FxpruneError: the notation is not valid.
        UnknownNameError: ``values`` is not one of :class:`Values`.
    """
    given: tuple[Any, ...] = names
    if not given or not all(isinstance(name, str) and name for name in given):
        raise refuse("names", names[0] if len(names) == 1 else names, "names of ops, such as 'mylib::turn'")
    if notation is not None:
        instance("notation", notation, str, "text such as 'x[*b, i, j] -> out[*b, j, i]'")
    if values is not None and values not in tuple(Values):
        raise UnknownNameError("values", str(values), tuple(Values))
    properties: dict[str, Any] = {
        "values": None if values is None else Values(values),
        "added": added,
        "may_alias": may_alias,
        "regroups": regroups,
        "adds": adds,
    }
    if notation is not None:
        for name in names:
            read = read_notation(notation, _qualified(name), multiplies=values == Values.PRODUCT)
            register_rule(name, read.state, **{**properties, "added": added or read.added})

    def decorate(decorated: Decorated) -> Decorated:
        if notation is None:
            function("rule", decorated, "a function of an OpSite, or a notation")
            for name in names:
                register_rule(name, decorated, **properties)  # type: ignore[arg-type]
        return decorated

    return decorate


def register_rule(name: str, state: Callable[[OpSite], None], **properties: Any) -> None:
    """Register ``state`` for the op ``name``, with the other fields of :class:`Rule` as keywords."""
    _RULES[_qualified(name)] = Rule(state, **properties)


def _qualified(name: str) -> str:
    return name if "::" in name else f"aten::{name}"


def registered_rules() -> dict[str, Rule]:
    """All rules by the full name of their op."""
    return dict(_RULES)


def find_rule(target: object) -> Rule | None:
    """The rule for an op: its overload's, else its own, else the pointwise rule if torch marks the op as such."""
    if not isinstance(target, OpOverload):
        return _RULES.get(f"python::{getattr(target, '__name__', '')}")
    found = _find(target.name())
    if found is None and not target._schema.is_mutable and is_pointwise(target):
        return _RULES[_TAGGED]
    return found


def _find(name: str) -> Rule | None:
    return _RULES.get(name) or _RULES.get(name.split(".")[0])


def moves_values(op: str) -> bool:
    """Whether an op, as text such as ``aten.view.default``, only moves or casts values."""
    is_getitem = op == str(operator.getitem)
    name = "python::getitem" if is_getitem else op.replace(".", "::", 1).removesuffix(".default")
    found = _find(name)
    return found is not None and found.values in (Values.MOVED, Values.CAST)


def is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two values, neither of them scaled."""
    found = find_rule(node.target)
    return found is not None and found.adds and bool(node.kwargs.get("alpha", 1) == 1)
