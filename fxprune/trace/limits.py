"""Size limits of a graph: guards, and sizes that the model specialises on.

If the code of a model branches on a size, as in ``if x.shape[1] > 512``, tracing follows the branch of the example. The
conditions for it come from torch's symbolic shapes; the graph asserts them and names the line that each comes from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxprune.graph.compat import (
    evaluate_expression,
    fake_mode,
    guards_of,
    is_free,
    size_hint,
    size_range,
    spell_expression,
)
from fxprune.graph.context import quiet
from fxprune.graph.tensors import TRACED, input_tensors, is_input, map_tensors
from fxprune.trace.inputs import free_axes

__all__ = ["Size", "forbid", "input_sizes", "limit_sizes", "pin_sizes"]

aten = torch.ops.aten

Size = tuple[fx.Node, int]
"""A size of an input: the node of the tensor, and the axis."""


def input_sizes(graph: fx.Graph) -> dict[Size, int | torch.SymInt]:
    """The sizes of the inputs along the axes that tracing lets vary if it can."""
    return {
        (node, axis): node.meta["val"].shape[axis]
        for node, _ in input_tensors(graph)
        for axis in range(free_axes(node.meta["val"]))
    }


def limit_sizes(graph_module: fx.GraphModule, found: Mapping[Size, int | torch.SymInt]) -> tuple[str, ...]:
    """Add assertions that refuse input sizes for which the model would compute something else.

    ``found`` has the sizes found by tracing, before some of them were pinned. Returns the limits that come from
    branches of the code, in words.
    """
    free: dict[Size, Any] = {
        place: size for place, size in found.items() if isinstance(size, torch.SymInt) and is_free(size)
    }
    fixed = {place: size_hint(now) for place, now in input_sizes(graph_module.graph).items() if not is_free(now)}
    checks = _SizeAssertions(graph_module.graph, fixed)
    for place, size in free.items():
        checks.tie(place, size)
    guards = guards_of(next(iter(free.values()))) if free else []
    notes = [note for expression, line in guards if (note := checks.guard(expression, line))]
    notes += [note for place, size in free.items() if (note := checks.bound(place, size))]
    for place, number in fixed.items():
        checks.compare(operator.eq, place, number)
    return tuple(dict.fromkeys(notes))


def forbid(graph_module: fx.GraphModule, place: Size, size: int) -> str:
    """Add an assertion that refuses a ``size`` of an axis; return the limit in words."""
    return _SizeAssertions(graph_module.graph, {}).compare(operator.ne, place, size)


_SYMBOLS = {operator.eq: "==", operator.ne: "!=", operator.le: "<="}


class _SizeAssertions:
    """Inserts assertions about sizes before the first op of a graph.

    ``fixed`` has the sizes that can be one number only; conditions on these alone hold already.
    """

    def __init__(self, graph: fx.Graph, fixed: Mapping[Size, int]) -> None:
        self.graph = graph
        self.fixed = fixed
        inputs = dict(input_tensors(graph))
        self.first = [node for node in graph.nodes if is_input(node)][-1].next
        self.text = {(node, axis): f"{name}.shape[{axis}]" for node, name in inputs.items() for axis in (0, 1)}
        self.symbols: dict[Any, Size] = {}
        self.traced: dict[Size, int] = {}
        self.bounded: set[Size] = set()

    def tie(self, place: Size, size: torch.SymInt) -> None:
        """Assert a size that tracing found to follow from others; any other size defines its symbol."""
        expression = size.node.expr
        self.traced[place] = size_hint(size)
        if expression.is_Symbol and expression not in self.symbols:
            self.symbols[expression] = place
        elif expression.free_symbols <= set(self.symbols):

            def follows() -> Any:
                value = self._evaluate(expression)
                return operator.eq(self._read(place), value)

            self._assert(follows, f"{self.text[place]} == {self._spell(expression)}")

    def guard(self, expression: Any, line: str) -> str:
        """Assert a condition if it is on sizes of inputs; return it in words."""
        known = expression.free_symbols <= set(self.symbols)
        if not known or all(self.symbols[symbol] in self.fixed for symbol in expression.free_symbols):
            return ""
        if len(expression.free_symbols) == 1 and getattr(expression, "rel_op", "") in ("<", "<="):
            self.bounded.update(self.symbols[symbol] for symbol in expression.free_symbols)
        text = f"{self._spell(expression)} ({line})"
        try:
            self._assert(lambda: self._evaluate(expression), text)
        except Exception:  # torch's arithmetic on sizes may need numbers: then only the traced ones are known to work
            places = [self.symbols[symbol] for symbol in expression.free_symbols]
            text = ", ".join(self.compare(operator.eq, place, self.traced[place], f" ({line})") for place in places)
        return text

    def bound(self, place: Size, size: torch.SymInt) -> str:
        """Assert an upper bound of a size, such as the rows of a table; return the condition in words."""
        largest = size_range(size)[1]
        if largest is None or place in self.bounded or place in self.fixed or not size.node.expr.is_Symbol:
            return ""
        return self.compare(operator.le, place, largest)

    def compare(self, how: Callable[[Any, Any], Any], place: Size, number: int, why: str = "") -> str:
        """Assert a comparison of a size with a number; return the condition in words."""
        text = f"{self.text[place]} {_SYMBOLS[how]} {number}{why}"
        self._assert(lambda: how(self._read(place), number), text)
        return text

    def _read(self, place: Size) -> fx.Proxy:
        node = self.graph.call_function(aten.sym_size.int, place)
        node.meta["val"] = place[0].meta["val"].shape[place[1]]
        return fx.Proxy(node)

    def _evaluate(self, expression: Any) -> Any:
        values = {symbol: self._read(self.symbols[symbol]) for symbol in expression.free_symbols}
        return evaluate_expression(expression, values)

    def _assert(self, condition: Callable[[], Any], text: str) -> None:
        with self.graph.inserting_before(self.first):
            message = f"{TRACED}for inputs with {text}"
            self.graph.call_function(aten._assert_scalar.default, (condition().node, message))

    def _spell(self, expression: Any) -> str:
        return spell_expression(expression, {s: self.text[place] for s, place in self.symbols.items()})


_LOSSY = {operator.mod, operator.floordiv}
"""Ops on sizes whose results tracing may take for constants: the number of chunks of a short input is 1."""

_OTHER_SIZES = (3, 64)
"""A batch and a number of tokens, those that work is counted at, that a graph with free sizes must take."""


def pin_sizes(graph_module: fx.GraphModule) -> str:
    """Make the sizes of inputs static in the metadata if the graph takes one size only; return them in words.

    A size may be free, in a range, or one number. A graph that divides sizes is also run without storage at other
    sizes.
    """
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    tensors = [node for node in inputs if isinstance(node.meta["val"], torch.Tensor)]
    pinned = [note for node in tensors if (note := _pin(node))]
    divides = any(node.target in _LOSSY for node in graph_module.graph.nodes)
    if divides and not _runs_at_other_sizes(graph_module, inputs):
        pinned = [note for node in tensors if (note := _pin(node, all_but_batch=True))] or pinned
    return ", ".join(dict.fromkeys(pinned))


def _pin(node: fx.Node, all_but_batch: bool = False) -> str:
    """Make the sizes of an input static that are one number, or all but the first; return the shape if any is."""
    value = node.meta["val"]
    pinned: set[int] = set()
    for axis, size in enumerate(value.shape):
        smallest, largest = size_range(size)
        if is_free(size) and (axis > 0 if all_but_batch else smallest == largest):
            pinned.add(axis)
    sizes = [size_hint(s) if axis in pinned or not is_free(s) else s for axis, s in enumerate(value.shape)]
    if all(isinstance(size, int) for size in value.shape) or not hasattr(value, "fake_mode"):
        return ""
    with value.fake_mode:
        node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)
    shape = ", ".join(str(size) if isinstance(size, int) else "any" for size in sizes)
    fixes = bool(pinned) or any(not is_free(size) for size in value.shape[: free_axes(value)])
    return f"{node.target} of shape ({shape}) alone" if fixes else ""


def _runs_at_other_sizes(graph_module: fx.GraphModule, inputs: list[fx.Node]) -> bool:
    def other(value: torch.Tensor) -> torch.Tensor:
        wanted = [_OTHER_SIZES[min(i, 1)] if is_free(size) else size_hint(size) for i, size in enumerate(value.shape)]
        return torch.zeros(wanted, dtype=value.dtype)

    try:
        with quiet(), fake_mode(), torch.no_grad():
            fx.Interpreter(graph_module).run(*(map_tensors(node.meta["val"], other) for node in inputs))
    except Exception:  # ops may refuse sizes with any error
        return False
    return True
