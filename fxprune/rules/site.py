"""An op with its arguments and tensors, and the statements that a rule may make about it.

In a printed rule ``(h * d)`` is an axis of ``h`` times ``d`` units, ``[a | b]`` one of ``a`` and then ``b``, and ``1``
one that broadcasts.
"""

from __future__ import annotations

import itertools
import operator
import string
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from fxprune.axes import UNIT, Expr, Factor, Freeze, factors, render
from fxprune.errors import AxisMismatch
from fxprune.graph.compat import OpOverload, argument_names
from fxprune.graph.tensors import tensor_name
from fxprune.rules.statements import (
    AtLeast,
    Average,
    Axis,
    Competition,
    Coupling,
    Held,
    Lookup,
    Positions,
    Role,
    SizeArgument,
    Statements,
    Statistic,
    TensorAxes,
)


class OpArguments:
    """The arguments of a node by the names in its op's schema."""

    def __init__(self, node: fx.Node) -> None:
        self._found: dict[str, tuple[tuple[Any, ...], Any]] = {}
        named = argument_names(node.target) if isinstance(node.target, OpOverload) else ()
        for i, (name, default, keyword_only) in enumerate(named):
            if not keyword_only and i < len(node.args):
                self._found[name] = (("args", i), node.args[i])
            else:
                self._found[name] = (("kwargs", name), node.kwargs.get(name, default))

    def __contains__(self, name: str) -> bool:
        """Whether the op has an argument ``name``, given here or not."""
        return name in self._found

    def get(self, name: str, default: Any = None) -> Any:
        """The value of argument ``name``, else its default in the schema, else ``default``."""
        value = self._found[name][1] if name in self._found else None
        return default if value is None else value

    def path(self, name: str) -> tuple[Any, ...]:
        """The path of argument ``name`` in the node, given or not."""
        return self._found[name][0]

    def values(self) -> dict[str, Any]:
        """All arguments with their values."""
        return {name: value for name, (_, value) in self._found.items()}


def nodes_in(argument: object) -> list[fx.Node]:
    """The nodes in ``argument``, nested lists included."""
    if isinstance(argument, tuple | list):
        return [node for item in argument for node in nodes_in(item)]
    return [argument] if isinstance(argument, fx.Node) else []


class _RuleFormatter:
    """Formats the rule of an op; gives letters to factors as they occur, after those that the rule itself uses."""

    def __init__(self, site: OpSite) -> None:
        self.site, self.stated = site, site._stated
        named: dict[Factor, str] = {}
        for expr, letter in site.letters:
            found = self.stated.solver.resolve(expr)
            if isinstance(found, Factor) and letter not in named.values():
                named.setdefault(found, letter)
        plain = (f"{letter}{i or ''}" for i in itertools.count() for letter in string.ascii_lowercase)
        spare = (letter for letter in plain if letter not in named.values())
        self.letters = defaultdict(lambda: next(spare), named)
        self.outs = [(f"out#{i}" if len(site.outs) > 1 else "out", x) for i, x in enumerate(site.outs)]

    def line(self) -> str:
        """Inputs with the names of the arguments they are passed as, outputs, and clauses."""
        given: list[tuple[str, TensorAxes]] = []
        node = self.site.node
        for name, argument in (self.site.arguments.values() or {"source": node.args[0] if node.args else None}).items():
            for place, source in enumerate(nodes_in(argument)):
                label = f"{name}#{place}" if isinstance(argument, list | tuple) else name
                several = self.site.all_of(source)
                given += [(label if len(several) == 1 else f"{label}#{i}", x) for i, x in enumerate(several)]
        inputs = ", ".join(self.tensor(label, x) for label, x in given)
        results = ", ".join(self.tensor(label, x) for label, x in self.outs) or "numbers"
        clauses = self.clauses({x.name: label for label, x in given})
        return "  ".join((self.site.name, f"{inputs} -> {results}" if inputs else f"-> {results}", *clauses))

    def tensor(self, label: str, x: TensorAxes) -> str:
        resolved = map(self.stated.solver.resolve, x.axes)
        return f"{label}[{', '.join(render(expr, self.letters.__getitem__) for expr in resolved)}]"

    def letters_in(self, *exprs: Expr) -> str:
        """The letters in ``exprs``, each once, separated by commas."""
        found = (factor for expr in exprs for factor in factors(self.stated.solver.resolve(expr)))
        return ", ".join(dict.fromkeys(map(self.letters.__getitem__, found)))

    def clauses(self, labels: Mapping[str, str]) -> Iterator[str]:
        """All statements other than equations."""
        stated, name = self.stated, self.site.node.name
        axes = {x.name: x for x in (*self.site.tensors, *self.site.outs)}
        summed = [places[0] for places in stated.sums.get(name, ())]
        yield from self.clause("sums", [axes[place.tensor].axes[place.dim] for place in summed])
        for lookup in stated.lookups:
            if lookup.node == name:
                yield f"{self.letters_in(lookup.expr) or '1'} by {labels.get(lookup.index, lookup.index)}"
        yield from self.clause("statistic over", [s.expr for s in stated.statistics if s.node == name])
        yield from self.clause("shares out", [c.expr for c in stated.competitions if c.freeze.node == name])
        for label, x in self.outs:
            if x.name in stated.positions:
                yield f"positions of {self.letters_in(stated.positions[x.name].expr) or '1'} in {label}"
        for least in stated.at_least:
            yield f"at least {least.count} of {self.letters_in(least.expr)}"
        reasons: dict[str, list[str]] = {}
        for factor, freeze in stated.solver.frozen_factors().items():
            if freeze.node == name and factor in self.letters:
                reasons.setdefault(freeze.reason, []).append(self.letters[factor])
        for reason, letters in reasons.items():
            yield f"keeps {', '.join(letters)}: {reason}"

    def clause(self, words: str, exprs: Sequence[Expr]) -> Iterator[str]:
        """``words`` and the letters in ``exprs``, if there are any."""
        if letters := self.letters_in(*exprs):
            yield f"{words} {letters}"


