"""The check that masking equals shrinking: outputs compared, and the node found where two runs part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.axes import Keep
from fxprune.discovery.dependency import AxisMap
from fxprune.errors import VerificationError
from fxprune.graph.carrier import inputs_at_place
from fxprune.graph.facts import Change, Fact
from fxprune.graph.names import tensor_name
from fxprune.masking.by_block import Leaving, kept_part
from fxprune.masking.masked_run import MaskedRun, PreciseRun, output_tensors

__all__ = [
    "TOLERANCE",
    "Expected",
    "Verified",
    "compare",
    "find_divergence",
    "masked_outputs",
    "require_equal",
    "slim_outputs",
]

TOLERANCE = 1e-4
"""Largest accepted difference in float32, relative to the largest output or 1, whichever is larger.

About a thousand times the relative step of float32 (1.2e-7): room for sums taken in another order all through a deep
model, and far less than one wrong unit makes.
"""


@dataclass(frozen=True, eq=False)
class Expected(Fact):
    """What the slim graph has to compute: the outputs of the dense one with the structures that go zeroed.

    Args:
        outputs: float tensors, in order; None where the weights are on ``meta`` and nothing can be run.
        dense: the dense graph, to say at which node the two part if they do; None where its tensors are given up.
        leaving: what leaves each block, by the name of the node, where blocks are compared one by one.
    """

    about: ClassVar[Change] = "weights"
    outputs: tuple[torch.Tensor, ...] | None
    dense: fx.GraphModule | None = None
    leaving: Mapping[str, Leaving] = field(default_factory=dict)


@dataclass(frozen=True)
class Verified(Fact):
    """The outcome of comparing the slim graph with the masked dense one.

    Args:
        error: the largest difference of outputs, and of what leaves a block where blocks are compared one by one,
            relative to the largest value or 1; None if nothing could be run.
        blocks: the largest difference of what leaves each block, by its module path in the dense model; empty where
            blocks were not compared one by one.
    """

    about: ClassVar[Change] = "weights"
    error: float | None
    blocks: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The block with the largest difference; empty where blocks were not compared one by one."""
        return max(self.blocks, key=lambda block: self.blocks[block], default="")


def masked_outputs(
    graph_module: fx.GraphModule,
    axes: AxisMap,
    keep: Keep,
    removed_blocks: Sequence[str],
    inputs: Mapping[str, Any],
) -> tuple[torch.Tensor, ...]:
    """Return the float outputs of the dense graph with the removed structures zeroed, without copying its weights."""
    with torch.no_grad():
        run = MaskedRun(graph_module, axes, keep, removed_blocks)
        return output_tensors(run.run(*inputs_at_place(graph_module, inputs)))


def slim_outputs(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Return the float outputs of a graph, computed in float32 at least."""
    with torch.no_grad():
        return output_tensors(PreciseRun(graph_module).run(*inputs_at_place(graph_module, inputs)))


def compare(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest expected value or 1; infinite if shapes differ."""
    worst = 0.0
    for want, got in zip(expected, actual, strict=True):
        if want.shape != got.shape:
            return float("inf")
        scale = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
        difference = float((want - got).detach().abs().max()) / scale if want.numel() else 0.0
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst


def find_divergence(
    dense: fx.GraphModule,
    slim: fx.GraphModule,
    axes: AxisMap,
    keep: Keep,
    removed_blocks: Sequence[str],
    inputs: Mapping[str, Any],
) -> str:
    """Return name, op and module of the first node whose slim value is not the kept part of the masked dense one."""
    masked = MaskedRun(dense, axes, keep, removed_blocks, garbage_collect_values=False)
    plain = PreciseRun(slim, garbage_collect_values=False)
    with torch.no_grad():
        masked.run(*inputs_at_place(dense, inputs))
        plain.run(*inputs_at_place(slim, inputs))
    values = {node.name: value for node, value in masked.env.items()}
    for node, got in plain.env.items():
        want = values.get(node.name)
        if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor) or not got.is_floating_point():
            continue
        try:
            want = kept_part(want, axes.tensors[tensor_name(node)], keep)
        except KeyError:  # a choice per outer unit that lies on another axis: no single index to compare by
            continue
        if compare([want], [got]) > TOLERANCE:
            return f"{node.name} ({node.target}) in {axes.modules.get(node.name) or 'the model'}"
    return "the outputs"


def require_equal(error: float, where: str) -> None:
    """Refuse an ``error`` above :data:`TOLERANCE`.

    Raises:
        VerificationError: it is above; names the difference and ``where`` it begins.
    """
    if not error <= TOLERANCE:
        raise VerificationError(
            f"slim and masked outputs differ by {error:.2e}, more than {TOLERANCE:.0e}",
            where=where,
            remedy="Please report the model's config; freeze the group concerned by leaving its kind out",
        )
