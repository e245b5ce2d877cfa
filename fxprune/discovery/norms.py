"""Norms that can be kept as masking has them: their average is said to be one over all units, masked ones too.

Where ``k`` of ``n`` units stay, the mean of squares over the kept ones is ``n / k`` times that over all with zeros in
the place of the others. So the graph without these units computes the same norm if what comes out of the mean were
multiplied by ``k / n``. Nothing in a model says that, but a root-mean-square norm has two numbers that do together:

    w x / sqrt(sum(x x) / n + e)  =  w sqrt(n / k) x / sqrt(sum(x x) / k + e n / k)

The factor is followed from the average through the graph, as a power of ``n / k``. An op that adds a number passes it
on once that number has it too, and an op that multiplies by a weight of the model's own ends it, as the weight takes
it. What ops do with it is found by calling them, so no form of a norm is known here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxprune.axes import Expr
from fxprune.graph.tensors import read_argument, tensor_name
from fxprune.pipeline.arguments import NORMS
from fxprune.rules.aliasing import writes
from fxprune.rules.probing import power_of, scaled_literal, shift_of
from fxprune.rules.registry import Values, find_rule
from fxprune.rules.site import nodes_in
from fxprune.rules.statements import Average

__all__ = ["NORMS", "KeptNorm", "NormReport", "ScaledNumber", "ScaledWeight", "find_norms"]


@dataclass(frozen=True)
class ScaledNumber:
    """A number among the arguments of a node that is multiplied by a power of ``n / k``.

    Args:
        node: name of the node.
        path: where in the node it stands.
        power: the power.
        value: what it is in this graph.
    """

    node: str
    path: tuple[Any, ...]
    power: float
    value: float


@dataclass(frozen=True)
class ScaledWeight:
    """A parameter or buffer of which ``value + offset`` is multiplied by a power of ``n / k``.

    Args:
        name: its name.
        power: the power.
        offset: what the graph adds to it before it multiplies with it, such as 1.
        reader: name of the node that reads it.
    """

    name: str
    power: float
    offset: float
    reader: str


@dataclass(frozen=True)
class KeptNorm:
    """An average that stays the one over all units when some go, by changing numbers and weights behind it.

    Args:
        node: name of the node that takes it.
        axes: what it is taken over.
        numbers: numbers in the graph that change.
        weights: weights that change.
    """

    node: str
    axes: tuple[Expr, ...]
    numbers: tuple[ScaledNumber, ...] = ()
    weights: tuple[ScaledWeight, ...] = ()


@dataclass(frozen=True)
class NormReport:
    """The averages of a graph.

    Args:
        kept: those that can be kept.
        reasons: for the others, by node, why not.
    """

    kept: tuple[KeptNorm, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


class _Lost(Exception):
    """The factor goes where nothing can take it; the message says where."""


def find_norms(
    graph: fx.Graph, averages: Mapping[Average, tuple[Expr, ...]], zero: Collection[str], owners: Mapping[str, str]
) -> NormReport:
    """Find the averages that can be kept as masking has them.

    Args:
        graph: the graph.
        averages: what the rules stated, with the solved axes of each.
        zero: names of the nodes whose masked units are zero where the average is taken.
        owners: for the names of parameters and buffers of the model, the one that stands for all of the same tensor.

    Complexity: linear in the number of averages times the number of nodes behind each up to its weight.
    """
    nodes = {node.name: node for node in graph.nodes}
    walk = _Walk({node: place for place, node in enumerate(graph.nodes)}, owners)
    kept: list[KeptNorm] = []
    reasons: dict[str, str] = {}
    for average, axes in averages.items():
        if average.node not in zero:
            reasons[average.node] = "masked units are not zero in what it is taken of"
            continue
        try:
            kept.append(walk.follow(nodes[average.node], average, axes))
        except _Lost as lost:
            reasons[average.node] = str(lost)
    shared = _shared(graph, kept, owners)
    while shared:
        reasons |= dict.fromkeys(shared, "its weight is used elsewhere, too")
        kept = [norm for norm in kept if norm.node not in shared]
        shared = _shared(graph, kept, owners)
    return NormReport(tuple(kept), reasons)


def _shared(graph: fx.Graph, kept: Collection[KeptNorm], owners: Mapping[str, str]) -> set[str]:
    """The nodes of norms whose weight something else reads, or another norm that would have it otherwise."""
    readers: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in owners:
            own = readers.setdefault(owners[str(node.target)], set())
            own.update(user.name for user in node.users if _reads_values(user))
    asked: dict[str, list[tuple[KeptNorm, ScaledWeight]]] = {}
    for norm in kept:
        for weight in norm.weights:
            asked.setdefault(weight.name, []).append((norm, weight))
    found: set[str] = set()
    for name, wishes in asked.items():
        alike = {(norm.axes, weight.power, weight.offset) for norm, weight in wishes}
        if len(alike) > 1 or readers[name] != {weight.reader for _, weight in wishes}:
            found.update(norm.node for norm, _ in wishes)
    return found


def _reads_values(user: fx.Node) -> bool:
    """Whether an op looks at more of a tensor than its shape, or its dtype."""
    rule = find_rule(user.target) if user.op == "call_function" else None
    return user.target is not getattr and (rule is None or rule.values is not Values.SHAPE)


class _Walk:
    """Follows the factor of one average after the other.

    Args:
        places: the place of each node in the order of execution.
        owners: as for :func:`find_norms`.
    """

    def __init__(self, places: Mapping[fx.Node, int], owners: Mapping[str, str]) -> None:
        self.places, self.owners = places, owners
        self.numbers: list[ScaledNumber] = []
        self.weights: list[ScaledWeight] = []

    def follow(self, node: fx.Node, average: Average, axes: tuple[Expr, ...]) -> KeptNorm:
        """Return what changes so that an average is kept.

        Raises:
            _Lost: the factor goes where nothing can take it.
        """
        self.numbers, self.weights = [], []
        powers = self._begin(node, average)
        pending = {user for start in powers for user in start.users}
        while pending:
            user = min(pending, key=self.places.__getitem__)
            pending.remove(user)
            scaled = {source: powers[source] for source in user.all_input_nodes if powers.get(source)}
            power = self._passed(user, scaled) if scaled else 0.0
            if power:
                powers[user] = power
                pending.update(user.users)
        return KeptNorm(node.name, axes, tuple(self.numbers), tuple(self.weights))

    def _begin(self, node: fx.Node, average: Average) -> dict[fx.Node, float]:
        """The results of the node that takes the average, each with its power."""
        if average.epsilon:
            value = read_argument(node, average.epsilon)
            if isinstance(value, fx.Node):
                raise _Lost("what it adds to the average is no number")
            self.numbers.append(ScaledNumber(node.name, average.epsilon, 1.0, value))
        weight = read_argument(node, average.weight) if average.weight else None
        if isinstance(weight, fx.Node) and self._ends_at(weight, node, average.power):
            return {}
        if isinstance(node.meta.get("val"), torch.Tensor):
            return {node: average.power}
        if any(user.args[1:] != (0,) and user.users for user in node.users):
            raise _Lost("the average itself is an output of its op")
        return {user: average.power for user in node.users if user.args[1:] == (0,)}

    def _passed(self, node: fx.Node, scaled: Mapping[fx.Node, float]) -> float:
        """The power of a node's result, given those of its inputs; 0 where a weight takes it or shapes alone count."""
        rule = find_rule(node.target) if node.op == "call_function" else None
        values = None if rule is None else rule.values
        if values is Values.SHAPE:
            return 0.0
        if node.op == "output" or writes(node):
            raise _Lost("it is written to in place" if node.op != "output" else "it is an output of the model")
        if values in (Values.MOVED, Values.CAST):
            first = nodes_in(node.args[0] if node.args else next(iter(node.kwargs.values()), None))
            found = {scaled.get(source, 0.0) for source in first}
            if len(found) == 1:
                return found.pop()
        if values not in (Values.POINTWISE, Values.COMPARED):
            raise _Lost(f"{node.target} takes what it gives, and no weight of its own has been multiplied with it")
        power = power_of(node, scaled)
        for other in node.all_input_nodes if power else ():
            degree = power_of(node, {other: 1.0}) if other not in scaled else None
            if power and degree and self._ends_at(other, node, power / degree):
                return 0.0
        if power is not None:
            return power
        literal = scaled_literal(node, scaled)
        if literal is None:
            raise _Lost(f"{node.target} works with what it gives, and neither a number nor a weight there makes up")
        path, lacks, power = literal
        self.numbers.append(ScaledNumber(node.name, path, lacks, read_argument(node, path)))
        return power

    def _ends_at(self, source: fx.Node, user: fx.Node, power: float, offset: float = 0.0) -> bool:
        """Whether ``source`` is made of a weight of the model's own that can be scaled in its place; it is put down.

        That may be cast on the way, have a number added, or have been multiplied with something else before.
        """
        if source.op == "get_attr":
            name = self.owners.get(tensor_name(source))
            if name is not None:
                self.weights.append(ScaledWeight(name, power, offset, user.name))
            return name is not None
        rule = find_rule(source.target) if source.op == "call_function" else None
        if rule is None or len(source.users) != 1:
            return False
        if rule.values in (Values.MOVED, Values.CAST):
            first = nodes_in(source.args[0]) if source.args else []
            return len(first) == 1 and self._ends_at(first[0], source, power, offset)
        if rule.values is not Values.POINTWISE or offset:
            return False
        if len(source.all_input_nodes) == 1 and (shift := shift_of(source)) is not None:
            return self._ends_at(source.all_input_nodes[0], source, power, shift)
        factors = (one for one in source.all_input_nodes if power_of(source, {one: 1.0}) == 1.0)
        return any(self._ends_at(one, source, power) for one in factors)
