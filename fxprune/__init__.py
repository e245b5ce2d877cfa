"""fxprune: structural pruning of language models as a suite of torch.fx passes."""

from fxprune.api import Result, apply, prune
from fxprune.checkpoint import from_pretrained, save_pretrained
from fxprune.dependency import dependency_graph
from fxprune.dot import write_dot
from fxprune.errors import FxpruneError
from fxprune.evaluation import Evaluation, evaluate
from fxprune.export import export_graph
from fxprune.groups import Group, Member, explain, find_groups
from fxprune.passbase import Pass, PassResult
from fxprune.pipeline import Pipeline
from fxprune.plan import Plan
from fxprune.recovery import Recovery, recover
from fxprune.registry import load_pass, pass_names
from fxprune.report import Report
from fxprune.rules import OpSite, TensorAxes, rule
from fxprune.trace import Traced, trace

__version__ = "0.1.0"

__all__ = [
    "Evaluation",
    "FxpruneError",
    "Group",
    "Member",
    "OpSite",
    "Pass",
    "PassResult",
    "Pipeline",
    "Plan",
    "Recovery",
    "Report",
    "Result",
    "TensorAxes",
    "Traced",
    "apply",
    "dependency_graph",
    "evaluate",
    "explain",
    "export_graph",
    "find_groups",
    "from_pretrained",
    "load_pass",
    "pass_names",
    "prune",
    "recover",
    "rule",
    "save_pretrained",
    "trace",
    "write_dot",
]
