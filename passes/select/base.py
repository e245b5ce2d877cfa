"""What the two selections share: groups to slots, choices to a plan."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import fx

from fxprune.checkpoint.stock import stock_test
from fxprune.discovery.dependency import AxisMap, Dependencies
from fxprune.discovery.explain import unruled
from fxprune.discovery.groups import DEFAULT_KINDS, Group, Groups, as_kinds
from fxprune.emit.epsilons import Places, find_places
from fxprune.errors import FxpruneError, PassError, RatioError
from fxprune.graph.facts import Change, Fact, add_note, facts_of
from fxprune.graph.source import Source
from fxprune.masking.compare import Expected
from fxprune.pipeline.arguments import flag, numbers, one_of, refuse, whole_number
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.words import RANKINGS
from fxprune.removal.budget import Budget, by_kind, check_budget, make_budget
from fxprune.removal.norms import scaled_numbers
from fxprune.removal.plan import Plan, keep_of
from fxprune.removal.removal import Removal
from fxprune.removal.scores import Scores

from .by_kind import read_by_kind
from .rounding import AUTO, Rounding
from .slots import Slot, make_keep, make_slots, protected_blocks, removed_layers

__all__ = ["RANKINGS", "Choice", "SelectPass", "Selection"]

Choice = tuple[int, int]
"""Of a slot, the option taken and how many of its units go."""


@dataclass(frozen=True)
class Selection:
    """What a selection works on.

    Args:
        slots: places where units go.
        scores: of all units.
        budget: counts what the ratio is of.
        sizes: what the structures of each kind cost, protected ones too.
        removal_for: the removal that choices for all slots make.
        accepts: whether a stock config can say what a plan leaves; always true where there is no stock class to ask.
        note: tells the user something.
        graph_module: the dense graph.
        by: the same with other scores.
    """

    slots: Sequence[Slot]
    scores: Scores
    budget: Budget
    sizes: Mapping[str, float]
    removal_for: Callable[[Sequence[Choice]], Removal]
    accepts: Callable[[Plan], bool]
    note: Callable[[str], None]
    graph_module: fx.GraphModule
    by: Callable[[Scores], Selection]


@dataclass(frozen=True, eq=False)
class SelectPass(Pass):
    """Chooses which units stay.

    Args:
        kinds: kinds of groups that may shrink.
        ranking: ``local``: the same fraction in every group; ``global``: the lowest scores anywhere, normalised
            within groups of the same kind.
        protect: number of blocks kept whole at the front and at the end; None for the paper's 4 and 2 of 32, scaled
            to the depth; ``()`` for none. Fractions, as in ``(0.07, 0.04)``, are of the depth.
        round_to: widths of parameters stay multiples of this where they shrink; the number of experts is no width.
            Numbers by kind, as in ``{"mlp": 64, "head": 2}``, count units of that kind. ``auto``: the finest multiple
            that is about as fast as any, by what :func:`fxprune.evaluation.measure_widths` measured on the device.
        tensor_parallel: devices that are to share each layer: MLP channels, query heads and key/value heads of each
            stay multiples of it where they shrink.
        uniform: the same widths in all layers, such that the stock config takes them where there is one.
        budget: what a ratio is a fraction of: ``params``, ``macs``, ``kv`` for the bytes of the key-value cache,
            ``bytes@q8_0`` and the like for bytes at a quantisation, or time, as ``decode@times.json``: see
            :func:`fxprune.removal.budget.make_budget`.
    """

    kinds: tuple[str, ...] = DEFAULT_KINDS
    ranking: str = "local"
    protect: tuple[float, float] | tuple[()] | None = None
    round_to: int | str | tuple[tuple[str, int], ...] = 1
    uniform: bool = False
    tensor_parallel: int = 1
    budget: str = "params"

    stage: ClassVar[str] = "select"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups, Scores)
    gives: ClassVar[tuple[type[Fact], ...]] = (Removal,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Expected,)

    def __post_init__(self) -> None:
        """Refuse nonsense before any work is done."""
        object.__setattr__(self, "kinds", as_kinds(self.kinds))
        one_of("ranking", self.ranking, RANKINGS)
        width = partial(whole_number, least=1)
        if not (isinstance(self.round_to, str) and self.round_to == AUTO):
            object.__setattr__(self, "round_to", read_by_kind("round_to", self.round_to, width))
        object.__setattr__(self, "tensor_parallel", width("tensor_parallel", self.tensor_parallel))
        object.__setattr__(self, "uniform", flag("uniform", self.uniform))
        check_budget(self.budget)
        if self.protect is not None:
            object.__setattr__(self, "protect", _protect(self.protect))
        if self.uniform and (any(self.protect or ()) or self.ranking != "local"):
            raise FxpruneError(
                f"the same widths in all layers cannot be had with protect={self.protect} and ranking={self.ranking!r}",
                where="uniform",
                remedy="Leave out protect and ranking",
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Decide on a removal.

        Raises:
            PassError: there are no scores for a kind that may shrink.
        """
        facts = facts_of(graph_module)
        axes, groups, scores = facts[Dependencies].axes, facts[Groups], facts[Scores]
        self._check_scores(groups.of_kinds(self.kinds), scores)
        protected = protected_blocks(axes.blocks, () if self.uniform else self.protect)
        rounding = Rounding.on(graph_module, self.round_to, self.tensor_parallel)
        budget = make_budget(self.budget, graph_module, axes)
        sizes = by_kind(budget, groups.of_kinds(self.kinds))
        accepts = _stock_test(graph_module, axes, groups.all) if self.uniform else lambda _: True
        note = partial(add_note, graph_module)

        def selection_by(scores: Scores) -> Selection:
            slots = make_slots(groups.all, scores, self.kinds, protected, rounding)

            def removal(choices: Sequence[Choice]) -> Removal:
                keep = make_keep(slots, choices, scores)
                return Removal(axes, groups.all, keep, removed_layers(slots, choices), self.asked, scores)

            return Selection(slots, scores, budget, sizes, removal, accepts, note, graph_module, selection_by)

        try:
            facts.put(self.decide(selection_by(scores)))
        except RatioError as error:
            frozen = unruled(axes)
            if not frozen:
                raise
            raise _with_unruled(error, frozen) from error
        return PassResult(graph_module, False)

    def decide(self, selection: Selection) -> Removal:
        """Return what goes: by default the lowest scores, as many as are chosen."""
        return selection.removal_for(self.choose(selection))

    def _check_scores(self, groups: Sequence[Group], scores: Scores) -> None:
        for group in groups:
            if group.name not in scores.units:
                raise PassError(
                    f"there are no scores for {group.name}, of the kind {group.kind!r} that may shrink",
                    where=f"pass {self.name}",
                    remedy=f"Score it: run an importance pass with kinds=[{', '.join(self.kinds)}]",
                )

    @property
    @abstractmethod
    def asked(self) -> dict[str, float]:
        """What the report says was asked for."""

    @abstractmethod
    def choose(self, selection: Selection) -> list[Choice]:
        """Return a choice for each slot."""


