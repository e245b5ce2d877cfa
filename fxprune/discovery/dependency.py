"""The dependency graph: every axis of every tensor, and the couplings that the ops impose.

Rules run once over the graph, in order; the equations they state are solved as they come. The result is a networkx
graph whose nodes are :class:`~fxprune.rules.statements.Axis` and whose edges are couplings.

An expert is a unit selected by indices from a top-k or similar, or one of parallel weights whose outputs a softmax
mixes. A softmax over experts runs over the kept ones, and a product with an axis of experts is not attention. A softmax
over anything else freezes its axis.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, ClassVar, NamedTuple

import networkx as nx
import torch
from torch import fx

from fxprune.axes import UNIT, Concat, Expr, Factor, Freeze, factors
from fxprune.discovery.norms import KeptNorm, find_norms
from fxprune.discovery.zeros import ZeroWalk
from fxprune.graph.context import defer_gc
from fxprune.graph.facts import Blocks, Change, Constants, Fact, facts_of, owner_block
from fxprune.graph.tensors import get_tensor, is_input, tensor_name
from fxprune.pipeline.arguments import NORMS, instance, one_of, refuse
from fxprune.rules.apply import apply_rule, describe_once, fresh_axes
from fxprune.rules.registry import Values, is_sum, values_of
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Axis, Lookup, Role, SizeArgument, Statements, Statistic, TensorAxes
from fxprune.trace import Traced


@dataclass(frozen=True)
class Bypass:
    """A residual block: names of the nodes of its input and of its output, which is the input plus a branch."""

    source: str
    target: str


def find_bypasses(graph: fx.Graph, blocks: tuple[str, ...]) -> dict[str, Bypass]:
    """Return the bypass of each residual block.

    The only value that leaves such a block is reached from a value that enters it through additions alone.
    """
    leaving: dict[str, list[fx.Node]] = {block: [] for block in blocks}
    owner: dict[fx.Node, str] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") if node.op == "call_function" else None
        inside = next((path for path, _ in (stack or {}).values() if path in leaving), None)
        if inside is not None:
            owner[node] = inside
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


def _residual_source(target: fx.Node, block: str, owner: dict[fx.Node, str]) -> fx.Node | None:
    """The one value outside ``block`` that ``target`` adds to; None if there is not exactly one."""
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
    """Return for each residual addition, of a value and a branch computed from it with weights, the value's tensor.

    Complexity: linear in the number of nodes between a value and the addition.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[str, str] = {}
    for node in graph.nodes:
        terms = [term for term in node.args[:2] if isinstance(term, fx.Node)] if is_sum(node) else []
        if len(terms) == 2:
            stream, branch = sorted(terms, key=place.__getitem__)
            if _is_branch(branch, stream, place):
                found[node.name] = tensor_name(stream)
    return found


