"""The user's ratio: a fraction of the parameters of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from fxprune.discovery.groups import as_kinds, bare_kind
from fxprune.errors import RatioError
from fxprune.pipeline.arguments import number
from fxprune.removal.removal import Removal

from .base import Choice, Selection, SelectPass
from .by_kind import as_pairs, read_by_kind
from .solver import CLOSE, Solver
from .uniform import choose_uniform

__all__ = ["SelectByRatioPass"]

_FAR = 0.05
"""How much less than the ratio may go where only some widths are allowed."""

_ENOUGH = 0.75
"""The most of the units of the kinds that come first that may go before the others shrink too: what is left of a layer
that loses more does little, and a few heads are then the smaller loss."""


@dataclass(frozen=True, eq=False)
class SelectByRatioPass(SelectPass):
    """The fraction ``ratio`` of the model's parameters goes.

    Local ranking solves for the one fraction of units that removes it, rounds the kinds with large units first, solves
    again for the rest, and settles what is left unit by unit where it costs least.

    Args:
        ratio: fraction of all parameters, in [0, 1). By kind, as in ``{"mlp": 0.3, "head": 0.1}``: the fraction of the
            parameters in structures of that kind, in all layers together; these are then the kinds that shrink.
        first: kinds that shrink alone, as long as no more than three quarters of their units have to go; past that, and
            in models without any, all ``kinds`` shrink.
    """

    name: ClassVar[str] = "select-by-ratio"
    ratio: float | tuple[tuple[str, float], ...] = 0.2
    first: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a ratio outside [0, 1)."""
        value = read_by_kind("ratio", self.ratio, partial(number, least=0, below=1, error=RatioError))
        object.__setattr__(self, "ratio", value)
        object.__setattr__(self, "kinds", as_pairs(value) or self.kinds)
        object.__setattr__(self, "first", as_kinds(self.first, "first") if self.first != () else ())
        super().__post_init__()

    @property
    def asked(self) -> dict[str, float]:
        """The ratio, where there is one for all kinds, of all parameters."""
        return {} if isinstance(self.ratio, tuple) or self.budget != "params" else {"ratio": self.ratio}

    def choose(self, selection: Selection) -> list[Choice]:
        """As many units from each slot as make the ratio, of each kind where it is given by kind.

        Raises:
            RatioError: even with one unit left in every group, less than the ratio goes.
        """
        if not isinstance(self.ratio, tuple):
            total = selection.budget.total
            first = _places(selection, self.first)
            if first and Solver(_part(selection, first), self.ratio * total).fraction({}) <= _ENOUGH:
                return self._of_part(selection, first, [(0, 0)] * len(selection.slots), self.ratio, total)
            return self._choose(selection, self.ratio, total)
        decided = [(0, 0)] * len(selection.slots)
        for spelled, ratio in self.ratio:
            kind = bare_kind(spelled)
            whole = selection.sizes.get(kind, 0.0)
            decided = self._of_part(selection, _places(selection, (kind,)), decided, ratio, whole)
        return decided

    def _of_part(
        self, selection: Selection, places: Sequence[int], decided: Sequence[Choice], ratio: float, whole: float
    ) -> list[Choice]:
        """What is ``decided``, and for the slots at ``places`` what removes the fraction ``ratio`` of ``whole``."""
        choices = dict(zip(places, self._choose(_part(selection, places, decided), ratio, whole), strict=True))
        return [choices.get(place, choice) for place, choice in enumerate(decided)]

    def _choose(self, selection: Selection, ratio: float, whole: float) -> list[Choice]:
        """Choices that remove the fraction ``ratio`` of ``whole`` parameters."""
        solver = Solver(selection, ratio * whole)
        largest = solver.removed(solver.most()) / max(whole, 1)
        if ratio > largest + CLOSE:
            raise self._too_large(f"{ratio:.1%} of the {selection.budget.word}", largest)
        if self.uniform:
            choices = choose_uniform(selection, lambda fixed, _: solver.fraction(fixed))
        else:
            choices = solver.repair(solver.local() if self.ranking == "local" else solver.globally())
        achieved = solver.removed(choices) / max(whole, 1)
        if self.uniform and ratio - achieved > _FAR:
            raise RatioError(
                f"{ratio:.1%} of the {selection.budget.word} cannot go with the same widths in all layers: "
                f"with kinds={self.kinds} the stock config takes {achieved:.1%}",
                where="uniform",
                remedy="Leave out uniform; the checkpoint then carries a modelling file of its own",
            )
        if self.budget != "params":
            selection.note(f"{achieved:.1%} of {whole:,.0f} {selection.budget.word} went")
        if abs(achieved - ratio) > CLOSE:
            selection.note(f"ratio {achieved:.2%} instead of {ratio:.2%}: the units are too large to come nearer")
        return choices

    def _too_large(self, asked: str, largest: float) -> RatioError:
        """The error of a ratio that cannot be reached, with what keeps it from being larger."""
        names = ("protect", "round_to", "tensor_parallel")
        changed = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        said = [f"{name}={getattr(self, name)}" for name in ("kinds", *changed)]
        error = RatioError(
            f"{asked} cannot go: with {', '.join(said)} the largest reachable ratio is {largest:.1%}",
            where="ratio",
            remedy="Ask for less, protect fewer layers or allow more kinds",
        )
        error.reachable = largest
        return error


def _places(selection: Selection, kinds: Sequence[str]) -> list[int]:
    return [place for place, slot in enumerate(selection.slots) if slot.kind in kinds]


def _part(selection: Selection, places: Sequence[int], decided: Sequence[Choice] = ()) -> Selection:
    """The selection of some slots alone, the others being ``decided``."""

    def removal_for(choices: Sequence[Choice]) -> Removal:
        chosen = dict(zip(places, choices, strict=True))
        return selection.removal_for([chosen.get(place, choice) for place, choice in enumerate(decided)])

    return replace(selection, slots=[selection.slots[place] for place in places], removal_for=removal_for)
