"""Groups of units removed together, found by BFS in the dependency graph, and the products that read them.

One unit of a parameter axis is the trigger. Breadth-first search follows the couplings as long as the axis reached
holds the trigger's factor; the parameters met on the way are the members of the group. In the paper's words: a neuron
triggers those that depend on it, these trigger the next, until nothing new is found (LLM-Pruner, section 3.1).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import torch
from torch import fx

from fxprune.axes import Expr, Factor, Index, Product, beside, factors, unit_index
from fxprune.discovery.dependency import AxisMap, axis_map
from fxprune.errors import ArgumentError
from fxprune.graph.context import defer_gc
from fxprune.graph.facts import Change, Fact
from fxprune.graph.tensors import producer_of, starred, tensor_name, upstream
from fxprune.pipeline.arguments import EXACT, KINDS, VOCAB, Kind, invalid, one_of, refuse
from fxprune.pipeline.pipeline import html_table
from fxprune.rules.apply import apply_rule_alone
from fxprune.rules.registry import Values, values_of
from fxprune.rules.statements import Axis, Role

DEFAULT_KINDS = ("mlp", "head", "conv")
"""Kinds to prune by default: those of the paper, and channels of convolutional networks, which have no others."""


def as_kinds(name: str, kinds: Any) -> tuple[str, ...]:
    """Return ``kinds``, the argument ``name``, as a tuple; a single kind may stand alone.

    The prefix ``exact-`` leaves out groups of a kind that a norm runs over.
    """
    if not isinstance(kinds, Collection) or isinstance(kinds, bytes):
        raise refuse(name, kinds, f"one or more of {', '.join(KINDS)}")
    named = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not named:
        raise invalid(name, kinds, f"${name} is empty", f"Name one or more of {', '.join(KINDS)}")
    if VOCAB in map(bare_kind, named):
        raise ArgumentError(
            "the kind vocab has no groups, which passes choose from",
            where=name,
            remedy="Remove tokens by fxprune.prune(model, kinds='vocab', tokenizer=tokenizer)",
            shell="Remove tokens by --kinds vocab",
            argument=name,
            value=kinds,
        )
    known = (*KINDS, VOCAB)  # which fxprune.prune takes out before
    # no norm runs over a layer, so that the prefix makes no difference there
    return tuple("layer" if one_of("kind", bare_kind(kind), known) == "layer" else str(kind) for kind in named)


def bare_kind(kind: Any) -> Any:
    """Return a kind without the prefix: ``mlp`` for ``exact-mlp``."""
    return kind.removeprefix(EXACT) if isinstance(kind, str) else kind


@dataclass(frozen=True)
class Member:
    """An axis of a parameter (``trained``) or buffer that holds units of the group, with its expression.

    Where the axis does not hold the outer units of the group, the first axis does, with the expression ``rows``.
    """

    name: str
    axis: int
    expr: Expr
    trained: bool = True
    rows: Expr | None = None

    def __str__(self) -> str:
        return f"{self.name}[{self.axis}]"


@dataclass(frozen=True)
class Group:
    """Units that can be removed, one at a time, each with everything that depends on it.

    Args:
        name: unique and readable, such as ``"model.layers.3/head"``.
        kind: of the units.
        members: the axes to slice, in order of execution.
        factor: the factor of the axis algebra with these units; None for a layer.
        block: module path of the block it lies in; None if it spans several.
        outer: the factor that is always around this one, or along the first axis of the weights that hold it: each of
            its units may keep different inner units, as each expert may keep other channels.
        renormalised: nodes that take a statistic over this axis; removal then equals masking up to that statistic.
        trigger: the parameter axis from which the search started.
        least: number of units that must stay, such as those selected by a top-k.
    """

    name: str
    kind: Kind
    members: tuple[Member, ...]
    factor: Factor | None = None
    block: str | None = None
    outer: Factor | None = None
    renormalised: tuple[str, ...] = ()
    trigger: Axis | None = None
    least: int = 1

    def __repr__(self) -> str:
        return f"<Group {self.name}: {self._summary}>"

    def __str__(self) -> str:
        """The group with its members, one per line; those of equal blocks together, with their number."""
        lines = (f"  {axis}{f' ({count})' if count > 1 else ''}" for axis, count in self._axes().items())
        return "\n".join((f"{self.name}: {self._summary}", *lines))

    def _repr_html_(self) -> str:
        return html_table(f"{self.name}: {self._summary}", self._axes().items(), ("axis", "number"))

    def _axes(self) -> Counter[str]:
        return Counter(starred(str(member)) for member in self.members)

    @property
    def _summary(self) -> str:
        inside = "" if self.outer is None else f" inside each of {self.outer.size}"
        exact = "" if not self.renormalised else ", renormalised"
        units = "unit" if self.size == 1 else "units"
        return f"{self.size:,} {units} of kind {self.kind}{inside}, on {len(self.members)} axes{exact}"

    @property
    def size(self) -> int:
        """Number of units, inside one outer unit if there is an outer factor."""
        return 1 if self.factor is None else self.factor.size

    @property
    def shape(self) -> tuple[int, ...]:
        """``(units,)``, or ``(outer units, units)`` where units may be chosen separately inside each outer unit."""
        return (self.size,) if self.outer is None else (self.outer.size, self.size)

    def numbers_along(self, expr: Expr, rows: Expr | None = None) -> Index:
        """The unit at each position of the axis ``expr``, or -1 for none: ``(size,)``.

        Unit ``u`` in outer unit ``o`` has number ``o * size + u``. It is ``(rows, size)`` if the outer units are on the
        first axis of the tensor, ``rows``.
        """
        assert self.factor is not None
        unit = unit_index(expr, self.factor)
        if self.outer is None:
            return unit
        outer = unit_index(expr, self.outer) if rows is None else unit_index(rows, self.outer)[:, None]
        return np.where(unit < 0, -1, outer * self.size + unit)

    @property
    def is_stacked(self) -> bool:
        """Whether the outer units are on an axis of the weights of their own, as those of experts are."""
        return any(member.rows is not None for member in self.members)

    def tied(self) -> Group:
        """The group with one choice for all rows of stacked weights."""
        members = tuple(replace(member, rows=None) for member in self.members)
        return replace(self, members=members, outer=None) if self.is_stacked else self

    def is_of(self, kinds: Sequence[str]) -> bool:
        """Whether its units are of one of ``kinds``; ``exact-mlp`` matches kind ``mlp`` with no norm over it."""
        return self.kind in kinds or (not self.renormalised and f"{EXACT}{self.kind}" in kinds)

    @property
    def parameters(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.trained)


@dataclass(frozen=True)
class Groups(Fact):
    """The groups of a graph."""

    about: ClassVar[Change] = "graph"
    all: tuple[Group, ...] = ()

    def __iter__(self) -> Iterator[Group]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def of_kinds(self, kinds: Sequence[str]) -> tuple[Group, ...]:
        return tuple(group for group in self.all if group.is_of(kinds))


@defer_gc()
def find_groups(graph: nx.Graph[Axis]) -> tuple[Group, ...]:
    """Every group of the model, in order of execution of their triggers; frozen factors and those of no unit make none.

    Complexity: linear in the size of the graph times the number of factors of an axis.
    """
    axes = axis_map(graph)
    by_factor = axes_by_factor(graph)
    groups: list[Group] = []
    seen: set[Factor] = set(axes.frozen)
    taken: dict[str, int] = {}
    ordered = sorted(axes.parameters, key=lambda name: axes.order[name])
    for trigger in (Axis(name, i) for name in ordered for i in range(len(axes.tensors[name]))):
        for factor in factors(graph.nodes[trigger]["expr"]):
            if factor in seen or not factor.size:
                continue
            seen.add(factor)
            reached = set(nx.node_connected_component(graph.subgraph(by_factor[factor]), trigger))
            group = _make_group(axes, factor, trigger, reached)
            count = taken[group.name] = taken.get(group.name, 0) + 1
            groups.append(group if count == 1 else replace(group, name=f"{group.name}.{count}"))
    inside: dict[str, list[Member]] = {block: [] for block in axes.blocks if block in axes.bypasses}
    for name in ordered:
        block = axes.block_of(name)
        if block is not None and block in inside:
            inside[block].append(Member(name, 0, axes.tensors[name][0]))
    layers = {block: tuple(members) for block, members in inside.items() if members}
    return (*groups, *(Group(f"{block}/layer", "layer", members, block=block) for block, members in layers.items()))


def axes_by_factor(graph: nx.Graph[Axis]) -> dict[Factor, list[Axis]]:
    """The axes that hold each factor, in the order of the graph."""
    found: dict[Factor, list[Axis]] = {}
    for axis in graph.nodes:
        for factor in dict.fromkeys(factors(graph.nodes[axis]["expr"])):
            found.setdefault(factor, []).append(axis)
    return found


def _make_group(axes: AxisMap, factor: Factor, trigger: Axis, reached: set[Axis]) -> Group:
    own = (a for a in reached if a.tensor in axes.stored and a.tensor not in axes.tied)
    ordered = sorted(own, key=lambda a: (axes.order[a.tensor], a))
    is_normed = bool(axes.renormalised.get(factor)) or axes.keeps_norm_over(factor)
    outer = None if is_normed else _outer_factor(axes, factor, reached)
    members = tuple(_make_member(axes, axis, outer) for axis in ordered)
    owners = {axes.block_of(m.name) for m in members if m.trained}
    block = next(iter(owners)) if len(owners) == 1 else None
    roles = _roles(axes, factor, members)
    named: tuple[tuple[str, Kind], ...] = ((Role.EXPERT, "expert"), (Role.HEAD, "head"), (Role.HEAD_DIM, "head_dim"))
    renormalised = axes.renormalised.get(factor, ())
    shared: Kind = "conv" if Role.CONVOLVED in roles and not is_normed else "channel"
    kind: Kind = next((kind for role, kind in named if role in roles), "mlp" if len(owners) == 1 else shared)
    least = axes.least.get(factor, 1)
    return Group(f"{block or 'model'}/{kind}", kind, members, factor, block, outer, renormalised, trigger, least)


def _make_member(axes: AxisMap, axis: Axis, outer: Factor | None) -> Member:
    exprs = axes.tensors[axis.tensor]
    rows = None if outer is None or outer in factors(exprs[axis.dim]) else exprs[0]
    return Member(axis.tensor, axis.dim, exprs[axis.dim], axis.tensor in axes.trained, rows)


def _roles(axes: AxisMap, factor: Factor, members: Sequence[Member]) -> frozenset[str]:
    """Return the roles of ``factor``, with heads and head widths distinguished by position.

    A factor that a product of two activations does not sum over is a head if it stands around a width, and a width if
    it stands inside a head. Otherwise it is neither, such as the inner channels of a scan.
    """
    tags = axes.tags.get(factor, frozenset())
    if Role.HEAD_DIM not in tags or Role.SUMMED in tags:
        return tags
    places = [place for member in members for place in beside(member.expr, factor)]
    if any(Role.HEAD_DIM in axes.tags.get(f, ()) and f not in axes.frozen for _, after in places for f in after):
        return tags | {Role.HEAD}
    around = frozenset().union(*(axes.tags.get(f, ()) for before, _ in places for f in before))
    return tags if around & {Role.HEAD, Role.HEAD_DIM} else tags - {Role.HEAD_DIM}


def _outer_factor(axes: AxisMap, factor: Factor, reached: set[Axis]) -> Factor | None:
    """The factor each of whose units may keep different units of ``factor``.

    It must be in every tensor that holds ``factor``, and in every weight directly around it, or its first axis: then
    nothing compares or sums units of ``factor`` across units of the outer one, and a choice per outer unit is a
    permutation away from one for all. Activations whose rows pick one outer unit each, as tokens do experts, count as
    holding it. If a tensor holds the outer factor twice, as ``h @ h.T`` does, its units do meet each other.
    """
    common: list[Factor] | None = None
    for axis in reached:
        exprs = axes.tensors[axis.tensor]
        around = [f for expr in exprs for f in factors(expr)]
        around += [f for f in (axes.picking.get(producer_of(axis.tensor)),) if f is not None and f not in around]
        if axis.tensor in axes.stored:  # the factors before every occurrence in the products of the axis
            first, *others = (before for before, _ in beside(exprs[axis.dim], factor))
            around = [f for f in first if all(f in other for other in others)]
            if axis.dim and isinstance(exprs[0], Factor) and axis.tensor not in axes.constants:
                around.insert(0, exprs[0])
        common = around if common is None else [f for f in common if f in around]
    summing = axes.summed.get(factor, ())
    names = {axis.tensor for axis in reached}.union(summing)
    candidates = [f for f in common or () if f != factor and f not in axes.frozen]
    candidates = [f for f in candidates if not _meet(axes, f, names, summing)]
    return candidates[-1] if candidates else None


def _meet(axes: AxisMap, outer: Factor, names: Collection[str], summing: Iterable[str]) -> bool:
    """Whether units of ``outer`` meet in a tensor of ``names``, of which ``summing`` sum over the units inside."""
    by_row = {name for name in names if axes.picking.get(producer_of(name)) == outer}
    if by_row and not by_row.issuperset(summing):
        return True
    met = {name: axes.tensors[name] for name in names if name in axes.tensors}
    return any(sum(_depth(expr, outer) for expr in exprs) + (name in by_row) > 1 for name, exprs in met.items())


def _depth(expr: Expr, factor: Factor) -> int:
    """Number of occurrences of ``factor`` in one position of ``expr``."""
    if isinstance(expr, Factor):
        return int(expr == factor)
    depths = [_depth(part, factor) for part in expr.parts]
    return sum(depths) if isinstance(expr, Product) else max(depths, default=0)


@dataclass(frozen=True)
class Consumer:
    """A contraction, ``node``, of activations with a weight, or with a selection from one.

    Positions along axis ``dim`` of ``source`` are those along axis ``axis`` of the parameter ``name``.
    """

    node: fx.Node
    source: fx.Node
    dim: int
    name: str
    axis: int


def find_consumers(graph: fx.Graph, axes: AxisMap) -> tuple[Consumer, ...]:
    """Return every product of activations with a parameter, in order of execution."""
    return tuple(found for node in graph.nodes for found in consumers_at(node, axes))


def consumers_of(group: Group, consumers: tuple[Consumer, ...]) -> tuple[Consumer, ...]:
    """Return the consumers that contract units of ``group``; none for a layer."""
    if group.factor is None:
        return ()
    held = {(member.name, member.axis) for member in group.parameters}
    return tuple(consumer for consumer in consumers if (consumer.name, consumer.axis) in held)


def units_at(group: Group, consumer: Consumer, axes: AxisMap) -> Index:
    """Return the unit of ``group`` at each position of a consumer's input, as :meth:`Group.numbers_along`."""
    return group.numbers_along(axes.tensors[consumer.name][consumer.axis])


