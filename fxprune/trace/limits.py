"""Size limits of a graph: those of its guards, and sizes the model specialises on.

Where the code of a model asks for a size, as in ``if x.shape[1] > 512``, tracing follows the answer of the example and
drops the rest. The conditions under which the answer is the same come from torch's symbolic shapes: ranges, holes,
remainders, equal sizes of two inputs. The graph checks them, and says where in the code they arose.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxprune.graph.compat import fake_mode, guards_of, is_free, size_hint, size_range, spell_expression, work_out
from fxprune.graph.context import quiet
from fxprune.graph.tensors import example_of, input_tensors, is_input
from fxprune.trace.inputs import free_axes

__all__ = ["Size", "forbid", "limit_sizes", "pin_sizes", "sizes_of"]

aten = torch.ops.aten

Size = tuple[fx.Node, int]
"""An axis of an input: the node of the tensor, and which axis of it."""


def sizes_of(graph: fx.Graph) -> dict[Size, int | torch.SymInt]:
    """Return the sizes of the inputs along the axes that tracing lets vary if it can."""
    return {
        (node, axis): node.meta["val"].shape[axis]
        for node, _ in input_tensors(graph)
        for axis in range(free_axes(node.meta["val"]))
    }


def limit_sizes(graph_module: fx.GraphModule, found: Mapping[Size, int | torch.SymInt]) -> tuple[str, ...]:
    """Let a graph refuse inputs of sizes for which its model would compute something else.

    Args:
        graph_module: the graph, changed in place.
        found: the sizes as tracing found them, before some of them were fixed.

    Returns:
        The limits that come from branches of the code, in words.
    """
    free: dict[Size, Any] = {
        place: size for place, size in found.items() if isinstance(size, torch.SymInt) and is_free(size)
    }
    fixed = {place: size_hint(now) for place, now in sizes_of(graph_module.graph).items() if not is_free(now)}
    checks = _Checks(graph_module.graph, fixed)
    for place, size in free.items():
        checks.tie(place, size)
    asked = guards_of(next(iter(free.values()))) if free else []
    notes = [note for expression, line in asked if (note := checks.guard(expression, line))]
    notes += [note for place, size in free.items() if (note := checks.bound(place, size))]
    for place, number in fixed.items():
        checks.compare(operator.eq, place, number)
    return tuple(dict.fromkeys(notes))


def forbid(graph_module: fx.GraphModule, place: Size, size: int) -> str:
    """Let a graph refuse a ``size`` of an axis; return the limit in words."""
    return _Checks(graph_module.graph, {}).compare(operator.ne, place, size)


_SPELLED = {operator.eq: "==", operator.ne: "!=", operator.le: "<="}


class _Checks:
    """Reads sizes and compares them, before anything else in a graph.

    Args:
        graph: the graph.
        fixed: the sizes that can be one number only; what is asked of them alone is answered.
    """

    def __init__(self, graph: fx.Graph, fixed: Mapping[Size, int]) -> None:
        self.graph = graph
        self.fixed = fixed
        inputs = dict(input_tensors(graph))
        self.first = [node for node in graph.nodes if is_input(node)][-1].next
        self.said = {(node, axis): f"{name}.shape[{axis}]" for node, name in inputs.items() for axis in (0, 1)}
        self.symbols: dict[Any, Size] = {}
        self.traced: dict[Size, int] = {}
        self.bounded: set[Size] = set()

    def tie(self, place: Size, size: torch.SymInt) -> None:
        """A size that tracing found to follow from others has to; one that does not is known from now on."""
        expression = size.node.expr
        self.traced[place] = size_hint(size)
        if expression.is_Symbol and expression not in self.symbols:
            self.symbols[expression] = place
        elif expression.free_symbols <= set(self.symbols):
            text = f"{self.said[place]} == {self._spelled(expression)}"
            self._require(lambda values: operator.eq(self._read(place), work_out(expression, values)), expression, text)

    def guard(self, expression: Any, line: str) -> str:
        """A condition on sizes has to hold, as far as inputs have them; return it in words."""
        known = expression.free_symbols <= set(self.symbols)
        if not known or all(self.symbols[symbol] in self.fixed for symbol in expression.free_symbols):
            return ""
        if len(expression.free_symbols) == 1 and getattr(expression, "rel_op", "") in ("<", "<="):
            self.bounded.update(self.symbols[symbol] for symbol in expression.free_symbols)
        text = f"{self._spelled(expression)} ({line})"
        try:
            self._require(lambda values: work_out(expression, values), expression, text)
        except Exception:  # torch's arithmetic on sizes may ask for numbers: then the traced ones are all there are
            places = [self.symbols[symbol] for symbol in expression.free_symbols]
            text = ", ".join(self.compare(operator.eq, place, self.traced[place], f" ({line})") for place in places)
        return text

    def bound(self, place: Size, size: torch.SymInt) -> str:
        """A size that cannot be large, as of the rows of a table, has not to be; return the condition in words."""
        largest = size_range(size)[1]
        if largest is None or place in self.bounded or place in self.fixed or not size.node.expr.is_Symbol:
            return ""
        return self.compare(operator.le, place, largest)

    def compare(self, how: Callable[[Any, Any], Any], place: Size, number: int, why: str = "") -> str:
        """A size has to compare so with a number; return the condition in words."""
        text = f"{self.said[place]} {_SPELLED[how]} {number}{why}"
        self._assert(lambda: how(self._read(place), number), text)
        return text

    def _read(self, place: Size) -> fx.Proxy:
        node = self.graph.call_function(aten.sym_size.int, place)
        node.meta["val"] = place[0].meta["val"].shape[place[1]]
        return fx.Proxy(node)

    def _require(self, condition: Callable[[dict[Any, Any]], Any], expression: Any, text: str) -> None:
        self._assert(lambda: condition({s: self._read(self.symbols[s]) for s in expression.free_symbols}), text)

    def _assert(self, condition: Callable[[], Any], text: str) -> None:
        with self.graph.inserting_before(self.first):
            said = f"this graph was traced for inputs with {text}"
            self.graph.call_function(aten._assert_scalar.default, (condition().node, said))

    def _spelled(self, expression: Any) -> str:
        return spell_expression(expression, {s: self.said[place] for s, place in self.symbols.items()})


_LOSSY = {operator.mod, operator.floordiv}
"""What turns a size into one that tracing may take for a constant: the number of chunks of a short input is 1."""

_OTHER = (3, 64)
"""A batch and a number of tokens that a graph whose sizes vary has to take.

