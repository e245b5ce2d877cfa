"""Export of a graph or a model to one file that runs without this package."""

from fxprune.export.model import export_model
from fxprune.export.program import export_graph

__all__ = ["export_graph", "export_model"]
