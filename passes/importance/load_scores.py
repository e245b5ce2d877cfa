"""Take the scores of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from fxprune.discovery.groups import Groups
from fxprune.errors import PlanError
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.pipeline.arguments import as_path
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.scores import Scores

__all__ = ["LoadScoresPass"]


@dataclass(frozen=True, eq=False)
class LoadScoresPass(Pass):
    """Takes scores that are there already: those of one run serve any ratio, ranking and width.

    Args:
        scores: such as ``result.scores``.
        file: in their place, the path of a file that :meth:`fxprune.Scores.save` wrote.
    """

    name: ClassVar[str] = "load-scores"
    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)

    scores: Scores | None = field(default=None, metadata={"spelled": False})
    file: str = ""

    def check_arguments(self) -> None:
        """Raise where there are no scores.

        Raises:
            PlanError: there are none, or the file cannot be read.
        """
        self._scores()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Put down the scores.

        Raises:
            PlanError: they are those of another model.
        """
        facts = facts_of(graph_module)
        scores = self._scores()
        scores.check(facts[Groups])
        facts.put(scores)
        return PassResult(graph_module, False)

    def _scores(self) -> Scores:
        if self.scores is None and self.file:
            return Scores.load(as_path("file", self.file))
        if isinstance(self.scores, Scores):
            return self.scores
        raise PlanError(
            "no scores", where=f"pass {self.name}", remedy="Pass scores, or file with what Scores.save wrote"
        )
