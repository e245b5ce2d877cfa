"""fxprune: structural pruning of language models as a suite of torch.fx passes.

Names are imported when they are first used, so that what needs no torch starts at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxprune.api import Result as Result
    from fxprune.api import apply as apply
    from fxprune.api import prune as prune
    from fxprune.api import prune_checkpoint as prune_checkpoint
    from fxprune.api import prune_pipeline as prune_pipeline
    from fxprune.checkpoint import from_pretrained as from_pretrained
    from fxprune.checkpoint import save_pretrained as save_pretrained
    from fxprune.data.calibration import Calibration as Calibration
    from fxprune.discovery.dependency import Dependencies as Dependencies
    from fxprune.discovery.dependency import dependency_graph as dependency_graph
    from fxprune.discovery.explain import explain as explain
    from fxprune.discovery.groups import Group as Group
    from fxprune.discovery.groups import Groups as Groups
    from fxprune.discovery.groups import Member as Member
    from fxprune.discovery.groups import find_groups as find_groups
    from fxprune.draw.write import write_dot as write_dot
    from fxprune.emit.emitted import Emitted as Emitted
    from fxprune.errors import FxpruneError as FxpruneError
    from fxprune.evaluation import Evaluation as Evaluation
    from fxprune.evaluation import evaluate as evaluate
    from fxprune.export import export_graph as export_graph
    from fxprune.export import export_model as export_model
    from fxprune.graph.facts import Fact as Fact
    from fxprune.graph.facts import facts_of as facts_of
    from fxprune.graph.tensors import get_tensor as get_tensor
    from fxprune.pipeline.arguments import argument as argument
    from fxprune.pipeline.contract import Pass as Pass
    from fxprune.pipeline.contract import PassResult as PassResult
    from fxprune.pipeline.pipeline import Pipeline as Pipeline
    from fxprune.pipeline.registry import load_pass as load_pass
    from fxprune.pipeline.registry import pass_names as pass_names
    from fxprune.recipes import Options as Options
    from fxprune.recipes import Recipe as Recipe
    from fxprune.recovery import Recovery as Recovery
    from fxprune.recovery import recover as recover
    from fxprune.removal.plan import Plan as Plan
    from fxprune.removal.removal import Removal as Removal
    from fxprune.removal.removal import Removed as Removed
    from fxprune.removal.removal import Scores as Scores
    from fxprune.report.report import Report as Report
    from fxprune.rules import OpSite as OpSite
    from fxprune.rules import TensorAxes as TensorAxes
    from fxprune.rules import rule as rule
    from fxprune.sweep import Sweep as Sweep
    from fxprune.sweep import sweep as sweep
    from fxprune.trace import Traced as Traced
    from fxprune.trace import trace as trace
    from fxprune.vocabulary.prune import VocabularyReport as VocabularyReport
    from fxprune.vocabulary.prune import prune_vocabulary as prune_vocabulary

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
    "removal.removal": ("Removal", "Removed", "Scores"),
    "report.report": ("Report",),
    "rules": ("OpSite", "TensorAxes", "rule"),
    "sweep": ("Sweep", "sweep"),
    "trace": ("Traced", "trace"),
    "vocabulary.prune": ("VocabularyReport", "prune_vocabulary"),
}
"""Where each public name is."""

_MODULES = {name: f"fxprune.{place}" for place, names in _PLACES.items() for name in names}

__all__ = [*_MODULES]


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
