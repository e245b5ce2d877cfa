"""The axis algebra: expressions, their unification, and the positions that a removal keeps.

An axis of a tensor is described by a term over three constructors::

    Factor(n)            n interchangeable units
    Product(e1, e2, ..)  row-major product: index = i1 * |e2| * .. + i2 * .. + ..
    Concat(e1, e2, ..)   one run after the other

Terms are immutable and always in normal form, which :func:`product` and :func:`concat` maintain:

* a ``Product`` holds two or more parts, each a ``Factor`` of two or more units, except that the *last* part may be
  a ``Concat`` (``(a | b) * r`` distributes to ``a*r | b*r``, which is the same axis; ``l * (a | b)`` does not);
* a ``Concat`` holds two or more parts, none of them a ``Concat`` and none empty.

Two axes made of the same factors are therefore equal exactly when their terms are.

The solver holds a substitution from factors to expressions. Making two expressions equal refines factors, by
splitting one into a product or a concatenation of smaller ones, until both sides read the same. Every step replaces
a factor by strictly smaller ones or merges two, so it terminates; nothing is ever undone. If two expressions cannot be
refined to one, :class:`~fxprune.errors.AxisMismatch` is raised and the caller freezes both.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from fxprune.errors import AxisMismatch

_ids = itertools.count()


@dataclass(frozen=True)
class Factor:
    """A run of ``size`` interchangeable units; two factors are the same only if their ``uid`` is.

    Args:
        size: number of units, two or more.
        uid: identity, since many factors have the same size.
    """

    size: int
    uid: int

    def __hash__(self) -> int:
        return self.uid


@dataclass(frozen=True)
class _Term:
    """A term made of others; its factors are looked at far more often than it is made."""

    parts: tuple[Expr, ...]

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        """The factors from left to right, repeats included."""
        return tuple(factor for part in self.parts for factor in factors(part))


class Product(_Term):
    """Row-major product of ``parts``, the first varying slowest."""

    @cached_property
    def size(self) -> int:
        """Units along the axis."""
        return prod(part.size for part in self.parts)


class Concat(_Term):
    """Concatenation of ``parts`` in order."""

    @cached_property
    def size(self) -> int:
        """Units along the axis."""
        return sum(part.size for part in self.parts)


Expr = Factor | Product | Concat

UNIT = Product(())
"""The axis of size 1: neutral in a product, and the one that broadcasts."""


def new_factor(size: int) -> Expr:
    """A factor of ``size`` units that is unlike any other, or :data:`UNIT` for size 1."""
    return UNIT if size == 1 else Factor(size, next(_ids))


def product(*parts: Expr) -> Expr:
    """The normal form of the row-major product of ``parts``."""
    flat: list[Expr] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Product) else (part,))
    flat = [part for part in flat if part.size != 1]
    for i, part in enumerate(flat[:-1]):
        if isinstance(part, Concat):
            rest = flat[i + 1 :]
            return product(*flat[:i], concat(*(product(piece, *rest) for piece in part.parts)))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(*parts: Expr) -> Expr:
    """The normal form of the concatenation of ``parts``."""
    flat: list[Expr] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Concat) else (part,))
    flat = [part for part in flat if part.size != 0]
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def factors(expr: Expr) -> tuple[Factor, ...]:
    """The factors of ``expr`` from left to right, repeats included."""
    return (expr,) if isinstance(expr, Factor) else expr.factors


def beside(
    expr: Expr, factor: Factor, before: tuple[Factor, ...] = (), after: tuple[Factor, ...] = ()
) -> Iterator[tuple[tuple[Factor, ...], tuple[Factor, ...]]]:
    """Yield the factors before and after each occurrence of ``factor`` in ``expr``, within its enclosing products.

    ``before`` and ``after`` are the factors around ``expr`` itself.
    """
    if expr == factor:
        yield before, after
    elif isinstance(expr, Concat):
        for part in expr.parts:
            yield from beside(part, factor, before, after)
    elif isinstance(expr, Product):
        for i, part in enumerate(expr.parts):
            left = tuple(f for other in expr.parts[:i] for f in factors(other))
            right = tuple(f for other in expr.parts[i + 1 :] for f in factors(other))
            yield from beside(part, factor, before + left, right + after)


def render(expr: Expr, label: Callable[[Factor], str] = lambda factor: f"f{factor.uid}:{factor.size}") -> str:
    """``expr`` as text, such as ``(kv:2 * rep:2 * [rot:8 | rot:8])``, with a label for each factor."""
    if isinstance(expr, Factor):
        return label(expr)
    if not expr.parts:
        return str(expr.size)
    inner = [render(part, label) for part in expr.parts]
    return f"({' * '.join(inner)})" if isinstance(expr, Product) else f"[{' | '.join(inner)}]"


@dataclass(frozen=True)
class Freeze:
    """Why a factor must keep all of its units, and the name of the graph node that requires it."""

    reason: str
    node: str

    def __str__(self) -> str:
        return f"{self.reason} (at {self.node})"


@dataclass(eq=False)
class Solver:
    """A growing set of equations between axis expressions, kept solved.

    Frozen factors and tags are read through :meth:`frozen_factors` and :meth:`tagged_factors`, which follow each
    factor to the factors that it was refined into.
    """

    _bound: dict[Factor, Expr] = field(default_factory=dict)
    _frozen: dict[Factor, Freeze] = field(default_factory=dict)
    _tags: dict[tuple[Factor, str], None] = field(default_factory=dict)

    def resolve(self, expr: Expr) -> Expr:
        """``expr`` with all bindings substituted, in normal form."""
        if isinstance(expr, Factor):
            bound = self._bound.get(expr)
            if bound is None:
                return expr
            self._bound[expr] = found = self.resolve(bound)  # path compression
            return found
        if self._bound.keys().isdisjoint(expr.factors):
            return expr
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
            for i, part in enumerate(expr.parts):
                if at < part.size:
                    left, right = self.cut(part, at)
                    return concat(*expr.parts[:i], left), concat(right, *expr.parts[i + 1 :])
                at -= part.size
        head, rest = expr.parts[0], expr.parts[1:]
        inner = product(*rest).size
        if at % inner:
            raise AxisMismatch(f"a cut after {at} goes through a unit", where=render(expr))
        left, right = self.cut(head, at // inner)
        return product(left, *rest), product(right, *rest)

    def freeze(self, expr: Expr, reason: str, node: str) -> None:
        """Keep every unit of ``expr``; a factor keeps the first reason given."""
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


Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Keep:
    """The kept units of each pruned factor.

    Args:
        units: for a factor of ``n`` units a boolean array ``(n,)``, true where the unit stays. A factor that occurs
            only inside another of ``m`` units, on the same axis or along the first axis of weights, may instead hold
            ``(m, n)``: one choice for each outer unit, with the same number kept in every row.
        outer: the enclosing factor of each factor of the second kind.
    """

    units: Mapping[Factor, Mask] = field(default_factory=dict)
    outer: Mapping[Factor, Factor] = field(default_factory=dict)

    def count(self, factor: Factor) -> int:
        """Number of kept units of ``factor`` (inside one outer unit, if it is nested)."""
        mask = self.units.get(factor)
        return factor.size if mask is None else int(mask.reshape(-1, factor.size)[0].sum())

    def touches(self, expr: Expr) -> bool:
        """Whether any unit of the axis ``expr`` is removed."""
        return any(self.count(factor) < factor.size for factor in factors(expr))

    def only(self, factors: Collection[Factor]) -> Keep:
        """The same units of ``factors`` alone; of any other all stay."""
        units = {factor: units for factor, units in self.units.items() if factor in factors}
        return Keep(units, {factor: around for factor, around in self.outer.items() if factor in units})


def kept_size(expr: Expr, keep: Keep) -> int:
    """Size of the axis ``expr`` after the removal."""
    if isinstance(expr, Factor):
        return keep.count(expr)
    sizes = [kept_size(part, keep) for part in expr.parts]
    return sum(sizes) if isinstance(expr, Concat) else prod(sizes)


def kept_mask(expr: Expr, keep: Keep) -> Mask:
    """Boolean mask ``(size,)`` of the kept positions of the axis ``expr``."""
    mask: Mask = _mask(expr, keep, {}, 1)[0]
    return mask


def weight_mask(exprs: Sequence[Expr], axis: int, keep: Keep) -> Mask:
    """Boolean mask ``(size,)`` of the kept positions of an axis of a weight with the axes ``exprs``.

    It is ``(rows, size)``, with the same number kept in every row, if what stays differs along the first axis.
    """
    expr = exprs[axis]
    outer = {keep.outer[factor] for factor in factors(expr) if factor in keep.outer}.difference(factors(expr))
    if not outer:
        return kept_mask(expr, keep)
    mask = _mask(expr, keep, {factor: unit_index(exprs[0], factor) for factor in outer}, exprs[0].size)
    return np.asarray(mask[0]) if (mask == mask[0]).all() else mask


def kept_positions(mask: Mask) -> Index:
    """The kept positions in a mask of :func:`weight_mask`: ``(kept,)``, or ``(rows, kept)``."""
    return np.flatnonzero(mask) if mask.ndim == 1 else np.nonzero(mask)[1].reshape(len(mask), -1)


def _mask(expr: Expr, keep: Keep, around: dict[Factor, Index], rows: int) -> Mask:
    """The mask ``(rows, size)`` of ``expr`` inside ``rows`` outer positions.

    ``around`` holds, for each enclosing factor, the unit that each of these positions belongs to: ``(rows,)``.
    """
    if isinstance(expr, Factor):
        units = keep.units.get(expr)
        if units is None:
            return np.ones((rows, expr.size), dtype=bool)
        return units[around[keep.outer[expr]]] if units.ndim == 2 else np.broadcast_to(units, (rows, expr.size))
    if isinstance(expr, Concat):
        return np.concatenate([_mask(part, keep, around, rows) for part in expr.parts], axis=1)
    mask, width = np.ones((rows, 1), dtype=bool), 1
    for part in expr.parts:
        below = _mask(part, keep, around, rows * width)
        mask = (mask.reshape(-1, 1) & below).reshape(rows, -1)
        around = {factor: np.repeat(index, part.size) for factor, index in around.items()}
        if isinstance(part, Factor):
            around[part] = np.tile(np.arange(part.size), rows * width)
        width *= part.size
    return mask


def unit_index(expr: Expr, factor: Factor) -> Index:
    """The unit of ``factor`` that each position of ``expr`` belongs to: ``(size,)``, -1 for none."""
    if isinstance(expr, Factor):
        return np.arange(expr.size) if expr == factor else np.full(expr.size, -1)
    if isinstance(expr, Concat):
        return np.concatenate([unit_index(part, factor) for part in expr.parts])
    index = np.full(1, -1)
    for part in expr.parts:
        index = np.maximum(index[:, None], unit_index(part, factor)[None, :]).reshape(-1)
    return index
