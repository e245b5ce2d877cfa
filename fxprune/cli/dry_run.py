"""What a prune would do, found out on `meta`, before any weight is read."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from fxprune.cli.console import console, print_json, working
from fxprune.cli.interrupts import at_once
from fxprune.cli.load import load_empty
from fxprune.errors import RatioError

__all__ = ["Expected", "expect", "tell_expected"]

_ALL = 0.999
"""A ratio that no model reaches: the refusal says which one it does."""

_SAMPLES, _TOKENS = 352, 128
"""What recipes have use for, where no number is given."""

_RUNS = {"importance": 1.0, "select": 1.0, "compensate": 4.0, "tune": 1.0}
"""How often a stage runs a sample forward, or does about as much work, for each time that it takes it.

So that the times told are those of `docs/commands.md`, within a factor of two.
"""

_GRADIENTS = 3.0
"""A run forward and backward, in runs forward."""

_PRODUCTS = 12
"""Of which the quickest says how fast a machine is; others may have had to wait for what else runs on it."""

_BASE = 0.5e9
"""Bytes that Python, torch and transformers take."""


@dataclass(frozen=True)
class Expected:
    """What a prune would do.

    Args:
        parameters: before and after.
        widths: of each group that shrinks, the units before and after.
        groups: of each kind, how many there are.
        frozen: how many axes of parameters have to stay as they are.
        reachable: the largest ratio that can be reached; None where it is not known.
        memory: bytes at the peak, about.
        seconds: the work would take on this machine, roughly; 0 where there is next to none.
    """

    parameters: tuple[int, int]
    widths: dict[str, tuple[int, int]]
    groups: dict[str, int]
    frozen: int
    reachable: float | None
    memory: float
    seconds: float


def tell_expected(values: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print what a prune would do.

    Args:
        values: of the options of the command.
        options: of a prune.
    """
    with working("looking at the model without its weights"):
        found = expect(values, options)
    if values["as_json"]:
        print_json(asdict(found))
        return
    before, after = found.parameters
    table = Table("kind", "groups", "units before", "units after", title="what to expect")
    shrunk = Counter((name.rpartition("/")[2], *width) for name, width in found.widths.items())
    for (kind, first, last), count in shrunk.items():
        table.add_row(kind, f"{count:,}", f"{first:,}", f"{last:,}")
    console.print(table)
    for line in _lines(found, before, after):
        console.print(line, markup=False, highlight=False)


def _lines(found: Expected, before: int, after: int) -> Iterator[str]:
    yield f"parameters: {before:,} to {after:,}, {1 - after / before:.2%} fewer"
    if found.reachable is not None:
        yield f"reachable: ratios of 0 to {found.reachable:.3f} with these options"
    yield f"groups there are: {', '.join(f'{count:,} of the kind {kind}' for kind, count in found.groups.items())}"
    yield f"frozen: {found.frozen:,} axes of parameters; `fxprune graph` says why"
    yield f"memory: about {found.memory / 1e9:.1f} GB at the peak, and that of the activations of a batch"
    yield f"time: about {_spoken(found.seconds)} with nothing else running, a rough guess: half or twice that may be"
    yield "nothing was read but the config, and nothing was written; scores may part the widths otherwise"


