"""fxprune: structural pruning of language models as a suite of torch.fx passes."""

from fxprune.api import Result, apply, prune, prune_pipeline
from fxprune.checkpoint import from_pretrained, save_pretrained
from fxprune.data.calibration import Calibration
from fxprune.discovery.dependency import Dependencies, dependency_graph
from fxprune.discovery.explain import explain
from fxprune.discovery.groups import Group, Groups, Member, find_groups
from fxprune.dot import write_dot
from fxprune.emit.emitted import Emitted
from fxprune.errors import FxpruneError
from fxprune.evaluation import Evaluation, evaluate
from fxprune.export import export_graph, export_model
from fxprune.graph.facts import Fact, facts_of
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass, pass_names
from fxprune.recovery import Recovery, recover
from fxprune.removal.plan import Plan
from fxprune.removal.removal import Removal, Removed
from fxprune.removal.report import Report
from fxprune.removal.scores import Scores
from fxprune.rules import OpSite, TensorAxes, rule
from fxprune.trace import Traced, trace

__version__ = "0.1.0"

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
    "Pass",
    "PassResult",
    "Pipeline",
    "Plan",
    "Recovery",
    "Removal",
    "Removed",
    "Report",
    "Result",
    "Scores",
    "TensorAxes",
    "Traced",
    "apply",
    "dependency_graph",
    "evaluate",
    "explain",
    "export_graph",
    "export_model",
    "facts_of",
    "find_groups",
    "from_pretrained",
    "load_pass",
    "pass_names",
    "prune",
    "prune_pipeline",
    "recover",
    "rule",
    "save_pretrained",
    "trace",
    "write_dot",
]
