"""How the scores of the members of a group make that of the group. It needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

__all__ = ["REDUCTIONS", "Array"]

Array = npt.NDArray[np.float64]

_OVER_MEMBERS: tuple[Callable[..., Array], ...] = (np.sum, np.prod, np.max, np.mean)

REDUCTIONS: dict[str, Callable[[Array], Array]] = {
    **{reduce.__name__: partial(reduce, axis=0) for reduce in _OVER_MEMBERS},
    "first": lambda members: members[0],
    "last": lambda members: members[-1],
}
"""How the scores of the members, stacked in order of execution, make the score of the group."""
