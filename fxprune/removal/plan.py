"""The plan: kept indices of each parameter, as data; and the difference of two plans.

Plans are read and compared without torch, which takes seconds to import: what needs it is imported where it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.axes import Expr, Factor, Index, Keep, Mask, factors, kept_mask, kept_positions, weight_mask
from fxprune.errors import PlanError
from fxprune.pipeline.arguments import NORMS, format_value

if TYPE_CHECKING:
    from fxprune.discovery.dependency import AxisMap
    from fxprune.discovery.groups import Group, Member

_VERSION = 1

_WRITTEN = "Use the text that Plan.to_json returned"
_OWN = "Use the plan's own model, or make the plan again"


Kept = list[int] | list[list[int]]
"""The indices of an axis that stay, or those of each kept index of the first axis."""


def kept_count(kept: Kept) -> int:
    """Return how many indices of an axis stay."""
    first = kept[0] if kept else 0
    return len(kept) if isinstance(first, int) else len(first)


@dataclass(frozen=True)
class Plan:
    """Kept indices of every parameter and buffer that shrinks.

    Args:
        kept: for each name and each axis that shrinks, the kept indices in order; where they differ along the first
            axis, as between experts, a list of them for each of its kept indices.
        removed_blocks: module paths of blocks that are removed as a whole.
        sizes: for each name and axis in ``kept``, the size of the axis in the model that the plan was made for; without
            it, a plan for a smaller model may pass for one for this.
        norm: treatment of norms over removed units, ``sliced`` or ``masked``, as in :func:`fxprune.prune`.
        vocabulary: ids of the tokens that stay, in order, whose places are the new ids; empty if all stay. The other
            fields are about the model without the others.
        parameters: number of parameters of the model that the plan was made for; None if it is not known.

    Raises:
        PlanError: an argument is something else.
    """

    kept: Mapping[str, Mapping[int, Kept]] = field(default_factory=dict)
    removed_blocks: tuple[str, ...] = ()
    sizes: Mapping[str, Mapping[int, int]] = field(default_factory=dict, compare=False)
    norm: str = "sliced"
    vocabulary: tuple[int, ...] = ()
    parameters: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self._check_axes()
        blocks: Any = self.removed_blocks
        if not isinstance(blocks, tuple) or not all(isinstance(block, str) for block in blocks):
            raise _no_plan("removed_blocks", f"they are {format_value(blocks)}, not a tuple of module paths")
        ids: Any = self.vocabulary
        if not isinstance(ids, tuple) or not {int}.issuperset(map(type, ids)) or any(a >= b for a, b in pairwise(ids)):
            raise _no_plan("vocabulary", f"it is {format_value(ids)}, not ids of tokens in order")
        if self.norm not in NORMS:
            raise _no_plan("norm", f"it is {format_value(self.norm)}, not one of {', '.join(NORMS)}")
        if self.parameters is not None and type(self.parameters) is not int:
            raise _no_plan("parameters", f"it is {format_value(self.parameters)}, not a whole number")

    def _check_axes(self) -> None:
        checked: dict[int, Any] = {}  # axes that lose the same units may share a list
        for what, value in (("kept", self.kept), ("sizes", self.sizes)):
            for name, axes in _items(what, value):
                for axis, held in _items(f"{what}[{name!r}]", axes):
                    place, numbers = f"{what}[{name!r}][{axis!r}]", held if what == "kept" else [held]
                    if not isinstance(name, str) or type(axis) is not int:
                        raise _no_plan(place, "its keys are not a name and the number of an axis")
                    if id(numbers) in checked:
                        continue
                    checked[id(numbers)] = numbers
                    if not _are_numbers(numbers) and not (what == "kept" and axis and _are_rows(numbers)):
                        raise _no_plan(place, f"it is {format_value(held)}, not whole numbers")

    def __repr__(self) -> str:
        return f"<Plan {self._summary}>"

    def __str__(self) -> str:
        """The summary, and the kept units of each axis, equal ones on one line."""
        return "\n".join((self._summary, *(f"  {axis}: {left} kept" for axis, left in self._rows())))

    def _repr_html_(self) -> str:
        from fxprune.pipeline.pipeline import html_table

        return html_table(f"Plan: {self._summary}", self._rows(), ("axis", "units kept"))

    @property
    def _summary(self) -> str:
        gone = len(self.removed_blocks)
        blocks = f", {gone} block{'s' if gone > 1 else ''} removed" if gone else ""
        tokens = f"{len(self.vocabulary):,} tokens stay, " if self.vocabulary else ""
        return f"{tokens}{len(self.kept):,} tensors shrink{blocks}, norms {self.norm}"

    def _rows(self) -> list[tuple[str, str]]:
        """Kept units of axes whose names differ only in numbers: smallest and largest count, and the size."""
        from fxprune.graph.tensors import starred

        found: dict[str, list[tuple[int, int]]] = {}
        for name, axes in self.kept.items():
            for axis, index in axes.items():
                size = self.sizes.get(name, {}).get(axis, 0)
                found.setdefault(f"{starred(name)}[{axis}]", []).append((kept_count(index), size))
        rows = [(block, "0") for block in self.removed_blocks]
        for label, pairs in found.items():
            counts, whole = sorted({left for left, _ in pairs}), max(size for _, size in pairs)
            span = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
            rows.append((label, f"{span} of {whole:,}" if whole else span))
        return rows

    @property
    def digest(self) -> str:
        """SHA-256 of what makes plans equal, the same after a trip through JSON."""
        data = {name: value for name, value in self._data().items() if name != "parameters"} | {"sizes": {}}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(self._data())

    def _data(self) -> dict[str, Any]:
        """The plan as JSON values."""
        kept, sizes = (
            {name: {str(axis): value for axis, value in axes.items()} for name, axes in held.items()}
            for held in (self.kept, self.sizes)
        )
        blocks = list(self.removed_blocks)
        data = {"version": _VERSION, "kept": kept, "removed_blocks": blocks, "sizes": sizes, "norm": self.norm}
        data |= {"vocabulary": list(self.vocabulary)} if self.vocabulary else {}
        return data | ({} if self.parameters is None else {"parameters": self.parameters})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan from the output of :meth:`to_json`."""
        try:
            data: Any = json.loads(text, object_pairs_hook=_once)
        except (TypeError, ValueError, RecursionError) as error:
            raise _no_plan("plan", f"{type(error).__name__}: {error}") from error
        if not isinstance(data, Mapping):
            raise _no_plan("plan", f"it is {format_value(data)}")
        version = data.get("version")
        if type(version) is not int or version != _VERSION:
            what = f"it is of version {format_value(version)}, this release reads {_VERSION}"
            raise PlanError(what, where="plan", remedy="Make the plan again")
        kept, sizes = _by_axis("kept", data.get("kept")), _by_axis("sizes", data.get("sizes", {}))
        lists: Any = (data.get("removed_blocks"), data.get("vocabulary", []))
        blocks, ids = (tuple(held) if isinstance(held, list) else held for held in lists)
        return cls(kept, blocks, sizes, data.get("norm", NORMS[0]), ids, data.get("parameters"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; json alone would take the last of two values of one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and {int}.issuperset(map(type, value))


def _are_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_are_numbers, value)) and len(set(map(len, value))) == 1


