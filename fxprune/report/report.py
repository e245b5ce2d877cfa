"""The report: a prune in numbers."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from fxprune.axes import Keep
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.explain import frozen_in
from fxprune.discovery.groups import Group
from fxprune.errors import ArgumentError
from fxprune.graph.context import clear_errors
from fxprune.graph.facts import Fact
from fxprune.removal.scores import Scores
from fxprune.report.page import headlines, page

__all__ = [
    "GroupSize",
    "Report",
    "Spread",
    "Work",
    "frozen_reasons",
    "package_versions",
    "renormalised_in",
    "sizes_of",
    "spreads_of",
    "widths_of",
]

_PACKAGES = ("fxprune", "torch", "transformers", "safetensors")

_MOST_ALIKE = 4
"""Groups of a kind in one block that are shown one by one; an expert each is too many."""


@dataclass(frozen=True)
class Work(Fact):
    """How large a graph was, and how much work one sample took, before anything was removed.

    Args:
        parameters: their number.
        macs: multiply-accumulates of one sample of ``tokens`` tokens.
        tokens: the sequence length ``macs`` is for.
        memory: bytes of the parameters.
        cache: bytes of keys and values that a token takes in half precision, before and after the removal; None where
            there is no attention, or nothing was decided yet.
        model: what the model is called, and its class.
    """

    parameters: int
    macs: int
    tokens: int
    memory: int = 0
    cache: tuple[int, int] | None = None
    model: str = ""


@dataclass(frozen=True)
class GroupSize:
    """A group and how many of its units stayed.

    Args:
        name: of the group.
        kind: what a unit is.
        block: module path of the block it lies in; None if it spans several.
        place: what it is shown with: its own name, or block and kind where blocks have many groups that are alike.
        before: units in the dense model.
        after: units in the slim model.
        nested: whether units are counted inside each unit of another group, as query heads of a key/value head are.
    """

    name: str
    kind: str
    block: str | None
    place: str
    before: int
    after: int
    nested: bool = False


@dataclass(frozen=True)
class Spread:
    """How scores of units are spread: least, first quartile, median, third quartile, most; empty where there are none.

    Args:
        kept: of units that stayed.
        removed: of units that went.
    """

    kept: tuple[float, ...] = ()
    removed: tuple[float, ...] = ()


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    return {name: version(name) for name in _PACKAGES}


@dataclass(frozen=True)
class Report(Fact):
    """A prune in numbers, before and after.

    Args:
        ratio: fraction of parameters asked for; None where a group ratio or a plan was given.
        group_ratio: fraction of units asked for; None where not.
        parameters: number of parameters, dense and slim.
        macs: multiply-accumulates of one sample of ``tokens`` tokens, dense and slim.
        tokens: the sequence length ``macs`` is for.
        widths: for each group that shrank, ``{group name: (units before, units after)}``.
        renormalised: of these, the groups that a norm or another statistic runs over, with the nodes that take it:
            removing such units equals zeroing them only up to that statistic, which is then of the units that stay.
        removed_blocks: blocks that went as a whole.
        frozen: for each parameter axis that had to keep units, ``{"name[axis]": reason}``.
        verification_error: largest difference between slim and masked dense outputs, relative to the largest output
            or 1; None where it was not checked.
        fidelity: largest difference between the dense graph and the module it was traced from, relative to the largest
            output; None where it was not checked, as on ``meta``.
        gradient_fidelity: the same of the gradients of the parameters; None where there are none.
        model_reasons: why there is no slim Hugging Face model; empty where there is one.
        notes: what else the user should know.
        model: what the dense model is called, and its class.
        memory: bytes of the parameters, dense and slim.
        cache: bytes of keys and values that a token takes in half precision, dense and slim; None where there is no
            attention.
        groups: every group of the model with its units before and after.
        scores: for each place of ``groups`` that was scored, how the scores are spread.
        criterion: the spelling of the pass that made the scores.
        kept_norms: modules whose norm runs over units that went and is kept as masking has it.
        passes: the passes that ran, each with its stage, its spelling and its seconds.
        versions: of the packages that the result depends on.
        measured: quality and speed where they were measured, in rows of text; the first row names the columns.
        picture: one layer of the slim model as SVG; no part of the plain data.
    """

    parameters: tuple[int, int]
    macs: tuple[int, int]
    tokens: int
    ratio: float | None = None
    group_ratio: float | None = None
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    renormalised: dict[str, tuple[str, ...]] = field(default_factory=dict)
    removed_blocks: tuple[str, ...] = ()
    frozen: dict[str, str] = field(default_factory=dict)
    verification_error: float | None = None
    fidelity: float | None = None
    gradient_fidelity: float | None = None
    model_reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    model: str = ""
    memory: tuple[int, int] | None = None
    cache: tuple[int, int] | None = None
    groups: tuple[GroupSize, ...] = ()
    scores: Mapping[str, Spread] = field(default_factory=dict)
    criterion: str = ""
    kept_norms: tuple[str, ...] = ()
    passes: tuple[tuple[str, str, float], ...] = field(default=(), compare=False)
    versions: Mapping[str, str] = field(default_factory=package_versions)
    measured: tuple[tuple[str, ...], ...] = ()
    picture: str = field(default="", repr=False, compare=False)

    @property
    def achieved(self) -> float:
        """Fraction of parameters that went."""
        dense, slim = self.parameters
        return 1 - slim / dense

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        data = dataclasses.asdict(self) | {"achieved": self.achieved}
        del data["picture"]
        return data

    def to_json(self) -> str:
        """Return everything as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Return the report that :meth:`to_dict` gave, also where it was a JSON document meanwhile.

        Raises:
            ArgumentError: it is something else.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        with clear_errors("report", "Pass what Report.to_dict returned", ArgumentError):
            values = {name: _as_tuples(value) for name, value in data.items() if name in known}
            values["groups"] = tuple(GroupSize(**size) for size in values.get("groups", ()))
            values["scores"] = {place: Spread(**spread) for place, spread in values.get("scores", {}).items()}
            return cls(**values)

    def to_html(self) -> str:
        """Return everything as one HTML page, which needs no other file."""
        return page(self)

    def table(self) -> Table:
        """Return dense against slim as a table for a terminal."""
        table = Table("", "dense", "slim", "change", title="fxprune")
        for size in headlines(self):
            table.add_row(size.name, f"{size.dense:,}", f"{size.slim:,}", f"{size.left - 1:+.1%}")
        return table


