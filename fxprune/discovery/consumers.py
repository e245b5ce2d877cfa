"""Where a graph multiplies activations by weights and adds up: what each weight takes in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from fxprune.axes import factors, unit_index
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Group
from fxprune.graph.names import tensor_name
from fxprune.rules.apply import run_alone
from fxprune.rules.registry import Values, find_rule
from fxprune.rules.statements import Axis

__all__ = ["Consumer", "consumers_of", "find_consumers", "read_weight", "takes_parameter", "units_at"]


@dataclass(frozen=True)
class Consumer:
    """A product of activations with a weight, or with what is picked from one, and the axis that it adds up over.

    Args:
        node: the product.
        source: the activations.
        dim: their axis that is added up over.
        name: the parameter.
        axis: its axis that is added up over; positions along it are those along ``dim``.
    """

    node: fx.Node
    source: fx.Node
    dim: int
    name: str
    axis: int


def find_consumers(graph: fx.Graph, axes: AxisMap) -> tuple[Consumer, ...]:
    """Return every product of activations with a parameter, in order of execution.

    Args:
        graph: the graph.
        axes: its solved axes.
    """
    trained = set(axes.parameters)
    return tuple(found for node in graph.nodes for found in _consumers(node, axes, trained))


def takes_parameter(node: fx.Node, axes: AxisMap) -> bool:
    """Whether a node is a product of activations with a parameter."""
    return any(True for _ in _consumers(node, axes, set(axes.parameters)))


def consumers_of(group: Group, consumers: tuple[Consumer, ...]) -> tuple[Consumer, ...]:
    """Return the consumers that add up over units of ``group``; none for a layer."""
    if group.factor is None:
        return ()
    held = {(member.name, member.axis) for member in group.parameters}
    return tuple(consumer for consumer in consumers if (consumer.name, consumer.axis) in held)


def units_at(group: Group, consumer: Consumer, axes: AxisMap) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return which unit of ``group`` each position of a consumer's input belongs to, -1 where to none: ``(size,)``.

    Units inside outer ones count through: unit ``u`` in outer unit ``o`` is ``o * group.size + u``.
    """
    assert group.factor is not None
    expr = axes.tensors[consumer.name][consumer.axis]
    unit = unit_index(expr, group.factor)
    if group.outer is None:
        return unit
    return np.where(unit < 0, -1, unit_index(expr, group.outer) * group.size + unit)


def read_weight(node: fx.Node) -> str | None:
    """Return the name of the weight whose values ``node`` holds, moved, cast or picked; None where it holds others."""
    while node.op == "call_function":
        rule, first = find_rule(node.target), node.args[0] if node.args else None
        if rule is None or rule.values not in (Values.MOVED, Values.CAST, Values.PICKED):
            return None
        if not isinstance(first, fx.Node):
            return None
        node = first
    return tensor_name(node) if node.op == "get_attr" else None


def _consumers(node: fx.Node, axes: AxisMap, trained: set[str]) -> Iterator[Consumer]:
    rule = find_rule(node.target) if node.op == "call_function" else None
    if rule is None or rule.values is not Values.PRODUCT or not isinstance(node.meta.get("val"), torch.Tensor):
        return
    read = {tensor_name(source): read_weight(source) for source in node.all_input_nodes}
    if not trained.intersection(name for name in read.values() if name is not None):
        return
    nodes = {tensor_name(source): source for source in node.all_input_nodes}
    for found in run_alone(node)[1].sums:
        pairs = [(a, b) for a, b in _both_ways(found.places) if read[a.tensor] is None and read[b.tensor] in trained]
        for taken, held in pairs:
            name = read[held.tensor]
            assert name is not None
            axis = _same_axis(axes, held, name)
            taken_expr = axes.tensors[taken.tensor][taken.dim]
            if axis is not None and taken_expr.size == axes.tensors[name][axis].size:
                yield Consumer(node, nodes[taken.tensor], taken.dim, axes.tied.get(name, name), axis)


def _both_ways(places: tuple[Axis, ...]) -> tuple[tuple[Axis, Axis], ...]:
    return ((places[0], places[1]), (places[1], places[0])) if len(places) == 2 else ()


def _same_axis(axes: AxisMap, held: Axis, name: str) -> int | None:
    """Return the axis of the parameter that an axis of what is read from it is; None where there is none like it."""
    if held.tensor == name:
        return held.dim
    expr = axes.tensors[held.tensor][held.dim]
    alike = [i for i, other in enumerate(axes.tensors[name]) if other == expr and any(True for _ in factors(expr))]
    return alike[0] if len(alike) == 1 else None
