"""The dependency graph: every axis of every tensor, and the couplings that the ops impose.

Rules run once over the graph, in order; the equations they state are solved as they come. The result is a networkx
graph whose nodes are :class:`~fxprune.rules.base.Axis` and whose edges are couplings.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import fx

from fxprune.axes import Expr, Factor, Freeze, new_factor
from fxprune.compat import UNKNOWN_SIZE, size_hint
from fxprune.depth import Bypass, find_bypasses
from fxprune.experts import settle_experts
from fxprune.rules import Literal, OpSite, TensorAxes, find_rule
from fxprune.rules.base import Axis, Journal
from fxprune.rules.pointers import follow_pointers
from fxprune.rules.registry import Rule
from fxprune.rules.shape import getitem
from fxprune.state import State, state_of
from fxprune.tensors import get_tensor
from fxprune.trace import Traced
from fxprune.vanishing import find_told_units

__all__ = ["AxisMap", "axis_map", "dependency_graph"]


@dataclass(frozen=True)
class AxisMap:
    """All axes, solved.

    Args:
        tensors: for each tensor name one expression per dimension, in normal form.
        frozen: factors that must keep their units, with the reason.
        tags: roles that ops gave to factors (``head``, ``head_dim``, ..).
        renormalised: for factors that a statistic runs over, the nodes that take it.
        summed: for factors that an op adds up over, the nodes that do.
        literals: numbers in the graph that are sizes.
        unruled: nodes whose op has no rule, with the op.
        modules: module path of each node.
        order: place of each tensor's first use in the order of execution, a weight before its bias.
        parameters: names of parameters; the other ``get_attr`` tensors are buffers.
        buffers: names of buffers.
        blocks: module paths of the repeated blocks.
        bypasses: for each block that can go as a whole, how to go around it.
        tied: parameter names that are another name's tensor, with that name.
        least: for factors that have to keep more than one unit, how many.
        pointers: for tensors that hold positions along an axis, what that axis is made of.
        constants: names of those buffers that the model's code makes, and that are none of the model's own.
    """

    tensors: dict[str, tuple[Expr, ...]]
    frozen: dict[Factor, Freeze]
    tags: dict[Factor, frozenset[str]]
    renormalised: dict[Factor, tuple[str, ...]]
    summed: dict[Factor, tuple[str, ...]]
    literals: tuple[Literal, ...]
    unruled: dict[str, str]
    modules: dict[str, str]
    order: dict[str, int]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    bypasses: dict[str, Bypass] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    least: dict[Factor, int] = field(default_factory=dict)
    pointers: dict[str, Expr] = field(default_factory=dict)
    constants: tuple[str, ...] = ()

    def weights(self) -> tuple[str, ...]:
        """Names of parameters and buffers."""
        return (*self.parameters, *self.buffers)


def dependency_graph(traced: Traced | fx.GraphModule) -> nx.Graph[Axis]:
    """The dependency graph of a traced model.

    Nodes are axes ``(tensor, index)`` with attributes ``expr``, ``size``, ``role`` (``parameter``, ``buffer`` or
    ``activation``) and ``module``. Edges are the couplings an op imposed, with attributes ``op`` and ``node``. The
    solved axes are ``graph.graph["axes"]``, an :class:`AxisMap`.

    Complexity: linear in the number of graph nodes.
    """
    graph_module = traced.graph_module if isinstance(traced, Traced) else traced
    state = state_of(graph_module)
    journal = _state_equations(graph_module)
    axes = _solve(graph_module, journal, state)
    graph: nx.Graph[Axis] = nx.Graph(axes=axes)
    roles = dict.fromkeys(axes.parameters, "parameter") | dict.fromkeys(axes.buffers, "buffer")
    for name, exprs in axes.tensors.items():
        role = roles.get(name, "activation")
        module = name.rpartition(".")[0] if name in roles else axes.modules.get(name, "")
        for i, expr in enumerate(exprs):
            graph.add_node(Axis(name, i), expr=expr, size=expr.size, role=role, module=module)
    for edge in journal.edges:
        if not graph.has_edge(edge.a, edge.b):
            graph.add_edge(edge.a, edge.b, op=edge.op, node=edge.node)
    return graph


def axis_map(graph: nx.Graph[Axis]) -> AxisMap:
    """The solved axes of a dependency graph."""
    axes = graph.graph["axes"]
    assert isinstance(axes, AxisMap)
    return axes


def _state_equations(graph_module: fx.GraphModule) -> Journal:
    """Run every rule; tied parameters first become one."""
    journal = Journal()
    owner: dict[int, TensorAxes] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            _add_weight(node, graph_module, journal, owner)
        elif node.op == "placeholder":
            tensor = _fresh(node.name, node.meta["val"])
            journal.tensors[node.name] = tensor
            for axis in tensor.axes:
                journal.solver.freeze(axis, "an input of the model", node.name)
        elif node.op == "call_function":
            _apply_rule(node, journal)
        elif node.op == "output":
            _freeze_output(node, journal)
    return journal


def _add_weight(node: fx.Node, graph_module: fx.GraphModule, journal: Journal, owner: dict[int, TensorAxes]) -> None:
    name = str(node.target)
    value = get_tensor(graph_module, name)
    tensor = _fresh(name, value, weight=True)
    journal.tensors[name] = tensor
    tied = owner.setdefault(id(value), tensor)
    if tied is not tensor:
        OpSite(node, journal, (tensor,)).tie_all(tied)


def _apply_rule(node: fx.Node, journal: Journal) -> None:
    value = node.meta.get("val")
    inputs = [journal.tensors.get(str(n.target) if n.op == "get_attr" else n.name) for n in node.all_input_nodes]
    tensors = [t for t in inputs if t is not None]
    weight = bool(tensors) and all(isinstance(t, TensorAxes) and t.weight for t in tensors)
    if isinstance(value, torch.Tensor):
        outs: tuple[TensorAxes, ...] = (_fresh(node.name, value, weight),)
        journal.tensors[node.name] = outs[0]
    elif isinstance(value, tuple | list) and any(isinstance(item, torch.Tensor) for item in value):
        outs = tuple(_fresh(f"{node.name}#{i}", item, weight) for i, item in enumerate(value))
        journal.tensors[node.name] = outs
    else:
        outs = ()
    for axis in (axis for out in outs for axis in out.axes if axis.size == UNKNOWN_SIZE):
        journal.solver.freeze(axis, "its size depends on the data", node.name)
    site = OpSite(node, journal, outs)
    if node.target is operator.getitem:
        source = journal.tensors.get(node.all_input_nodes[0].name)
        if isinstance(source, tuple):
            getitem(site, source)
    else:
        function = find_rule(node.target)
        if function is not None:
            _run_rule(function, site)
        elif outs:
            journal.unruled[node.name] = str(node.target)
            site.freeze_all(f"no rule for {node.target}")
    follow_pointers(site)


def _run_rule(function: Rule, site: OpSite) -> None:
    """Run a rule; a use of the op that it was not written for freezes what the op touches, and never crashes."""
    try:
        function(site)
    except Exception as error:  # whatever a rule, a user's own too, trips over
        op = str(site.node.target)
        site.journal.unruled[site.node.name] = op
        site.freeze_all(f"the rule for {op} does not cover this use ({type(error).__name__})")
        site.understood.clear()


def _freeze_output(node: fx.Node, journal: Journal) -> None:
    """What the model returns keeps its shape; an output class called with tensors counts as the output."""
    for result in node.all_input_nodes:
        tensor = journal.tensors.get(str(result.target) if result.op == "get_attr" else result.name)
        if tensor is None:
            _freeze_output(result, journal)
        for item in (tensor,) if isinstance(tensor, TensorAxes) else tensor or ():
            for axis in item.axes:
                journal.solver.freeze(axis, "an output of the model", result.name)
            if item.name in journal.pointers:
                pointed, i = journal.pointers[item.name]
                journal.solver.freeze(pointed.axes[i], "positions along it are an output of the model", result.name)


def _fresh(name: str, value: Any, weight: bool = False) -> TensorAxes:
    shape = value.shape if isinstance(value, torch.Tensor) else ()
    return TensorAxes(name, tuple(new_factor(size_hint(size)) for size in shape), weight)


def _solve(graph_module: fx.GraphModule, journal: Journal, state: State) -> AxisMap:
    solver = journal.solver
    least = settle_experts(journal)
    tensors: dict[str, tuple[Expr, ...]] = {}
    for entry in journal.tensors.values():
        for tensor in (entry,) if isinstance(entry, TensorAxes) else entry:
            tensors[tensor.name] = tuple(solver.resolve(axis) for axis in tensor.axes)
    told = find_told_units(graph_module.graph, journal, tensors, state.constants)
    for factor, (reason, name) in told.frozen.items():
        solver.freeze(factor, reason, name)
    attributes = {str(n.target): n for n in graph_module.graph.nodes if n.op == "get_attr"}
    is_parameter = {name: isinstance(get_tensor(graph_module, name), torch.nn.Parameter) for name in attributes}
    position = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    return AxisMap(
        tensors=tensors,
        frozen=solver.frozen_factors(),
        tags=solver.tagged_factors(),
        renormalised=told.renormalised,
        summed=told.summed,
        literals=tuple(replace(literal, expr=solver.resolve(literal.expr)) for literal in journal.literals),
        unruled=dict(journal.unruled),
        modules={node.name: module_path(node) for node in graph_module.graph.nodes},
        order=_order(attributes, position),
        parameters=tuple(name for name, yes in is_parameter.items() if yes),
        buffers=tuple(name for name, yes in is_parameter.items() if not yes),
        blocks=state.blocks,
        bypasses=find_bypasses(graph_module.graph, state.blocks),
        tied=_tied(graph_module, tuple(attributes)),
        least=least,
        pointers={name: solver.resolve(x.axes[i]) for name, (x, i) in journal.pointers.items()},
        constants=tuple(name for name in attributes if name in state.constants),
    )


def _order(attributes: Mapping[str, fx.Node], position: Mapping[fx.Node, int]) -> dict[str, int]:
    """The place of each tensor's first use: by op, then by argument of the op (a weight comes before its bias)."""

    def first_use(name: str) -> tuple[int, int]:
        node = attributes[name]
        return min(((position[user], user.all_input_nodes.index(node)) for user in node.users), default=(0, 0))

    return {name: place for place, name in enumerate(sorted(attributes, key=first_use))}


def _tied(graph_module: fx.GraphModule, names: tuple[str, ...]) -> dict[str, str]:
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(get_tensor(graph_module, name)), name) for name in names}
    return {name: owner for name, owner in owners.items() if name != owner}


def module_path(node: fx.Node) -> str:
    """Path of the module whose code made ``node``."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""
