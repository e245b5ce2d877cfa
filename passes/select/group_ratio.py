"""The paper's ratio: a fraction of the units of every group that may shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxprune.errors import RatioError

from .base import Choice, Selection, SelectPass
from .ranking import count_below, normalised
from .uniform import choose_uniform

__all__ = ["SelectByGroupRatioPass"]


@dataclass(frozen=True, eq=False)
class SelectByGroupRatioPass(SelectPass):
    """From every group the fraction ``group_ratio`` of its units goes, rounded to what is nearest.

    Source: LLM-Pruner's ``--pruning_ratio``. With ``global`` ranking it is the fraction of all units of a kind.

    Args:
        group_ratio: fraction of units, in [0, 1).
    """

    name: ClassVar[str] = "select-by-group-ratio"
    group_ratio: float = 0.25

    def __post_init__(self) -> None:
        """Refuse a ratio outside [0, 1)."""
        super().__post_init__()
        if not 0 <= self.group_ratio < 1:
            raise RatioError(
                f"group_ratio is {self.group_ratio}", where="group_ratio", remedy="Pass a number in [0, 1)"
            )

    @property
    def asked(self) -> dict[str, float]:
        """The group ratio."""
        return {"group_ratio": self.group_ratio}

    def choose(self, selection: Selection) -> list[Choice]:
        """The same fraction of each slot, or of each kind's units in order of their scores."""
        if self.uniform:
            return choose_uniform(selection, lambda _: self.group_ratio)
        if self.ranking == "local":
            return [slot.choose(self.group_ratio) for slot in selection.slots]
        values = normalised(selection.slots)
        cut: dict[str, float] = {}
        for kind in {slot.kind for slot in selection.slots}:
            pool = sorted(
                v for slot, row in zip(selection.slots, values, strict=True) if slot.kind == kind for v in row
            )
            index = round(self.group_ratio * len(pool))
            cut[kind] = pool[index] if index < len(pool) else float("inf")
        return [(0, count_below(slot, row, cut[slot.kind])) for slot, row in zip(selection.slots, values, strict=True)]
