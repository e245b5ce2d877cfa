"""Selection by search: the budget of kinds and layers is measured instead of fixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from fxprune.data.calibration import Calibration, spread
from fxprune.data.samples import check_samples
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import ArgumentError
from fxprune.graph.facts import Fact, Runnable
from fxprune.graph.tensors import require_weights
from fxprune.masking.judge import DivergenceJudge, foresee_split, samples_except, split_samples
from fxprune.pipeline.arguments import argument
from fxprune.pipeline.contract import Pass, PassCost, tracked
from fxprune.pipeline.registry import pass_argument
from fxprune.removal.scores import Scores

from .base import Choice, Selection, Slot, width_bars
from .ratio import BudgetSolver, SelectByRatioPass

__all__ = ["SelectBySearchPass", "choice_shares", "scale_shares"]

Shares = tuple[float, ...]
"""The relative fraction that each slot loses."""

_STEP = 1.6
"""The initial factor of a move; its square root is taken after a round in which nothing helped."""

_EVEN = 0.002
"""Allocations whose sizes differ by less than this part of the whole count as equal: a measurement resolves no less."""


@dataclass(frozen=True)
class _Allocation:
    """A split of the budget between slots, under a name in words.

    Its divergence is in nats per position, on the samples of the search; infinite before it is measured.
    """

    name: str
    shares: Shares
    choices: tuple[Choice, ...]
    divergence: float = float("inf")


def choice_shares(slots: Sequence[Slot], choices: Sequence[Choice]) -> Shares:
    """The fraction that choices remove from each slot."""
    return tuple(count / slot.options[i].size for slot, (i, count) in zip(slots, choices, strict=True))


def scale_shares(shares: Shares, part: Sequence[int], factor: float) -> Shares:
    """The shares with those in ``part`` multiplied by ``factor``; one of 0 that grows gets a quarter of the mean."""
    losing = [share for share in shares if share]
    new = 0.25 * sum(losing) / max(len(losing), 1)
    return tuple(
        share if place not in part else (share * factor if share or factor < 1 else new)
        for place, share in enumerate(shares)
    )


@dataclass(frozen=True, eq=False)
class SelectBySearchPass(SelectByRatioPass):
    """Removes the fraction ``ratio`` from the kinds and layers where a measurement shows the least harm.

    The search starts with the selection of ``select-by-ratio``, with ``auto`` that by each ranking, and with other
    splits between the kinds: each kind alone, and the smaller ones at half their share. From the best it moves a part
    of the budget: all slots of a kind in a quarter of the layers lose more, or less, and the others compensate. A move
    is kept if it lowers the divergence from the dense model, on masked runs over calibration samples. The scores decide
    which units of a group go.

    In the end the result is compared with the start on samples that the search has not seen; if it does worse there,
    the start is taken. At least one unit of each group stays.

    Source: the moves are those of Li et al., "Týr-the-Pruner" (arXiv 2503.09657), there over layers alone.
    """

    name: ClassVar[str] = "select-by-search"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups, Scores, Calibration, Runnable)
    preconditions = (require_weights,)

    trials: int = argument(24, "Allocations to measure.", least=1)
    samples: int = argument(
        16, "Calibration samples to measure on, and as many again for the final comparison.", least=1
    )
    bins: int = argument(4, "Parts of the depth that budget moves between.", least=1)
    fit: Pass | None = argument(
        None,
        """Compensation carried out before each measurement, such as ``least-squares``. None by default: a fit takes
        many times as long as a measurement.""",
        check=pass_argument("compensate"),
    )
    heldout: Any | None = argument(
        None,
        "Samples for the final comparison, in any form that calibration data has; None for calibration samples.",
        check=check_samples,
        spelled=False,
    )
    batch: int = argument(8, "Samples that run at once.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uniform or isinstance(self.ratio, tuple):
            raise ArgumentError(
                "the same widths in all layers, or a ratio by kind, leave nothing to search for",
                where=f"pass {self.name}",
                remedy="Use select-by-ratio, or leave out $uniform and ratios by kind",
            )

    @property
    def compares_rankings(self) -> bool:
        return False  # the search measures both

    def foresee(self, graph_module: fx.GraphModule, given: tuple[type[Fact], ...]) -> None:
        super().foresee(graph_module, given)
        foresee_split(graph_module, given, self.heldout, self.samples)

    def cost(self, samples: int) -> PassCost:
        """A run of each sample a trial, after a fit if there is one; and the dense runs and the final comparison."""
        taken = min(self.samples, samples)
        fit = 0.0 if self.fit is None else self.fit.cost(samples).runs
        return PassCost(runs=self.trials * (taken + fit) + 4.0 * taken, batch=min(self.batch, taken), outputs=4)

    def choose(self, selection: Selection) -> list[Choice]:
        graph_module = selection.graph_module
        initial = super().choose(selection)
        rest, heldout = split_samples(graph_module, self.heldout, self.samples)
        seen = spread(rest, min(self.samples, len(rest) // 2 or 1))
        unseen = samples_except(rest, seen) or rest
        judge = DivergenceJudge(graph_module, seen, self.batch, self.fit, unseen)
        found = list(self._search(selection, initial, judge))
        first, best = found[0], min(found, key=lambda one: one.divergence)
        judge = DivergenceJudge(graph_module, heldout, self.batch, self.fit, unseen)
        before, after = (judge.divergence(selection.removal_for(one.choices)) for one in (first, best))
        change = f"divergence from the dense model {before:.3f} nats per token before and {after:.3f} after"
        selection.note(f"search: {len(found)} allocations measured; on held-out samples, {change}")
        chosen = best if after < before else first
        selection.note(f"search: took {chosen.name}" + ("" if after < before else ", since nothing did better"))
        for line in width_bars(selection.slots, chosen.choices):
            selection.note(f"search: {line}")
        return list(chosen.choices)

    def _search(self, selection: Selection, initial: Sequence[Choice], judge: DivergenceJudge) -> Iterator[_Allocation]:
        measured: dict[tuple[Choice, ...], _Allocation] = {}
        proposals = self._proposals(selection, initial, measured)
        for _ in tracked(range(self.trials), self.name, self.trials):
            new = next((one for one in proposals if one.choices not in measured), None)
            if new is None:
                return
            divergence = judge.divergence(selection.removal_for(new.choices))
            trial = _Allocation(new.name, new.shares, new.choices, divergence)
            measured[trial.choices] = trial
            yield trial

    def _proposals(
        self, selection: Selection, initial: Sequence[Choice], measured: dict[tuple[Choice, ...], _Allocation]
    ) -> Iterator[_Allocation]:
        """Allocations to measure; those after the first few start from the best so far."""
        target = BudgetSolver(selection, 0.0).removed(initial)

        def best() -> _Allocation:
            return min(measured.values(), key=lambda one: one.divergence)

        def allocations(name: str, shares: Shares) -> Iterator[_Allocation]:
            """Yield the allocation by shares if it removes as much as the initial one."""
            if any(shares):
                solver = BudgetSolver(selection, target, shares)
                choices = solver.repair(solver.local())
                if abs(solver.removed(choices) - target) <= _EVEN * selection.budget.total:
                    yield _Allocation(name, shares, tuple(choices))

        yield from self._starts(selection, initial)
        for name, shares in _splits(selection):
            yield from allocations(name, shares)
        step = _STEP
        while step > 1.1:  # smaller moves change less than a measurement resolves
            before = best()
            for part_name, part in _depth_parts(selection.slots, self.bins):
                for factor in (1 / step, step):
                    start = best()
                    word = "less" if factor < 1 else "more"
                    yield from allocations(
                        f"{start.name}, {word} from {part_name}", scale_shares(start.shares, part, factor)
                    )
                    if best() is not start:
                        break
            step = step if best() is not before else step**0.5

    def _starts(self, selection: Selection, initial: Sequence[Choice]) -> Iterator[_Allocation]:
        """Yield the initial selection, and with ``auto`` the one by global ranking."""
        yield _Allocation("the initial selection", choice_shares(selection.slots, initial), tuple(initial))
        if self.ranking == "auto":
            anywhere = replace(self, ranking="global")
            choices = SelectByRatioPass.choose(anywhere, replace(selection, note=lambda _: None))
            yield _Allocation("the lowest scores anywhere", choice_shares(selection.slots, choices), tuple(choices))


def _splits(selection: Selection) -> Iterator[tuple[str, Shares]]:
    """Yield initial splits between kinds: each kind alone, and the smaller ones at half their share."""
    slots = selection.slots
    kinds = sorted({slot.kind for slot in slots}, key=lambda kind: -selection.sizes.get(kind, 0.0))
    yield "the same share everywhere", (1.0,) * len(slots)
    for kind in kinds if len(kinds) > 1 else ():
        yield f"{kind} alone", tuple(float(slot.kind == kind) for slot in slots)
    if len(kinds) > 1:
        yield f"more from {kinds[0]}", tuple(1.0 if slot.kind == kinds[0] else 0.5 for slot in slots)


def _depth_parts(slots: Sequence[Slot], bins: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the numbers of the slots of each kind in each part of the depth."""
    for kind in dict.fromkeys(slot.kind for slot in slots):
        places = [place for place, slot in enumerate(slots) if slot.kind == kind]
        count = min(bins, len(places))
        for i in range(count):
            part = tuple(places[i * len(places) // count : (i + 1) * len(places) // count])
            yield f"{kind} in part {i + 1} of {count}", part
