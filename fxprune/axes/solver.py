"""Unification of axis expressions by refinement.

The solver holds a substitution from factors to expressions. Making two expressions equal refines factors, by
splitting one into a product or a concatenation of smaller ones, until both sides read the same. Every step replaces
a factor by strictly smaller ones or merges two, so it ends; nothing is ever undone. Where two expressions cannot be
refined to one, :class:`~fxprune.errors.AxisMismatch` says so and the caller freezes both.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fxprune.axes.expr import Concat, Expr, Factor, Product, concat, factors, new_factor, product, render
from fxprune.errors import AxisMismatch

__all__ = ["Freeze", "Solver"]


@dataclass(frozen=True)
class Freeze:
    """Why a factor must keep all of its units.

    Args:
        reason: in words.
        node: name of the graph node that demands it.
    """

    reason: str
    node: str

    def __str__(self) -> str:
        return f"{self.reason} (at {self.node})"


@dataclass(eq=False)
class Solver:
    """A growing set of equations between axis expressions, kept solved.

    ``frozen`` and ``tags`` may be read through :meth:`frozen_factors` and :meth:`tagged_factors`, which follow each
    factor to what it has become.
    """

    _bound: dict[Factor, Expr] = field(default_factory=dict)
    _frozen: dict[Factor, Freeze] = field(default_factory=dict)
    _tags: dict[tuple[Factor, str], None] = field(default_factory=dict)

    def resolve(self, expr: Expr) -> Expr:
        """``expr`` with all that is known substituted, in normal form."""
        if isinstance(expr, Factor):
            bound = self._bound.get(expr)
            if bound is None:
                return expr
            self._bound[expr] = found = self.resolve(bound)
            return found
        parts = tuple(self.resolve(part) for part in expr.parts)
        if all(new is old for new, old in zip(parts, expr.parts, strict=True)):
            return expr
        return product(*parts) if isinstance(expr, Product) else concat(*parts)

    def unify(self, a: Expr, b: Expr) -> None:
        """Make ``a`` and ``b`` the same axis.

        Raises:
            AxisMismatch: no refinement makes them equal. Refinements made on the way stay; they are sound.
        """
        a, b = self.resolve(a), self.resolve(b)
        if a.size != b.size:
            raise AxisMismatch(
                f"axes of {a.size} and {b.size} units cannot be the same", where=f"{render(a)} = {render(b)}"
            )
        if a == b or a.size == 1:
            return
        if isinstance(a, Factor):
            self._bound[a] = b
        elif isinstance(b, Factor):
            self._bound[b] = a
        elif isinstance(a, Product) and isinstance(b, Product):
            self._unify_products(a, b)
        else:
            self._unify_runs(a, b)

    def cut(self, expr: Expr, at: int) -> tuple[Expr, Expr]:
        """``expr`` as two runs, the first of ``at`` units (``0 <= at <= size``).

        Raises:
            AxisMismatch: the cut would go through a unit of an outer factor.
        """
        expr = self.resolve(expr)
        if at in (0, expr.size):
            empty = Concat(())
            return (empty, expr) if at == 0 else (expr, empty)
        if isinstance(expr, Factor):
            left, right = new_factor(at), new_factor(expr.size - at)
            self._bound[expr] = concat(left, right)
            return left, right
        if isinstance(expr, Concat):
            return self._cut_concat(expr, at)
        head, rest = expr.parts[0], expr.parts[1:]
        inner = product(*rest).size
        if at % inner:
            raise AxisMismatch(f"a cut after {at} goes through a unit", where=render(expr))
        left, right = self.cut(head, at // inner)
        return product(left, *rest), product(right, *rest)

    def freeze(self, expr: Expr, reason: str, node: str) -> None:
        """Keep every unit of ``expr``; the first reason given to a factor stays."""
        for factor in factors(self.resolve(expr)):
            self._frozen.setdefault(factor, Freeze(reason, node))

    def tag(self, expr: Expr, tag: str) -> None:
        """Attach ``tag`` to every factor of ``expr``."""
        for factor in factors(self.resolve(expr)):
            self._tags[factor, tag] = None

    def frozen_factors(self) -> dict[Factor, Freeze]:
        """The frozen factors as they are now, each with the first reason."""
        found: dict[Factor, Freeze] = {}
        for factor, freeze in self._frozen.items():
            for leaf in factors(self.resolve(factor)):
                found.setdefault(leaf, freeze)
        return found

    def tagged_factors(self) -> dict[Factor, frozenset[str]]:
        """The tags of each factor as it is now."""
        found: dict[Factor, set[str]] = {}
        for factor, tag in self._tags:
            for leaf in factors(self.resolve(factor)):
                found.setdefault(leaf, set()).add(tag)
        return {factor: frozenset(tags) for factor, tags in found.items()}

    def _cut_concat(self, expr: Concat, at: int) -> tuple[Expr, Expr]:
        left: list[Expr] = []
        for i, part in enumerate(expr.parts):
            if at < part.size:
                first, second = self.cut(part, at)
                return concat(*left, first), concat(second, *expr.parts[i + 1 :])
            left.append(part)
            at -= part.size
        return expr, Concat(())

    def _unify_products(self, a: Product, b: Product) -> None:
        """Match the leading factors; both are factors, since only a last part may be a concatenation."""
        head_a, head_b = a.parts[0], b.parts[0]
        if head_a.size == head_b.size:
            self.unify(head_a, head_b)
            self.unify(product(*a.parts[1:]), product(*b.parts[1:]))
            return
        small, large = sorted((head_a, head_b), key=lambda head: head.size)
        if large.size % small.size or not isinstance(large, Factor):
            raise AxisMismatch("the factors interleave differently", where=f"{render(a)} = {render(b)}")
        self._bound[large] = product(new_factor(small.size), new_factor(large.size // small.size))
        self.unify(a, b)

    def _unify_runs(self, a: Expr, b: Expr) -> None:
        """Match two concatenations run by run, cutting the longer run to the shorter."""
        runs_a = deque(a.parts if isinstance(a, Concat) else (a,))
        runs_b = deque(b.parts if isinstance(b, Concat) else (b,))
        while runs_a:
            run_a, run_b = runs_a.popleft(), runs_b.popleft()
            size = min(run_a.size, run_b.size)
            run_a, rest_a = self.cut(run_a, size)
            run_b, rest_b = self.cut(run_b, size)
            self.unify(run_a, run_b)
            if rest_a.size:
                runs_a.appendleft(rest_a)
            if rest_b.size:
                runs_b.appendleft(rest_b)
