"""Estimate of the result and cost of a prune, made on `meta` without reading weights."""

from __future__ import annotations

import dataclasses
import math
import timeit
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import fxprune
from fxprune.checkpoint.read import load_config_only
from fxprune.cli.console import print_json, print_lines, print_table, working
from fxprune.cli.models import locate_model
from fxprune.cli.preparation import CalibrationText, Prepared, reader_of
from fxprune.data.built_in import CHARACTERS_PER_TOKEN, built_in_text
from fxprune.data.text import MOST_SAMPLES, TOKENS, calibration_text
from fxprune.discovery.groups import Groups
from fxprune.errors import ArgumentError, RatioError
from fxprune.evaluation.comparison import WINDOW, WINDOWS
from fxprune.graph.compat import is_free, size_hint
from fxprune.graph.tensors import input_tensors, returned_nodes
from fxprune.offload.prefetch import free_bytes
from fxprune.pipeline.arguments import has_vocab
from fxprune.recipes.recipe import changed, needs_samples
from fxprune.trace.inputs import inputs_like


@dataclass(frozen=True)
class Activations:
    """Elements of activations per token: in ``total``, ``alive`` at the peak, and ``outputs``; ``size`` bytes each."""

    total: float
    alive: float
    outputs: float
    size: float = 4.0


def costs_of(passes: Sequence[Any], samples: int) -> list[tuple[Any, Any]]:
    """Passes with their costs; training runs on the samples recorded by an earlier pass."""
    found, recorded = [], samples
    for step in passes:
        cost = step.cost(recorded if step.stage == "tune" else samples)
        recorded, samples = cost.recorded or recorded, cost.given or samples
        found.append((step, cost))
    return found


def peak_memory(
    costs: Sequence[tuple[Any, Any]],
    tokens: int,
    sizes: Activations,
    weights: tuple[float, float],
    *,
    in_place: bool = False,
    on_disk: bool = False,
    free: float = math.inf,
) -> float:
    """Peak memory in bytes: dense and slim ``weights``, and the activations of the most demanding pass.

    ``free`` are the bytes of memory that are free before the prune.
    """
    dense, slim = weights
    both = 0.0 if on_disk else dense if in_place else dense + slim
    held, current, most = 0.0 if on_disk else dense, dense, both
    for step, cost in costs:
        held = held if step.changes == "nothing" else both
        current = slim if step.changes == "graph" else current
        elements = cost.batch * ((sizes.total if cost.backward else sizes.alive) + cost.outputs * sizes.outputs)
        trained = cost.weights * current * 4 / sizes.size
        if (on_disk and cost.updates) or (cost.if_free and 2 * trained > free - held):
            trained = 0.0
        most = max(most, held + sizes.size * tokens * elements * current / dense + trained)
    return 0.9e9 + most  # with Python, torch, transformers and what tracing loads, by a prune of the demo model


