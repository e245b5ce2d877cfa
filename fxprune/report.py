"""What a prune did, in numbers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from rich.table import Table

from fxprune.axes import Keep
from fxprune.groups import Group, frozen_axes
from fxprune.rules.base import Axis

__all__ = ["Report", "frozen_reasons", "widths_of"]


@dataclass(frozen=True)
class Report:
    """Before and after.

    Args:
        ratio: fraction of parameters asked for; None where a group ratio or a plan was given.
        group_ratio: fraction of units asked for; None where not.
        parameters: number of parameters, dense and slim.
        macs: multiply-accumulates of one sample of ``tokens`` tokens, dense and slim.
        tokens: the sequence length ``macs`` is for.
        widths: for each group that shrank, ``{group name: (units before, units after)}``.
        removed_blocks: blocks that went as a whole.
        frozen: for each parameter axis that had to keep units, ``{"name[axis]": reason}``.
        verification_error: largest difference between slim and masked dense outputs, relative to the largest output
            or 1; None where it was not checked.
        model_reasons: why there is no slim Hugging Face model; empty where there is one.
        notes: what else the user should know.
    """

    parameters: tuple[int, int]
    macs: tuple[int, int]
    tokens: int
    ratio: float | None = None
    group_ratio: float | None = None
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    removed_blocks: tuple[str, ...] = ()
    frozen: dict[str, str] = field(default_factory=dict)
    verification_error: float | None = None
    model_reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def achieved(self) -> float:
        """Fraction of parameters that went."""
        dense, slim = self.parameters
        return 1 - slim / dense

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return dataclasses.asdict(self) | {"achieved": self.achieved}

    def to_json(self) -> str:
        """Everything as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        """Dense against slim, for a terminal."""
        table = Table("", "dense", "slim", "change", title="fxprune")
        for name, (dense, slim) in (
            ("parameters", self.parameters),
            (f"MACs at {self.tokens} tokens", self.macs),
        ):
            table.add_row(name, f"{dense:,}", f"{slim:,}", f"{slim / max(dense, 1) - 1:+.1%}")
        return table


def frozen_reasons(graph: nx.Graph[Axis]) -> dict[str, str]:
    """Frozen parameter axes with their reasons, in words."""
    return {axis: str(freeze) for axis, freeze in frozen_axes(graph).items()}


def widths_of(groups: tuple[Group, ...], keep: Keep) -> dict[str, tuple[int, int]]:
    """Units before and after of the groups that shrank."""
    found: dict[str, tuple[int, int]] = {}
    for group in groups:
        if group.factor is not None and keep.touches(group.factor):
            found[group.name] = (group.size, keep.count(group.factor))
    return found
