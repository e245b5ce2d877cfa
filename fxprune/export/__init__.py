"""A graph or a model as one file that runs without this package."""

from typing import TYPE_CHECKING

from fxprune.pipeline.later import later

if TYPE_CHECKING:
    from fxprune.export.model import export_model
    from fxprune.export.program import export_graph

__all__ = ["export_graph", "export_model"]

__getattr__ = later(__name__, {"export_graph": "program", "export_model": "model"})