def _is_branch(branch: fx.Node, stream: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether ``branch`` is computed from ``stream`` with a matrix of weights."""
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


class Pick(NamedTuple):
    """Rows, the axes ``rows`` of a tensor, that pick a unit of ``factor`` each by the values of ``numbers``."""

    factor: Factor
    numbers: str
    rows: tuple[Expr, ...]


def find_picking_rows(
    graph: fx.Graph,
    stated: Statements,
    tensors: Mapping[str, tuple[Expr, ...]],
    summed: Mapping[Factor, Collection[str]],
) -> dict[str, Factor]:
    """Return the nodes whose rows belong to one unit of a factor each, with it; none if it is picked in several ways.

    Such rows pick matrices of a weight by number, as tokens do experts. Ops that treat each row by itself keep them
    apart: elementwise ones, those that only move other axes, and products of the rows with a matrix each.
    """
    found = {lookup.node: pick for lookup in stated.lookups if (pick := _pick(lookup, stated, tensors)) is not None}
    matrices = set(found)
    for node in (node for node in graph.nodes if node.op == "call_function" and node.name not in found):
        sources = [source.name for source in node.all_input_nodes if source.name in found]
        picks = {found[name] for name in sources}
        values, outs = values_of(node), [tensors[out.name] for out in stated.tensors.get(node.name, ())]
        if len(picks) != 1 or not outs:
            continue
        (pick,) = picks
        moves = values in (Values.MOVED, Values.CAST) and str(node.target) not in _REORDERING
        of_rows = (factor for row in pick.rows for factor in factors(row))
        multiplies = values is Values.PRODUCT and sum(name in matrices for name in sources) == 1
        multiplies = multiplies and all(node.name not in summed.get(factor, ()) for factor in of_rows)
        by_row = moves or multiplies or values in (Values.POINTWISE, Values.COMPARED)
        if by_row and all(exprs.count(row) == 1 for exprs in outs for row in pick.rows):
            found[node.name] = pick
            if moves and matrices.issuperset(sources):
                matrices.add(node.name)
    ways = Counter(pick.factor for pick in set(found.values()))
    return {name: pick.factor for name, pick in found.items() if ways[pick.factor] == 1}


_REORDERING = ("aten.flip.default", "aten.fliplr.default", "aten.flipud.default", "aten.roll.default")
"""Ops that move rows among themselves, and may leave their axis the same."""


def _pick(lookup: Lookup, stated: Statements, tensors: Mapping[str, tuple[Expr, ...]]) -> Pick | None:
    """The pick of a lookup whose rows take the place of the axis that they pick along."""
    factor, out, count = stated.solver.resolve(lookup.expr), tensors.get(lookup.node, ()), len(tensors[lookup.index])
    rows = tuple(row for row in out[lookup.dim : lookup.dim + count] if row != UNIT)
    is_pick = isinstance(factor, Factor) and len(out) == lookup.tensor.rank - 1 + count
    return Pick(factor, lookup.index, rows) if is_pick and rows else None  # type: ignore[arg-type]


def resolve_experts(stated: Statements) -> dict[Factor, int]:
    """Resolve which factors are experts, and so which axes a softmax freezes and which products are attention.

    Returns the number of units that a factor must keep if that is more than one: the ``k`` of a top-k over it.
    """
    solver = stated.solver
    tagged, frozen = solver.tagged_factors(), solver.frozen_factors()
    mixed = {Role.SHARED_OUT, Role.SIDE_BY_SIDE}
    experts = {
        factor
        for factor, tags in tagged.items()
        if factor not in frozen and (Role.EXPERT in tags or (mixed <= tags and Role.HEAD not in tags))
    }
    for factor in experts:
        solver.tag(factor, Role.EXPERT)
    for found in stated.competitions:
        for factor in factors(solver.resolve(found.expr)):
            if factor in experts:
                stated.statistics.append(Statistic(factor, found.freeze.node))
            else:
                solver.freeze(factor, found.freeze.reason, found.freeze.node)
    for product in stated.products:
        solved = [(solver.resolve(expr), role) for expr, role in product]
        if not any(factor in experts for expr, _ in solved for factor in factors(expr)):
            for expr, role in solved:
                solver.tag(expr, role)
    return _least_units(stated)


def _least_units(stated: Statements) -> dict[Factor, int]:
    """The number of units that must stay; if several factors make an axis, the last ones make up for the others.

    Several ops that each select one unit along an axis need as many units.
    """
    solver, least = stated.solver, dict[Factor, int]()
    frozen = solver.frozen_factors()
    single = Counter(solver.resolve(found.expr) for found in stated.at_least if found.count == 1)
    for expr, count in ((solver.resolve(found.expr), found.count) for found in stated.at_least):
        count = max(count, single[expr])
        free = [factor for factor in factors(expr) if factor not in frozen]
        for factor in reversed(free):
            while least.get(factor, 1) < factor.size and size_with(expr, dict.fromkeys(free, 1) | least) < count:
                least[factor] = least.get(factor, 1) + 1
    for factor, count in least.items():
        if count >= factor.size:
            node = next(s.node for s in stated.statistics if factor in factors(solver.resolve(s.expr)))
            solver.freeze(factor, f"all {factor.size} units are needed", node)
    return least


def size_with(expr: Expr, sizes: Mapping[Factor, float]) -> float:
    """Size of an axis with other sizes of factors, which may be fractional."""
    if isinstance(expr, Factor):
        return sizes.get(expr, expr.size)
    parts = [size_with(part, sizes) for part in expr.parts]
    return sum(parts) if isinstance(expr, Concat) else prod(parts)


@dataclass(frozen=True)
class AxisMap:
    """All axes, solved.

    Args:
        tensors: for each tensor name one expression per dimension, in normal form.
        frozen: factors that must keep their units, with the reason.
        tags: roles that ops gave to factors (``head``, ``head_dim``, ..).
        renormalised: for factors that a statistic runs over, its nodes.
        summed: for factors that ops sum over, their nodes.
        size_arguments: numbers in the graph that are sizes.
        unruled: nodes whose op has no rule, with the op.
        modules: module path of each node.
        order: rank of each tensor's first use in the order of execution, a weight before its bias.
        parameters: names of parameters; the other ``get_attr`` tensors are ``buffers``.
        blocks: module paths of the repeated blocks.
        bypasses: for each block that can be removed as a whole, its bypass.
        tied: parameter names that alias another name's tensor, with that name.
        least: for factors that must keep more than one unit, the number.
        positions: for tensors that hold positions along an axis, the expression of that axis.
        picking: for nodes whose rows pick units of a factor, that factor; see :func:`find_picking_rows`.
        constants: names of the buffers that the model's code makes rather than the model holds.
        rules: for the node of each op, its rule as text.
        norm: treatment of norms over removed units, ``sliced`` or ``masked``.
        norms: averages that are rescaled to equal masking, which are then not among ``renormalised``.
        unkept: with ``norm="masked"``, the nodes whose average cannot be rescaled, with the reason.
        residuals: nodes of residual additions, with the tensor that they add to.
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
    picking: dict[str, Factor] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    rules: dict[str, str] = field(default_factory=dict)
    norm: str = "sliced"
    norms: tuple[KeptNorm, ...] = ()
    unkept: dict[str, str] = field(default_factory=dict)
    residuals: dict[str, str] = field(default_factory=dict)

    def weights(self) -> tuple[str, ...]:
        return (*self.parameters, *self.buffers)

    @cached_property
    def trained(self) -> frozenset[str]:
        """Names of parameters."""
        return frozenset(self.parameters)

    @cached_property
    def stored(self) -> frozenset[str]:
        """Names of parameters and buffers."""
        return frozenset(self.weights())

    @cached_property
    def _blocks(self) -> frozenset[str]:
        return frozenset(self.blocks)

    def block_of(self, name: str) -> str | None:
        """The repeated block that a module path or tensor name is or lies in; None if it is in none."""
        return owner_block(name, self._blocks)

    def keeps_norm_over(self, factor: Factor) -> bool:
        return any(factor in factors(expr) for norm in self.norms for expr in norm.axes)


@defer_gc()
def dependency_graph(traced: Traced | fx.GraphModule, norm: str = "sliced") -> nx.Graph[Axis]:
    """The dependency graph of a traced model.

    Nodes are axes ``(tensor, index)`` with attributes ``expr``, ``size``, ``role`` (``parameter``, ``buffer`` or
    ``activation``) and ``module``. Edges are the couplings an op imposed, with attributes ``op`` and ``node``. The
    solved axes are ``graph.graph["axes"]``, an :class:`AxisMap`.

    Args:
        traced: a traced model.
        norm: treatment of norms over removed units, ``sliced`` or ``masked``; see :mod:`fxprune.discovery.norms`.

    Complexity: linear in the number of graph nodes.

    Raises:
        PassError: the graph did not come from :func:`fxprune.trace`.
    """
    one_of("norm", norm, NORMS)
    graph_module = traced.graph_module if isinstance(traced, Traced) else traced
    instance("traced", graph_module, fx.GraphModule, "the result of fxprune.trace(model)")
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
    """The dependency graph of a graph module, and its solved axes."""

    about: ClassVar[Change] = "graph"
    graph: nx.Graph[Axis]

    @property
    def axes(self) -> AxisMap:
        return axis_map(self.graph)


def axis_map(graph: nx.Graph[Axis]) -> AxisMap:
    """The solved axes of a dependency graph."""
    given: Any = graph
    axes = given.graph.get("axes") if isinstance(given, nx.Graph) else None
    if not isinstance(axes, AxisMap):
        raise refuse("graph", graph, "a dependency graph, as in fxprune.dependency_graph(fxprune.trace(model))")
    return axes


def _state_equations(graph_module: fx.GraphModule) -> tuple[Statements, dict[str, str]]:
    """Run all rules in order, and return their statements and each rule as text; tied parameters first become one."""
    stated, described, rules = Statements(), dict[Any, str](), dict[str, str]()
    owner: dict[int, TensorAxes] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            name = tensor_name(node)
            value = get_tensor(graph_module, name)
            weight = fresh_axes(name, value, weight=True)
            stated.tensors[name] = (weight,)
            tied = owner.setdefault(id(value), weight)
            if tied is not weight:
                OpSite(node, stated, (weight,)).tie_all(tied)
        elif is_input(node):
            tensor = fresh_axes(node.name, node.meta["val"])
            stated.tensors[node.name] = (tensor,)
            for axis in tensor.axes:
                stated.solver.freeze(axis, "an input of the model", node.name)
        elif node.op == "call_function":
            rules[node.name] = describe_once(apply_rule(node, stated), described)
        elif node.op == "output":
            _freeze_output(node, stated)
    return stated, rules


def _freeze_output(node: fx.Node, stated: Statements) -> None:
    """Freeze the axes of the outputs; the arguments of an output class count as outputs."""
    for result in node.all_input_nodes:
        if tensor_name(result) not in stated.tensors:
            _freeze_output(result, stated)
        for tensor in stated.tensors.get(tensor_name(result), ()):
            for axis in tensor.axes:
                stated.solver.freeze(axis, "an output of the model", result.name)
            if tensor.name in stated.positions:
                expr = stated.positions[tensor.name].expr
                stated.solver.freeze(expr, "positions along it are an output of the model", result.name)


def _solve(graph_module: fx.GraphModule, stated: Statements, rules: dict[str, str], norm: str) -> AxisMap:
    solver, facts = stated.solver, facts_of(graph_module)
    blocks, constants = facts[Blocks].paths, facts[Constants].names
    least = resolve_experts(stated)
    made = itertools.chain.from_iterable(stated.tensors.values())
    tensors = {tensor.name: tuple(solver.resolve(axis) for axis in tensor.axes) for tensor in made}
    zeros = ZeroWalk(graph_module.graph, stated, tensors, constants)
    for node in (node for node in graph_module.graph.nodes if node.op == "call_function"):
        zeros.visit(node)
    for factor, freeze in zeros.frozen.items():
        solver.freeze(factor, freeze.reason, freeze.node)
    attributes = {str(n.target): n for n in graph_module.graph.nodes if n.op == "get_attr"}
    is_parameter = {name: isinstance(get_tensor(graph_module, name), torch.nn.Parameter) for name in attributes}
    for factor, place in _unproduced(graph_module.graph, stated, tensors, is_parameter).items():
        solver.freeze(factor, "an axis of data that no parameter produces", place)
    position = {node: place for place, node in enumerate(graph_module.graph.nodes)}

    def first_use(name: str) -> tuple[int, int]:
        """By op, then by argument of the op: a weight comes before its bias."""
        node = attributes[name]
        return min(((position[user], user.all_input_nodes.index(node)) for user in node.users), default=(0, 0))

    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(get_tensor(graph_module, name)), name) for name in attributes}
    own = {name: owner for name, owner in owners.items() if name not in constants}
    rescaled = stated.averages if norm == "masked" else ()
    averages = {one: tuple(tensors[place.tensor][place.dim] for place in one.places) for one in rescaled}
    norms, unkept = find_norms(graph_module.graph, averages, zeros.averaged, own)
    kept_norms = {kept.node for kept in norms}
    renormalised = {
        factor: tuple(name for name in names if name not in kept_norms) for factor, names in zeros.renormalised.items()
    }
    return AxisMap(
        tensors=tensors,
        frozen=solver.frozen_factors(),
        tags=solver.tagged_factors(),
        renormalised={factor: names for factor, names in renormalised.items() if names},
        summed={factor: tuple(names) for factor, names in zeros.summed.items()},
        size_arguments=tuple(replace(size, expr=solver.resolve(size.expr)) for size in stated.size_arguments),
        unruled=dict(stated.unruled),
        modules={node.name: module_path(node) for node in graph_module.graph.nodes},
        order={name: place for place, name in enumerate(sorted(attributes, key=first_use))},
        parameters=tuple(name for name, yes in is_parameter.items() if yes),
        buffers=tuple(name for name, yes in is_parameter.items() if not yes),
        blocks=blocks,
        bypasses=find_bypasses(graph_module.graph, blocks),
        tied={name: owner for name, owner in owners.items() if name != owner},
        least=least,
        positions={name: solver.resolve(found.expr) for name, found in stated.positions.items()},
        picking=find_picking_rows(graph_module.graph, stated, tensors, zeros.summed),
        constants=tuple(name for name in attributes if name in constants),
        rules=rules,
        norm=norm,
        norms=norms,
        unkept=unkept,
        residuals=find_residuals(graph_module.graph),
    )