def _no_plan(where: str, what: str) -> PlanError:
    return PlanError(what, where=where, remedy=_WRITTEN)


def _items(where: str, value: Any) -> Iterable[tuple[Any, Any]]:
    if not isinstance(value, Mapping):
        raise _no_plan(where, f"it is {format_value(value)}, not a mapping")
    return value.items()


def _by_axis(what: str, value: Any) -> dict[str, dict[int, Any]]:
    """Return a field of a JSON document by name and axis; axes are text there."""
    found: dict[str, dict[int, Any]] = {}
    for name, axes in _items(what, value):
        for axis, held in _items(f"{what}[{name!r}]", axes):
            if not (axis.isascii() and axis.isdigit() and len(axis) < 3):
                raise _no_plan(f"{what}[{name!r}]", f"{format_value(axis)} is not the number of an axis")
            found.setdefault(name, {})[int(axis)] = held
    return found


def plan_of(axes: AxisMap, keep: Keep, removed_blocks: tuple[str, ...] = ()) -> Plan:
    """Return the plan that keeps the units of ``keep``."""
    from fxprune.graph.facts import within

    names = [name for name in axes.weights() if name not in axes.constants and not within(name, removed_blocks)]
    indices = kept_indices(axes, keep, names)
    arrays = {id(index): index for by_axis in indices.values() for index in by_axis.values()}  # many axes share one
    lists = {key: index.tolist() for key, index in arrays.items()}
    kept = {name: {axis: lists[id(index)] for axis, index in by_axis.items()} for name, by_axis in indices.items()}
    sizes = {name: {axis: axes.tensors[name][axis].size for axis in by_axis} for name, by_axis in kept.items()}
    return Plan(kept, removed_blocks, sizes, axes.norm, parameters=_parameters(axes))


def _parameters(axes: AxisMap) -> int:
    """Number of parameters that the graph reads, tied ones counted once."""
    own = (name for name in axes.parameters if name not in axes.tied)
    return sum(prod(expr.size for expr in axes.tensors[name]) for name in own)


