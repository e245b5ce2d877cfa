"""Carry out a removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxprune.pipeline.contract import Pass
from fxprune.pipeline.pipeline import PassSequence

from .bypass_blocks import BypassBlocksPass
from .eliminate_dead_code import EliminateDeadCodePass
from .propagate_shapes import PropagateShapesPass
from .rewrite_literals import RewriteLiteralsPass
from .slice_parameters import SliceParametersPass

__all__ = ["ShrinkPass"]


@dataclass(frozen=True, eq=False)
class ShrinkPass(PassSequence):
    """Goes around blocks, cuts tensors, makes the sizes in the graph fit, and leaves out what nothing uses."""

    name: ClassVar[str] = "shrink"
    stage: ClassVar[str] = "shrink"

    @property
    def steps(self) -> tuple[Pass, ...]:
        """The passes, in the one order that works."""
        return (
            BypassBlocksPass(),
            EliminateDeadCodePass(),
            SliceParametersPass(),
            RewriteLiteralsPass(),
            PropagateShapesPass(),
            EliminateDeadCodePass(),
        )
