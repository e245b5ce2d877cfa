"""What a rule sees: one op, its tensors with their axes, and the few things it may say about them.

A rule never changes the graph. The output axes of an op start as fresh factors; a rule *adds equations*. What it
does not equate stays independent, so a rule must say everything that holds, and freeze what it cannot express.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import fx

from fxprune.axes import UNIT, Expr, Freeze, Solver
from fxprune.compat import argument_names
from fxprune.errors import AxisMismatch

__all__ = ["Axis", "Edge", "Journal", "Literal", "OpSite", "TensorAxes"]


class Axis(NamedTuple):
    """An axis of a tensor: parameter or buffer name, or name of the graph node."""

    tensor: str
    dim: int


@dataclass(frozen=True, eq=False)
class TensorAxes:
    """A tensor in the graph.

    Args:
        name: parameter or buffer name, or name of the node that makes it.
        axes: one expression per dimension.
        weight: whether it is made of parameters and buffers alone.
    """

    name: str
    axes: tuple[Expr, ...]
    weight: bool = False

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes as seen while tracing."""
        return tuple(axis.size for axis in self.axes)


class Edge(NamedTuple):
    """Two axes that an op couples."""

    a: Axis
    b: Axis
    node: str
    op: str


@dataclass(frozen=True)
class Literal:
    """A number in the graph that is the size of an axis, to be rewritten when that axis shrinks.

    Args:
        node: name of the node that holds it.
        path: where in the node: ``("args", 1, 0)`` or ``("kwargs", "size", 0)``.
        expr: the expression whose size it is.
        offset: what is added to that size.
    """

    node: str
    path: tuple[Any, ...]
    expr: Expr
    offset: int = 0


class Journal:
    """Everything the rules have said so far.

    ``tensors``, ``edges`` and ``literals`` are facts by node. ``pointers`` says for a tensor of integers which axis its
    values are positions along; ``picked`` names tensors that are matrices picked from weights. What waits for the end,
    when all axes are solved: statistics in ``renormalised``, ``sums`` over axes, where ``zeros`` come from, softmaxes
    in ``competitions``, ``products`` of activations with the roles of their axes, and the ``least`` size of an axis.
    """

    def __init__(self) -> None:
        self.solver = Solver()
        self.tensors: dict[str, TensorAxes | tuple[TensorAxes, ...]] = {}
        self.edges: list[Edge] = []
        self.literals: list[Literal] = []
        self.renormalised: list[tuple[Expr, str]] = []
        self.sums: list[tuple[str, tuple[Axis, ...]]] = []
        self.zeros: dict[Axis, tuple[Axis, ...]] = {}
        self.pointers: dict[str, tuple[TensorAxes, int]] = {}
        self.picked: set[str] = set()
        self.competitions: list[tuple[Expr, Freeze]] = []
        self.products: list[list[tuple[Expr, str]]] = []
        self.least: list[tuple[Expr, int]] = []
        self.unruled: dict[str, str] = {}


