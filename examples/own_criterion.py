"""Score structures by a criterion of your own: here, by the largest weight in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from fxprune.passes.importance.base import ImportancePass
from torch import fx

import fxprune
from examples.models import load
from fxprune.graph.tensors import get_tensor


@dataclass(frozen=True, eq=False)
class LargestWeightPass(ImportancePass):
    """The score of a slice is its largest weight."""

    name: ClassVar[str] = "largest-weight"

    def positions(
        self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """Return the largest magnitude in each slice along each wanted axis of a parameter."""
        found = {}
        for name, axis in wanted:
            weight = get_tensor(graph_module, name).detach().abs()
            found[name, axis] = weight.movedim(axis, 0).flatten(1).amax(1)
        return found


def main() -> None:
    """Prune by this criterion and by the sum of all weights, and compare."""
    model, _ = load()
    mine = fxprune.prune(model, recipe="llm-pruner", importance=LargestWeightPass(reduction="max"), ratio=0.1)
    sums = fxprune.prune(model, recipe="llm-pruner", importance="l1", ratio=0.1)
    same = sum(mine.plan.kept[name] == kept for name, kept in sums.plan.kept.items() if name in mine.plan.kept)
    print(f"{mine.report.achieved:.1%} of the parameters removed")
    print(f"{same} of {len(sums.plan.kept)} parameters lose the same slices as by the sum of all weights")


if __name__ == "__main__":
    main()
