"""What the two selections share: groups to slots, choices to a plan."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxprune.dependency import axis_map
from fxprune.errors import FxpruneError, UnknownNameError
from fxprune.groups import check_kinds
from fxprune.passbase import Pass, PassResult
from fxprune.plan import Plan, plan_of
from fxprune.scores import Scores
from fxprune.state import State, state_of
from passes.select.budget import ParameterBudget
from passes.select.slots import Slot, make_keep, make_slots, protected_blocks, removed_layers

__all__ = ["RANKINGS", "SelectPass", "Selection"]

RANKINGS = ("local", "global")


@dataclass(frozen=True)
class Selection:
    """What a selection works on.

    Args:
        slots: places where units go.
        scores: of all units.
        budget: counts parameters.
        plan_for: the plan that choices for all slots make.
    """

    slots: Sequence[Slot]
    scores: Scores
    budget: ParameterBudget
    plan_for: Callable[[Sequence[tuple[int, int]]], Plan]


@dataclass(eq=False)
class SelectPass(Pass):
    """Chooses which units stay.

    Args:
        kinds: kinds of groups that may shrink.
        ranking: ``local``: the same fraction in every group; ``global``: the lowest scores anywhere, normalised
            within groups of the same kind.
        protect: number of blocks kept whole at the front and at the end; None for the paper's 4 and 2 of 32, scaled
            to the depth; ``()`` for none.
        round_to: widths of parameters stay multiples of this where they shrink; the number of experts is no width.
        uniform: the same widths in all layers, such that the stock config takes them where there is one.
    """

    kinds: tuple[str, ...] = ("mlp", "head")
    ranking: str = "local"
    protect: tuple[int, int] | tuple[()] | None = None
    round_to: int = 1
    uniform: bool = False

    stage: ClassVar[str] = "select"
    needs: ClassVar[tuple[str, ...]] = ("graph", "scores")
    gives: ClassVar[tuple[str, ...]] = ("keep", "plan")

    def __post_init__(self) -> None:
        """Refuse nonsense before any work is done."""
        check_kinds(self.kinds)
        if self.ranking not in RANKINGS:
            raise UnknownNameError("ranking", self.ranking, RANKINGS)
        if self.round_to < 1:
            raise FxpruneError(f"round_to is {self.round_to}", where="round_to", remedy="Pass 1 or more")
        if self.protect is not None and (len(self.protect) not in (0, 2) or any(n < 0 for n in self.protect)):
            raise FxpruneError(f"protect is {self.protect}", where="protect", remedy="Pass (first, last), () or None")
        if self.uniform and (any(self.protect or ()) or self.ranking != "local"):
            raise FxpruneError(
                f"the same widths in all layers cannot be had with protect={self.protect} and ranking={self.ranking!r}",
                where="uniform",
                remedy="Leave out protect and ranking",
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Choose; the graph is not changed."""
        state = state_of(graph_module)
        assert state.graph is not None and state.scores is not None
        axes = axis_map(state.graph)
        scores, protected = state.scores, protected_blocks(axes.blocks, () if self.uniform else self.protect)
        slots = make_slots(state.groups, scores, self.kinds, protected, self.round_to)

        def plan_for(choices: Sequence[tuple[int, int]]) -> Plan:
            return plan_of(axes, make_keep(slots, choices, scores), removed_layers(slots, choices))

        choices = self.choose(Selection(slots, scores, ParameterBudget(axes), plan_for), state)
        state.keep = make_keep(slots, choices, scores)
        state.plan = plan_for(choices)
        return PassResult(graph_module, False)

    @abstractmethod
    def choose(self, selection: Selection, state: State) -> list[tuple[int, int]]:
        """For each slot the option taken and how many of its units go."""