def read_weight(node: fx.Node) -> str | None:
    """Return the name of the weight whose values ``node`` holds, moved, cast or selected; None for other values."""
    while node.op == "call_function":
        first = node.args[0] if node.args else None
        if values_of(node) not in (Values.MOVED, Values.CAST, Values.PICKED) or not isinstance(first, fx.Node):
            return None
        node = first
    return tensor_name(node) if node.op == "get_attr" else None


def _looks_up(node: fx.Node) -> bool:
    """Whether ``node`` holds rows of a weight that an input of the graph chooses, as an embedding of tokens does."""
    while node.op == "call_function" and isinstance(node.args[0], fx.Node):
        others = [source for source in node.all_input_nodes if source is not node.args[0]]
        if values_of(node) is Values.PICKED and any(source.op == "placeholder" for source in upstream(others)):
            return True
        node = node.args[0]
    return False


def consumers_at(node: fx.Node, axes: AxisMap) -> Iterator[Consumer]:
    """Yield the products of activations with a parameter that a node is."""
    if values_of(node) is not Values.PRODUCT or not isinstance(node.meta.get("val"), torch.Tensor):
        return
    nodes = {tensor_name(source): source for source in node.all_input_nodes}
    read = {name: read_weight(source) for name, source in nodes.items()}
    if axes.trained.isdisjoint(name for name in read.values() if name is not None):
        return
    if None not in read.values():  # rows looked up in one weight are what another one multiplies
        found_rows = [name for name, source in nodes.items() if _looks_up(source)]
        read.update(dict.fromkeys(found_rows if len(found_rows) == 1 else ()))
    for places in apply_rule_alone(node)[1].sums.get(node.name, ()):
        for taken, held in itertools.permutations(places) if len(places) == 2 else ():
            name = read[held.tensor]
            if read[taken.tensor] is not None or name is None or name not in axes.trained:
                continue
            expr, size = axes.tensors[held.tensor][held.dim], axes.tensors[taken.tensor][taken.dim].size
            alike = [held.dim]
            if held.tensor != name:  # the axis of the parameter that an axis of a view of it corresponds to
                alike = [i for i, other in enumerate(axes.tensors[name]) if factors(expr) and other == expr]
            if len(alike) == 1 and size == axes.tensors[name][alike[0]].size:
                yield Consumer(node, nodes[taken.tensor], taken.dim, axes.tied.get(name, name), alike[0])