@dataclass(frozen=True, eq=False)
class OpSite:
    """One op of the graph while its rule runs.

    Args:
        node: the graph node.
        outs: the output tensors, one for most ops.
        letters: names that the rule gives to axes, for printing.
        understood: names of inputs that hold positions along an axis and whose use the rule has stated.
    """

    node: fx.Node
    _stated: Statements
    outs: tuple[TensorAxes, ...]
    letters: list[tuple[Expr, str]] = field(default_factory=list)
    understood: set[str] = field(default_factory=set)

    @property
    def out(self) -> TensorAxes:
        """The first output."""
        return self.outs[0]

    @property
    def name(self) -> str:
        """The op's name without namespace and overload: ``linear``."""
        target = getattr(self.node.target, "overloadpacket", self.node.target)
        return str(getattr(target, "__name__", target))

    @cached_property
    def arguments(self) -> OpArguments:
        """The arguments by their names in the op's schema."""
        return OpArguments(self.node)

    def has(self, name: str) -> bool:
        """Whether the op has an argument ``name``, given here or not."""
        return name in self.arguments

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument ``name`` in the graph, else its default in the schema, else ``default``."""
        return self.arguments.get(name, default)

    def tensor(self, name: str) -> TensorAxes | None:
        """The tensor passed as argument ``name``; None if none is."""
        value = self.arg(name)
        return self.of(value) if isinstance(value, fx.Node) else None

    def need(self, name: str) -> TensorAxes:
        """The tensor passed as the required argument ``name``."""
        found = self.tensor(name)
        assert found is not None, f"{self.node.name} has no tensor {name}"
        return found

    def of(self, node: fx.Node) -> TensorAxes | None:
        """The tensor that ``node`` makes, if it makes one and no list."""
        return next((x for x in self.all_of(node) if x.name == tensor_name(node)), None)

    def all_of(self, node: fx.Node) -> tuple[TensorAxes, ...]:
        """The tensors that ``node`` makes, one or several."""
        return self._stated.tensors.get(tensor_name(node), ())

    def list_of(self, name: str) -> list[TensorAxes]:
        """The tensors passed as argument ``name``, a list or a single one."""
        return self._made_by(nodes_in(self.arg(name, ())))

    @cached_property
    def tensors(self) -> list[TensorAxes]:
        """All input tensors, those in lists too; for ``getitem`` the one that is taken out."""
        if self.node.target is operator.getitem:
            return [self.all_of(node)[int(self.node.args[1])] for node in self.node.all_input_nodes]  # type: ignore[arg-type]
        return self._made_by(self.node.all_input_nodes)

    def _made_by(self, nodes: Iterable[fx.Node]) -> list[TensorAxes]:
        return [tensor for tensor in map(self.of, nodes) if tensor is not None]

    @cached_property
    def first(self) -> list[TensorAxes]:
        """The tensors in the first argument, one or a list: those whose values a moving op passes on."""
        if self.node.target is operator.getitem:
            return self.tensors
        argument = self.node.args[0] if self.node.args else next(iter(self.arguments.values().values()), None)
        return self._made_by(nodes_in(argument))

    def is_weight(self, x: TensorAxes) -> bool:
        """Whether ``x`` is computed from parameters and buffers alone, or consists of matrices picked from them."""
        return x.weight or x.name in self._stated.picked

    def is_picked(self, x: TensorAxes) -> bool:
        """Whether ``x`` consists of matrices picked from weights."""
        return x.name in self._stated.picked

    def positions_of(self, x: TensorAxes) -> Positions | None:
        """The axis that the values of ``x`` are positions along; None if unknown."""
        return self._stated.positions.get(x.name)

    def equate(self, a: Expr, b: Expr) -> None:
        """State that ``a`` and ``b`` are the same axis; if they cannot be, both are frozen with the reason."""
        try:
            self._stated.solver.unify(a, b)
        except AxisMismatch as error:
            for side in (a, b):
                self.freeze_expr(side, error.what)

    def cut(self, expr: Expr, at: int) -> tuple[Expr, Expr]:
        """Cut ``expr`` in two runs, the first of ``at`` units; AxisMismatch if that cuts a unit of an outer factor."""
        return self._stated.solver.cut(expr, at)

    def link(self, a: TensorAxes, i: int, b: TensorAxes, j: int) -> None:
        """Record that this op couples axis ``i`` of ``a`` with axis ``j`` of ``b`` (an edge, no equation)."""
        ends = Axis(a.name, i % a.rank), Axis(b.name, j % b.rank)
        self._stated.couplings.append(Coupling(*ends, self.node.name, str(self.node.target)))

    def tie(self, a: TensorAxes, i: int, b: TensorAxes, j: int) -> None:
        """State that axis ``i`` of ``a`` is axis ``j`` of ``b``."""
        if a.axes[i] is UNIT and b.axes[j] is UNIT:
            return
        self.equate(a.axes[i], b.axes[j])
        self.link(a, i, b, j)

    def tie_all(self, x: TensorAxes, out: TensorAxes | None = None, *, but: Sequence[int] = ()) -> None:
        """State that every axis of ``x`` is the axis of ``out`` at the same place, except those in ``but``."""
        out = self.out if out is None else out
        skip = {i % x.rank for i in but}
        for i in range(x.rank):
            if i not in skip:
                self.tie(x, i, out, i)

    def tie_others(self, x: TensorAxes, dims: Collection[int]) -> None:
        """State that the axes of ``x`` other than ``dims`` are those of every output, which may lack ``dims``."""
        left = [i for i in range(x.rank) if i not in dims]
        for out in self.outs:
            for j, i in enumerate(left):
                self.tie(x, i, out, i if out.rank == x.rank else j)

    def broadcast(self, x: TensorAxes, out: TensorAxes | None = None) -> None:
        """State that ``x`` is broadcast to ``out``: trailing axes match, axes of size 1 do not count."""
        out = self.out if out is None else out
        for i in range(1, x.rank + 1):
            if x.sizes[-i] != 1:
                self.tie(x, -i, out, -i)

    def size_argument(self, name: str, expr: Expr, item: int | None = None, offset: int = 0) -> None:
        """State that argument ``name`` (its entry ``item``, if a list) is the size of ``expr``, plus ``offset``."""
        path = self.arguments.path(name)
        path = path if item is None else (*path, item)
        self._stated.size_arguments.append(SizeArgument(self.node.name, path, expr, offset))

    def freeze(self, x: TensorAxes, i: int | Iterable[int], reason: str) -> None:
        """State that axis ``i`` of ``x``, or each of several, must keep its units."""
        for dim in (i,) if isinstance(i, int) else i:
            self.freeze_expr(x.axes[dim], reason)

    def freeze_expr(self, expr: Expr, reason: str) -> None:
        """State that ``expr`` must keep its units."""
        self._stated.solver.freeze(expr, reason, self.node.name)

    def freeze_tensor(self, x: TensorAxes, reason: str) -> None:
        """State that every axis of ``x`` must keep its units."""
        self.freeze(x, range(x.rank), reason)

    def freeze_all(self, reason: str) -> None:
        """State that every axis this op touches must keep its units."""
        for tensor in (*self.tensors, *self.outs):
            self.freeze_tensor(tensor, reason)

    def take_statistic(self, x: TensorAxes, i: int | Iterable[int]) -> None:
        """State that this op takes a statistic over axis ``i`` of ``x``, or several: removing units changes it."""
        for dim in (i,) if isinstance(i, int) else i:
            self.take_statistic_of(x.axes[dim])

    def take_statistic_of(self, expr: Expr) -> None:
        """State that this op takes a statistic over ``expr``: removing units changes it."""
        self._stated.statistics.append(Statistic(expr, self.node.name))

    def average(self, x: TensorAxes, dims: Sequence[int], power: float, epsilon: str = "", weight: str = "") -> None:
        """State that this op averages over axes of ``x``, as an :class:`~fxprune.rules.statements.Average`."""
        places = tuple(Axis(x.name, i % x.rank) for i in dims)
        paths = (self.arguments.path(name) if name and self.arg(name) is not None else () for name in (epsilon, weight))
        self._stated.averages.append(Average(self.node.name, places, power, *paths))

    def add_up(self, *places: tuple[TensorAxes, int]) -> None:
        """State that this op multiplies tensors and sums over one axis, given by ``places`` in each of them.

        Units that are zero in one of them can be removed; for others this is a statistic (:meth:`take_statistic`).
        """
        axes = tuple(Axis(x.name, i % x.rank) for x, i in places)
        self._stated.sums.setdefault(self.node.name, []).append(axes)

    def keep_zeros(self, out: TensorAxes, i: int, *sources: tuple[TensorAxes, int]) -> None:
        """State that masked units along axis ``i`` of ``out`` are zero if they are zero along all of ``sources``."""
        axes = tuple(Axis(x.name, j % x.rank) for x, j in sources)
        self._stated.held[Axis(out.name, i % out.rank)] = Held(axes)

    def keep_all_zeros(self, x: TensorAxes, *, but: Collection[int] = ()) -> None:
        """State :meth:`keep_zeros` for each axis of the output that is the one of ``x`` at the same place."""
        for i in range(x.rank):
            if i not in but:
                self.keep_zeros(self.out, i, (x, i))

    def keep_values(self, out: TensorAxes, i: int, source: tuple[TensorAxes, int], *also: float) -> None:
        """State that masked units along axis ``i`` of ``out`` hold their values along ``source`` or one of ``also``."""
        x, j = source
        self._stated.held[Axis(out.name, i % out.rank)] = Held((Axis(x.name, j % x.rank),), also)

    def compete(self, x: TensorAxes, i: int, reason: str) -> None:
        """State that units along axis ``i`` of ``x`` compete, as in a softmax.

        Experts may be removed; any other axis is frozen for this ``reason``.
        """
        self._stated.competitions.append(Competition(x.axes[i], Freeze(reason, self.node.name)))
        self.tag(x, i, Role.SHARED_OUT)

    def need_units(self, x: TensorAxes, i: int, count: int) -> None:
        """State that axis ``i`` of ``x`` must keep at least ``count`` units."""
        self.need_units_of(x.axes[i], count)

    def need_units_of(self, expr: Expr, count: int) -> None:
        """State that ``expr`` must keep at least ``count`` units."""
        self._stated.at_least.append(AtLeast(expr, count))

    def tag(self, x: TensorAxes, i: int, role: Role) -> None:
        """State the role of axis ``i`` of ``x`` in this op."""
        self._stated.solver.tag(x.axes[i], role)

    def tag_product(self, axes: list[tuple[TensorAxes, int, bool]], summed: list[tuple[TensorAxes, int]]) -> None:
        """State the roles of the axes of a product.

        Unless an axis holds experts, batch axes of two activations are heads, and their other axes are inside a head.
        Batch axes of weights lie side by side; other axes of weights have no role.

        Args:
            axes: operand, axis, and whether it is a batch axis.
            summed: operand and axis of each axis that is summed over.
        """
        if not any(self.is_weight(x) for x, _, _ in axes):
            roles = [(x.axes[i], Role.HEAD if batch else Role.HEAD_DIM) for x, i, batch in axes]
            self._stated.products.append((*roles, *((x.axes[i], Role.SUMMED) for x, i in summed)))
        for x, i, batch in axes:
            if batch and self.is_weight(x):
                self.tag(x, i, Role.SIDE_BY_SIDE)

    def pick_weights(self, out: TensorAxes) -> None:
        """State that ``out`` consists of matrices picked from weights and counts as a weight."""
        self._stated.picked.add(out.name)

    def hold_positions(self, out: TensorAxes, x: TensorAxes, i: int) -> None:
        """State that the values of ``out`` are positions along axis ``i`` of ``x``."""
        self._stated.positions[out.name] = Positions(x, i % x.rank)

    def picks(self, index: TensorAxes, x: TensorAxes, i: int) -> bool:
        """State that ``index`` picks units along axis ``i`` of ``x``.

        If the values of ``index`` are known to be positions along some axis, axis ``i`` is tied to it: removing units
        changes the positions along. Returns False if they are not known, in which case the caller freezes axis ``i``.
        """
        self._stated.lookups.append(Lookup(x, i % x.rank, index.name, self.node.name))
        known = self.positions_of(index)
        if known is None:
            return False
        self.understand(index)
        self.tie(x, i, known.tensor, known.dim)
        self.tag(x, i, Role.EXPERT)
        return True

    def understand(self, x: TensorAxes) -> None:
        """State that the rule covers the use of the positions in ``x``, if it holds any."""
        self.understood.add(x.name)

    def name_axis(self, x: TensorAxes, i: int, letter: str) -> None:
        """Name axis ``i`` of ``x`` by ``letter`` in the printed rule."""
        self.letters.append((x.axes[i], letter))

    def __str__(self) -> str:
        """The rule as applied here, in the notation of rules."""
        return _RuleFormatter(self).line()
