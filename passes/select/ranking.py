"""Global ranking: units of all groups of a kind in one order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .slots import Array, Slot

__all__ = ["count_below", "normalised"]


def normalised(slots: Sequence[Slot]) -> list[Array]:
    """The scores of each slot's first option, cheapest first, divided by the mean magnitude of all of its kind."""
    rows = [slot.options[0].scores for slot in slots]
    means = {
        kind: float(
            np.abs(np.concatenate([row for slot, row in zip(slots, rows, strict=True) if slot.kind == kind])).mean()
        )
        for kind in {slot.kind for slot in slots}
    }
    return [row / (means[slot.kind] or 1.0) for slot, row in zip(slots, rows, strict=True)]


def count_below(slot: Slot, values: Array, threshold: float) -> int:
    """How many units of ``slot`` go when those scored below ``threshold`` do."""
    return slot.options[0].below(int((values < threshold).sum()))
