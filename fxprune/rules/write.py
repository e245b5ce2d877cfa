"""Rules in writing: what one was found to state at an op, in the notation that rules are written in.

``linear  input[b, s, i], weight[o, i] -> out[b, s, o]  sums i`` reads: axes with one letter are one axis, and the op
adds up over ``i``. ``(h * d)`` is an axis of ``h`` times ``d`` units, ``[a | b]`` one of ``a`` and then ``b``, and
``1`` one that broadcasts.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from fxprune.axes import Expr, Factor, Product, factors
from fxprune.graph.compat import OpOverload, argument_names
from fxprune.graph.names import tensor_name
from fxprune.rules.statements import Statements, TensorAxes

__all__ = ["Arguments", "nodes_in", "op_name", "write_rule"]


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
    writer = _Writer(stated, letters)
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


class _Writer:
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
