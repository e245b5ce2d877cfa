"""What the passes of a prune take, by their own arguments: samples run forward, and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxprune.errors import ArgumentError

__all__ = [
    "Sizes",
    "Weights",
    "check_removes",
    "memory_of",
    "most_samples",
    "recipe_of",
    "runs_of",
    "sizes_of",
    "there_are",
]

_CHARACTERS = 4
"""A token of English text stands for, about: of the built-in one, 4.04 with the tokenizer of the demo model."""

_MOST_SAMPLES = 1024
"""Of a text that is given, where no number is asked for."""

_PUBLISHED_SAMPLES = 10
"""What the paper uses."""

_HELD = 16
"""Samples of built-in text that tuning stops by."""

_RUNS = {"importance": 1.0, "select": 1.0, "compensate": 4.0, "tune": 1.0}
"""How often a stage runs a sample forward, or does about as much work, for each time that it takes it.

So that the times told are those of `docs/commands.md`, within a factor of two.
"""

_GRADIENTS = 3.0
"""A run forward and backward, in runs forward."""

_COMPARISONS = 4.0
"""Runs of a search beside its trials: the dense model's, and those of what is compared in the end."""

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
class Weights:
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


def check_removes(passes: Sequence[Any]) -> None:
    """Refuse a pipeline that takes nothing away.

    Raises:
        ArgumentError: nothing in it selects, or nothing removes.
    """
    left = [stage for stage in ("select", "shrink") if not any(step.stage == stage for step in passes)]
    if left:
        what = f"no pass of it is of the stage {left[0]}, and nothing would go"
        raise ArgumentError(what, where="recipe", remedy="Add one; `fxprune recipes fast` prints a whole pipeline")


def recipe_of(values: Mapping[str, Any]) -> str:
    """Return the recipe of a prune: the paper's where an importance is named, unless another is asked for."""
    return values["recipe"] or ("llm-pruner" if values["importance"] or values["taylor"] else "balanced")


def most_samples(values: Mapping[str, Any]) -> int | None:
    """Return how many samples of the calibration text are taken; None for as many as there are."""
    published = recipe_of(values) == "llm-pruner" and values["samples"] is None
    return _PUBLISHED_SAMPLES if published else values["samples"]


def there_are(values: Mapping[str, Any], tokens: int) -> int:
    """Return how many samples there are to take from: of the text that was named, else of the built-in one.

    Args:
        values: of the options of a prune.
        tokens: of a sample.
    """
    from fxprune.data.files import calibration_text
    from fxprune.data.text import offline_text

    file: Path | None = values["calibration"]
    text = offline_text() if file is None else calibration_text(file)
    windows = max(1, len(text) // (_CHARACTERS * tokens))
    return windows if file is None else min(windows, most_samples(values) or _MOST_SAMPLES)


def runs_of(passes: Sequence[Any], there: int) -> float:
    """Return how many samples run forward, or what does about as much work, all in all.

    Args:
        passes: of a prune, in order.
        there: samples to take from.
    """
    return sum(_work(step, taken, rest) for step, taken, rest in _taking(passes, there))


def memory_of(passes: Sequence[Any], there: int, tokens: int, sizes: Sizes, weights: Weights) -> float:
    """Return bytes at the peak, about: of the weights, and of what the samples take in the pass that needs most.

    Args:
        passes: of a prune, in order.
        there: samples to take from.
        tokens: of a sample.
        sizes: of what the dense model computes.
        weights: of the model.
    """
    takes = {id(step): taken for step, taken, _ in _taking(passes, there)}
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


def _taking(passes: Sequence[Any], there: int) -> Iterator[tuple[Any, int, int]]:
    """Each pass that works on samples, with how many it takes, and how many there are."""
    from fxprune.data.calibration import Calibration

    taught = there
    for step in passes:
        asked = getattr(step, "samples", None)
        if Calibration in step.gives:
            there = taught = min(asked or there, there)
        elif hasattr(step, "importance"):
            yield step, there, there
        elif step.stage == "tune":  # what tunes learns from the samples recorded before it
            taught = min(asked or taught, there)
            yield step, taught, there
        elif Calibration in step.needs or step.stage == "compensate":
            yield step, min(asked or there, there), there


def _work(step: Any, taken: int, there: int) -> float:
    """What a pass takes, in samples run forward."""
    from fxprune.pipeline.registry import parse_pass

    if hasattr(step, "importance"):  # scores in steps, and fits between them
        spelled = [text for text in (step.importance, step.compensate) if text]
        return float(step.steps) * runs_of([parse_pass(text) for text in spelled], there)
    if hasattr(step, "trials"):  # a search, which may fit before each trial
        fits = runs_of([parse_pass(step.fit)], there) if step.fit else 0.0
        return float(step.trials) * (taken + fits) + _COMPARISONS * taken
    if step.stage == "select" and hasattr(step, "epochs"):  # what it compares on in the end is not learned from
        learned = max(there - taken, 1)
        return learned * (1 + _GRADIENTS * float(step.epochs)) + _COMPARISONS * taken
    if step.stage == "tune":
        measured = getattr(step, "measurements", 0) + 1
        return taken * (_GRADIENTS * float(step.epochs) if hasattr(step, "epochs") else 1.0) + _HELD * float(measured)
    return _RUNS.get(step.stage, 1.0) * taken * (_GRADIENTS if _learns(step) else 1.0)


def _learns(step: Any) -> bool:
    """Whether a pass takes gradients."""
    return hasattr(step, "epochs") or (step.stage == "importance" and hasattr(step, "order"))


def _numbers(step: Any, taken: int, sizes: Sizes) -> float:
    """The numbers that a pass holds of its samples, for each token of one."""
    batch = min(getattr(step, "batch", 1), taken)
    said = _OUTPUTS * sizes.said
    if step.stage == "compensate":  # dense and masked side by side, all samples at once
        return 2 * taken * sizes.alive
    if _learns(step):
        return batch * (sizes.all + said)
    return batch * (sizes.alive + sizes.said + (said if step.stage in ("select", "tune") else 0.0))


def _sums(step: Any, weights: Weights) -> float:
    """Bytes of what a pass keeps of each weight, at the most: where memory is short, it takes less and longer."""
    if step.stage == "tune" and getattr(step, "weights", False):
        return _LEARNING * weights.slim
    kept = _SUMS.get(getattr(step, "order", ""), 0)
    return (_LITTLE if getattr(step, "memory", "auto") == "low" else kept) * weights.dense if kept else 0.0
