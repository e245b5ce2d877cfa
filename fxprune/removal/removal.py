"""A decision about a graph: which units stay and which blocks go, and how far it has been carried out.

Selection decides a :class:`Removal`, and three steps carry it out. The graph goes around the blocks that are removed
(:class:`Bypassed`), its tensors are cut (:class:`Sliced`), and the sizes written in it are made to fit
(:class:`Removed`). Each step uses up the fact of the one before, so that none is left out or done twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from fxprune.axes import Keep
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Group
from fxprune.graph.facts import Change, Fact
from fxprune.removal.norms import Scaling, scaled_weights
from fxprune.removal.plan import Plan, kept_of_constants, plan_of
from fxprune.removal.scores import Scores

__all__ = ["Bypassed", "Removal", "Removed", "Sliced"]


@dataclass(frozen=True, eq=False)
class Removal(Fact):
    """Which units of a graph stay, and which blocks go.

    Args:
        axes: the solved axes of the graph, before the removal.
        groups: its groups.
        keep: the kept units of each factor that loses some.
        removed_blocks: module paths of blocks that go as a whole.
        asked: what selection was asked for, for the report: ``ratio`` or ``group_ratio``.
        scores: what it was decided by; None where it was not by scores.
    """

    about: ClassVar[Change] = "graph"
    axes: AxisMap
    groups: tuple[Group, ...]
    keep: Keep
    removed_blocks: tuple[str, ...] = ()
    asked: Mapping[str, float] = field(default_factory=dict)
    scores: Scores | None = None

    @cached_property
    def plan(self) -> Plan:
        """The removal in a portable form: kept indices by parameter."""
        return plan_of(self.axes, self.keep, self.removed_blocks)

    @cached_property
    def kept(self) -> dict[str, Mapping[int, list[int]]]:
        """Kept indices of every tensor the graph reads, what the model's code makes included."""
        return {**self.plan.kept, **kept_of_constants(self.axes, self.keep)}

    @cached_property
    def scaled(self) -> dict[str, Scaling]:
        """How the weights of norms change that are kept as masking has them."""
        return scaled_weights(self.axes, self.keep)


@dataclass(frozen=True, eq=False)
class Bypassed(Fact):
    """The first step of a removal: the graph goes around the blocks that it takes; tensors are whole.

    Args:
        removal: what is carried out.
    """

    removal: Removal


@dataclass(frozen=True, eq=False)
class Sliced(Fact):
    """The second step of a removal: tensors are cut to what it leaves; the sizes in the graph are those before it.

    Args:
        removal: what is carried out.
    """

    removal: Removal


@dataclass(frozen=True, eq=False)
class Removed(Fact):
    """The last step of a removal: the graph is slim and computes.

    Args:
        removal: what was carried out, in terms of the graph before it.
    """

    removal: Removal
