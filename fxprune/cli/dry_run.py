"""What a prune would do, found out on `meta`, before any weight is read."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from fxprune.cli.console import console, print_json, working
from fxprune.cli.costs import runs_of, there_are
from fxprune.cli.interrupts import at_once
from fxprune.cli.load import load_empty
from fxprune.cli.memory import ModelWeights, memory_of, sizes_of
from fxprune.cli.preparation import TOKENS, Prepared, most_samples, prepare, reader_of
from fxprune.errors import RatioError

__all__ = ["Estimate", "expect", "tell_expected"]

_ALL = 0.999
"""A ratio that no model reaches: the refusal says which one it does."""

_PRODUCTS = 12
"""Of which the quickest says how fast a machine is; others may have had to wait for what else runs on it."""


@dataclass(frozen=True)
class Estimate:
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


def _lines(found: Estimate, before: int, after: int) -> Iterator[str]:
    yield f"parameters: {before:,} to {after:,}, {1 - after / before:.2%} fewer"
    if found.reachable is not None:
        yield f"reachable: ratios of 0 to {found.reachable:.3f} with these options"
    yield f"groups there are: {', '.join(f'{count:,} of the kind {kind}' for kind, count in found.groups.items())}"
    yield f"frozen: {found.frozen:,} axes of parameters; `fxprune graph` says why"
    yield f"memory: about {found.memory / 1e9:.1f} GB at the peak, by the samples that the passes take: an estimate"
    yield f"time: about {_spoken(found.seconds)} with nothing else running, an estimate: half or twice that may be"
    yield "no weight was read, and nothing was written; scores may part the widths otherwise"


def expect(values: Mapping[str, Any], options: Mapping[str, Any]) -> Estimate:
    """Return what a prune would do, with scores at random in place of those that need weights.

    Raises:
        RatioError: the ratio cannot be reached.
        FxpruneError: as :func:`fxprune.cli.preparation.prepare`.
    """
    with at_once():
        import torch

        import fxprune.api
        from fxprune.discovery.groups import Groups
    prepared = prepare(values, options)
    empty = load_empty(values["model"], values["gguf_file"])
    traced = fxprune.trace(empty, dynamic=False).graph_module
    named = {name: value for name, value in options.items() if name not in ("importance", "taylor", "inplace")}
    named |= {"recipe": _recipe_of(values), "importance": "random", "compensate": "none", "tune": "none"}
    quick = [step for step in fxprune.prune_pipeline(None, verify=False, **named).passes if step.name != "emit-model"]
    choosing = next(place for place, step in enumerate(quick) if step.stage == "select")
    fxprune.Pipeline(quick[:choosing])(traced)  # these change nothing: what they find out is put down in the graph
    result = fxprune.Result.of(fxprune.Pipeline(quick[choosing:])(traced).graph_module)
    facts = fxprune.facts_of(traced)
    kept = result.report.parameters
    size = getattr(torch, values["dtype"]).itemsize if values["dtype"] else _size_of(empty)
    there, tokens = _samples(prepared, values)
    counted = _counted(traced) or result.report.tokens
    sizes = sizes_of(traced, counted, size)
    weights = ModelWeights(size * kept[0], size * kept[1], values["in_place"], values["low_memory"])
    macs = result.report.macs[0] / counted * tokens
    return Estimate(
        parameters=kept,
        widths=dict(result.report.widths),
        groups=dict(Counter(group.kind for group in facts[Groups].all)),
        frozen=len(result.report.frozen),
        reachable=_reachable(quick[choosing], traced),
        memory=memory_of(prepared.passes, there, tokens, sizes, weights),
        seconds=2 * macs * runs_of(prepared.passes, there) / _speed(),
    )


def _recipe_of(values: Mapping[str, Any]) -> str:
    """The recipe of a prune: the paper's where an importance is named, unless another is asked for."""
    return values["recipe"] or ("llm-pruner" if values["importance"] or values["taylor"] else "balanced")


def _samples(prepared: Prepared, values: Mapping[str, Any]) -> tuple[int, int]:
    """How many samples there are, and the tokens of one."""
    if prepared.samples is not None:
        return len(prepared.samples), prepared.samples.shape[1]
    reader, named = reader_of(prepared.passes), values["calibration"]
    file = getattr(reader, "file", "")
    if file and named is None:  # rows of tokens, of a recipe of one's own
        with open(file, encoding="utf-8") as rows:
            return sum(1 for row in rows if row.strip()), TOKENS
    tokens = values["tokens"] or (getattr(reader, "tokens", TOKENS) if named is None else TOKENS)
    most = values["samples"] or most_samples(prepared.passes)
    if stand_ins := getattr(reader, "stand_ins", 0):
        return min(stand_ins, most or stand_ins), tokens
    return 1 if reader is None else there_are(named, tokens, most), tokens


def _counted(graph_module: Any) -> int | None:
    """Return how many tokens the traced input has, whose work is counted where no size is free; None without any."""
    shown = (node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder"))
    shapes = (
        value.shape for value in shown if value is not None and not value.is_floating_point() and value.dim() == 2
    )
    return next((shape.numel() for shape in shapes), None)


def _reachable(choice: Any, graph_module: Any) -> float | None:
    """The largest ratio that a selection can reach; None where it goes by another number."""
    if not hasattr(choice, "ratio"):
        return None
    try:
        dataclasses.replace(choice, ratio=_ALL)(graph_module)
    except RatioError as error:
        return error.reachable
    return _ALL


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
