"""Shrinking: the plan becomes smaller tensors and a graph that fits them."""

from passes.shrink.bypass_blocks import BypassBlocksPass
from passes.shrink.eliminate_dead_code import EliminateDeadCodePass
from passes.shrink.propagate_shapes import PropagateShapesPass
from passes.shrink.rewrite_literals import RewriteLiteralsPass
from passes.shrink.slice_parameters import SliceParametersPass

__all__ = [
    "BypassBlocksPass",
    "EliminateDeadCodePass",
    "PropagateShapesPass",
    "RewriteLiteralsPass",
    "SliceParametersPass",
]
