"""Take the decision of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import fx

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import PlanError
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.masking.compare import Expected
from fxprune.pipeline.arguments import as_path, refuse
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.plan import Plan, keep_of
from fxprune.removal.removal import Removal

__all__ = ["PlanFromJsonPass"]


@dataclass(frozen=True, eq=False)
class PlanFromJsonPass(Pass):
    """Takes the units that stay and the blocks that go from a plan.

    Args:
        text: what :meth:`fxprune.Plan.to_json` wrote.
        file: in its place, the path of a file with such text.
    """

    name: ClassVar[str] = "plan-from-json"
    stage: ClassVar[str] = "select"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups)
    gives: ClassVar[tuple[type[Fact], ...]] = (Removal,)
    drops: ClassVar[tuple[type[Fact], ...]] = (Expected,)

    text: str = ""
    file: str = ""

    def check_arguments(self) -> None:
        """Raise where there is nothing to read a plan from.

        Raises:
            PlanError: there is neither a text nor a file.
        """
        if not isinstance(self.text, str):
            raise refuse("text", self.text, "what Plan.to_json wrote", PlanError)
        if not self.text and not self.file:
            raise PlanError(
                "no plan",
                where=f"pass {self.name}",
                remedy="Pass text, or file with the path of what Plan.to_json wrote",
            )
        if not self.text:
            as_path("file", self.file, error=PlanError)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the removal.

        Raises:
            PlanError: the text is no plan, or not one of this model.
        """
        plan = Plan.from_json(self.text or self._read())
        facts = facts_of(graph_module)
        axes, groups = facts[Dependencies].axes, facts[Groups].all
        facts.put(Removal(axes, groups, keep_of(axes, groups, plan), plan.removed_blocks))
        return PassResult(graph_module, False)

    def _read(self) -> str:
        try:
            return Path(self.file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PlanError(
                f"cannot be read: {error}", where=self.file, remedy="Pass text, or the path of a plan"
            ) from error