def _unproduced(
    graph: fx.Graph, stated: Statements, axes: Mapping[str, tuple[Expr, ...]], is_parameter: Mapping[str, bool]
) -> dict[Factor, str]:
    """The factors of inputs and constants, such as coordinates, along which no parameter gives units to a value.

    A parameter gives units along its axes that are left in what an op makes of it and a value; those that are summed
    over read units. A table by head or by width of a head has axes that other parameters give units to.

    Returns the name of a tensor with such an axis for each.
    """

    def tensors(node: fx.Node) -> tuple[TensorAxes, ...]:
        return stated.tensors.get(tensor_name(node), ())

    def held(node: fx.Node) -> set[Factor]:
        return {factor for tensor in tensors(node) for expr in axes[tensor.name] for factor in factors(expr)}

    data: dict[Factor, str] = {}
    produced: set[Factor] = set()
    learned: set[fx.Node] = set()
    for node in graph.nodes:
        sources = learned.intersection(node.all_input_nodes)
        if sources or is_parameter.get(str(node.target), False):
            learned.add(node)
            given = {factor for source in sources if all(t.weight for t in tensors(source)) for factor in held(source)}
            produced |= set() if all(t.weight for t in tensors(node)) else given & held(node)
        elif node.op != "output":
            data.update({factor: node.name for factor in held(node) if factor not in data})
    return {factor: name for factor, name in data.items() if factor not in produced}


def module_path(node: fx.Node) -> str:
    """Path of the module whose code ``node`` comes from."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""
