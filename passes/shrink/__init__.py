"""Shrinking: the plan becomes smaller tensors and a graph that fits them."""

from .shrink import (
    BypassBlocksPass,
    EliminateDeadCodePass,
    PropagateShapesPass,
    RewriteLiteralsPass,
    ShrinkPass,
    SliceParametersPass,
)

__all__ = [
    "BypassBlocksPass",
    "EliminateDeadCodePass",
    "PropagateShapesPass",
    "RewriteLiteralsPass",
    "ShrinkPass",
    "SliceParametersPass",
]
