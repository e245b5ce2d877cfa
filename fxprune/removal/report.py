"""What a prune did, in numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from fxprune.axes import Keep
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.explain import frozen_in
from fxprune.discovery.groups import Group
from fxprune.errors import ArgumentError
from fxprune.graph.attempts import clear_errors
from fxprune.graph.facts import Fact

__all__ = ["Report", "Work", "frozen_reasons", "renormalised_in", "widths_of"]


@dataclass(frozen=True)
class Work(Fact):
    """How large a graph was, and how much work one sample took, before anything was removed.

    Args:
        parameters: their number.
        macs: multiply-accumulates of one sample of ``tokens`` tokens.
        tokens: the sequence length ``macs`` is for.
    """

    parameters: int
    macs: int
    tokens: int


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

    @property
    def achieved(self) -> float:
        """Fraction of parameters that went."""
        dense, slim = self.parameters
        return 1 - slim / dense

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return dataclasses.asdict(self) | {"achieved": self.achieved}

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
            return cls(**{name: _as_tuples(value) for name, value in data.items() if name in known})

    def table(self) -> Table:
        """Return dense against slim as a table for a terminal."""
        table = Table("", "dense", "slim", "change", title="fxprune")
        for name, (dense, slim) in (
            ("parameters", self.parameters),
            (f"MACs at {self.tokens} tokens", self.macs),
        ):
            table.add_row(name, f"{dense:,}", f"{slim:,}", f"{slim / max(dense, 1) - 1:+.1%}")
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
