"""From an ``nn.Module`` to a portable, canonical ATen graph."""

from fxprune.trace.capture import Traced, trace

__all__ = ["Traced", "trace"]
