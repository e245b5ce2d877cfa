"""A graph run over samples, with values shown on the way to whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import Sample, computing, stacked
from fxprune.graph.carrier import current_carrier
from fxprune.masking.in_parts import PartRuns, parts_by_weights
from fxprune.masking.masked_run import PreciseRun
from fxprune.rules.aliasing import written_sources

__all__ = ["observe"]

Watch = Mapping[fx.Node, Callable[[Any], None]]


def observe(
    graph_module: fx.GraphModule,
    samples: Sequence[Sample],
    watch: Watch,
    batch: int,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
    *,
    in_turn: bool = True,
) -> None:
    """Run a graph, in float32 at least, over samples, as far as the last node that is watched.

    Values are freed after their last use, so that memory is for what is alive at one node, of one batch.

    Args:
        graph_module: the graph.
        samples: single samples.
        watch: what to call with the value of a node, once for each batch.
        batch: samples that run at once.
        track: shows progress over the batches.
        in_turn: all values of a batch have to be seen before those of the next one. Without, weights that are carried
            to another device go there once for all batches, and the graph runs in parts.

    Raises:
        CalibrationError: the graph cannot compute the samples.
    """
    nodes = list(graph_module.graph.nodes)
    last = max((i for i, node in enumerate(nodes) if node in watch), default=-1)
    batches = list(stacked(samples, graph_module, batch))
    if not in_turn and current_carrier() is not None and not written_sources(graph_module.graph):
        _run_in_parts(graph_module, batches, watch, track)
        return
    with torch.no_grad():
        for inputs in track(batches, len(batches)):
            with computing(inputs):
                _run(PreciseRun(graph_module), inputs, nodes[: last + 1], watch)


def _run_in_parts(
    graph_module: fx.GraphModule,
    batches: Sequence[Mapping[str, Any]],
    watch: Watch,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
) -> None:
    """Run all batches through one part of the graph, and then through the next one."""
    parts = parts_by_weights(graph_module)
    last = max((i for i, part in enumerate(parts) if not watch.keys().isdisjoint(part.nodes)), default=-1)
    runs = PartRuns(graph_module, parts, batches, (), precise=True)
    steps = (number for part in parts[: last + 1] for number in runs.forward(part, watch))
    for _ in track(steps, len(batches) * (last + 1)):
        pass


def _run(run: fx.Interpreter, inputs: Mapping[str, torch.Tensor], nodes: Sequence[fx.Node], watch: Watch) -> None:
    run.args_iter = iter(inputs.values())
    for node in nodes:
        run.env[node] = run.run_node(node)
        if node in watch:
            watch[node](run.env[node])
        for value in run.user_to_last_uses.get(node, ()):
            del run.env[value]