def other_model_note(axes: AxisMap, plan: Plan) -> str | None:
    """A note on a plan that fits a model other than the one it was made for, such as one of more layers."""
    count = _parameters(axes)
    if plan.parameters in (None, count):
        return None
    return (
        f"the plan was made for a model of {plan.parameters:,} parameters, and this one has {count:,}: "
        "what the plan does not name stays whole"
    )


def kept_indices(axes: AxisMap, keep: Keep, names: Iterable[str]) -> dict[str, dict[int, Index]]:
    """Return the kept indices of each axis that shrinks, as in :class:`Plan`; those of equal axes are one array."""
    kept: dict[str, dict[int, Index]] = {}
    known: dict[tuple[Expr, ...], Index] = {}
    for name in names:
        exprs = axes.tensors[name]
        for i, expr in enumerate(exprs):
            if keep.touches(expr):
                alike = (expr,) if keep.outer.keys().isdisjoint(factors(expr)) else (expr, exprs[0])
                if alike not in known:
                    known[alike] = kept_index(exprs, i, keep)
                kept.setdefault(name, {})[i] = known[alike]
    return kept


def kept_index(exprs: Sequence[Expr], axis: int, keep: Keep) -> Index:
    """Return the kept indices of an axis of a weight, once the axes before it are cut."""
    mask = weight_mask(exprs, axis, keep)
    if mask.ndim == 2:
        mask = mask[kept_mask(exprs[0], keep)]
        mask = mask[0] if (mask == mask[0]).all() else mask
    return kept_positions(mask)


def keep_of(axes: AxisMap, groups: tuple[Group, ...], plan: Plan) -> Keep:
    """Return the kept units of a plan, read back from its indices.

    Raises:
        PlanError: the plan does not match the model, or removes parts of units.
    """
    masks = _plan_masks(axes, plan)
    units: dict[Factor, Mask] = {}
    outer: dict[Factor, Factor] = {}
    for group in groups:
        member = next((m for m in group.members if (m.name, m.axis) in masks), None)
        if group.factor is None or member is None:
            continue
        units[group.factor] = found = _unit_mask(group, member, masks[member.name, member.axis])
        least = int(found.sum(axis=-1).min())
        if least < group.least:
            what = f"{least} units of {group.size} stay, and at least {group.least} must"
            raise PlanError(what, where=group.name, remedy=_OWN)
        if group.outer is not None and found.ndim == 2:
            outer[group.factor] = group.outer
    keep = Keep(units, outer)
    _check_plan(axes, keep, masks, plan)
    return keep


def _plan_masks(axes: AxisMap, plan: Plan) -> dict[tuple[str, int], Mask]:
    blocks = set(plan.removed_blocks) - set(axes.bypasses)
    if blocks:
        where = min(blocks) or "removed_blocks"
        raise PlanError("the model has no removable block of this name", where=where, remedy=_OWN)
    masks: dict[tuple[str, int], Mask] = {}
    for name, by_axis in plan.kept.items():
        for axis, index in by_axis.items():
            exprs, where = axes.tensors.get(name), f"{name}[{axis}]"
            if exprs is None or name not in axes.stored or not 0 <= axis < len(exprs):
                raise PlanError("the model has no such axis", where=where, remedy=_OWN)
            size = exprs[axis].size
            made_for = plan.sizes.get(name, {}).get(axis, size)
            if made_for != size:
                raise PlanError(f"the plan is for {made_for} here, the model has {size}", where=where, remedy=_OWN)
            mask = _index_mask(index, size, by_axis.get(0), exprs[0].size)
            if mask is None:
                remedy = "Make the plan again"
                raise PlanError(f"kept indices do not fit an axis of {size}", where=where, remedy=remedy)
            masks[name, axis] = mask
    return masks


def _index_mask(kept: Kept, size: int, first: Any, count: int) -> Mask | None:
    """The mask ``(size,)`` of kept indices, or ``(count, size)`` of those of rows; None if they do not fit.

    Of the ``count`` rows those at ``first`` stay; None for all.
    """
    by_row = _are_rows(kept)
    rows: list[Any] = list(kept) if by_row else [kept]
    if not all(row and min(row) >= 0 and max(row) < size and len({*row}) == len(row) for row in rows):
        return None
    if not by_row:
        return np.isin(np.arange(size), rows[0])
    places = list(range(count)) if first is None else first
    if not _are_numbers(places) or len(rows) != len(places) or not {*range(count)}.issuperset(places):
        return None
    mask = np.zeros((count, size), dtype=bool)
    for place, row in enumerate(rows):
        mask[places[place], row] = True
    return mask


