"""Two plans side by side: what one removes and the other keeps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fxprune.errors import PlanError
from fxprune.removal.plan import Plan

__all__ = ["Difference", "differences"]

_BLOCK = re.compile(r"(.*?\.\d+)\.")
"""The path of a block in the name of a parameter: up to the first number."""

_Lost = tuple[int, tuple[int, ...], tuple[int, ...]]
"""The size of an axis, and the indices of it that two plans remove."""


@dataclass(frozen=True)
class Difference:
    """Axes of parameters that lose the same indices, in each of two plans.

    Args:
        block: module path of the block that they lie in; empty where they are in several, or in none.
        axes: as in ``"mlp.weight[0]"``, after the path of the block.
        size: indices of each axis in the dense model.
        first: indices that the first plan alone removes.
        second: indices that the second plan alone removes.
        both: indices that both remove.
    """

    block: str
    axes: tuple[str, ...]
    size: int
    first: int
    second: int
    both: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self)


def differences(first: Plan, second: Plan) -> tuple[Difference, ...]:
    """Return the axes of which two plans do not remove the same, those that are alike as one.

    Compare with ``Plan()`` for what a plan removes at all. Blocks that go as a whole are not among them.

    Args:
        first: a plan.
        second: a plan for the same model.

    Raises:
        PlanError: the plans are for models of different sizes, or do not say for which.
    """
    lost = {axis: _lost(axis, first, second) for axis in dict.fromkeys((*_axes(first), *_axes(second)))}
    anywhere = {found for (name, _), found in lost.items() if not _BLOCK.match(name)}
    alike: dict[tuple[str, _Lost], list[str]] = {}
    for (name, axis), found in lost.items():
        inside = _BLOCK.match(name)
        block = "" if inside is None or found in anywhere else inside[1]
        shown = name.removeprefix(f"{block}.") if block else name
        alike.setdefault((block, found), []).append(f"{shown}[{axis}]")
    return tuple(
        Difference(block, tuple(axes), size, len({*one} - {*other}), len({*other} - {*one}), len({*one} & {*other}))
        for (block, (size, one, other)), axes in alike.items()
        if one != other
    )


def _axes(plan: Plan) -> Iterable[tuple[str, int]]:
    return ((name, axis) for name, by_axis in plan.kept.items() for axis in by_axis)


def _lost(at: tuple[str, int], first: Plan, second: Plan) -> _Lost:
    name, axis = at
    plans = [plan for plan in (first, second) if axis in plan.kept.get(name, {})]
    sizes = {plan.sizes.get(name, {}).get(axis) for plan in plans}
    where, size = f"{name}[{axis}]", next(iter(sizes))
    if len(sizes) > 1:
        raise PlanError("the plans are for axes of different sizes", where=where, remedy="Compare plans for one model")
    if size is None:
        raise PlanError("the plan does not say how long the axis was", where=where, remedy="Make the plan again")
    return size, _gone(first, name, axis, size), _gone(second, name, axis, size)


def _gone(plan: Plan, name: str, axis: int, size: int) -> tuple[int, ...]:
    kept = set(plan.kept.get(name, {}).get(axis, range(size)))
    return tuple(index for index in range(size) if index not in kept)