def expect(values: Mapping[str, Any], options: Mapping[str, Any]) -> Expected:
    """Return what a prune would do, with scores at random in place of those that need weights.

    Raises:
        RatioError: the ratio cannot be reached.
    """
    with at_once():
        import torch

        import fxprune.api
        from fxprune.discovery.groups import Groups
    planned = fxprune.prune_pipeline(None, **options)
    empty = load_empty(values["model"], values["gguf_file"])
    traced = fxprune.trace(empty, dynamic=False).graph_module
    named = {name: value for name, value in options.items() if name not in ("importance", "taylor", "inplace")}
    named |= {"recipe": recipe_of(values), "importance": "random", "compensate": "none", "tune": "none"}
    quick = [step for step in fxprune.prune_pipeline(None, verify=False, **named).passes if step.name != "emit-model"]
    choosing = next(place for place, step in enumerate(quick) if step.stage == "select")
    fxprune.Pipeline(quick[:choosing])(traced)  # these change nothing: what they find out is put down in the graph
    result = fxprune.Result.of(fxprune.Pipeline(quick[choosing:])(traced).graph_module)
    facts = fxprune.facts_of(traced)
    kept = result.report.parameters
    size = getattr(torch, values["dtype"]).itemsize if values["dtype"] else _size_of(empty)
    slim_too = 0 if values["in_place"] else kept[1]
    samples, tokens = values["samples"] or _samples_of(recipe_of(values)), values["tokens"] or _TOKENS
    macs = result.report.macs[0] / (_counted(traced) or result.report.tokens) * tokens
    return Expected(
        parameters=kept,
        widths=dict(result.report.widths),
        groups=dict(Counter(group.kind for group in facts[Groups].all)),
        frozen=len(result.report.frozen),
        reachable=_reachable(quick[choosing], traced),
        memory=_BASE + size * (kept[0] + slim_too),
        seconds=2 * macs * _runs(planned.passes, samples) / _speed(),
    )


def recipe_of(values: Mapping[str, Any]) -> str:
    """Return the recipe of a prune: the paper's where an importance is named, unless another is asked for."""
    return values["recipe"] or ("llm-pruner" if values["importance"] or values["taylor"] else "balanced")


def _counted(graph_module: Any) -> int | None:
    """Return how many tokens the traced input has, whose work is counted where no size is free; None without any."""
    shown = (node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder"))
    shapes = (
        value.shape for value in shown if value is not None and not value.is_floating_point() and value.dim() == 2
    )
    return next((shape.numel() for shape in shapes), None)


def _samples_of(recipe: str) -> int:
    """Return how many samples a recipe takes of built-in text."""
    from fxprune.data.calibration import Calibration
    from fxprune.recipes import as_recipe

    read = (getattr(step, "samples", None) for step in as_recipe(recipe).passes if Calibration in step.gives)
    return next(filter(None, read), _SAMPLES)


def _reachable(choice: Any, graph_module: Any) -> float | None:
    """The largest ratio that a selection can reach; None where it goes by another number."""
    if not hasattr(choice, "ratio"):
        return None
    try:
        dataclasses.replace(choice, ratio=_ALL)(graph_module)
    except RatioError as error:
        return error.reachable
    return _ALL


def _runs(passes: Sequence[Any], samples: int) -> float:
    """How many samples run forward, all in all."""
    from fxprune.data.calibration import Calibration

    total, taught = 0.0, samples
    for step in passes:
        reads = Calibration in step.needs or step.stage in ("compensate", "tune")
        taken = min(getattr(step, "samples", None) or (taught if step.stage == "tune" else samples), samples)
        taught = taken if step.stage == "tune" else taught  # what tunes learns from the samples recorded before it
        learns = hasattr(step, "epochs") or (step.stage == "importance" and hasattr(step, "order"))
        gradients = _GRADIENTS if learns else 1.0
        times = getattr(step, "epochs", 1.0) or 1.0
        total += _RUNS.get(step.stage, 0.0) * taken * gradients * times if reads else 0.0
    return total


def _speed() -> float:
    """How many floating point operations this machine does in a second, by the quickest of a few products."""
    import torch

    square = torch.ones(1024, 1024)
    quickest = float("inf")
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        torch.mm(square, square)
        quickest = min(quickest, time.perf_counter() - start)
    return 2 * 1024**3 / max(quickest, 1e-6)


def _size_of(model: Any) -> int:
    """The bytes of a weight in the files of a model, as its config says."""
    import torch

    named = getattr(model.config, "dtype", None)
    return int(named.itemsize if isinstance(named, torch.dtype) else 4)


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return "a minute or less" if seconds < 60 else "a minute"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
