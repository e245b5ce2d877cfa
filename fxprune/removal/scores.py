"""Scores of units, and their reduction over the members of a group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fxprune.axes import unit_index
from fxprune.discovery.groups import Group, Member
from fxprune.errors import PassError, PlanError, UnknownNameError
from fxprune.graph.context import wrap_errors
from fxprune.graph.facts import Change, Fact
from fxprune.offload.atomic import atomic_path
from fxprune.pipeline.arguments import as_path, format_value

__all__ = ["REDUCTIONS", "PositionScores", "Scores", "score_groups", "unit_scores"]

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
"""For each member ``(name, axis)`` one score per position along that axis: ``(size,)``."""


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
            raise PlanError(
                f"cannot be read: {error}", where=path, remedy="Use a file that Scores.save wrote"
            ) from error
        return cls(units, metadata.get("source", ""))

    def check(self, groups: Iterable[Group]) -> None:
        """Check that the scores are of ``groups``, one for each unit; some groups may have none."""
        if not isinstance(self.units, Mapping):
            raise PlanError(
                f"they are {format_value(self.units)}", where="scores", remedy="Use scores of an earlier run"
            )
        shapes = {g.name: (g.size,) if g.outer is None else (g.outer.size, g.size) for g in groups}
        for name, row in self.units.items():
            if not isinstance(row, np.ndarray):
                raise PlanError(f"its scores are {format_value(row)}", where=str(name), remedy="Pass arrays of float64")
            if shapes.get(name) != row.shape or not np.isfinite(row).all():
                found = "no such group" if name not in shapes else f"units {shapes[name]}"
                raise PlanError(
                    f"{found}, but scores of shape {row.shape}, which must be finite",
                    where=name,
                    remedy="Use scores of this model as it is, or score it again",
                )


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
    score = found.to(torch.float64).cpu().numpy()
    if group.factor is None:
        return np.asarray([score.sum()])
    unit = unit_index(member.expr, group.factor)
    if group.outer is None:
        return np.bincount(unit[unit >= 0], score[unit >= 0], minlength=group.size).astype(np.float64)
    cell = unit_index(member.expr, group.outer) * group.size + unit
    inside = unit >= 0
    table = np.bincount(cell[inside], score[inside], minlength=group.outer.size * group.size)
    return table.astype(np.float64).reshape(group.outer.size, group.size)
