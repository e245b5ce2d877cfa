"""Scores of units, and the removal decided for a graph, with the rescaling of its norms.

Selection decides a :class:`Removal`, and three steps apply it: removed blocks are bypassed (:class:`Bypassed`), tensors
are sliced (:class:`Sliced`), and sizes written in the graph are updated (:class:`Removed`). Each step consumes the fact
of the one before, so that none is left out or done twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from math import prod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fxprune.axes import Factor, Index, Keep, kept_size
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Group, Member
from fxprune.discovery.norms import KeptNorm
from fxprune.errors import PassError, PlanError, UnknownNameError
from fxprune.graph.context import wrap_errors
from fxprune.graph.facts import Change, Fact, within
from fxprune.offload.atomic import atomic_path
from fxprune.pipeline.arguments import as_path, format_value
from fxprune.removal.plan import Plan, kept_indices, plan_of
from fxprune.removal.target import Reached

Array = npt.NDArray[np.float64]

_OVER_MEMBERS: tuple[Callable[..., Array], ...] = (np.sum, np.prod, np.max, np.mean)

REDUCTIONS: dict[str, Callable[[Array], Array]] = {
    **{reduce.__name__: partial(reduce, axis=0) for reduce in _OVER_MEMBERS},
    "first": lambda members: members[0],
    "last": lambda members: members[-1],
}
"""Reductions of the scores of the members, stacked in order of execution, to the score of the group."""

_FORMAT, _VERSION = "fxprune.scores", 1
"""Metadata key of a file of scores, and the version of its layout."""

PositionScores = Mapping[tuple[str, int], torch.Tensor]
"""For each member ``(name, axis)`` one score per position along that axis: ``(size,)``, or ``(rows, size)``."""


@dataclass(frozen=True)
class Scores(Fact):
    """Scores of units, valid for the model as it was scored and for any ratio.

    Args:
        units: for each group name ``(units,)``, or ``(outer units, units)`` where units may be chosen separately
            inside each outer unit.
        source: the spelling of the pass that made them.
    """

    about: ClassVar[Change] = "weights"
    units: Mapping[str, Array]
    source: str = ""

    def __eq__(self, other: object) -> bool:
        """Whether another object holds the same scores of the same groups, made by the same pass."""
        if not isinstance(other, Scores):
            return NotImplemented
        same = self.source == other.source and self.units.keys() == other.units.keys()
        return same and all(np.array_equal(row, other.units[name]) for name, row in self.units.items())

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the scores as safetensors: one float64 tensor for each group."""
        path = as_path("file", file, error=PlanError)
        remedy = "Choose a file in an existing, writable folder"
        with wrap_errors(path, remedy, PlanError), atomic_path(path, PlanError) as new:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(row)) for name, row in self.units.items()}
            save_file(tensors, new, {_FORMAT: str(_VERSION), "source": self.source})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Scores:
        """Read the scores that :meth:`save` wrote."""
        path = as_path("file", file, error=PlanError)
        try:
            with safe_open(path, "pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get(_FORMAT) != str(_VERSION):
                    raise ValueError(f"it holds no scores of version {_VERSION}")
                units = {name: opened.get_tensor(name).numpy() for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            remedy = "Use a file that Scores.save wrote"
            reason = "it is a folder" if os.path.isdir(path) else error
            raise PlanError(f"cannot be read: {reason}", where=path, remedy=remedy) from error
        return cls(units, metadata.get("source", ""))

    def spread(self, groups: Iterable[Group]) -> Scores:
        """Give every row of stacked weights the scores ``(units,)`` of a group that tells no rows apart."""
        units: Any = self.units  # a criterion of the user's own may have made them
        for group in groups if isinstance(units, Mapping) else ():
            if group.is_stacked and np.shape(units.get(group.name)) == group.shape[1:]:
                units = {**units, group.name: np.broadcast_to(units[group.name], group.shape).copy()}
        return replace(self, units=units)

    def check(
        self, groups: Iterable[Group], remedy: str = "Use scores of this model as it is, or score it again"
    ) -> None:
        """Check that the scores are of ``groups``, finite, one for each unit; some groups may have none."""
        units: Any = self.units  # a criterion of the user's own may have made them
        if not isinstance(units, Mapping):
            what = f"they are {format_value(units)}"
            raise PlanError(what, where="scores", remedy="Use scores of an earlier run")
        shapes = {group.name: group.shape for group in groups}
        for name, row in units.items():
            if not isinstance(row, np.ndarray) or row.dtype.kind not in "biuf":
                raise PlanError(f"its scores are {format_value(row)}", where=str(name), remedy="Pass arrays of float64")
            if name not in shapes:
                raise PlanError("no such group", where=name, remedy=remedy)
            if row.shape != shapes[name]:
                what = f"its units are of shape {shapes[name]}, and its scores {row.shape}"
                raise PlanError(what, where=name, remedy=remedy)
            if not np.isfinite(row).all():
                raise PlanError("its scores are not all finite", where=name, remedy=remedy)


def score_groups(groups: Iterable[Group], positions: PositionScores, reduction: str) -> Scores:
    """Sum position scores to unit scores and reduce them over members, by one of :data:`REDUCTIONS`.

    ``first`` and ``last`` are the first and last member to execute.
    """
    if reduction not in REDUCTIONS:
        raise UnknownNameError("reduction", reduction, REDUCTIONS)
    units: dict[str, Array] = {}
    for group in groups:
        rows = [unit_scores(group, member, positions) for member in group.parameters]
        units[group.name] = REDUCTIONS[reduction](np.stack(rows))
    return Scores(units)


def unit_scores(group: Group, member: Member, positions: PositionScores) -> Array:
    """Return the sum of the position scores of each unit of ``group`` in one member."""
    found = positions[member.name, member.axis]
    if found.is_meta:
        raise PassError("its weights are on meta", where=member.name, remedy="Load the weights first")
    score = found.detach().to(torch.float64).cpu().numpy()
    if group.factor is None:
        return np.asarray([score.sum()])
    unit = group.numbers_along(member.expr, member.rows)
    score = np.broadcast_to(score.sum(axis=0) if score.ndim > unit.ndim else score, unit.shape)
    sums = np.bincount(unit[unit >= 0], score[unit >= 0], minlength=prod(group.shape))
    return sums.astype(np.float64).reshape(group.shape)


_MOST_LINES = 6
"""Most reasons to list in a report."""


@dataclass(frozen=True)
class Scaling:
    """Scaling of a weight to which the graph adds an offset: ``w`` becomes ``(w + offset) factor - offset``."""

    factor: float
    offset: float = 0.0

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the scaled weight in its own dtype, computed in at least float32."""
        wide = weight if weight.dtype == torch.float64 else weight.float()
        return ((wide + self.offset) * self.factor - self.offset).to(weight.dtype)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight that scales exactly to the new values as rounded to its dtype, in at least float32.

        For a weight of that dtype it is the weight itself up to its last bits.
        """
        wide = self.of(weight).to(torch.promote_types(weight.dtype, torch.float32))
        return (wide + self.offset) / self.factor - self.offset


@dataclass(frozen=True)
class RescaledNumber:
    """A number in the graph before and after a removal."""

    before: float
    after: float


def scaled_numbers(axes: AxisMap, keep: Keep) -> dict[tuple[str, tuple[Any, ...]], RescaledNumber]:
    """Return the numbers in the graph that change, by node name and argument path."""
    return {
        (number.node, number.path): RescaledNumber(number.value, number.value * float(ratio) ** number.power)
        for norm, ratio in _touched(axes, keep)
        for number in norm.numbers
    }


def kept_norm_modules(axes: AxisMap, keep: Keep) -> tuple[str, ...]:
    """Return the modules whose norm loses units and is rescaled."""
    return tuple(axes.modules.get(norm.node) or norm.node for norm, _ in _touched(axes, keep))


def unkept_norm_reasons(axes: AxisMap, nodes: Collection[str]) -> tuple[str, ...]:
    """Describe why norms at some nodes are not rescaled; nothing unless ``norm="masked"``."""
    by_reason: dict[str, list[str]] = {}
    for node in nodes:
        if node in axes.unkept:
            by_reason.setdefault(axes.unkept[node], []).append(axes.modules.get(node) or node)
    lines = []
    for reason, places in list(by_reason.items())[:_MOST_LINES]:
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"the norm in {places[0]}{more} is taken over the kept units: {reason}")
    return tuple(lines)


def _touched(axes: AxisMap, keep: Keep) -> list[tuple[KeptNorm, Fraction]]:
    """The rescaled norms over axes that lose units, each with the number of units per kept unit."""
    return [
        (norm, prod((Fraction(expr.size, kept_size(expr, keep)) for expr in norm.axes), start=Fraction(1)))
        for norm in axes.norms
        if any(map(keep.touches, norm.axes))
    ]


@dataclass(frozen=True, eq=False)
class Removal(Fact):
    """The kept units and removed blocks of a graph.

    Args:
        axes: the solved axes of the graph, before the removal.
        keep: the kept units of each factor that loses some.
        removed_blocks: module paths of blocks removed as a whole.
        asked: the requested ``ratio`` or ``group_ratio``, for the report.
        scores: the scores that decided it, if any.
        reached: what became of the target, if there was one.
    """

    about: ClassVar[Change] = "graph"
    axes: AxisMap
    groups: tuple[Group, ...]
    keep: Keep
    removed_blocks: tuple[str, ...] = ()
    asked: Mapping[str, float] = field(default_factory=dict)
    scores: Scores | None = None
    reached: Reached | None = None

    def __post_init__(self) -> None:
        """Check the form of the kept units, which a selection of the user's own may have made.

        Raises:
            PlanError: they are no masks of the units of their factors, or fewer stay than must.
        """
        remedy = "Pass a fxprune.axes.Keep with an array of bools for each factor, true for a unit that stays"
        if not isinstance(self.keep, Keep):
            raise PlanError(f"keep is {format_value(self.keep)}", where="removal", remedy=remedy)
        named = {group.factor: group for group in self.groups}
        units: Mapping[Any, Any] = self.keep.units
        for factor, mask in units.items():
            group = named.get(factor)
            where = str(factor) if group is None else group.name
            is_mask = isinstance(factor, Factor) and isinstance(mask, np.ndarray) and mask.dtype == bool
            nested = factor in self.keep.outer
            if not is_mask or mask.ndim not in ((1, 2) if nested else (1,)) or mask.shape[-1] != factor.size:
                raise PlanError(f"its kept units are {format_value(mask)}", where=where, remedy=remedy)
            least = 1 if group is None else group.least
            if self.keep.count(factor) < least:
                what = f"{self.keep.count(factor)} of {factor.size} units stay"
                raise PlanError(what, where=where, remedy=f"Keep at least {least}")

    @cached_property
    def plan(self) -> Plan:
        """The removal in a portable form: kept indices by parameter."""
        return plan_of(self.axes, self.keep, self.removed_blocks)

    @cached_property
    def kept(self) -> dict[str, dict[int, Index]]:
        """Kept indices of every tensor the graph reads, constants included."""
        axes, gone = self.axes, self.removed_blocks
        return kept_indices(axes, self.keep, (n for n in axes.weights() if n in axes.constants or not within(n, gone)))

    @cached_property
    def scaled(self) -> dict[str, Scaling]:
        """The scaling of weights by name; tied weights are under one of their names."""
        touched = _touched(self.axes, self.keep)
        return {w.name: Scaling(float(ratio) ** w.power, w.offset) for norm, ratio in touched for w in norm.weights}


@dataclass(frozen=True, eq=False)
class _RemovalStep(Fact):
    removal: Removal


class Bypassed(_RemovalStep):
    """The first step of a removal is done: removed blocks are bypassed; tensors are whole."""


class Sliced(_RemovalStep):
    """The second step of a removal is done: tensors are sliced; sizes in the graph are still those before it."""


class Removed(_RemovalStep):
    """The last step of a removal is done: the graph is slim and can run."""
