"""The split of the budget between kinds and layers, measured instead of fixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxprune.data.calibration import Calibration, Sample, spread
from fxprune.data.samples import check_kind
from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import ArgumentError
from fxprune.graph.facts import Fact, Runnable
from fxprune.graph.tensors import require_weights
from fxprune.pipeline.arguments import instance, whole_number
from fxprune.pipeline.contract import Pass, Track, check_track, no_progress
from fxprune.pipeline.registry import parse_pass
from fxprune.removal.scores import Scores

from .base import Choice, Selection
from .judge import DivergenceJudge, Shares, allocations, heldout_parts, move, picture, shares_of, without
from .ratio import SelectByRatioPass

__all__ = ["SelectBySearchPass"]

Samples = tuple[Sample, ...]

_STEP = 1.6
"""By what a share is multiplied or divided at first; after a round in which nothing helped, by its square root."""

_SMALLEST_STEP = 1.1
"""Smaller moves change less than the measurement can tell."""


@dataclass(frozen=True)
class _Trial:
    """An allocation that was measured.

    Args:
        name: where it comes from, in words.
        shares: of each slot.
        choices: of each slot.
        divergence: in nats a position, on the samples that the search looks at.
    """

    name: str
    shares: Shares
    choices: list[Choice]
    divergence: float


@dataclass(frozen=True, eq=False)
class SelectBySearchPass(SelectByRatioPass):
    """The fraction ``ratio`` goes, from the kinds and layers where it harms least, which is measured.

    It begins with what ``select-by-ratio`` takes, and with other splits between the kinds: each kind alone, and the
    smaller ones at half their share. From the best it moves a part of the budget: all slots of a kind in a quarter of
    the layers lose more, or less, and the others make up for it. What lowers the divergence from the dense model, on
    masked runs over calibration samples, is kept. Which units of a group go is up to their scores.

    In the end the result is compared with the beginning on samples that the search has not looked at; if it does worse
    there, the beginning is taken. At least one unit of each group stays.

    Source: the moves are those of Li et al., "Týr-the-Pruner" (arXiv 2503.09657), there over layers alone.

    Args:
        trials: allocations to measure.
        samples: calibration samples to measure on, and as many again to compare on in the end.
        bins: parts of the depth that budget moves between.
        fit: the spelling of a compensation, such as ``least-squares``, that is carried out before each measurement;
            none by default, since a fit takes many times as long as a measurement.
        heldout: samples to compare on in the end, in any form that calibration data has; None for calibration samples.
        batch: samples that run at once.
        track: shows progress, as ``track(items, what, total)``.
    """

    name: ClassVar[str] = "select-by-search"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups, Scores, Calibration, Runnable)

    trials: int = 24
    samples: int = 16
    bins: int = 4
    fit: str = ""
    heldout: Any = field(default=None, metadata={"spelled": False})
    batch: int = 8
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse what a search cannot keep to.

        Raises:
            ArgumentError: the widths have to be uniform, or the ratio is fixed for each kind.
        """
        super().__post_init__()
        for name in ("trials", "samples", "bins", "batch"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        if self.uniform or isinstance(self.ratio, tuple):
            raise ArgumentError(
                "the same widths in all layers, or a ratio by kind, leave nothing to search for",
                where=f"pass {self.name}",
                remedy="Use select-by-ratio, or leave uniform and the ratios by kind out",
            )
        if self.heldout is not None:
            check_kind(self.heldout)
        self._fit()
        check_track(self.track)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless there are calibration samples and real weights."""
        super().requires(graph_module)
        require_weights(graph_module, self.name)

    def choose(self, selection: Selection) -> list[Choice]:
        """The allocation that does best.

        Raises:
            RatioError: even with one unit left in every group, less than the ratio goes.
            CalibrationError: there is one sample alone.
        """
        begun = super().choose(selection)
        looked_at, heldout, rest = _parted(selection.graph_module, self.heldout, self.samples)
        judge = DivergenceJudge(selection.graph_module, looked_at, self.batch, self._fit(), rest)
        found = list(self._search(selection, begun, judge))
        first, best = found[0], min(found, key=lambda trial: trial.divergence)
        judge = DivergenceJudge(selection.graph_module, heldout, self.batch, self._fit(), rest)
        before, after = (judge.divergence(selection.removal_for(trial.choices)) for trial in (first, best))
        better = after < before
        told = f"divergence from the dense model {before:.3f} nats a token before and {after:.3f} after"
        selection.note(f"search: {len(found)} allocations measured; on samples that it did not look at, {told}")
        chosen = best if better else first
        selection.note(f"search: took {chosen.name}" + ("" if better else ", since nothing did better"))
        for line in picture(selection.slots, chosen.choices):
            selection.note(f"search: {line}")
        return chosen.choices

    def _fit(self) -> Pass | None:
        """The compensation that is carried out before each measurement."""
        return parse_pass(instance("fit", self.fit, str, "a compensation as text, or ''")) if self.fit else None

    def _search(self, selection: Selection, begun: list[Choice], judge: DivergenceJudge) -> Iterator[_Trial]:
        """Measure one allocation after the other, the beginning first; each move is from the best so far."""
        seen: dict[tuple[Choice, ...], float] = {}
        best: _Trial | None = None

        def measured(name: str, shares: Shares, choices: Sequence[Choice]) -> _Trial:
            key = tuple(choices)
            if key not in seen:
                seen[key] = judge.divergence(selection.removal_for(choices))
            return _Trial(name, shares, list(choices), seen[key])

        proposals = self._proposals(selection, begun, lambda: best)
        for _ in self.track(range(self.trials), self.name, self.trials):
            proposal = next((p for p in proposals if p[2] is not None and tuple(p[2]) not in seen), None)
            if proposal is None or proposal[2] is None:
                return
            trial = measured(proposal[0], proposal[1], proposal[2])
            best = trial if best is None or trial.divergence < best.divergence else best
            yield trial

    def _proposals(
        self, selection: Selection, begun: list[Choice], best: Any
    ) -> Iterator[tuple[str, Shares, list[Choice] | None]]:
        """Allocations to measure; those after the first few start from the best so far."""
        solver = allocations(selection, begun)
        own = shares_of(selection.slots, begun)
        yield "the beginning", own, begun
        for name, shares in solver.splits():
            yield name, shares, solver.choices(shares)
        step = _STEP
        while step > _SMALLEST_STEP:
            before = best()
            for part_name, part in solver.parts(self.bins):
                for factor in (1 / step, step):
                    start = best()
                    shares = move(start.shares, part, factor)
                    word = "less" if factor < 1 else "more"
                    yield f"{start.name}, {word} from {part_name}", shares, solver.choices(shares)
                    if best() is not start:
                        break
            step = step if best() is not before else step**0.5


def _parted(graph_module: fx.GraphModule, given: Any, most: int) -> tuple[Samples, Samples, Samples]:
    """Samples to look at, to compare on in the end, and to fit to."""
    rest, heldout = heldout_parts(graph_module, given, most)
    looked_at = spread(rest, min(most, len(rest) // 2 or 1))
    return looked_at, heldout, without(rest, looked_at) or rest