def _stock_test(graph_module: fx.GraphModule, axes: AxisMap, groups: tuple[Group, ...]) -> Callable[[Plan], bool]:
    """Return a test of plans: would the slim model load in stock transformers from its config alone?"""
    source = facts_of(graph_module).get(Source)

    def epsilons(plan: Plan) -> Places:
        if source is None or not axes.norms:
            return Places()
        return find_places(graph_module.graph, source.model, scaled_numbers(axes, keep_of(axes, groups, plan)))

    return stock_test(source, epsilons)


def _with_unruled(error: RatioError, frozen: Mapping[str, Sequence[str]]) -> RatioError:
    """Return an error that names ops without a rule, where such froze what might have gone."""
    op, axes = max(frozen.items(), key=lambda item: len(item[1]))
    others = f" and {len(frozen) - 1} more ops" if len(frozen) > 1 else ""
    more = f" and {len(axes) - 1} more axes" if len(axes) > 1 else ""
    told = RatioError(
        f"{error.what}; {op}{others} has no rule and froze {axes[0]}{more}",
        where=error.where,
        remedy=f"{error.remedy}; or say what the op does to axes, with fxprune.rule",
    )
    told.reachable = error.reachable
    return told


def _protect(value: Any) -> tuple[float, ...]:
    """Return how many blocks, or what fractions of them, stay whole at the front and at the end; nothing for none.

    Raises:
        ArgumentError: it is neither.
    """
    wanted = "(first, last) with the numbers of layers kept whole or fractions of them, () for none, or None"
    parts = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, float | int) for part in value)
    if parts and any(0 < part < 1 for part in value) and all(0 <= part < 1 for part in value):
        return tuple(map(float, value))
    found = numbers("protect", value, wanted)
    if len(found) not in (0, 2):
        raise refuse("protect", value, wanted)
    return found
