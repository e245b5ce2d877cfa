"""A graph run over samples, with values shown on the way to whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import Sample, computing, stacked
from fxprune.masking.masked_run import PreciseRun

__all__ = ["observe"]

Watch = Mapping[fx.Node, Callable[[Any], None]]


def observe(
    graph_module: fx.GraphModule,
    samples: Sequence[Sample],
    watch: Watch,
    batch: int,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
) -> None:
    """Run a graph, in float32 at least, over samples, as far as the last node that is watched.

    Values are freed after their last use, so that memory is for what is alive at one node, of one batch.

    Args:
        graph_module: the graph.
        samples: single samples.
        watch: what to call with the value of a node, once for each batch.
        batch: samples that run at once.
        track: shows progress over the batches.

    Raises:
        CalibrationError: the graph cannot compute the samples.
    """
    nodes = list(graph_module.graph.nodes)
    last = max((i for i, node in enumerate(nodes) if node in watch), default=-1)
    batches = list(stacked(samples, graph_module, batch))
    with torch.no_grad():
        for inputs in track(batches, len(batches)):
            with computing(inputs):
                _run(PreciseRun(graph_module), inputs, nodes[: last + 1], watch)


def _run(run: fx.Interpreter, inputs: Mapping[str, torch.Tensor], nodes: Sequence[fx.Node], watch: Watch) -> None:
    run.args_iter = iter(inputs.values())
    for node in nodes:
        run.env[node] = run.run_node(node)
        if node in watch:
            watch[node](run.env[node])
        for value in run.user_to_last_uses.get(node, ()):
            del run.env[value]
