"""The plan: which indices of which parameters stay. Data only, so that it can be stored, read and applied again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fxprune.axes import Expr, Factor, Keep, factors, kept_mask, unit_index
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Group
from fxprune.errors import PlanError
from fxprune.graph.blocks import within

__all__ = ["Plan", "keep_of", "kept_of_constants", "plan_of"]

_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Kept indices of every parameter and buffer that shrinks.

    Args:
        kept: for each name, for each axis that shrinks, the kept indices in order.
        removed_blocks: module paths of blocks that go as a whole.
    """

    kept: Mapping[str, Mapping[int, list[int]]] = field(default_factory=dict)
    removed_blocks: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the plan as a JSON document."""
        kept = {name: {str(axis): index for axis, index in axes.items()} for name, axes in self.kept.items()}
        return json.dumps({"version": _VERSION, "kept": kept, "removed_blocks": list(self.removed_blocks)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Raises:
            PlanError: the text is not such a document.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            version = data["version"]
            kept = {
                str(name): {int(axis): [int(i) for i in index] for axis, index in axes.items()}
                for name, axes in data["kept"].items()
            }
            removed = tuple(str(block) for block in data["removed_blocks"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a plan: {error!r}", remedy="Use the text that Plan.to_json returned") from error
        if version != _VERSION:
            raise PlanError(f"plan of version {version}, this release reads {_VERSION}", remedy="Make the plan again")
        return cls(kept, removed)


def plan_of(axes: AxisMap, keep: Keep, removed_blocks: tuple[str, ...] = ()) -> Plan:
    """Return the plan that leaves the units of ``keep``."""
    own = [name for name in axes.weights() if name not in axes.constants and not within(name, removed_blocks)]
    return Plan(_kept(axes, keep, own), removed_blocks)


def kept_of_constants(axes: AxisMap, keep: Keep) -> dict[str, dict[int, list[int]]]:
    """Return the kept indices of what the model's code makes.

    They are no part of a plan, since their names hold for one graph alone.
    """
    return _kept(axes, keep, axes.constants)


def _kept(axes: AxisMap, keep: Keep, names: Iterable[str]) -> dict[str, dict[int, list[int]]]:
    touched = {factor for factor in keep.units if keep.touches(factor)}
    kept: dict[str, dict[int, list[int]]] = {}
    for name in names:
        for i, expr in enumerate(axes.tensors[name]):
            if touched.intersection(factors(expr)):
                kept.setdefault(name, {})[i] = np.flatnonzero(kept_mask(expr, keep)).tolist()
    return kept


def keep_of(axes: AxisMap, groups: tuple[Group, ...], plan: Plan) -> Keep:
    """Return the kept units that make ``plan``, read back from its indices.

    Raises:
        PlanError: the plan names what the model does not have, or removes parts of units.
    """
    masks = _plan_masks(axes, plan)
    units: dict[Factor, npt.NDArray[np.bool_]] = {}
    outer: dict[Factor, Factor] = {}
    for group in groups:
        member = next((m for m in group.members if (m.name, m.axis) in masks), None)
        if group.factor is None or member is None:
            continue
        mask = masks[member.name, member.axis]
        units[group.factor] = found = _unit_mask(member.expr, group, mask)
        if int(found.sum(axis=-1).min()) < group.least:
            raise PlanError(
                f"{int(found.sum(axis=-1).min())} units of {group.size} stay where {group.least} have to",
                where=group.name,
                remedy="Use the plan's own model, or make the plan again",
            )
        if group.outer is not None and found.ndim == 2:
            outer[group.factor] = group.outer
    keep = Keep(units, outer)
    _check_plan(axes, keep, masks, plan)
    return keep


def _plan_masks(axes: AxisMap, plan: Plan) -> dict[tuple[str, int], npt.NDArray[np.bool_]]:
    blocks = set(plan.removed_blocks) - set(axes.bypasses)
    if blocks:
        raise PlanError(f"the model has no removable block {sorted(blocks)[0]}", remedy="Use the plan's own model")
    masks: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
    for name, by_axis in plan.kept.items():
        for axis, index in by_axis.items():
            exprs = axes.tensors.get(name)
            if exprs is None or name not in axes.weights() or not 0 <= axis < len(exprs):
                raise PlanError(
                    "the model has no such axis", where=f"{name}[{axis}]", remedy="Use the plan's own model"
                )
            size = exprs[axis].size
            if not index or min(index) < 0 or max(index) >= size or len(set(index)) < len(index):
                raise PlanError(
                    f"kept indices do not fit an axis of {size}",
                    where=f"{name}[{axis}]",
                    remedy="Make the plan again",
                )
            masks[name, axis] = np.isin(np.arange(size), index)
    return masks


def _unit_mask(expr: Expr, group: Group, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the units of ``group`` with a kept position, by outer unit where rows differ."""
    assert group.factor is not None
    unit = unit_index(expr, group.factor)
    if group.outer is None:
        return np.bincount(unit[mask & (unit >= 0)], minlength=group.size) > 0
    rows = unit_index(expr, group.outer)
    table = np.zeros((group.outer.size, group.size), dtype=bool)
    held = mask & (unit >= 0)
    table[rows[held], unit[held]] = True
    full = table.any(axis=1)
    some = table[full]
    if len(some) and (some == some[0]).all():
        return np.asarray(some[0])
    table[~full] = some[0] if len(some) else True
    return table


def _check_plan(axes: AxisMap, keep: Keep, masks: Mapping[tuple[str, int], npt.NDArray[np.bool_]], plan: Plan) -> None:
    rows_equal = all(len(set(mask.sum(axis=1).tolist())) == 1 for mask in keep.units.values() if mask.ndim == 2)
    again = plan_of(axes, keep, plan.removed_blocks).kept if rows_equal else {}
    for name, axis in masks:
        expected = again.get(name, {}).get(axis)
        if expected is None or expected != sorted(plan.kept[name][axis]):
            raise PlanError(
                "the kept indices are not whole units of this model",
                where=f"{name}[{axis}]",
                remedy="Apply the plan to the model it was made for, unchanged",
            )
    for name, by_axis in again.items():
        for axis in by_axis:
            if (name, axis) not in masks:
                raise PlanError("shrinks with others but is not in the plan", where=f"{name}[{axis}]")
