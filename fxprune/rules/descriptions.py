"""What each op's rule says, by itself, as text; worked out once for all ops of one form."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxprune.rules.apply import run_alone
from fxprune.rules.site import OpSite

__all__ = ["Descriptions", "describe"]


def describe(node: fx.Node) -> str:
    """The rule of ``node`` by itself, as text: ``linear  input[b, s, i], weight[o, i] -> out[b, s, o]  sums i``."""
    return str(run_alone(node)[0])


class Descriptions:
    """The rules of many nodes. What is said depends on the op, on shapes and on the other arguments alone."""

    def __init__(self) -> None:
        self._known: dict[Any, str] = {}

    def of(self, op: OpSite) -> str:
        """As :func:`describe`."""
        node = op.node
        results = tuple(x.sizes for x in op.outs)  # sizes among the arguments may be computed at run time
        keywords = tuple(node.kwargs), _form(op, tuple(node.kwargs.values()))
        key = (node.target, _form(op, node.args), keywords, results)
        if key not in self._known:
            self._known[key] = describe(node)
        return self._known[key]


def _form(op: OpSite, argument: Any) -> Any:
    """What stands for an argument: sizes for a tensor, whether it was met before, and all else as it is."""
    if isinstance(argument, fx.Node):
        found = op.all_of(argument)
        return (op.node.all_input_nodes.index(argument), *(x.sizes for x in found))
    if isinstance(argument, list | tuple):
        return tuple(_form(op, item) for item in argument)
    return argument if argument is None or isinstance(argument, int | str) else repr(argument)
