"""Propagation of the values of masked units: where a masked unit stays zero, and where it does not.

Masking zeroes a unit in every weight that holds it. Removing it is equivalent if each op that sums over the unit finds
zeros there. A product with a weight always does. A product of two activations, or a plain sum, does only if the zeros
reach it: ``relu`` passes them on, ``sigmoid`` turns them into halves. And some functions have no value at zero at all,
such as a weight divided by its own norm.

So the values of masked units are propagated through the graph, axis by axis. An op whose result differs between a
masked and an absent unit takes a statistic over it, like a norm: it runs on the kept units only, and the group is
marked ``renormalised``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping

from torch import fx

from fxprune.axes import Expr, Factor, Freeze, factors
from fxprune.graph.tensors import producer_of, tensor_name
from fxprune.rules.probing import constant_result
from fxprune.rules.registry import Rule, Values, alias_roots, find_rule, writes
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Axis, Statements

Numbers = frozenset[float | None]
"""Possible values of masked units along an axis; None for any value."""

_ZERO: Numbers = frozenset({0.0})
_ANYTHING: Numbers = frozenset({None})
_MOST = 4
"""Most values to track, then any value: each op is called for all combinations of the values of its inputs."""


class ZeroWalk:
    """Values of masked units of every factor, propagated through a graph by :meth:`visit` of each op in order.

    ``constants`` are tensors made by the code of the model, which masking does not change. ``held`` has the values of
    masked units, where they are known; ``renormalised`` for each factor the nodes that must run on its kept units only,
    ``summed`` those that sum over it; ``frozen`` the factors that must keep their units; ``averaged`` the nodes that
    average over units whose masked values are zero.

    Complexity: linear in the number of nodes times the number of factors of an axis.
    """

    def __init__(
        self, graph: fx.Graph, stated: Statements, tensors: Mapping[str, tuple[Expr, ...]], constants: Collection[str]
    ) -> None:
        self.stated = stated
        self.tensors = tensors
        self.weights = {tensor_name(n) for n in graph.nodes if n.op == "get_attr"}.difference(constants)
        self.fixed = stated.solver.frozen_factors()
        self.held: dict[tuple[Axis, Factor], Numbers] = {}
        self.renormalised: dict[Factor, dict[str, None]] = {}
        self.summed: dict[Factor, dict[str, None]] = {}
        self.averaged: set[str] = set()
        self.averages = {average.node: average.places for average in stated.averages}
        self.frozen: dict[Factor, Freeze] = {}
        self.outs: dict[str, list[str]] = {}
        for name in tensors:
            self.outs.setdefault(producer_of(name), []).append(name)
        self.sources: dict[Axis, list[Axis]] = {}
        for a, b, node, _ in stated.couplings:
            for out, source in ((a, b), (b, a)):
                if producer_of(out.tensor) == node:
                    self.sources.setdefault(out, []).append(source)
        for statistic in stated.statistics:
            for factor in factors(stated.solver.resolve(statistic.expr)):
                self.renormalised.setdefault(factor, {})[statistic.node] = None
        root = alias_roots(graph)
        members: dict[fx.Node, list[str]] = {}
        for node in graph.nodes:
            members.setdefault(root[node], []).append(tensor_name(node))
        self.aliases = {node: members[root[node]] for node in root if writes(node)}

    def visit(self, node: fx.Node) -> None:
        """Find the factors of which ``node`` must see kept units alone, and masked values in its results."""
        op, rule = OpSite(node, self.stated, ()), find_rule(node.target)
        for places in self.stated.sums.get(node.name, ()):
            for factor in self.free(places[0]):
                self.summed.setdefault(factor, {})[node.name] = None
                if not any(self.numbers(place, factor) == _ZERO for place in places):
                    self.renormalise(node, factor)
        averaged = [(place, factor) for place in self.averages.get(node.name, ()) for factor in self.free(place)]
        if averaged and all(self.numbers(place, factor) == _ZERO for place, factor in averaged):
            self.averaged.add(node.name)
        for place in self.places(node.name):
            for factor in self.free(place):
                found = self.result(op, rule, place, factor)
                self.held[place, factor] = found if len(found) <= _MOST else _zero_or_anything(found)
        for name in self.aliases.get(node, ()):  # values that share the memory it writes to
            for place in self.places(name):
                for factor in self.free(place):
                    written = (self.held.get((result, factor), ()) for result in self.places(node.name))
                    self.held[place, factor] = self.numbers(place, factor).union(*written)

    def free(self, place: Axis) -> Iterator[Factor]:
        found = dict.fromkeys(factors(self.tensors[place.tensor][place.dim]))
        return (factor for factor in found if factor not in self.fixed)

    def numbers(self, place: Axis, factor: Factor) -> Numbers:
        if place.tensor in self.weights and self.count(place, factor):
            return _ZERO
        return self.held.get((place, factor), _ANYTHING)

    def count(self, place: Axis, factor: Factor) -> int:
        return factors(self.tensors[place.tensor][place.dim]).count(factor)

    def places(self, name: str) -> Iterator[Axis]:
        """The axes of a tensor, or of all results of a node with several."""
        for tensor in (name,) if name in self.tensors else self.outs.get(name, ()):
            yield from (Axis(tensor, dim) for dim in range(len(self.tensors[tensor])))

    def renormalise(self, node: fx.Node, factor: Factor) -> None:
        """Mark ``node`` to run on the kept units of ``factor``; freeze the factor if it writes in place."""
        if writes(node):
            reason = f"{node.target} writes in place and has no value at zero"
            self.frozen.setdefault(factor, Freeze(reason, node.name))
        self.renormalised.setdefault(factor, {})[node.name] = None

    def result(self, op: OpSite, rule: Rule | None, place: Axis, factor: Factor) -> Numbers:
        """The values of masked units of ``factor`` along ``place``, an axis of a result of ``op``."""
        if op.node.name in self.renormalised.get(factor, {}):
            return _ZERO
        held, values = self.stated.held.get(place), None if rule is None else rule.values
        if held is not None:
            given = [self.numbers(source, factor) for source in held.sources]
            if held.also is not None:
                return frozenset(held.also).union(*given)
            return _ZERO if all(numbers == _ZERO for numbers in given) else _ANYTHING
        sources = [source for source in self.sources.get(place, ()) if self.count(source, factor)]
        if values in (Values.POINTWISE, Values.CAST, Values.COMPARED):
            return self.called(op.node, factor, sources)
        if rule is not None and values is Values.PRODUCT:
            return self.multiplied(place, factor, sources, op.arg(rule.added) if rule.added else None)
        moves, moved = values in (Values.MOVED, Values.PICKED), sources
        if moves:
            names = {x.name for x in op.first}
            moved = [source for source in sources if source.tensor in names]
        copied = self.count(place, factor) > sum(self.count(source, factor) for source in moved)
        if copied or not (moves or values is Values.REDUCED):
            return _ANYTHING  # copies are separate units
        found: Numbers = frozenset().union(*(self.numbers(source, factor) for source in moved))
        return found if moves or found == _ZERO else _zero_or_anything(found)

    def multiplied(self, place: Axis, factor: Factor, sources: list[Axis], added: object) -> Numbers:
        """As :meth:`result`, for a sum of products and of the tensor that the node ``added`` makes, if it is one."""
        term = tensor_name(added) if isinstance(added, fx.Node) else None
        multiplied = [source for source in sources if source.tensor != term]
        product = [self.numbers(source, factor) for source in multiplied]
        inside = self.count(place, factor) > max((self.count(source, factor) for source in multiplied), default=0)
        if inside and not all(numbers == _ZERO for numbers in product):
            return _ANYTHING  # a unit of one source lies inside kept units of another
        found = _ZERO if _ZERO in product else _zero_or_anything(*product)
        terms = [self.numbers(source, factor) for source in sources if source.tensor == term]
        return found if term is None or terms == [_ZERO] else _zero_or_anything(found)

    def called(self, node: fx.Node, factor: Factor, sources: list[Axis]) -> Numbers:
        """As :meth:`result`, for an elementwise op, which is called on the values."""
        inputs = {n: s for n in node.all_input_nodes for s in sources if s.tensor == tensor_name(n)}
        choices = [self.numbers(source, factor) for source in inputs.values()]
        if all(choice == _ANYTHING for choice in choices):
            return _ANYTHING
        found = {
            constant_result(node, dict(zip(inputs, choice, strict=True))) for choice in itertools.product(*choices)
        }
        if any(number is not None and math.isnan(number) for number in found):
            self.renormalise(node, factor)
            return _ZERO
        return frozenset(found)


def _zero_or_anything(*numbers: Numbers) -> Numbers:
    return _ANYTHING | _ZERO if any(0.0 in found for found in numbers) else _ANYTHING
