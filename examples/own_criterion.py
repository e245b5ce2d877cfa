"""Score structures by a criterion of your own that needs data: the squared gradients of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from fxprune.passes.importance import ImportancePass, axis_sums
from torch import fx
from torch.nn.functional import cross_entropy

import fxprune
from examples.models import load


@dataclass(frozen=True, eq=False)
class SquaredGradientPass(ImportancePass):
    """Score slices by the sum of their squared gradients, averaged over samples: ``E[g ** 2]``."""

    name: ClassVar[str] = "squared-gradient"
    needs: ClassVar[tuple[type[fxprune.Fact], ...]] = (*ImportancePass.needs, fxprune.Calibration)

    samples: int | None = fxprune.argument(None, "Calibration samples to use; None for all.", least=1)

    def positions(
        self, graph_module: fx.GraphModule, wanted: Mapping[tuple[str, int], tuple[int, ...]]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """Sum the squared gradients over each slice along each wanted axis of a parameter."""
        weights = {name: fxprune.get_tensor(graph_module, name) for name, _ in wanted}
        squares = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        samples = fxprune.facts_of(graph_module)[fxprune.Calibration].samples[: self.samples]
        for sample in samples:
            logits = graph_module(**sample.inputs)["logits"]
            loss = cross_entropy(logits[0, :-1].float(), sample.labels[0, 1:])
            for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                squares[name] += gradient.float().square() / len(samples)
        return {(name, axis): axis_sums(squares[name], axis, shape) for (name, axis), shape in wanted.items()}


def main() -> None:
    """Prune by this criterion and by the magnitude of weights, and compare."""
    model, tokenizer = load()
    calibration = tokenizer("The capital of France is Paris. " * 16, return_tensors="pt").input_ids.view(-1)
    calibration = calibration[: len(calibration) // 32 * 32].view(-1, 32)
    mine = fxprune.prune(model, calibration, recipe="llm-pruner", importance=SquaredGradientPass(), ratio=0.1)
    sums = fxprune.prune(model, recipe="llm-pruner", importance="l2", ratio=0.1)
    same = sum(mine.plan.kept[name] == kept for name, kept in sums.plan.kept.items() if name in mine.plan.kept)
    print(f"{mine.report.achieved:.1%} of the parameters removed")
    print(f"{same} of {len(sums.plan.kept)} parameters lose the same slices as by magnitude")


if __name__ == "__main__":
    main()
