"""The dependency graph: every axis of every tensor, and the couplings that the ops impose.

An expert is a unit that positions made by a top-k or the like pick, or weights side by side whose outputs a softmax
mixes. A softmax runs over the experts that are left, and a product with an axis of experts is no attention. A softmax
over anything else keeps its axis.

Rules run once over the graph, in order; the equations they state are solved as they come. The result is a networkx
graph whose nodes are :class:`~fxprune.rules.statements.Axis` and whose edges are couplings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar

import networkx as nx
import torch
from torch import fx

from fxprune.axes import Concat, Expr, Factor, Freeze, factors
from fxprune.discovery.norms import NORMS, KeptNorm, NormReport, find_norms
from fxprune.discovery.zeros import follow_zeros
from fxprune.graph.context import tidy_later
from fxprune.graph.facts import Blocks, Change, Constants, Fact, facts_of
from fxprune.graph.tensors import get_tensor, is_input, tensor_name
from fxprune.pipeline.arguments import instance, one_of, refuse
from fxprune.rules.apply import Descriptions, apply_rule, fresh_axes
from fxprune.rules.registry import is_sum
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Axis, Role, SizeArgument, Statements, Statistic, TensorAxes
from fxprune.trace import Traced

__all__ = [
    "AxisMap",
    "Bypass",
    "Dependencies",
    "axis_map",
    "dependency_graph",
    "find_bypasses",
    "find_residuals",
    "settle_experts",
]


@dataclass(frozen=True)
class Bypass:
    """A residual block: its output is its input plus what it computes.

    Args:
        source: name of the node that goes in.
        target: name of the node that comes out, to be replaced by ``source``.
    """

    source: str
    target: str


def find_bypasses(graph: fx.Graph, blocks: tuple[str, ...]) -> dict[str, Bypass]:
    """For each block that is a residual one, how to go around it.

    The only value that leaves the block has to be reached from a value that enters it through additions alone.
    """
    owner = _owners(graph, frozenset(blocks))
    leaving: dict[str, list[fx.Node]] = {block: [] for block in blocks}
    for node, block in owner.items():
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        if is_tensor and any(owner.get(user) != block for user in node.users):
            leaving[block].append(node)
    found: dict[str, Bypass] = {}
    for block, targets in leaving.items():
        source = _residual_source(targets[0], block, owner) if len(targets) == 1 else None
        if source is not None:
            found[block] = Bypass(source.name, targets[0].name)
    return found


def _owners(graph: fx.Graph, blocks: frozenset[str]) -> dict[fx.Node, str]:
    """The block each operation was made in, for those in one."""
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") if node.op == "call_function" else None
        block = next((path for path, _ in (stack or {}).values() if path in blocks), None)
        if block is not None:
            found[node] = block
    return found


def _residual_source(target: fx.Node, block: str, owner: dict[fx.Node, str]) -> fx.Node | None:
    """The value outside ``block`` that ``target`` is a sum with, if there is exactly one."""
    outside: list[fx.Node] = []
    pending = [target]
    while pending:
        node = pending.pop()
        if not is_sum(node):
            continue
        for term in node.args[:2]:
            if not isinstance(term, fx.Node) or term.op == "get_attr":
                continue
            (pending if owner.get(term) == block else outside).append(term)
    same = [node for node in outside if node.meta["val"].shape == target.meta["val"].shape]
    return same[0] if len(outside) == len(same) == 1 else None


def find_residuals(graph: fx.Graph) -> dict[str, str]:
    """For each node that adds to a value what was computed from it with weights, the name of that value's tensor.

    Complexity: linear in the number of nodes between a value and where it is added to.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[str, str] = {}
    for node in graph.nodes:
        terms = [term for term in node.args[:2] if isinstance(term, fx.Node)] if node.op == "call_function" else []
        if len(terms) == 2 and is_sum(node):
            stream, branch = sorted(terms, key=place.__getitem__)
            if _is_branch(branch, stream, place):
                found[node.name] = tensor_name(stream)
    return found


