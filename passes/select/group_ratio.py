"""The paper's ratio: a fraction of the units of every group that may shrink."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from fxprune.errors import RatioError
from fxprune.pipeline.arguments import number

from .base import Choice, Selection, SelectPass
from .by_kind import as_pairs, of_kind, read_by_kind
from .ranking import count_below, normalised
from .uniform import choose_uniform

__all__ = ["SelectByGroupRatioPass"]


@dataclass(frozen=True, eq=False)
class SelectByGroupRatioPass(SelectPass):
    """From every group the fraction ``group_ratio`` of its units goes, rounded to what is nearest.

    Source: LLM-Pruner's ``--pruning_ratio``. With ``global`` ranking it is the fraction of all units of a kind.

    Args:
        group_ratio: fraction of units, in [0, 1); by kind too, as in ``{"mlp": 0.3, "head": 0.1}``, which are then the
            kinds that shrink.
    """

    name: ClassVar[str] = "select-by-group-ratio"
    group_ratio: float | tuple[tuple[str, float], ...] = 0.25

    def __post_init__(self) -> None:
        """Refuse a ratio outside [0, 1)."""
        value = read_by_kind("group_ratio", self.group_ratio, partial(number, least=0, below=1, error=RatioError))
        object.__setattr__(self, "group_ratio", value)
        object.__setattr__(self, "kinds", as_pairs(value) or self.kinds)
        super().__post_init__()

    @property
    def asked(self) -> dict[str, float]:
        """The group ratio, where there is one for all kinds."""
        return {} if isinstance(self.group_ratio, tuple) else {"group_ratio": self.group_ratio}

    def choose(self, selection: Selection) -> list[Choice]:
        """The same fraction of each slot, or of each kind's units in order of their scores."""
        ratio = {slot.kind: of_kind(self.group_ratio, slot.kind, 0.0) for slot in selection.slots}
        if self.uniform:
            return choose_uniform(selection, lambda _, kind: ratio[kind])
        if self.ranking == "local":
            return [slot.choose(ratio[slot.kind]) for slot in selection.slots]
        values = normalised(selection.slots)
        cut: dict[str, float] = {}
        for kind in {slot.kind for slot in selection.slots}:
            pool = sorted(
                v for slot, row in zip(selection.slots, values, strict=True) if slot.kind == kind for v in row
            )
            index = round(ratio[kind] * len(pool))
            cut[kind] = pool[index] if index < len(pool) else float("inf")
        return [(0, count_below(slot, row, cut[slot.kind])) for slot, row in zip(selection.slots, values, strict=True)]
