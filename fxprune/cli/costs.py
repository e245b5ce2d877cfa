"""What the passes of a prune take, by their own arguments, in samples run forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["learns", "runs_of", "taking", "there_are"]

_HELD = 16
"""Samples of built-in text that tuning stops by."""

_RUNS = {"importance": 1.0, "select": 1.0, "compensate": 4.0, "tune": 1.0}
"""How often a stage runs a sample forward, or does about as much work, for each time that it takes it.

So that the times told are those of `docs/commands.md`, within a factor of two.
"""

_GRADIENTS = 3.0
"""A run forward and backward, in runs forward."""

_WRITING = 3.0
"""A sample that the model writes, a token at a time, in runs forward."""

_COMPARISONS = 4.0
"""Runs of a search beside its trials: the dense model's, and those of what is compared in the end."""


def there_are(file: Path | None, tokens: int, most: int | None = None) -> int:
    """Return about how many samples there are to take from: of a text, else of the built-in one.

    Args:
        file: of text; None for the built-in one.
        tokens: of a sample.
        most: that are taken; None for as many as there are.
    """
    from fxprune.data.built_in import CHARACTERS, built_in_text
    from fxprune.data.text import MOST_SAMPLES, calibration_text

    text = built_in_text() if file is None else calibration_text(file)
    windows = max(1, len(text) // (CHARACTERS * tokens))
    return min(windows, most or (windows if file is None else MOST_SAMPLES))


def runs_of(passes: Sequence[Any], there: int) -> float:
    """Return how many samples run forward, or what does about as much work, all in all.

    Args:
        passes: of a prune, in order.
        there: samples to take from.
    """
    written = sum(float(getattr(step, "to_write", 0)) for step in passes)
    return _WRITING * written + sum(_work(step, taken, rest) for step, taken, rest in taking(passes, there))


def taking(passes: Sequence[Any], there: int) -> Iterator[tuple[Any, int, int]]:
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
            taught = taught if asked is None else min(asked, there)
            taught *= getattr(step, "copies", 1)
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
    return _RUNS.get(step.stage, 1.0) * taken * (_GRADIENTS if learns(step) else 1.0)


def learns(step: Any) -> bool:
    """Whether a pass takes gradients."""
    return hasattr(step, "epochs") or (step.stage == "importance" and hasattr(step, "order"))