def _unit_mask(group: Group, member: Member, mask: Mask) -> Mask:
    """Return the units of ``group`` with a kept position, by outer unit if these differ."""
    unit = group.numbers_along(member.expr, member.rows)
    mask = np.broadcast_to(mask, unit.shape)
    table: Mask = np.bincount(unit[mask & (unit >= 0)], minlength=prod(group.shape)).reshape(group.shape) > 0
    if group.outer is None:
        return table
    full = table.any(axis=1)
    some = table[full]
    if len(some) and (some == some[0]).all():
        return np.asarray(some[0])
    table[~full] = some[0] if len(some) else True
    return table


def _check_plan(axes: AxisMap, keep: Keep, masks: Mapping[tuple[str, int], Mask], plan: Plan) -> None:
    rows_equal = all(len(set(mask.sum(axis=1).tolist())) == 1 for mask in keep.units.values() if mask.ndim == 2)
    again = plan_of(axes, keep, plan.removed_blocks).kept if rows_equal else {}
    for name, axis in masks:
        expected = again.get(name, {}).get(axis)
        if expected is None or expected != _ordered(plan.kept[name][axis]):
            remedy = "Apply the plan to the model it was made for, unchanged"
            what = "the kept indices are not whole units of this model"
            raise PlanError(what, where=f"{name}[{axis}]", remedy=remedy)
    for name, by_axis in again.items():
        for axis in by_axis:
            if (name, axis) not in masks:
                raise PlanError("shrinks with others but is not in the plan", where=f"{name}[{axis}]", remedy=_OWN)


def _ordered(kept: Kept) -> list[Any]:
    rows: Any = kept
    return [sorted(row) for row in rows] if _are_rows(kept) else sorted(rows)


_BLOCK = re.compile(r"(.*?\.\d+)\.")
"""The path of a block in the name of a parameter: up to the first number."""

_RemovedIndices = tuple[int, tuple[int, ...], tuple[int, ...]]
"""The size of an axis, and the indices that each of two plans removes."""


@dataclass(frozen=True)
class Difference:
    """Axes of parameters that lose the same indices, in each of two plans.

    Args:
        block: module path of the block that they lie in; empty if they are in several, or in none.
        axes: as in ``"mlp.weight[0]"``, relative to the block.
        size: of each axis in the dense model.
        first: number of indices that only the first plan removes, as ``second`` is that of the second, and ``both``.
    """

    block: str
    axes: tuple[str, ...]
    size: int
    first: int
    second: int
    both: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def differences(first: Plan, second: Plan) -> tuple[Difference, ...]:
    """Return the axes of which two plans remove different indices, equal ones together.

    The difference from ``Plan()`` is everything that a plan removes, except blocks removed as a whole.

    Raises:
        PlanError: the plans are for models of different sizes, or do not record sizes.
    """
    places = dict.fromkeys((name, axis) for plan in (first, second) for name in plan.kept for axis in plan.kept[name])
    removed = {place: _removed_indices(*place, first, second) for place in places}
    anywhere = {found for (name, _), found in removed.items() if not _BLOCK.match(name)}
    alike: dict[tuple[str, _RemovedIndices], list[str]] = {}
    for (name, axis), found in removed.items():
        inside = _BLOCK.match(name)
        block = "" if inside is None or found in anywhere else inside[1]
        shown = name.removeprefix(f"{block}.") if block else name
        alike.setdefault((block, found), []).append(f"{shown}[{axis}]")
    return tuple(
        Difference(block, tuple(axes), size, len({*one} - {*other}), len({*other} - {*one}), len({*one} & {*other}))
        for (block, (size, one, other)), axes in alike.items()
        if one != other
    )


def _removed_indices(name: str, axis: int, first: Plan, second: Plan) -> _RemovedIndices:
    plans = [plan for plan in (first, second) if axis in plan.kept.get(name, {})]
    sizes = {plan.sizes.get(name, {}).get(axis) for plan in plans}
    where, size = f"{name}[{axis}]", next(iter(sizes))
    if len(sizes) > 1:
        raise PlanError("the plans are for axes of different sizes", where=where, remedy="Compare plans for one model")
    if size is None:
        raise PlanError("the plan does not record the size of the axis", where=where, remedy="Make the plan again")
    kept: list[Any] = [plan.kept.get(name, {}).get(axis, range(size)) for plan in (first, second)]
    count = max([len(rows) for rows in kept if _are_rows(rows)], default=1)
    by_row = [rows if _are_rows(rows) else [rows] * count for rows in kept]
    if len(set(map(len, by_row))) > 1:
        raise PlanError("the plans keep different experts", where=where, remedy="Compare plans for one model")
    one, other = ({row * size + i for row, own in enumerate(rows) for i in own} for rows in by_row)
    size *= count
    return size, tuple(i for i in range(size) if i not in one), tuple(i for i in range(size) if i not in other)