Other than those traced with, and as many tokens as work is counted at, so that this much runs.
"""


def pin_sizes(graph_module: fx.GraphModule) -> str:
    """Write the size into the metadata of inputs of which the graph takes one size only.

    A size may be free, in a range, or one number. Where a graph divides sizes it is also run without storage at other
    ones.

    Returns:
        What was fixed, in words; empty if nothing was.
    """
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    tensors = [node for node in inputs if isinstance(node.meta["val"], torch.Tensor)]
    pinned = [note for node in tensors if (note := _pin(node, _is_one_number))]
    divided = any(node.target in _LOSSY for node in graph_module.graph.nodes)
    if divided and not _runs(graph_module, inputs):
        pinned = [note for node in tensors if (note := _pin(node, lambda _, axis: axis > 0))] or pinned
    return ", ".join(dict.fromkeys(pinned))


def _is_one_number(size: int | torch.SymInt, axis: int) -> bool:
    smallest, largest = size_range(size)
    return smallest == largest


def _pin(node: fx.Node, fixed: Callable[[int | torch.SymInt, int], bool]) -> str:
    """Put numbers in place of the sizes of an input that are ``fixed``; return the shape if any is a number."""
    value = node.meta["val"]
    pinned = {axis for axis, size in enumerate(value.shape) if is_free(size) and fixed(size, axis)}
    sizes = [size_hint(s) if axis in pinned or not is_free(s) else s for axis, s in enumerate(value.shape)]
    if all(isinstance(size, int) for size in value.shape) or not hasattr(value, "fake_mode"):
        return ""
    with value.fake_mode:
        node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)
    shape = ", ".join(str(size) if isinstance(size, int) else "any" for size in sizes)
    fixes = bool(pinned) or any(not is_free(size) for size in value.shape[: free_axes(value)])
    return f"{node.target} of shape ({shape}) alone" if fixes else ""


def _runs(graph_module: fx.GraphModule, inputs: list[fx.Node]) -> bool:
    """Whether the graph computes at all at sizes other than the traced ones."""

    def other(value: torch.Tensor) -> torch.Tensor:
        wanted = [_OTHER[min(i, 1)] if is_free(size) else size_hint(size) for i, size in enumerate(value.shape)]
        return torch.zeros(wanted, dtype=value.dtype)

    try:
        with quiet(), fake_mode(), torch.no_grad():
            fx.Interpreter(graph_module).run(*(example_of(node.meta["val"], other) for node in inputs))
    except Exception:  # ops refuse sizes that they do not take with whatever error they like
        return False
    return True
