"""An op with its arguments and tensors, and the statements a rule may make about it.

``linear  input[b, s, i], weight[o, i] -> out[b, s, o]  sums i`` reads: axes with one letter are one axis, and the op
adds up over ``i``. ``(h * d)`` is an axis of ``h`` times ``d`` units, ``[a | b]`` one of ``a`` and then ``b``, and
``1`` one that broadcasts.
"""

from __future__ import annotations

import itertools
import operator
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from fxprune.axes import UNIT, Expr, Factor, Freeze, Product, factors
from fxprune.errors import AxisMismatch
from fxprune.graph.compat import OpOverload, argument_names
from fxprune.graph.tensors import tensor_name
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

__all__ = ["Arguments", "OpSite", "nodes_in", "op_name", "write_rule"]


def op_name(target: object) -> str:
    """The op in short, without namespace and overload: ``linear``."""
    if isinstance(target, OpOverload):
        return str(target.name()).partition("::")[2].partition(".")[0]
    return str(getattr(target, "__name__", target))


class Arguments:
    """The arguments of a node by the names in its op's schema.

    Args:
        node: the node.
    """

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
        """The value of argument ``name``, or its default in the schema, or ``default`` where both are None."""
        value = self._found[name][1] if name in self._found else None
        return default if value is None else value

    def path(self, name: str) -> tuple[Any, ...]:
        """Where in the node argument ``name`` is, or would be."""
        return self._found[name][0]

    def values(self) -> dict[str, Any]:
        """All arguments with their values."""
        return {name: value for name, (_, value) in self._found.items()}


def nodes_in(argument: object) -> list[fx.Node]:
    """The nodes in ``argument`` and in lists there."""
    if isinstance(argument, tuple | list):
        return [node for item in argument for node in nodes_in(item)]
    return [argument] if isinstance(argument, fx.Node) else []


def write_rule(
    node: fx.Node, outs: Sequence[TensorAxes], stated: Statements, letters: Sequence[tuple[Expr, str]] = ()
) -> str:
    """What was stated at ``node``, in one line.

    Args:
        node: the node.
        outs: the axes of its results.
        stated: the statements.
        letters: names that the rule gives to axes.
    """
    writer = _StatementWriter(stated, letters)
    given = list(_inputs(node, stated))
    inputs = ", ".join(writer.tensor(label, x) for label, x in given)
    results = ", ".join(writer.tensor(label, x) for label, x in _labelled(outs)) or "numbers"
    clauses = writer.clauses(node, outs, {x.name: label for label, x in given})
    name = op_name(node.target)
    return "  ".join((name, f"{inputs} -> {results}" if inputs else f"-> {results}", *clauses))


def _inputs(node: fx.Node, stated: Statements) -> Iterator[tuple[str, TensorAxes]]:
    """The input tensors with the names of the arguments they are passed as."""
    named = Arguments(node).values() or {"source": node.args[0] if node.args else None}
    for name, argument in named.items():
        nodes = nodes_in(argument)
        found = [
            (f"{name}#{i}" if isinstance(argument, list | tuple) else name, source) for i, source in enumerate(nodes)
        ]
        for label, source in found:
            entry = stated.tensors.get(tensor_name(source), ())
            several = entry if isinstance(entry, tuple) else (entry,)
            for i, x in enumerate(several):
                yield (label if len(several) == 1 else f"{label}#{i}"), x


class _StatementWriter:
    """Gives letters to factors as they are met, those that the rule itself uses first."""

    def __init__(self, stated: Statements, letters: Sequence[tuple[Expr, str]]) -> None:
        self.stated = stated
        self.letters: dict[Factor, str] = {}
        for expr, letter in letters:
            found = stated.solver.resolve(expr)
            if isinstance(found, Factor) and letter not in self.letters.values():
                self.letters.setdefault(found, letter)
        taken = set(self.letters.values())
        plain = (f"{letter}{i or ''}" for i in itertools.count() for letter in string.ascii_lowercase)
        self.spare = (letter for letter in plain if letter not in taken)

    def letter(self, factor: Factor) -> str:
        """The letter of ``factor``."""
        if factor not in self.letters:
            self.letters[factor] = next(self.spare)
        return self.letters[factor]

    def expr(self, expr: Expr) -> str:
        """``expr`` in letters."""
        if isinstance(expr, Factor):
            return self.letter(expr)
        if not expr.parts:
            return "1" if isinstance(expr, Product) else "0"
        parts = [self.expr(part) for part in expr.parts]
        return f"({' * '.join(parts)})" if isinstance(expr, Product) else f"[{' | '.join(parts)}]"

    def tensor(self, label: str, x: TensorAxes) -> str:
        """``x`` with all its axes."""
        return f"{label}[{', '.join(self.expr(self.stated.solver.resolve(axis)) for axis in x.axes)}]"

    def several(self, expr: Expr) -> list[str]:
        """The letters in ``expr``, each once."""
        return list(dict.fromkeys(self.letter(factor) for factor in factors(self.stated.solver.resolve(expr))))

    def clauses(self, node: fx.Node, outs: Sequence[TensorAxes], labels: Mapping[str, str]) -> Iterator[str]:
        """What was stated beside the equations."""
        stated, name = self.stated, node.name
        axes = {
            x.name: x
            for entry in stated.tensors.values()
            for x in ((entry,) if isinstance(entry, TensorAxes) else entry)
        }
        places = [s.places[0] for s in stated.sums if s.node == name]
        yield from self.listed("sums", [axes[place.tensor].axes[place.dim] for place in places])
        for lookup in stated.lookups:
            if lookup.node == name:
                yield f"{', '.join(self.several(lookup.expr)) or '1'} by {labels.get(lookup.index, lookup.index)}"
        yield from self.listed("statistic over", [s.expr for s in stated.statistics if s.node == name])
        yield from self.listed("shares out", [c.expr for c in stated.competitions if c.freeze.node == name])
        held = [(label, stated.positions.get(x.name)) for label, x in _labelled(outs)]
        for label, found in held:
            if found is not None:
                yield f"positions of {', '.join(self.several(found.expr)) or '1'} in {label}"
        for least in stated.at_least:
            yield f"at least {least.count} of {', '.join(self.several(least.expr))}"
        reasons: dict[str, list[str]] = {}
        for factor, freeze in stated.solver.frozen_factors().items():
            if freeze.node == name and factor in self.letters:
                reasons.setdefault(freeze.reason, []).append(self.letter(factor))
        for reason, letters in reasons.items():
            yield f"keeps {', '.join(letters)}: {reason}"

    def listed(self, words: str, exprs: Sequence[Expr]) -> Iterator[str]:
        """``words`` and the letters in ``exprs``, if there are any."""
        found = dict.fromkeys(letter for expr in exprs for letter in self.several(expr))
        if found:
            yield f"{words} {', '.join(found)}"


def _labelled(outs: Sequence[TensorAxes]) -> list[tuple[str, TensorAxes]]:
    return [("out", outs[0])] if len(outs) == 1 else [(f"out#{i}", x) for i, x in enumerate(outs)]


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
