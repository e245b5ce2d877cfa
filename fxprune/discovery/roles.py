"""Which units are experts, and what that means for other axes: known only once all axes are solved.

An expert is a unit that positions made by a top-k or the like pick, or weights side by side whose outputs a softmax
mixes. A softmax runs over the experts that are left, and a product with an axis of experts is no attention. A softmax
over anything else keeps its axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod

from fxprune.axes import Concat, Expr, Factor, factors
from fxprune.rules.statements import Role, Statements, Statistic

__all__ = ["settle_experts"]


def settle_experts(stated: Statements) -> dict[Factor, int]:
    """Settle the roles of factors, what a softmax means for its axis, and which axes have no unit to spare.

    Returns:
        For each factor that has to keep more than one unit, how many: the ``k`` of a top-k over it.
    """
    solver = stated.solver
    experts = _experts(stated)
    for factor in experts:
        solver.tag(factor, Role.EXPERT)
    for found in stated.competitions:
        for factor in factors(solver.resolve(found.expr)):
            if factor in experts:
                stated.statistics.append(Statistic(factor, found.freeze.node))
            else:
                solver.freeze(factor, found.freeze.reason, found.freeze.node)
    for product in stated.products:
        solved = [(solver.resolve(expr), role) for expr, role in product.roles]
        if not any(factor in experts for expr, _ in solved for factor in factors(expr)):
            for expr, role in solved:
                solver.tag(expr, role)
    return _least(stated)


def _experts(stated: Statements) -> frozenset[Factor]:
    tags, frozen = stated.solver.tagged_factors(), stated.solver.frozen_factors()
    return frozenset(factor for factor, own in tags.items() if factor not in frozen and _is_expert(own))


def _is_expert(tags: frozenset[str]) -> bool:
    return Role.EXPERT in tags or ({Role.SHARED_OUT, Role.SIDE_BY_SIDE} <= tags and Role.HEAD not in tags)


def _least(stated: Statements) -> dict[Factor, int]:
    """How many units have to stay; where several factors make an axis, the last ones have to make up for the others.

    Units that are picked one at a time along an axis, by several ops, have to be as many.
    """
    solver, least = stated.solver, dict[Factor, int]()
    frozen = solver.frozen_factors()
    single = Counter(solver.resolve(found.expr) for found in stated.at_least if found.count == 1)
    for expr, count in ((solver.resolve(found.expr), found.count) for found in stated.at_least):
        count = max(count, single[expr])
        for factor in reversed(list(_free(expr, frozen))):
            while _fewest(expr, least, frozen) < count and least.get(factor, 1) < factor.size:
                least[factor] = least.get(factor, 1) + 1
    for factor, count in least.items():
        if count >= factor.size:
            node = next(s.node for s in stated.statistics if factor in factors(solver.resolve(s.expr)))
            solver.freeze(factor, f"all {factor.size} units are needed", node)
    return least


def _free(expr: Expr, frozen: Mapping[Factor, object]) -> Iterator[Factor]:
    return (factor for factor in factors(expr) if factor not in frozen)


def _fewest(expr: Expr, least: Mapping[Factor, int], frozen: Mapping[Factor, object]) -> int:
    """The smallest size that the axis ``expr`` may get."""
    if isinstance(expr, Factor):
        return expr.size if expr in frozen else least.get(expr, 1)
    sizes = [_fewest(part, least, frozen) for part in expr.parts]
    return sum(sizes) if isinstance(expr, Concat) else prod(sizes)