@dataclass(frozen=True, eq=False)
class OpSite:
    """One op of the graph while its rule runs.

    Args:
        node: the graph node.
        journal: where statements go.
        outs: the output tensors, one for most ops.
        understood: names of inputs that hold positions along an axis, of which the rule has said what they do here.
    """

    node: fx.Node
    journal: Journal
    outs: tuple[TensorAxes, ...]
    understood: set[str] = field(default_factory=set)

    @property
    def out(self) -> TensorAxes:
        """The first output."""
        return self.outs[0]

    @cached_property
    def _arguments(self) -> dict[str, tuple[tuple[Any, ...], Any]]:
        """Of each argument of the op's schema: its path in the node and its value."""
        found: dict[str, tuple[tuple[Any, ...], Any]] = {}
        for i, (name, default, keyword_only) in enumerate(argument_names(self.node.target)):  # type: ignore[arg-type]
            if not keyword_only and i < len(self.node.args):
                found[name] = (("args", i), self.node.args[i])
            elif name in self.node.kwargs:
                found[name] = (("kwargs", name), self.node.kwargs[name])
            else:
                found[name] = (("kwargs", name), default)
        return found

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument ``name`` as it stands in the graph, or its default."""
        value = self._arguments[name][1] if name in self._arguments else None
        return default if value is None else value

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
        key = str(node.target) if node.op == "get_attr" else node.name
        found = self.journal.tensors.get(key)
        return found if isinstance(found, TensorAxes) else None

    def list_of(self, name: str) -> list[TensorAxes]:
        """The tensors of the list passed as argument ``name``."""
        found = [self.of(item) for item in self.arg(name, ()) if isinstance(item, fx.Node)]
        return [tensor for tensor in found if tensor is not None]

    @cached_property
    def tensors(self) -> list[TensorAxes]:
        """All input tensors, those in lists too."""
        found = [self.of(node) for node in self.node.all_input_nodes]
        return [tensor for tensor in found if tensor is not None]

    def equate(self, a: Expr, b: Expr) -> None:
        """``a`` and ``b`` are the same axis; where they cannot be, both are frozen with the reason."""
        try:
            self.journal.solver.unify(a, b)
        except AxisMismatch as error:
            for side in (a, b):
                self.journal.solver.freeze(side, error.what, self.node.name)

    def link(self, a: TensorAxes, i: int, b: TensorAxes, j: int) -> None:
        """Record that this op couples axis ``i`` of ``a`` with axis ``j`` of ``b`` (an edge, no equation)."""
        edge = Edge(Axis(a.name, i % a.rank), Axis(b.name, j % b.rank), self.node.name, str(self.node.target))
        self.journal.edges.append(edge)

    def tie(self, a: TensorAxes, i: int, b: TensorAxes, j: int) -> None:
        """Axis ``i`` of ``a`` is axis ``j`` of ``b``."""
        if a.axes[i] is UNIT and b.axes[j] is UNIT:
            return
        self.equate(a.axes[i], b.axes[j])
        self.link(a, i, b, j)

    def tie_all(self, x: TensorAxes, out: TensorAxes | None = None, *, but: Sequence[int] = ()) -> None:
        """Every axis of ``x`` is the axis of ``out`` at the same place, those of ``but`` excepted."""
        out = self.out if out is None else out
        skip = {i % x.rank for i in but}
        for i in range(x.rank):
            if i not in skip:
                self.tie(x, i, out, i)

    def broadcast(self, x: TensorAxes, out: TensorAxes | None = None) -> None:
        """``x`` is broadcast to ``out``: trailing axes match, axes of size 1 do not count."""
        out = self.out if out is None else out
        for i in range(1, x.rank + 1):
            if x.sizes[-i] != 1:
                self.tie(x, -i, out, -i)

    def freeze(self, x: TensorAxes, i: int, reason: str) -> None:
        """Axis ``i`` of ``x`` must keep its units."""
        self.journal.solver.freeze(x.axes[i], reason, self.node.name)

    def freeze_all(self, reason: str) -> None:
        """Every axis this op touches must keep its units."""
        for tensor in (*self.tensors, *self.outs):
            for i in range(tensor.rank):
                self.freeze(tensor, i, reason)

    def tag(self, x: TensorAxes, i: int, tag: str) -> None:
        """Say what role axis ``i`` of ``x`` plays here."""
        self.journal.solver.tag(x.axes[i], tag)

    def renormalise(self, x: TensorAxes, i: int) -> None:
        """This op takes a statistic over axis ``i`` of ``x``: removing units changes it."""
        self.journal.renormalised.append((x.axes[i], self.node.name))

    def add_up(self, *places: tuple[TensorAxes, int]) -> None:
        """This op multiplies tensors and adds up over one axis, which ``places`` name in each of them.

        Units that are zero in one of them can go; others make this a statistic, as :meth:`renormalise` does.
        """
        axes = tuple(Axis(x.name, i % x.rank) for x, i in places)
        self.journal.sums.append((self.node.name, axes))

    def keep_zeros(self, out: TensorAxes, i: int, *sources: tuple[TensorAxes, int]) -> None:
        """Masked units along axis ``i`` of ``out`` are zero if they are along all of ``sources``."""
        self.journal.zeros[Axis(out.name, i % out.rank)] = tuple(Axis(x.name, j % x.rank) for x, j in sources)

    def point_at(self, out: TensorAxes, x: TensorAxes, i: int) -> None:
        """The values of ``out`` are positions along axis ``i`` of ``x``."""
        self.journal.pointers[out.name] = x, i % x.rank

    def picks(self, index: TensorAxes, x: TensorAxes, i: int) -> bool:
        """``index`` picks units along axis ``i`` of ``x``.

        If its values are known to be positions along an axis, that axis is the one picked from: the positions change
        with its units when some go. Returns False where nothing is known, so that axis ``i`` has to stay.
        """
        target = self.journal.pointers.get(index.name)
        if target is None:
            return False
        self.understood.add(index.name)
        self.tie(x, i, *target)
        self.tag(x, i, "expert")
        return True

    def is_weight(self, x: TensorAxes) -> bool:
        """Whether ``x`` is made of parameters and buffers alone, or of matrices picked from them."""
        return x.weight or x.name in self.journal.picked

    def compete(self, x: TensorAxes, i: int, reason: str) -> None:
        """Units along axis ``i`` of ``x`` share out a whole: fewer can where they are experts, else all stay."""
        self.journal.competitions.append((x.axes[i], Freeze(reason, self.node.name)))
        self.tag(x, i, "shared out")

    def need_units(self, x: TensorAxes, i: int, least: int) -> None:
        """Axis ``i`` of ``x`` has to keep ``least`` units or more."""
        self.journal.least.append((x.axes[i], least))

    def multiplies(self, *roles: tuple[TensorAxes, int, str]) -> None:
        """This op multiplies activations; ``roles`` are tags that their axes get unless one holds experts."""
        self.journal.products.append([(x.axes[i], tag) for x, i, tag in roles])

    def literal(self, name: str, expr: Expr, item: int | None = None, offset: int = 0) -> None:
        """Argument ``name`` (its entry ``item``, if a list) is the size of ``expr``, plus ``offset``."""
        path = self._arguments[name][0]
        self.journal.literals.append(Literal(self.node.name, path if item is None else (*path, item), expr, offset))
