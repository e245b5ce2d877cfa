"""Axis expressions and their normal form.

An axis of a tensor is described by a term over three constructors::

    Factor(n)            n interchangeable units
    Product(e1, e2, ..)  row-major product: index = i1 * |e2| * .. + i2 * .. + ..
    Concat(e1, e2, ..)   one run after the other

Terms are immutable and always in normal form, which :func:`product` and :func:`concat` maintain:

* a ``Product`` holds two or more parts, each a ``Factor`` of two or more units, except that the *last* part may be
  a ``Concat`` (``(a | b) * r`` distributes to ``a*r | b*r``, which is the same axis; ``l * (a | b)`` does not);
* a ``Concat`` holds two or more parts, none of them a ``Concat`` and none empty.

Two axes made of the same factors are therefore equal exactly when their terms are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

__all__ = [
    "UNIT",
    "Concat",
    "Expr",
    "Factor",
    "Product",
    "beside",
    "concat",
    "contains",
    "factors",
    "new_factor",
    "product",
    "render",
]

_ids = itertools.count()


@dataclass(frozen=True)
class Factor:
    """A run of ``size`` interchangeable units; two factors are the same only if their ``uid`` is.

    Args:
        size: number of units, two or more.
        uid: what tells this factor from others of the same size.
    """

    size: int
    uid: int


@dataclass(frozen=True)
class Product:
    """Row-major product of ``parts``, the first varying slowest."""

    parts: tuple[Expr, ...]

    @cached_property
    def size(self) -> int:
        """Units along the axis."""
        return prod(part.size for part in self.parts)


@dataclass(frozen=True)
class Concat:
    """Concatenation of ``parts`` in order."""

    parts: tuple[Expr, ...]

    @cached_property
    def size(self) -> int:
        """Units along the axis."""
        return sum(part.size for part in self.parts)


Expr = Factor | Product | Concat

UNIT = Product(())
"""The axis of size 1: neutral in a product, and what broadcasts."""


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


def factors(expr: Expr) -> Iterator[Factor]:
    """Yield the factors of ``expr`` from left to right, repeats included."""
    if isinstance(expr, Factor):
        yield expr
        return
    for part in expr.parts:
        yield from factors(part)


def contains(expr: Expr, factor: Factor) -> bool:
    """Whether ``factor`` occurs in ``expr``."""
    return any(found == factor for found in factors(expr))


def beside(
    expr: Expr, factor: Factor, before: tuple[Factor, ...] = (), after: tuple[Factor, ...] = ()
) -> Iterator[tuple[tuple[Factor, ...], tuple[Factor, ...]]]:
    """Yield what comes before and after each place of ``factor`` in ``expr``, in the products around it.

    Args:
        expr: the expression.
        factor: what to look for.
        before: what comes before ``expr``.
        after: what comes after ``expr``.
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


def render(
    expr: Expr,
    name: Callable[[Factor], str] = lambda factor: f"f{factor.uid}",
    size: Callable[[Factor], object] = lambda factor: factor.size,
) -> str:
    """``expr`` as text, as in ``(kv:2 * rep:2 * [rot:8 | rot:8])``.

    Args:
        expr: the expression.
        name: gives each factor its name.
        size: gives what stands behind the name.
    """
    if isinstance(expr, Factor):
        return f"{name(expr)}:{size(expr)}"
    if not expr.parts:
        return "1"
    inner = [render(part, name, size) for part in expr.parts]
    return f"({' * '.join(inner)})" if isinstance(expr, Product) else f"[{' | '.join(inner)}]"
