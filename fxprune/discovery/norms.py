"""Norms that can be rescaled to give over the kept units the result over all units with masked ones at zero.

If ``k`` of ``n`` units stay, the mean of squares over the kept ones is ``n / k`` times that over all with zeros for the
others. The graph without these units computes the same norm if the mean is multiplied by ``k / n``. A
root-mean-square norm has two numbers that can absorb this factor together:

    w x / sqrt(sum(x x) / n + e)  =  w sqrt(n / k) x / sqrt(sum(x x) / k + e n / k)

The factor is followed from the average through the graph, as a power of ``n / k``. An op that adds a number passes it
on once that number is scaled too, and an op that multiplies by a weight of the model ends it, as the weight absorbs it.
The effect of an op is found by calling it, so no form of a norm is known here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.axes import Expr
from fxprune.graph.tensors import read_argument, tensor_name
from fxprune.rules.probing import scaled_literal, scaling_power, shift_of
from fxprune.rules.registry import Values, values_of, writes
from fxprune.rules.site import nodes_in
from fxprune.rules.statements import Average


@dataclass(frozen=True)
class ScaledNumber:
    """A literal argument, ``value`` at ``path`` of a node, to multiply by a power of ``n / k``."""

    node: str
    path: tuple[Any, ...]
    power: float
    value: float


@dataclass(frozen=True)
class ScaledWeight:
    """A parameter or buffer whose ``value + offset`` is multiplied by a power of ``n / k``.

    Args:
        offset: the number that the graph adds to it before multiplying, such as 1.
        reader: name of the node that reads it.
    """

    name: str
    power: float
    offset: float
    reader: str


@dataclass(frozen=True)
class KeptNorm:
    """An average over ``axes`` that can equal the one over all units when some are removed, by scaling after it."""

    node: str
    axes: tuple[Expr, ...]
    numbers: tuple[ScaledNumber, ...] = ()
    weights: tuple[ScaledWeight, ...] = ()


class _Lost(Exception):
    """Nothing can absorb the factor; the message says where it is lost."""


def find_norms(
    graph: fx.Graph, averages: Mapping[Average, tuple[Expr, ...]], zero: Collection[str], owners: Mapping[str, str]
) -> tuple[tuple[KeptNorm, ...], dict[str, str]]:
    """The averages that can be rescaled to equal masking, and for the others, by node, why not.

    Args:
        averages: those stated by the rules, with the solved axes of each.
        zero: names of the nodes whose masked units are zero where the average is taken.
        owners: for each name of a parameter or buffer of the model, the first name of the same tensor.

    Complexity: linear in the number of averages times the number of nodes between each and its weight.
    """
    nodes = {node.name: node for node in graph.nodes}
    places = {node: place for place, node in enumerate(graph.nodes)}
    kept: list[KeptNorm] = []
    reasons: dict[str, str] = {}
    for average, axes in averages.items():
        if average.node not in zero:
            reasons[average.node] = "masked units are not zero in its input"
            continue
        try:
            kept.append(_Walk(places, owners).follow(nodes[average.node], average, axes))
        except _Lost as lost:
            reasons[average.node] = str(lost)
    while shared := _shared(graph, kept, owners):
        reasons |= dict.fromkeys(shared, "its weight is also used elsewhere")
        kept = [norm for norm in kept if norm.node not in shared]
    return tuple(kept), reasons


def _shared(graph: fx.Graph, kept: Collection[KeptNorm], owners: Mapping[str, str]) -> set[str]:
    """The nodes of norms whose weight is also read elsewhere, or scaled differently by another norm."""
    readers: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in owners:
            users = (user for user in node.users if user.target is not getattr and values_of(user) is not Values.SHAPE)
            readers.setdefault(owners[str(node.target)], set()).update(user.name for user in users)
    scaled: dict[str, list[tuple[KeptNorm, ScaledWeight]]] = {}
    for norm in kept:
        for weight in norm.weights:
            scaled.setdefault(weight.name, []).append((norm, weight))
    found: set[str] = set()
    for name, pairs in scaled.items():
        scalings = {(norm.axes, weight.power, weight.offset) for norm, weight in pairs}
        if len(scalings) > 1 or readers[name] != {weight.reader for _, weight in pairs}:
            found.update(norm.node for norm, _ in pairs)
    return found


class _Walk:
    """Follows the factor of an average through the graph; ``places`` are ranks of nodes in the order of execution."""

    def __init__(self, places: Mapping[fx.Node, int], owners: Mapping[str, str]) -> None:
        self.places, self.owners = places, owners
        self.numbers: list[ScaledNumber] = []
        self.weights: list[ScaledWeight] = []

    def follow(self, node: fx.Node, average: Average, axes: tuple[Expr, ...]) -> KeptNorm:
        """Return the numbers and weights to scale for an average; raises ``_Lost`` if nothing can absorb the factor."""
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
        """The results of the node of the average, each with its power."""
        if average.epsilon:
            value = read_argument(node, average.epsilon)
            if isinstance(value, fx.Node):
                raise _Lost("the term added to the average is not a number")
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
        """The power of a node's result, given those of its inputs; 0 if a weight absorbs it or only shapes are read."""
        values = values_of(node)
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
            raise _Lost(f"{node.target} reads it before a weight has been multiplied with it")
        power = scaling_power(node, scaled)
        for other in node.all_input_nodes if power else ():
            degree = scaling_power(node, {other: 1.0}) if other not in scaled else None
            if power and degree and self._ends_at(other, node, power / degree):
                return 0.0
        if power is not None:
            return power
        literal = scaled_literal(node, scaled)
        if literal is None:
            raise _Lost(f"{node.target} reads it, and neither a number nor a weight there can absorb the factor")
        path, lacks, power = literal
        self.numbers.append(ScaledNumber(node.name, path, lacks, read_argument(node, path)))
        return power

    def _ends_at(self, source: fx.Node, user: fx.Node, power: float, offset: float = 0.0) -> bool:
        """Whether ``source`` comes from a weight of the model that can absorb the factor; record the weight if so.

        On the way it may be cast, have a number added, or be multiplied by something else.
        """
        if source.op == "get_attr":
            name = self.owners.get(tensor_name(source))
            if name is not None:
                self.weights.append(ScaledWeight(name, power, offset, user.name))
            return name is not None
        values = values_of(source)
        if len(source.users) != 1:
            return False
        if values in (Values.MOVED, Values.CAST):
            first = nodes_in(source.args[0]) if source.args else []
            return len(first) == 1 and self._ends_at(first[0], source, power, offset)
        if values is not Values.POINTWISE or offset:
            return False
        if len(source.all_input_nodes) == 1 and (shift := shift_of(source)) is not None:
            return self._ends_at(source.all_input_nodes[0], source, power, shift)
        factors = (one for one in source.all_input_nodes if scaling_power(source, {one: 1.0}) == 1.0)
        return any(self._ends_at(one, source, power) for one in factors)
