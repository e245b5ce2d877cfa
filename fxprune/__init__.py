"""fxprune: structural pruning of language models as a suite of torch.fx passes.

Names are imported when they are first used, so that what needs no torch starts at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxprune.api import Result, apply, prune, prune_checkpoint, prune_pipeline
    from fxprune.checkpoint import from_pretrained, save_pretrained
    from fxprune.data.calibration import Calibration
    from fxprune.discovery.dependency import Dependencies, dependency_graph
    from fxprune.discovery.explain import explain
    from fxprune.discovery.groups import Group, Groups, Member, find_groups
    from fxprune.draw.write import write_dot
    from fxprune.emit.emitted import Emitted
    from fxprune.errors import FxpruneError
    from fxprune.evaluation import Evaluation, evaluate
    from fxprune.export import export_graph, export_model
    from fxprune.graph.facts import Fact, facts_of
    from fxprune.graph.tensors import get_tensor
    from fxprune.pipeline.arguments import argument
    from fxprune.pipeline.contract import Pass, PassResult
    from fxprune.pipeline.pipeline import Pipeline
    from fxprune.pipeline.registry import load_pass, pass_names
    from fxprune.recipes import Options, Recipe
    from fxprune.recovery import Recovery, recover
    from fxprune.removal.plan import Plan
    from fxprune.removal.removal import Removal, Removed
    from fxprune.removal.scores import Scores
    from fxprune.report.report import Report
    from fxprune.rules import OpSite, TensorAxes, rule
    from fxprune.trace import Traced, trace

__version__ = "0.1.0"

_PLACES = {
    "api": ("Result", "apply", "prune", "prune_checkpoint", "prune_pipeline"),
    "checkpoint": ("from_pretrained", "save_pretrained"),
    "data.calibration": ("Calibration",),
    "discovery.dependency": ("Dependencies", "dependency_graph"),
    "discovery.explain": ("explain",),
    "discovery.groups": ("Group", "Groups", "Member", "find_groups"),
    "draw.write": ("write_dot",),
    "emit.emitted": ("Emitted",),
    "errors": ("FxpruneError",),
    "evaluation": ("Evaluation", "evaluate"),
    "export": ("export_graph", "export_model"),
    "graph.facts": ("Fact", "facts_of"),
    "graph.tensors": ("get_tensor",),
    "pipeline.arguments": ("argument",),
    "pipeline.contract": ("Pass", "PassResult"),
    "pipeline.pipeline": ("Pipeline",),
    "pipeline.registry": ("load_pass", "pass_names"),
    "recipes": ("Options", "Recipe"),
    "recovery": ("Recovery", "recover"),
    "removal.plan": ("Plan",),
    "removal.removal": ("Removal", "Removed"),
    "report.report": ("Report",),
    "removal.scores": ("Scores",),
    "rules": ("OpSite", "TensorAxes", "rule"),
    "trace": ("Traced", "trace"),
}
"""Where each public name is."""

_MODULES = {name: f"fxprune.{place}" for place, names in _PLACES.items() for name in names}

__all__ = [
    "Calibration",
    "Dependencies",
    "Emitted",
    "Evaluation",
    "Fact",
    "FxpruneError",
    "Group",
    "Groups",
    "Member",
    "OpSite",
    "Options",
    "Pass",
    "PassResult",
    "Pipeline",
    "Plan",
    "Recipe",
    "Recovery",
    "Removal",
    "Removed",
    "Report",
    "Result",
    "Scores",
    "TensorAxes",
    "Traced",
    "apply",
    "argument",
    "dependency_graph",
    "evaluate",
    "explain",
    "export_graph",
    "export_model",
    "facts_of",
    "find_groups",
    "from_pretrained",
    "get_tensor",
    "load_pass",
    "pass_names",
    "prune",
    "prune_checkpoint",
    "prune_pipeline",
    "recover",
    "rule",
    "save_pretrained",
    "trace",
    "write_dot",
]


class _Package(ModuleType):
    """A package in which a function may have the name of the room that it is in."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a room does not take the place of the function."""
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
