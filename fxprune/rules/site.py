"""What a rule sees: one op with its arguments and tensors, and the few things it may state about them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from fxprune.axes import UNIT, Expr, Freeze
from fxprune.errors import AxisMismatch
from fxprune.graph.names import tensor_name
from fxprune.rules.statements import (
    ActivationProduct,
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
    Sum,
    TensorAxes,
)
from fxprune.rules.write import Arguments, nodes_in, op_name, write_rule

__all__ = ["OpSite"]


@dataclass(frozen=True, eq=False)
class OpSite:
    """One op of the graph while its rule runs.

    Args:
        node: the graph node.
        _stated: where statements go.
        outs: the output tensors, one for most ops.
        letters: names that the rule gives to axes, for printing.
        understood: names of inputs that hold positions along an axis, of which the rule has said what they do here.
    """

    node: fx.Node
    _stated: Statements
    outs: tuple[TensorAxes, ...]
    letters: list[tuple[Expr, str]] = field(default_factory=list)
    understood: set[str] = field(default_factory=set)

    # ------------------------------------------------------------------------------------------------- what there is

    @property
    def out(self) -> TensorAxes:
        """The first output."""
        return self.outs[0]

    @property
    def name(self) -> str:
        """The op in short, without namespace and overload: ``linear``."""
        return op_name(self.node.target)

    @cached_property
    def _text(self) -> str:
        """The op in full: ``aten.linear.default``."""
        return str(self.node.target)

    @cached_property
    def arguments(self) -> Arguments:
        """The arguments by the names in the op's schema."""
        return Arguments(self.node)

    def has(self, name: str) -> bool:
        """Whether the op has an argument ``name``, given here or not."""
        return name in self.arguments

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument ``name`` as it stands in the graph, or its default in the schema, or ``default``."""
        return self.arguments.get(name, default)

    def tensor(self, name: str) -> TensorAxes | None:
        """The tensor passed as argument ``name``; None if none is."""
        value = self.arg(name)
        return self.of(value) if isinstance(value, fx.Node) else None

    def need(self, name: str) -> TensorAxes:
        """The tensor passed as argument ``name``, which the op always has."""
        found = self.tensor(name)
        assert found is not None, f"{self.node.name} has no tensor {name}"
        return found

    def of(self, node: fx.Node) -> TensorAxes | None:
        """The tensor that ``node`` makes, if it makes one."""
        found = self._stated.tensors.get(tensor_name(node))
        return found if isinstance(found, TensorAxes) else None

    def all_of(self, node: fx.Node) -> tuple[TensorAxes, ...]:
        """The tensors that ``node`` makes, one or several."""
        found = self._stated.tensors.get(tensor_name(node), ())
        return (found,) if isinstance(found, TensorAxes) else found

    def list_of(self, name: str) -> list[TensorAxes]:
        """The tensors of the list passed as argument ``name``."""
        found = [self.of(item) for item in self.arg(name, ()) if isinstance(item, fx.Node)]
        return [tensor for tensor in found if tensor is not None]

    @cached_property
    def tensors(self) -> list[TensorAxes]:
        """All input tensors, those in lists too; of several that one node made, the one that is taken out."""
        if self.node.target is operator.getitem:
            return [self.all_of(node)[int(self.node.args[1])] for node in self.node.all_input_nodes]  # type: ignore[arg-type]
        found = [self.of(node) for node in self.node.all_input_nodes]
        return [tensor for tensor in found if tensor is not None]

    @cached_property
    def first(self) -> list[TensorAxes]:
        """The tensors in the first argument, one or a list: those whose values an op that moves values passes on."""
        if self.node.target is operator.getitem:
            return self.tensors
        argument = self.node.args[0] if self.node.args else next(iter(self.arguments.values().values()), None)
        found = [self.of(node) for node in nodes_in(argument)]
        return [tensor for tensor in found if tensor is not None]

    def is_weight(self, x: TensorAxes) -> bool:
        """Whether ``x`` is made of parameters and buffers alone, or of matrices picked from them."""
        return x.weight or x.name in self._stated.picked

    def is_picked(self, x: TensorAxes) -> bool:
        """Whether ``x`` is made of matrices picked from weights."""
        return x.name in self._stated.picked

    def positions_of(self, x: TensorAxes) -> Positions | None:
        """The axis that the values of ``x`` are known to be positions along."""
        return self._stated.positions.get(x.name)

    # ------------------------------------------------------------------------------------------- which axes are one

    def equate(self, a: Expr, b: Expr) -> None:
        """State that ``a`` and ``b`` are the same axis; where they cannot be, both are frozen with the reason."""
        try:
            self._stated.solver.unify(a, b)
        except AxisMismatch as error:
            for side in (a, b):
                self.freeze_expr(side, error.what)

    def cut(self, expr: Expr, at: int) -> tuple[Expr, Expr]:
        """Cut ``expr`` into two runs, the first of ``at`` units.

        Raises:
            AxisMismatch: the cut would go through a unit of an outer factor.
        """
        return self._stated.solver.cut(expr, at)

    def link(self, a: TensorAxes, i: int, b: TensorAxes, j: int) -> None:
        """Record that this op couples axis ``i`` of ``a`` with axis ``j`` of ``b`` (an edge, no equation)."""
        ends = Axis(a.name, i % a.rank), Axis(b.name, j % b.rank)
        self._stated.couplings.append(Coupling(*ends, self.node.name, self._text))

    def tie(self, a: TensorAxes, i: int, b: TensorAxes, j: int) -> None:
        """State that axis ``i`` of ``a`` is axis ``j`` of ``b``."""
        if a.axes[i] is UNIT and b.axes[j] is UNIT:
            return
        self.equate(a.axes[i], b.axes[j])
        self.link(a, i, b, j)

    def tie_all(self, x: TensorAxes, out: TensorAxes | None = None, *, but: Sequence[int] = ()) -> None:
        """State that every axis of ``x`` is the axis of ``out`` at the same place, those of ``but`` excepted."""
        out = self.out if out is None else out
        skip = {i % x.rank for i in but}
        for i in range(x.rank):
            if i not in skip:
                self.tie(x, i, out, i)

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

    # ---------------------------------------------------------------------------------------- what may not go, or how

    def freeze(self, x: TensorAxes, i: int, reason: str) -> None:
        """State that axis ``i`` of ``x`` must keep its units."""
        self.freeze_expr(x.axes[i], reason)

    def freeze_expr(self, expr: Expr, reason: str) -> None:
        """State that ``expr`` must keep its units."""
        self._stated.solver.freeze(expr, reason, self.node.name)

    def freeze_tensor(self, x: TensorAxes, reason: str) -> None:
        """State that every axis of ``x`` must keep its units."""
        for i in range(x.rank):
            self.freeze(x, i, reason)

    def freeze_all(self, reason: str) -> None:
        """State that every axis this op touches must keep its units."""
        for tensor in (*self.tensors, *self.outs):
            self.freeze_tensor(tensor, reason)

    def take_statistic(self, x: TensorAxes, i: int) -> None:
        """State that this op takes a statistic over axis ``i`` of ``x``: removing units changes it."""
        self.take_statistic_of(x.axes[i])

    def take_statistic_of(self, expr: Expr) -> None:
        """State that this op takes a statistic over ``expr``: removing units changes it."""
        self._stated.statistics.append(Statistic(expr, self.node.name))

    def average(self, x: TensorAxes, dims: Sequence[int], power: float, epsilon: str = "", weight: str = "") -> None:
        """State that this op takes an average over axes of ``x``; see :class:`~fxprune.rules.statements.Average`."""
        places = tuple(Axis(x.name, i % x.rank) for i in dims)
        paths = (self.arguments.path(name) if name and self.arg(name) is not None else () for name in (epsilon, weight))
        self._stated.averages.append(Average(self.node.name, places, power, *paths))

    def add_up(self, *places: tuple[TensorAxes, int]) -> None:
        """State that this op multiplies tensors and adds up over one axis, which ``places`` name in each of them.

        Units that are zero in one of them can go; others make this a statistic, as :meth:`take_statistic` does.
        """
        axes = tuple(Axis(x.name, i % x.rank) for x, i in places)
        self._stated.sums.append(Sum(self.node.name, axes))

    def keep_zeros(self, out: TensorAxes, i: int, *sources: tuple[TensorAxes, int]) -> None:
        """State that masked units along axis ``i`` of ``out`` are zero if they are along all of ``sources``."""
        axes = tuple(Axis(x.name, j % x.rank) for x, j in sources)
        self._stated.held[Axis(out.name, i % out.rank)] = Held(axes)

    def keep_values(self, out: TensorAxes, i: int, source: tuple[TensorAxes, int], *also: float) -> None:
        """State that masked units along axis ``i`` of ``out`` hold what they do along ``source``, or ``also``."""
        x, j = source
        self._stated.held[Axis(out.name, i % out.rank)] = Held((Axis(x.name, j % x.rank),), also)

    def compete(self, x: TensorAxes, i: int, reason: str) -> None:
        """State that units along axis ``i`` of ``x`` share out a whole.

        Fewer can where they are experts, else all stay, for this ``reason``.
        """
        self._stated.competitions.append(Competition(x.axes[i], Freeze(reason, self.node.name)))
        self.tag(x, i, Role.SHARED_OUT)

    def need_units(self, x: TensorAxes, i: int, count: int) -> None:
        """State that axis ``i`` of ``x`` has to keep ``count`` units or more."""
        self.need_units_of(x.axes[i], count)

    def need_units_of(self, expr: Expr, count: int) -> None:
        """State that ``expr`` has to keep ``count`` units or more."""
        self._stated.at_least.append(AtLeast(expr, count))

    # ------------------------------------------------------------------------------------------ what axes are used for

    def tag(self, x: TensorAxes, i: int, role: Role) -> None:
        """State what role axis ``i`` of ``x`` has here."""
        self._stated.solver.tag(x.axes[i], role)

    def multiply_activations(self, *roles: tuple[TensorAxes, int, Role]) -> None:
        """State that this op multiplies activations: their axes have these roles unless one holds experts."""
        self._stated.products.append(ActivationProduct(tuple((x.axes[i], role) for x, i, role in roles)))

    def pick_weights(self, out: TensorAxes) -> None:
        """State that ``out`` is made of matrices picked from weights, and as good as a weight."""
        self._stated.picked.add(out.name)

    def hold_positions(self, out: TensorAxes, x: TensorAxes, i: int) -> None:
        """State that the values of ``out`` are positions along axis ``i`` of ``x``."""
        self._stated.positions[out.name] = Positions(x, i % x.rank)

    def picks(self, index: TensorAxes, x: TensorAxes, i: int) -> bool:
        """State that ``index`` picks units along axis ``i`` of ``x``.

        If its values are known to be positions along an axis, that axis is the one picked from: the positions change
        with its units when some go. Returns False where nothing is known, so that axis ``i`` has to stay.
        """
        self._stated.lookups.append(Lookup(x.axes[i], index.name, self.node.name))
        known = self.positions_of(index)
        if known is None:
            return False
        self.understand(index)
        self.tie(x, i, known.tensor, known.dim)
        self.tag(x, i, Role.EXPERT)
        return True

    def understand(self, x: TensorAxes) -> None:
        """State that the rule says all there is to say about the positions in ``x``, if it holds any."""
        self.understood.add(x.name)

    def name_axis(self, x: TensorAxes, i: int, letter: str) -> None:
        """Call axis ``i`` of ``x`` by ``letter`` where the rule is printed."""
        self.letters.append((x.axes[i], letter))

    def __str__(self) -> str:
        """The rule as it was applied here, in the notation of rules."""
        return write_rule(self.node, self.outs, self._stated, self.letters)
