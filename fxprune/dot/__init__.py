"""Pictures of the dependency graph, as Graphviz text."""

from fxprune.dot.write import write_dot

__all__ = ["write_dot"]
