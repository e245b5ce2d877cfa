"""Selection by a plan, such as that of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch import fx

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.errors import PlanError
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.pipeline.arguments import argument, instance, path_or_empty
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.plan import Plan, keep_of
from fxprune.removal.removal import Removal

__all__ = ["PlanFromJsonPass"]


@dataclass(frozen=True, eq=False)
class PlanFromJsonPass(Pass):
    """Takes the units that stay and the blocks that are removed from a plan."""

    name: ClassVar[str] = "plan-from-json"
    stage: ClassVar[str] = "select"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Dependencies, Groups)
    gives: ClassVar[tuple[type[Fact], ...]] = (Removal,)

    text: str = argument(
        "",
        "The output of :meth:`fxprune.Plan.to_json`.",
        check=partial(instance, kind=str, wanted="what Plan.to_json wrote", error=PlanError),
    )
    file: str = argument(
        "", "In its place, the path of a file with such text.", check=partial(path_or_empty, error=PlanError)
    )

    def check_arguments(self) -> None:
        if not self.text and not self.file:
            raise PlanError(
                "no plan",
                where=f"pass {self.name}",
                remedy="Pass text, or file with the path of what Plan.to_json wrote",
            )

    def foresee(self, graph_module: fx.GraphModule, given: tuple[type[Fact], ...]) -> None:
        """Refuse a plan for another model before samples are made and read."""
        if Groups in given:
            self._removal(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts_of(graph_module).put(self._removal(graph_module))
        return PassResult(graph_module, False)

    def _removal(self, graph_module: fx.GraphModule) -> Removal:
        try:
            text = self.text or Path(self.file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PlanError(
                f"cannot be read: {error}", where=self.file, remedy="Pass text, or the path of a plan"
            ) from error
        plan = Plan.from_json(text)
        facts = facts_of(graph_module)
        axes, groups = facts[Dependencies].axes, facts[Groups].all
        return Removal(axes, groups, keep_of(axes, groups, plan), plan.removed_blocks)
