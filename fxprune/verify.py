"""Masking equals shrinking: the invariant, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxprune.axes import Keep, kept_mask
from fxprune.dependency import AxisMap
from fxprune.errors import VerificationError
from fxprune.masking import MaskedRun, PreciseRun, output_tensors

__all__ = ["TOLERANCE", "compare", "find_divergence", "masked_outputs", "require_equal", "slim_outputs"]

TOLERANCE = 1e-4
"""Largest accepted difference in float32, relative to the largest output or 1, whichever is larger."""


def masked_outputs(
    graph_module: fx.GraphModule,
    axes: AxisMap,
    keep: Keep,
    removed_blocks: Sequence[str],
    inputs: Mapping[str, Any],
) -> tuple[torch.Tensor, ...]:
    """Float outputs of the dense graph with the removed structures zeroed; no second copy of the weights is made."""
    with torch.no_grad():
        return output_tensors(MaskedRun(graph_module, axes, keep, removed_blocks).run(*inputs.values()))


def slim_outputs(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Float outputs of a graph in float32."""
    with torch.no_grad():
        return output_tensors(PreciseRun(graph_module).run(*inputs.values()))


def compare(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference, relative to the largest expected value or 1; infinite if shapes differ."""
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
    """The first node whose slim value is not the kept part of the masked dense one: name, op and module."""
    masked = MaskedRun(dense, axes, keep, removed_blocks, garbage_collect_values=False)
    plain = PreciseRun(slim, garbage_collect_values=False)
    with torch.no_grad():
        masked.run(*inputs.values())
        plain.run(*inputs.values())
    values = {node.name: value for node, value in masked.env.items()}
    for node, got in plain.env.items():
        want = values.get(node.name)
        if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor) or not got.is_floating_point():
            continue
        key = str(node.target) if node.op == "get_attr" else node.name
        try:
            for axis, expr in enumerate(axes.tensors[key]):
                mask = torch.from_numpy(kept_mask(expr, keep).copy())
                want = want if mask.all() else want.index_select(axis, mask.nonzero()[:, 0])
        except KeyError:  # a choice per outer unit that lies on another axis: no single index to compare by
            continue
        if compare([want], [got]) > TOLERANCE:
            return f"{node.name} ({node.target}) in {axes.modules.get(node.name) or 'the model'}"
    return "the outputs"


def require_equal(error: float, where: str) -> None:
    """Raise unless ``error`` is within :data:`TOLERANCE`.

    Raises:
        VerificationError: with the difference and ``where`` it begins.
    """
    if not error <= TOLERANCE:
        raise VerificationError(
            f"slim and masked outputs differ by {error:.2e}, more than {TOLERANCE:.0e}",
            where=where,
            remedy="Please report the model's config; freeze the group concerned by leaving its kind out",
        )