def print_estimate(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print an estimate."""
    if as_json:
        print_json(found)
        return
    shrunk = Counter((name.rpartition("/")[2], *width) for name, width in found["widths"].items())
    rows = ((kind, f"{count:,}", f"{before:,}", f"{after:,}") for (kind, before, after), count in shrunk.items())
    print_table(("kind", "groups", "units before", "units after"), rows, title="what to expect")
    print_lines(_lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    before, after = found["parameters"]
    yield f"parameters: {before:,} to {after:,}, {1 - after / before:.2%} removed"
    if found["reached"]:
        yield found["reached"]
    if found["reachable"] is not None:
        yield f"reachable: ratios of 0 to {found['reachable']:.3f} with these options"
    yield f"groups: {', '.join(f'{count:,} of the kind {kind}' for kind, count in found['groups'].items())}"
    yield f"frozen: {found['frozen']:,} axes of parameters; `fxprune graph` lists the reasons"
    yield f"memory: about {found['memory'] / 1e9:.1f} GB at the peak (estimated)"
    minutes = found["seconds"] / 60
    if minutes < 1.5:
        duration = "a minute or less" if minutes < 1 else "a minute"
    else:
        duration = f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
    yield f"time: about {duration} with nothing else running (within a factor of two)"
    if found["read"]:
        written = f", and up to {found['written'] / 1e9:,.0f} GB are written" if found["written"] else ""
        read = f"up to {found['read'] / 1e9:,.0f} GB are read again and again"
        yield f"disk: {read}, if none of it stays in memory{written}"
    yield "no weight was read, and nothing was written; with real scores widths may be distributed differently"


def estimate(
    model: str,
    gguf_file: str | None,
    text: CalibrationText,
    options: Mapping[str, Any],
    prepared: Prepared,
    *,
    dtype: str | None,
    low_memory: bool,
) -> dict[str, Any]:
    """Estimate a prune: sizes before and after, groups by kind, bytes of memory at the peak, seconds.

    Scores are random in place of those that need weights. ``read`` are the bytes that tuning, and text that the model
    writes, read from disk if memory holds no weights, and ``written`` those that tuning writes.

    Raises:
        RatioError: the ratio cannot be reached.
        ArgumentError: the vocabulary is among the kinds.
    """
    if has_vocab(options):
        what = "the vocabulary is chosen by the calibration text, which is not read"
        raise ArgumentError(what, where="--dry-run", remedy="Leave it out, or look at the other kinds alone")
    empty, traced, result, reachable = _trace_and_select(model, gguf_file, options, prepared)
    named = getattr(empty.config, "dtype", None) if dtype is None else getattr(torch, dtype)
    size = named.itemsize if isinstance(named, torch.dtype) else 4
    report = result.report
    rows = next(iter(input_tensors(traced.graph)))[0].meta["val"].shape[0]
    batch = size_hint(rows)
    counted = _traced_tokens(traced) or report.tokens or batch  # where there are no tokens, images and sounds count
    samples, tokens = _count_samples(prepared, text, counted // batch)
    costs = costs_of(prepared.passes, samples)
    dense, slim = (float(size * count) for count in report.parameters)
    in_place = bool(options.get("inplace"))
    sizes = sizes_of(traced, counted, size)
    worked = (report.tokens or 1) if is_free(rows) else counted  # the work of a graph of fixed size is that of a batch
    flops = 2 * report.macs[0] / worked * tokens * sum(cost.runs for _, cost in costs)
    if not low_memory and options.get("eval", True) and report.tokens and not isinstance(prepared.samples, list):
        flops += 2 * sum(report.macs) / worked * WINDOW * WINDOWS
    free = free_bytes(torch.device("cpu"))
    read, written = _disk_traffic(costs, (dense, slim), report.parameters[1]) if low_memory else (0.0, 0.0)
    groups = fxprune.facts_of(traced)[Groups].all
    gone = {one.name: (1, 0) for one in groups if one.factor is None and one.block in report.removed_blocks}
    return dict(
        parameters=report.parameters,
        widths={**report.widths, **gone},
        groups=dict(Counter(group.kind for group in groups)),
        frozen=len(report.frozen),
        reachable=reachable,
        memory=peak_memory(costs, tokens, sizes, (dense, slim), in_place=in_place, on_disk=low_memory, free=free),
        seconds=flops / _flops(),
        reached="" if report.reached is None else str(report.reached),
        read=read,
        written=written,
    )


def _trace_and_select(
    model: str, gguf_file: str | None, options: Mapping[str, Any], prepared: Prepared
) -> tuple[Any, fx.GraphModule, fxprune.Result, float | None]:
    """Trace and selection on ``meta``, with random scores.

    Returns:
        The model on ``meta``, its graph, the result of the prune, and the largest ratio that can be reached.
    """
    passes = _without_weights(options, prepared.passes)
    choosing = next(place for place, step in enumerate(passes) if step.stage == "select")
    with working("tracing the model without its weights"):
        empty = load_config_only(locate_model(model), gguf_file)
        for step in passes:
            step.foresee_model(empty)
        inputs = inputs_like(empty, prepared.samples)
        # a cache and activations are counted for each token, which takes axes of any number of tokens
        traced = fxprune.trace(empty, inputs, dynamic=options.get("target") is not None).graph_module
        fxprune.Pipeline(passes[:choosing])(traced)  # these change nothing, and record facts in the graph
        result = fxprune.Result.of(fxprune.Pipeline(passes[choosing:])(traced).graph_module)
        return empty, traced, result, _reachable(passes[choosing], traced)


def _without_weights(options: Mapping[str, Any], real: Sequence[Any]) -> list[Any]:
    """The passes of a prune with random scores, and without what needs weights or samples.

    Args:
        real: the passes with both, whose selection is taken if residual width may go.
    """
    changes = {"importance": "random", "compensate": "none", "tune": "none", "verify": False, "inplace": False}
    given = {name: value for name, value in options.items() if name != "memory"} | changes
    passes = fxprune.prune_pipeline(None, **given).passes
    if any(step.stage == "select" and needs_samples(step) for step in passes):
        passes = fxprune.prune_pipeline(None, **{**given, "select": "select-by-ratio"}).passes
    kept = [step for step in passes if step.name != "emit-model"]
    select = next(step for step in real if step.stage == "select")
    if not getattr(select, "width", ()):
        return kept
    scored = [changed(step, {"kinds": select.kinds}) if step.stage == "importance" else step for step in kept]
    return [select if step.stage == "select" else step for step in scored]


def _disk_traffic(
    costs: Sequence[tuple[Any, Any]], weights: tuple[float, float], parameters: int
) -> tuple[float, float]:
    """Bytes read and written beside one sweep a pass, if memory holds none of the weights.

    Args:
        weights: bytes of the dense and of the slim ones.
        parameters: of the slim model: each has 12 bytes of state where it is trained.
    """
    dense, slim = weights
    updates = 12.0 * parameters * sum(cost.updates for _, cost in costs)
    swept = sum(cost.sweeps * (slim if step.stage == "tune" else dense) for step, cost in costs)
    return swept + updates, updates


def _count_samples(prepared: Prepared, text: CalibrationText, traced: int = TOKENS) -> tuple[int, int]:
    """Number of samples and tokens per sample; estimated by the length of a text if there is no tokenizer.

    Samples of a processor are like the one that the model was traced with, of ``traced`` tokens.
    """
    if isinstance(prepared.samples, list):
        return len(prepared.samples), traced
    if prepared.samples is not None:
        return tuple(prepared.samples["input_ids"].shape)
    reader = reader_of(prepared.passes)
    if reader is None:
        return 1, traced
    most = text.samples or getattr(reader, "samples", None) or getattr(reader, "built_in", None)
    if text.source is not None:
        tokens = text.tokens or TOKENS
        windows = len(calibration_text(text.source)) // (CHARACTERS_PER_TOKEN * tokens)
        return max(1, min(windows, most or MOST_SAMPLES)), tokens
    tokens = getattr(reader, "tokens", TOKENS)
    if file := getattr(reader, "file", ""):
        with open(file, encoding="utf-8") as rows:
            return sum(1 for row in rows if row.strip()), tokens
    if substitutes := getattr(reader, "substitutes", 0):
        return min(substitutes, most or substitutes), tokens
    windows = len(built_in_text()) // (CHARACTERS_PER_TOKEN * tokens)
    return max(1, min(windows, most or windows)), tokens


def _traced_tokens(graph_module: Any) -> int | None:
    """Tokens of the input that a graph was traced with; None if there is no such input."""
    values = (node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder"))
    shapes = (one.shape for one in values if one is not None and not one.is_floating_point() and one.dim() == 2)
    return next((math.prod(map(size_hint, shape)) for shape in shapes), None)


def _reachable(choice: Any, graph_module: Any) -> float | None:
    """The largest ratio that a selection can reach; None if it has no ratio, or a target instead."""
    if not hasattr(choice, "ratio") or getattr(choice, "target", None):
        return None
    try:
        dataclasses.replace(choice, ratio=0.999)(graph_module)  # no model reaches it: the refusal names what it does
    except RatioError as error:
        return error.reachable
    return 0.999


def _flops() -> float:
    """Floating point operations per second on this machine, by the fastest of a few matrix products."""
    square = torch.ones(1024, 1024)
    seconds = timeit.repeat(lambda: torch.mm(square, square), number=1, repeat=12)  # some may wait for other work
    return 2 * 1024**3 / max(min(seconds), 1e-6)


def sizes_of(graph_module: Any, tokens: int, size: float) -> Activations:
    """Sizes of the activations of a traced graph whose inputs have ``tokens``, of ``size`` bytes an element."""
    nodes = list(graph_module.graph.nodes)
    last = {source: node for node in nodes for source in node.all_input_nodes}
    outputs = returned_nodes(graph_module.graph)
    numel = {node: 0 if node in outputs else _numel(node) for node in nodes}
    alive = most = 0
    for node in nodes:
        alive += numel[node]
        most = max(most, alive)
        alive -= sum(numel[source] for source in node.all_input_nodes if last[source] is node)
    ends = sum(map(_numel, outputs))
    return Activations((sum(numel.values()) + ends) / tokens, most / tokens, ends / tokens, size)


def _numel(node: Any) -> int:
    """Elements of a floating point tensor that an op computes; 0 for anything else, or if a size is not known."""
    value = node.meta.get("val")
    known = node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point()
    return math.prod(value.shape) if known and all(type(size) is int for size in value.shape) else 0