def _is_branch(branch: fx.Node, stream: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether ``branch`` is computed from ``stream``, and a matrix of weights takes part in it."""
    between, pending = {branch}, [branch]
    reached = weighed = False
    while pending:
        node = pending.pop()
        for source in node.all_input_nodes:
            reached = reached or source is stream
            weighed = weighed or (source.op == "get_attr" and source.meta["val"].ndim > 1)
            if source not in between and place[source] > place[stream]:
                between.add(source)
                pending.append(source)
    return reached and weighed


def settle_experts(stated: Statements) -> dict[Factor, int]:
    """Settle the roles of factors, what a softmax means for its axis, and which axes have no unit to spare.

    Returns:
        For each factor that has to keep more than one unit, how many: the ``k`` of a top-k over it.
    """
    solver = stated.solver
    experts = _experts(stated)
    for factor in experts:
        solver.tag(factor, Role.EXPERT)
    for found in stated.competitions:
        for factor in factors(solver.resolve(found.expr)):
            if factor in experts:
                stated.statistics.append(Statistic(factor, found.freeze.node))
            else:
                solver.freeze(factor, found.freeze.reason, found.freeze.node)
    for product in stated.products:
        solved = [(solver.resolve(expr), role) for expr, role in product.roles]
        if not any(factor in experts for expr, _ in solved for factor in factors(expr)):
            for expr, role in solved:
                solver.tag(expr, role)
    return _least(stated)


def _experts(stated: Statements) -> frozenset[Factor]:
    tags, frozen = stated.solver.tagged_factors(), stated.solver.frozen_factors()
    return frozenset(factor for factor, own in tags.items() if factor not in frozen and _is_expert(own))


def _is_expert(tags: frozenset[str]) -> bool:
    return Role.EXPERT in tags or ({Role.SHARED_OUT, Role.SIDE_BY_SIDE} <= tags and Role.HEAD not in tags)


def _least(stated: Statements) -> dict[Factor, int]:
    """How many units have to stay; where several factors make an axis, the last ones have to make up for the others.

    Units that are picked one at a time along an axis, by several ops, have to be as many.
    """
    solver, least = stated.solver, dict[Factor, int]()
    frozen = solver.frozen_factors()
    single = Counter(solver.resolve(found.expr) for found in stated.at_least if found.count == 1)
    for expr, count in ((solver.resolve(found.expr), found.count) for found in stated.at_least):
        count = max(count, single[expr])
        for factor in reversed(list(_free(expr, frozen))):
            while _fewest(expr, least, frozen) < count and least.get(factor, 1) < factor.size:
                least[factor] = least.get(factor, 1) + 1
    for factor, count in least.items():
        if count >= factor.size:
            node = next(s.node for s in stated.statistics if factor in factors(solver.resolve(s.expr)))
            solver.freeze(factor, f"all {factor.size} units are needed", node)
    return least


def _free(expr: Expr, frozen: Mapping[Factor, object]) -> Iterator[Factor]:
    return (factor for factor in factors(expr) if factor not in frozen)


def _fewest(expr: Expr, least: Mapping[Factor, int], frozen: Mapping[Factor, object]) -> int:
    """The smallest size that the axis ``expr`` may get."""
    if isinstance(expr, Factor):
        return expr.size if expr in frozen else least.get(expr, 1)
    sizes = [_fewest(part, least, frozen) for part in expr.parts]
    return sum(sizes) if isinstance(expr, Concat) else prod(sizes)


@dataclass(frozen=True)
class AxisMap:
    """All axes, solved.

    Args:
        tensors: for each tensor name one expression per dimension, in normal form.
        frozen: factors that must keep their units, with the reason.
        tags: roles that ops gave to factors (``head``, ``head_dim``, ..).
        renormalised: for factors that a statistic runs over, the nodes that take it.
        summed: for factors that an op adds up over, the nodes that do.
        size_arguments: numbers in the graph that are sizes.
        unruled: nodes whose op has no rule, with the op.
        modules: module path of each node.
        order: place of each tensor's first use in the order of execution, a weight before its bias.
        parameters: names of parameters; the other ``get_attr`` tensors are buffers.
        buffers: names of buffers.
        blocks: module paths of the repeated blocks.
        bypasses: for each block that can go as a whole, how to go around it.
        tied: parameter names that are another name's tensor, with that name.
        least: for factors that have to keep more than one unit, how many.
        positions: for tensors that hold positions along an axis, what that axis is made of.
        constants: names of those buffers that the model's code makes, and that are none of the model's own.
        rules: for the node of each op, its rule by itself as text.
        norm: what becomes of norms over units that go, ``sliced`` or ``masked``.
        norms: averages that are kept as masking has them, which are then not among ``renormalised``.
        unkept: where norms are to be kept, the nodes whose average cannot be, with the reason.
        residuals: nodes that add to a value what was computed from it, with the tensor of that value.
    """

    tensors: dict[str, tuple[Expr, ...]]
    frozen: dict[Factor, Freeze]
    tags: dict[Factor, frozenset[str]]
    renormalised: dict[Factor, tuple[str, ...]]
    summed: dict[Factor, tuple[str, ...]]
    size_arguments: tuple[SizeArgument, ...]
    unruled: dict[str, str]
    modules: dict[str, str]
    order: dict[str, int]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    bypasses: dict[str, Bypass] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    least: dict[Factor, int] = field(default_factory=dict)
    positions: dict[str, Expr] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    rules: dict[str, str] = field(default_factory=dict)
    norm: str = "sliced"
    norms: tuple[KeptNorm, ...] = ()
    unkept: dict[str, str] = field(default_factory=dict)
    residuals: dict[str, str] = field(default_factory=dict)

    def weights(self) -> tuple[str, ...]:
        """Names of parameters and buffers."""
        return (*self.parameters, *self.buffers)

    def keeps_norm_over(self, factor: Factor) -> bool:
        """Whether a norm that is kept as masking has it runs over a factor."""
        return any(factor in factors(expr) for norm in self.norms for expr in norm.axes)


@tidy_later()
def dependency_graph(traced: Traced | fx.GraphModule, norm: str = "sliced") -> nx.Graph[Axis]:
    """The dependency graph of a traced model.

    Nodes are axes ``(tensor, index)`` with attributes ``expr``, ``size``, ``role`` (``parameter``, ``buffer`` or
    ``activation``) and ``module``. Edges are the couplings an op imposed, with attributes ``op`` and ``node``. The
    solved axes are ``graph.graph["axes"]``, an :class:`AxisMap`.

    Args:
        traced: a traced model.
        norm: what becomes of a norm over fewer units, ``sliced`` or ``masked``; see :mod:`fxprune.discovery.norms`.

    Complexity: linear in the number of graph nodes.

    Raises:
        ArgumentError: it is no traced model.
        UnknownNameError: there is no such word for ``norm``.
        PassError: it is a graph that did not come from :func:`fxprune.trace`.
    """
    one_of("norm", norm, NORMS)
    graph_module = traced.graph_module if isinstance(traced, Traced) else traced
    instance("traced", graph_module, fx.GraphModule, "what fxprune.trace(model) returns")
    facts_of(graph_module)
    stated, rules = _state_equations(graph_module)
    axes = _solve(graph_module, stated, rules, norm)
    graph: nx.Graph[Axis] = nx.Graph(axes=axes)
    roles = dict.fromkeys(axes.parameters, "parameter") | dict.fromkeys(axes.buffers, "buffer")
    for name, exprs in axes.tensors.items():
        role = roles.get(name, "activation")
        module = name.rpartition(".")[0] if name in roles else axes.modules.get(name, "")
        for i, expr in enumerate(exprs):
            graph.add_node(Axis(name, i), expr=expr, size=expr.size, role=role, module=module)
    for pair in stated.couplings:
        if not graph.has_edge(pair.a, pair.b):
            graph.add_edge(pair.a, pair.b, op=pair.op, node=pair.node)
    return graph


@dataclass(frozen=True, eq=False)
class Dependencies(Fact):
    """The dependency graph of a graph module, and its solved axes.

    Args:
        graph: from :func:`dependency_graph`.
    """

    about: ClassVar[Change] = "graph"
    graph: nx.Graph[Axis]

    @property
    def axes(self) -> AxisMap:
        """The solved axes."""
        return axis_map(self.graph)


def axis_map(graph: nx.Graph[Axis]) -> AxisMap:
    """The solved axes of a dependency graph.

    Raises:
        ArgumentError: it is none.
    """
    asked: Any = graph
    axes = asked.graph.get("axes") if isinstance(asked, nx.Graph) else None
    if not isinstance(axes, AxisMap):
        raise refuse("graph", graph, "a dependency graph, as in fxprune.dependency_graph(fxprune.trace(model))")
    return axes


def _state_equations(graph_module: fx.GraphModule) -> tuple[Statements, dict[str, str]]:
    """What all rules state, run in order, and each rule as text; tied parameters first become one."""
    stated, descriptions = Statements(), Descriptions()
    owner: dict[int, TensorAxes] = {}
    rules: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            _add_weight(node, graph_module, stated, owner)
        elif is_input(node):
            tensor = fresh_axes(node.name, node.meta["val"])
            stated.tensors[node.name] = tensor
            for axis in tensor.axes:
                stated.solver.freeze(axis, "an input of the model", node.name)
        elif node.op == "call_function":
            rules[node.name] = descriptions.of(apply_rule(node, stated))
        elif node.op == "output":
            _freeze_output(node, stated)
    return stated, rules


def _add_weight(node: fx.Node, graph_module: fx.GraphModule, stated: Statements, owner: dict[int, TensorAxes]) -> None:
    name = tensor_name(node)
    value = get_tensor(graph_module, name)
    tensor = fresh_axes(name, value, weight=True)
    stated.tensors[name] = tensor
    tied = owner.setdefault(id(value), tensor)
    if tied is not tensor:
        OpSite(node, stated, (tensor,)).tie_all(tied)


def _freeze_output(node: fx.Node, stated: Statements) -> None:
    """What the model returns keeps its shape; an output class called with tensors counts as the output."""
    for result in node.all_input_nodes:
        tensor = stated.tensors.get(tensor_name(result))
        if tensor is None:
            _freeze_output(result, stated)
        for item in (tensor,) if isinstance(tensor, TensorAxes) else tensor or ():
            for axis in item.axes:
                stated.solver.freeze(axis, "an output of the model", result.name)
            if item.name in stated.positions:
                expr = stated.positions[item.name].expr
                stated.solver.freeze(expr, "positions along it are an output of the model", result.name)


def _solve(graph_module: fx.GraphModule, stated: Statements, rules: dict[str, str], norm: str) -> AxisMap:
    solver, facts = stated.solver, facts_of(graph_module)
    blocks, constants = facts[Blocks].paths, facts[Constants].names
    least = settle_experts(stated)
    tensors: dict[str, tuple[Expr, ...]] = {}
    for entry in stated.tensors.values():
        for tensor in (entry,) if isinstance(entry, TensorAxes) else entry:
            tensors[tensor.name] = tuple(solver.resolve(axis) for axis in tensor.axes)
    zeros = follow_zeros(graph_module.graph, stated, tensors, constants)
    for factor, freeze in zeros.frozen.items():
        solver.freeze(factor, freeze.reason, freeze.node)
    attributes = {str(n.target): n for n in graph_module.graph.nodes if n.op == "get_attr"}
    is_parameter = {name: isinstance(get_tensor(graph_module, name), torch.nn.Parameter) for name in attributes}
    tied = _tied(graph_module, tuple(attributes))
    own = {name: tied.get(name, name) for name in attributes if name not in constants}
    averages = {one: tuple(tensors[place.tensor][place.dim] for place in one.places) for one in stated.averages}
    norms = find_norms(graph_module.graph, averages, zeros.averaged, own) if norm == "masked" else NormReport()
    position = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    return AxisMap(
        tensors=tensors,
        frozen=solver.frozen_factors(),
        tags=solver.tagged_factors(),
        renormalised=_without(zeros.renormalised, {kept.node for kept in norms.kept}),
        summed=zeros.summed,
        size_arguments=tuple(replace(size, expr=solver.resolve(size.expr)) for size in stated.size_arguments),
        unruled=dict(stated.unruled),
        modules={node.name: module_path(node) for node in graph_module.graph.nodes},
        order=_order(attributes, position),
        parameters=tuple(name for name, yes in is_parameter.items() if yes),
        buffers=tuple(name for name, yes in is_parameter.items() if not yes),
        blocks=blocks,
        bypasses=find_bypasses(graph_module.graph, blocks),
        tied=tied,
        least=least,
        positions={name: solver.resolve(found.expr) for name, found in stated.positions.items()},
        constants=tuple(name for name in attributes if name in constants),
        rules=rules,
        norm=norm,
        norms=norms.kept,
        unkept=dict(norms.reasons),
        residuals=find_residuals(graph_module.graph),
    )


def _without(found: Mapping[Factor, tuple[str, ...]], nodes: Collection[str]) -> dict[Factor, tuple[str, ...]]:
    """Nodes by factor without some, and without factors that none is left of."""
    left = {factor: tuple(name for name in names if name not in nodes) for factor, names in found.items()}
    return {factor: names for factor, names in left.items() if names}


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
