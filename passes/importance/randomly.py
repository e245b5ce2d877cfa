"""Random scores: the baseline any criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import fx

from fxprune.discovery.groups import Group
from fxprune.pipeline.arguments import as_seed
from fxprune.removal.scores import Scores

from .base import ImportancePass

__all__ = ["RandomImportancePass"]


@dataclass(frozen=True, eq=False)
class RandomImportancePass(ImportancePass):
    """Units are scored uniformly at random in [0, 1).

    Args:
        seed: the same seed gives the same scores.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no seed."""
        super().__post_init__()
        object.__setattr__(self, "seed", as_seed("seed", self.seed))

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        """One number for each unit, in the order of ``groups``."""
        generator = np.random.default_rng(self.seed)
        shapes = {g.name: (g.outer.size, g.size) if g.outer is not None else (g.size,) for g in groups}
        return Scores({name: generator.random(shape) for name, shape in shapes.items()})
