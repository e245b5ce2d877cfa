"""What the passes of a prune take in memory, by their own arguments and by the shapes of a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.cli.costs import learns, taking

__all__ = ["ModelWeights", "Sizes", "memory_of", "sizes_of"]

_OUTPUTS = 3
"""Copies of what a model says, beside the first, where it is compared: in full precision, as logarithms, a gradient."""

_SUMS = {"first": 1, "mix": 2}
"""Numbers in four bytes that a Taylor expansion keeps of each weight, by its order."""

_LEARNING = 5
"""Copies of weights that are learned: themselves, gradients, two moments of these, and the best so far."""

_LITTLE = 0.1
"""Part of the bytes of the weights that it keeps with little memory."""

_BASE = 0.5e9
"""Bytes that Python, torch and transformers take."""


@dataclass(frozen=True)
class Sizes:
    """What a model computes, in numbers for each token.

    Args:
        all: that are computed, which is what learning keeps.
        alive: at once, at the most, but those that it says in the end.
        said: in the end.
        size: bytes of a number.
    """

    all: float
    alive: float
    said: float
    size: float = 4.0


@dataclass(frozen=True)
class ModelWeights:
    """What weights take, in bytes.

    Args:
        dense: as they were.
        slim: what is left of them.
        in_place: whether the dense ones are freed as the slim ones are made.
        on_disk: whether all of them stay on disk.
    """

    dense: float
    slim: float
    in_place: bool = False
    on_disk: bool = False

    def held(self, *, both: bool) -> float:
        """Return what is in memory: the dense ones, and where ``both`` the slim ones beside them."""
        return 0.0 if self.on_disk else self.dense + (self.slim if both and not self.in_place else 0.0)


def memory_of(passes: Sequence[Any], there: int, tokens: int, sizes: Sizes, weights: ModelWeights) -> float:
    """Return bytes at the peak, about: of the weights, and of what the samples take in the pass that needs most.

    Args:
        passes: of a prune, in order.
        there: samples to take from.
        tokens: of a sample.
        sizes: of what the dense model computes.
        weights: of the model.
    """
    takes = {id(step): taken for step, taken, _ in taking(passes, there)}
    peak, changed, left = weights.held(both=True), False, 1.0
    for step in passes:
        changes = getattr(step, "changes", "nothing")
        changed = changed or changes != "nothing"
        left = weights.slim / weights.dense if changes == "graph" else left
        numbers = left * tokens * _numbers(step, takes[id(step)], sizes) if id(step) in takes else 0.0
        peak = max(peak, weights.held(both=changed) + sizes.size * numbers + _sums(step, weights))
    return _BASE + peak


def sizes_of(graph_module: Any, tokens: int, size: float) -> Sizes:
    """Return what a graph computes, by the shapes that are known of it.

    Args:
        graph_module: a traced graph.
        tokens: of its inputs.
        size: bytes of a number.
    """
    nodes = list(graph_module.graph.nodes)
    last = {source: node for node in nodes for source in node.all_input_nodes}
    said = _said(graph_module)
    numel = {node: 0 if node in said else _numel(node) for node in nodes}
    alive = most = 0
    for node in nodes:
        alive += numel[node]
        most = max(most, alive)
        alive -= sum(numel[source] for source in node.all_input_nodes if last[source] is node)
    ends = sum(map(_numel, said))
    return Sizes((sum(numel.values()) + ends) / tokens, most / tokens, ends / tokens, size)


def _said(graph_module: Any) -> set[Any]:
    """The nodes of the tensors that a graph gives, also where something that is no tensor is made of them."""
    import torch

    found: set[Any] = set()
    left = [node for node in graph_module.graph.nodes if node.op == "output"]
    while left:
        for source in left.pop().all_input_nodes:
            (found.add if isinstance(source.meta.get("val"), torch.Tensor) else left.append)(source)
    return found


def _numel(node: Any) -> int:
    """The numbers of what an op gives; 0 for anything else, and where a size is not known."""
    import torch

    value = node.meta.get("val")
    known = node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point()
    return math.prod(value.shape) if known and all(type(size) is int for size in value.shape) else 0


def _numbers(step: Any, taken: int, sizes: Sizes) -> float:
    """The numbers that a pass holds of its samples, for each token of one."""
    batch = min(getattr(step, "batch", 1), taken)
    said = _OUTPUTS * sizes.said
    if step.stage == "compensate":  # dense and masked side by side, all samples at once
        return 2 * taken * sizes.alive
    if learns(step):
        return batch * (sizes.all + said)
    return batch * (sizes.alive + sizes.said + (said if step.stage in ("select", "tune") else 0.0))


def _sums(step: Any, weights: ModelWeights) -> float:
    """Bytes of what a pass keeps of each weight, at the most: where memory is short, it takes less and longer."""
    if step.stage == "tune" and getattr(step, "weights", False):
        return _LEARNING * weights.slim
    kept = _SUMS.get(getattr(step, "order", ""), 0)
    return (_LITTLE if getattr(step, "memory", "auto") == "low" else kept) * weights.dense if kept else 0.0