def _as_tuples(value: Any) -> Any:
    """Return plain data with tuples in place of lists, which JSON has in place of tuples."""
    if isinstance(value, Mapping):
        return {name: _as_tuples(item) for name, item in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def frozen_reasons(axes: AxisMap) -> dict[str, str]:
    """Return the reason, in words, of each parameter axis that keeps units."""
    return {axis: str(freeze) for axis, freeze in frozen_in(axes).items()}


def renormalised_in(groups: tuple[Group, ...], keep: Keep) -> dict[str, tuple[str, ...]]:
    """Return the groups that shrank under a statistic, with the nodes that take it."""
    shrunk = widths_of(groups, keep)
    return {group.name: group.renormalised for group in groups if group.renormalised and group.name in shrunk}


def widths_of(groups: tuple[Group, ...], keep: Keep) -> dict[str, tuple[int, int]]:
    """Return the units, before and after, of the groups that shrank."""
    found: dict[str, tuple[int, int]] = {}
    for group in groups:
        if group.factor is not None and keep.touches(group.factor):
            found[group.name] = (group.size, keep.count(group.factor))
    return found


def sizes_of(groups: Sequence[Group], keep: Keep, removed_blocks: Sequence[str]) -> tuple[GroupSize, ...]:
    """Return every group with its units before and after; of a block that went, no unit stays."""
    alike = Counter((group.block, group.kind) for group in groups)
    found = []
    for group in groups:
        after = 0 if group.block in removed_blocks else 1 if group.factor is None else keep.count(group.factor)
        many = group.block is not None and alike[group.block, group.kind] > _MOST_ALIKE
        place = f"{group.block}/{group.kind}" if many else group.name
        nested = group.outer is not None
        found.append(GroupSize(group.name, group.kind, group.block, place, group.size, after, nested))
    return tuple(found)


def spreads_of(
    groups: Sequence[Group], keep: Keep, removed_blocks: Sequence[str], scores: Scores | None
) -> dict[str, Spread]:
    """Return how the scores of units that stayed and of those that went are spread, by place."""
    kept: dict[str, list[npt.NDArray[np.float64]]] = {}
    removed: dict[str, list[npt.NDArray[np.float64]]] = {}
    sizes = sizes_of(groups, keep, removed_blocks)
    for group, size in zip(groups, sizes, strict=True):
        units = None if scores is None else scores.units.get(group.name)
        if units is None:
            continue
        stays: Any = size.after > 0
        if size.after and group.factor is not None and group.factor in keep.units:
            stays = keep.units[group.factor]
        mask = np.broadcast_to(stays, units.shape)
        kept.setdefault(size.place, []).append(units[mask])
        removed.setdefault(size.place, []).append(units[~mask])
    return {place: Spread(_quartiles(kept[place]), _quartiles(removed[place])) for place in kept}


def _quartiles(parts: Sequence[npt.NDArray[np.float64]]) -> tuple[float, ...]:
    values = np.concatenate(parts)
    return tuple(map(float, np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))) if values.size else ()
