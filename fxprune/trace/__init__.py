"""From an ``nn.Module`` to a portable, canonical ATen graph."""

from fxprune.trace.blocks import find_blocks
from fxprune.trace.capture import Traced, trace

__all__ = ["Traced", "find_blocks", "trace"]
