"""Where a masked unit leaves zeros behind, and where it does not.

Masking zeroes a unit in every weight that holds it. Removing it is the same as long as nothing else can tell: each op
that adds up over the unit has to find zeros there. A product with a weight always does. A product of two activations,
or a plain sum, does only if the zeros got that far: ``relu`` passes them on, ``sigmoid`` makes halves of them. And
some functions have no value at zero at all, such as a weight divided by its own norm.

So the numbers that masked units hold are followed through the graph, axis by axis. An op that can tell such a unit from
one that is not there takes a statistic over it, like a norm: it runs on the kept units alone, and the group is marked
``renormalised``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from torch import fx

from fxprune.axes import Expr, Factor, factors
from fxprune.compat import OpOverload
from fxprune.rules import OpSite, find_rule
from fxprune.rules.base import Axis, Journal
from fxprune.rules.outcome import outcome
from fxprune.rules.pointwise import pointwise
from fxprune.trace.canonical import may_alias

__all__ = ["Told", "find_told_units"]

Numbers = frozenset[float | None]
"""What masked units hold along an axis: some numbers, or None for anything."""

_ZERO: Numbers = frozenset({0.0})
_ANYTHING: Numbers = frozenset({None})
_MOST = 4

_MOVE = (
    "reshape view flatten reshape_as view_as unsqueeze squeeze squeeze_ transpose t permute numpy_T mT movedim"
    " swapaxes adjoint matrix_H expand expand_as broadcast_to broadcast_tensors repeat tile repeat_interleave cat"
    " concat stack split_with_sizes split_with_sizes_copy split chunk tensor_split unbind select slice narrow getitem"
    " embedding index index_select flip roll lift_fresh copy copy_"
    " ravel moveaxis swapdims concatenate view_as_complex view_as_real"
)
"""Ops whose results hold what their inputs do."""

_REDUCE = "tril triu tril_ triu_ diff sum mean norm linalg_vector_norm amax amin var std var_mean std_mean prod"
"""Ops that make zeros of zeros."""

_LINEAR = "linear conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"
_MULTIPLY = {"matmul mm bmm mv dot einsum": "", _LINEAR: "bias"}
_MULTIPLY |= {"addmm baddbmm": "self"}
"""Ops that make zeros where one factor is zero, with the argument that they add."""

_MOVES, _REDUCTIONS = frozenset(_MOVE.split()), frozenset(_REDUCE.split())
_PRODUCTS = {name: added for names, added in _MULTIPLY.items() for name in names.split()}


class Told(NamedTuple):
    """Units that an op tells from units that are not there.

    Args:
        renormalised: for each factor the nodes that have to run on its kept units.
        frozen: for each factor that has to stay, the reason and the node.
        summed: for each factor the nodes that add up over it.
    """

    renormalised: dict[Factor, tuple[str, ...]]
    frozen: dict[Factor, tuple[str, str]]
    summed: dict[Factor, tuple[str, ...]]


def find_told_units(
    graph: fx.Graph, journal: Journal, tensors: Mapping[str, tuple[Expr, ...]], constants: Collection[str] = ()
) -> Told:
    """Every factor whose masked units some op tells from units that are not there.

    Args:
        graph: the graph.
        journal: what the rules said, all of them.
        tensors: the solved axes of each tensor.
        constants: tensors that the code makes, which masking leaves as they are.

    Complexity: linear in the number of nodes times the number of factors of an axis.
    """
    walk = _Walk(graph, journal, tensors, constants)
    for node in graph.nodes:
        if node.op == "call_function":
            walk.visit(node)
    return Told(_frozen_lists(walk.renormalised), walk.frozen, _frozen_lists(walk.summed))


def _frozen_lists(found: Mapping[Factor, Mapping[str, None]]) -> dict[Factor, tuple[str, ...]]:
    return {factor: tuple(nodes) for factor, nodes in found.items()}


class _Walk:
    """One pass over a graph in order; ``held`` are the numbers that masked units hold, where not just anything."""

    def __init__(
        self, graph: fx.Graph, journal: Journal, tensors: Mapping[str, tuple[Expr, ...]], constants: Collection[str]
    ) -> None:
        self.journal = journal
        self.tensors = tensors
        self.weights = {str(n.target) for n in graph.nodes if n.op == "get_attr"}.difference(constants)
        self.fixed = journal.solver.frozen_factors()
        self.held: dict[tuple[Axis, Factor], Numbers] = {}
        self.renormalised: dict[Factor, dict[str, None]] = {}
        self.summed: dict[Factor, dict[str, None]] = {}
        self.frozen: dict[Factor, tuple[str, str]] = {}
        self.outs: dict[str, list[str]] = {}
        for name in tensors:
            self.outs.setdefault(name.partition("#")[0], []).append(name)
        self.sources: dict[Axis, list[Axis]] = {}
        for edge in journal.edges:
            for out, source in ((edge.a, edge.b), (edge.b, edge.a)):
                if out.tensor.partition("#")[0] == edge.node:
                    self.sources.setdefault(out, []).append(source)
        self.sums: dict[str, list[tuple[Axis, ...]]] = {}
        for name, places in journal.sums:
            self.sums.setdefault(name, []).append(places)
        for expr, name in journal.renormalised:
            for factor in factors(journal.solver.resolve(expr)):
                self.renormalised.setdefault(factor, {})[name] = None
        self.aliases = _aliases(graph)

    def visit(self, node: fx.Node) -> None:
        """Work out what ``node`` tells apart, and what masked units hold in its results."""
        for places in self.sums.get(node.name, ()):
            for factor in self.free(places[0]):
                self.summed.setdefault(factor, {})[node.name] = None
                if not any(self.numbers(place, factor) == _ZERO for place in places):
                    self.tell(node, factor)
        for place in self.places(node.name):
            for factor in self.free(place):
                found = self.result(node, place, factor)
                self.held[place, factor] = found if len(found) <= _MOST else _zero_or_anything(found)
        for name in self.aliases.get(node, ()):  # what it writes is seen through all that shares memory with it
            for place in self.places(name):
                for factor in self.free(place):
                    self.held[place, factor] = self.numbers(place, factor) | self.written(node, factor)

    def free(self, place: Axis) -> Iterator[Factor]:
        """The factors of an axis that are not frozen."""
        found = dict.fromkeys(factors(self.tensors[place.tensor][place.dim]))
        return (factor for factor in found if factor not in self.fixed)

    def numbers(self, place: Axis, factor: Factor) -> Numbers:
        """What masked units of ``factor`` hold along ``place``."""
        if place.tensor in self.weights and self.count(place, factor):
            return _ZERO
        return self.held.get((place, factor), _ANYTHING)

    def count(self, place: Axis, factor: Factor) -> int:
        """How often ``factor`` occurs in an axis."""
        return sum(found == factor for found in factors(self.tensors[place.tensor][place.dim]))

    def places(self, name: str) -> Iterator[Axis]:
        """The axes of a tensor, or of all results of a node that has several."""
        for tensor in (name,) if name in self.tensors else self.outs.get(name, ()):
            yield from (Axis(tensor, dim) for dim in range(len(self.tensors[tensor])))

    def tell(self, node: fx.Node, factor: Factor) -> None:
        """Run ``node`` on the kept units of ``factor``; keep them all if it writes in place."""
        if _writes(node):
            self.frozen.setdefault(factor, (f"{node.target} writes in place to what has no value at zero", node.name))
        self.renormalised.setdefault(factor, {})[node.name] = None

    def result(self, node: fx.Node, place: Axis, factor: Factor) -> Numbers:
        """What masked units of ``factor`` hold along ``place``, an axis of a result of ``node``."""
        if node.name in self.renormalised.get(factor, {}):
            return _ZERO
        sources = [source for source in self.sources.get(place, ()) if self.count(source, factor)]
        name = _name(node)
        if find_rule(node.target) is pointwise:
            return self.called(node, factor, sources)
        if place in self.journal.zeros:
            zero = all(self.numbers(source, factor) == _ZERO for source in self.journal.zeros[place])
            return _ZERO if zero else _ANYTHING
        if name in _SPECIAL:
            return _SPECIAL[name](self, node, place, factor)
        if name in _PRODUCTS:
            return self.multiplied(factor, sources, self.argument(node, _PRODUCTS[name]))
        carried = _carriers(node, place, sources) if name in _MOVES or name in _REDUCTIONS else []
        if self.count(place, factor) > sum(self.count(source, factor) for source in carried):
            return _ANYTHING  # copies are units of their own
        found: Numbers = frozenset().union(*(self.numbers(source, factor) for source in carried))
        return found if name in _MOVES or found == _ZERO else _zero_or_anything(found)

    def multiplied(self, factor: Factor, sources: list[Axis], added: str | None) -> Numbers:
        """As :meth:`result`, for a sum of products and of the tensor ``added``."""
        product = [self.numbers(source, factor) for source in sources if source.tensor != added]
        found = _ZERO if _ZERO in product else _zero_or_anything(*product)
        if added is None:
            return found
        terms = [self.numbers(source, factor) for source in sources if source.tensor == added]
        return found if terms == [_ZERO] else _zero_or_anything(found)

    def called(self, node: fx.Node, factor: Factor, sources: list[Axis]) -> Numbers:
        """As :meth:`result`, for an op that works on each element by itself, found out by calling it."""
        inputs = {n: s for n in node.all_input_nodes for s in sources if s.tensor == _key(n)}
        choices = [self.numbers(source, factor) for source in inputs.values()]
        if all(choice == _ANYTHING for choice in choices):
            return _ANYTHING
        found = {outcome(node, dict(zip(inputs, choice, strict=True))) for choice in itertools.product(*choices)}
        if any(number is not None and math.isnan(number) for number in found):
            self.tell(node, factor)
            return _ZERO
        return frozenset(found)

    def argument(self, node: fx.Node, name: str) -> str | None:
        """The tensor passed as argument ``name``."""
        value = OpSite(node, self.journal, ()).arg(name) if name else None
        return _key(value) if isinstance(value, fx.Node) else None

    def written(self, node: fx.Node, factor: Factor) -> Numbers:
        """What masked units of ``factor`` hold in what ``node`` writes; nothing if it writes to none."""
        return frozenset().union(*(self.held.get((place, factor), ()) for place in self.places(node.name)))


def _zero_or_anything(*numbers: Numbers) -> Numbers:
    """Anything, and zero too if that is among ``numbers``."""
    return _ANYTHING | _ZERO if any(0.0 in found for found in numbers) else _ANYTHING


def _attention(walk: _Walk, node: fx.Node, place: Axis, factor: Factor) -> Numbers:
    """Weights of attention are never zero: the values have to be."""
    value = walk.argument(node, "value")
    dim = place.dim - len(walk.tensors[place.tensor])
    if value is None or -dim > len(walk.tensors[value]):
        return _ANYTHING
    found = walk.numbers(Axis(value, dim % len(walk.tensors[value])), factor)
    return found if found == _ZERO else _ANYTHING


def _layer_norm(walk: _Walk, node: fx.Node, place: Axis, factor: Factor) -> Numbers:
    """Beside the axes it runs over, a norm of zeros is its bias."""
    x = walk.argument(node, "input")
    zero = x is not None and walk.argument(node, "bias") is None and walk.numbers(Axis(x, place.dim), factor) == _ZERO
    return _ZERO if zero else _ANYTHING


def _batch_norm(walk: _Walk, node: fx.Node, place: Axis, factor: Factor) -> Numbers:
    """Channels are zero where scale and shift are."""
    names = [walk.argument(node, name) for name in ("weight", "bias")]
    zero = all(name is not None and walk.numbers(Axis(name, 0), factor) == _ZERO for name in names)
    return _ZERO if zero and place.dim == 1 else _ANYTHING


def _pad(walk: _Walk, node: fx.Node, place: Axis, factor: Factor) -> Numbers:
    """Beside what was there, what is filled in."""
    x, fill = walk.argument(node, "self"), OpSite(node, walk.journal, ()).arg("value", 0)
    return _ANYTHING if x is None else walk.numbers(Axis(x, place.dim), factor) | {float(fill)}


def _zeros(walk: _Walk, node: fx.Node, place: Axis, factor: Factor) -> Numbers:
    return _ZERO


_SPECIAL: dict[str, Callable[[_Walk, fx.Node, Axis, Factor], Numbers]] = {
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    **dict.fromkeys(("layer_norm", "rms_norm", "_fused_rms_norm"), _layer_norm),
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _zeros),
}


def _carriers(node: fx.Node, place: Axis, sources: list[Axis]) -> list[Axis]:
    """Those of ``sources`` whose values an op passes on, where it only looks at the shape of others."""
    values = node.args[0]
    if _name(node) == "broadcast_tensors" and isinstance(values, list | tuple):
        values = values[int(place.tensor.partition("#")[2])]
    elif not _name(node).endswith("_as"):
        return sources
    return [source for source in sources if isinstance(values, fx.Node) and source.tensor == _key(values)]


def _key(node: fx.Node) -> str:
    return str(node.target) if node.op == "get_attr" else node.name


def _name(node: fx.Node) -> str:
    """The op without namespace and overload."""
    if isinstance(node.target, OpOverload):
        return str(node.target.name()).removeprefix("aten::").partition(".")[0]
    return str(getattr(node.target, "__name__", ""))


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def _aliases(graph: fx.Graph) -> dict[fx.Node, list[str]]:
    """For each node that writes in place, the values that share memory with what it writes to."""
    root: dict[fx.Node, fx.Node] = {}
    members: dict[fx.Node, list[str]] = {}
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        root[node] = root[first] if isinstance(first, fx.Node) and may_alias(node) else node
        members.setdefault(root[node], []).append(_key(node))
    return {node: members[root[node]] for node in root if _writes(node)}
