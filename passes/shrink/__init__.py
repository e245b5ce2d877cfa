"""Shrinking: the plan becomes smaller tensors and a graph that fits them."""

from .bypass_blocks import BypassBlocksPass
from .eliminate_dead_code import EliminateDeadCodePass
from .propagate_shapes import PropagateShapesPass
from .rewrite_literals import RewriteLiteralsPass
from .shrink import ShrinkPass
from .slice_parameters import SliceParametersPass

__all__ = [
    "BypassBlocksPass",
    "EliminateDeadCodePass",
    "PropagateShapesPass",
    "RewriteLiteralsPass",
    "ShrinkPass",
    "SliceParametersPass",
]
