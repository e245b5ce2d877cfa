"""Shrinking: the plan becomes smaller tensors and a graph that fits them."""

from .shrink import BypassBlocksPass as BypassBlocksPass
from .shrink import EliminateDeadCodePass as EliminateDeadCodePass
from .shrink import PropagateShapesPass as PropagateShapesPass
from .shrink import RewriteLiteralsPass as RewriteLiteralsPass
from .shrink import ShrinkPass as ShrinkPass
from .shrink import SliceParametersPass as SliceParametersPass
