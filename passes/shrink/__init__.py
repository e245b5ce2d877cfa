"""Shrinking: the plan becomes smaller tensors and a graph that fits them."""

from .propagate_shapes import PropagateShapesPass
from .shrink import BypassBlocksPass, EliminateDeadCodePass, RewriteLiteralsPass, ShrinkPass
from .slice_parameters import SliceParametersPass

__all__ = [
    "BypassBlocksPass",
    "EliminateDeadCodePass",
    "PropagateShapesPass",
    "RewriteLiteralsPass",
    "ShrinkPass",
    "SliceParametersPass",
]
