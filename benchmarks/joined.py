"""Neighbouring blocks joined, with nothing removed: `python -m benchmarks.joined --data FOLDER`.

Both blocks of a pair read what the first one read, and what both give is added: one block of twice the width. Pruned
back to the old width, pairs make a model with fewer layers of a stock class. The cost of the join itself, before any
unit goes, is measured here: pairs are joined one by one, each time the one that moves predictions least.

Source: FlattenGPT (arXiv 2602.08858), for the join.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import fx
from torch.fx.passes.tools_common import legalize_graph

import fxprune
from benchmarks import common
from benchmarks.common import load_named, write_results
from benchmarks.quality.measure import Bench
from benchmarks.quality.reference import KeptReference
from benchmarks.quality.rows import Protocol
from benchmarks.quality.texts import kept_back, read_texts
from fxprune.cli.console import widened
from fxprune.discovery.dependency import find_residuals
from fxprune.evaluation.comparison import graph_predictor
from fxprune.graph.facts import fork

RESULTS = common.RESULTS / "joined.json"

_CANDIDATES = 5
"""Pairs that are tried beside those that are joined already: those that alone move predictions least."""


@dataclass(frozen=True)
class JoinedRow:
    """A model with some pairs of neighbouring blocks joined, beside the dense one.

    Attributes:
        pairs: Places of the first blocks of the pairs, in the order in which they were joined.
        ratios: Perplexity over that of the dense model, and its standard error, by text.
        divergence: Mean over the texts of the divergence from the dense model, in nats.
        agreement: Mean over the texts of how often both rank the same token first.
    """

    pairs: tuple[int, ...]
    ratios: dict[str, tuple[float, float]]
    divergence: float
    agreement: float


def block_sums(graph: fx.Graph, blocks: int) -> tuple[str, list[list[fx.Node]]]:
    """The name of the value that enters the first block, and the residual additions of each block, in order.

    Raises:
        ValueError: They are not one chain, with as many in each block.
    """
    found = find_residuals(graph)
    sums = [node for node in graph.nodes if node.name in found]
    if not sums or len(sums) % blocks or any(found[other.name] != one.name for one, other in pairwise(sums)):
        raise ValueError(f"{len(sums)} residual additions are no chain over {blocks} blocks")
    size = len(sums) // blocks
    return found[sums[0].name], [sums[i : i + size] for i in range(0, len(sums), size)]


def join(graph_module: fx.GraphModule, blocks: int, pairs: Sequence[int]) -> fx.GraphModule:
    """A graph in which each block of `pairs` is joined with the next one; weights are shared with the given graph.

    Of the blocks `x + a(x)` and `x + b(x)`, the second of which reads the first, this makes `x + a(x) + b(x)`, for each
    of the branches that they consist of: attention beside attention, and so on.
    """
    graph_module = fork(graph_module)
    entry, sums = block_sums(graph_module.graph, blocks)
    start = next(node for node in graph_module.graph.nodes if node.name == entry)
    for place in pairs:
        first, second = sums[place], sums[place + 1]
        source = sums[place - 1][-1] if place else start
        begin = second[0]
        for user in list(first[-1].users):
            user.replace_input_with(first[-1], first[0] if user is begin else source)
        for mine, other in zip(first[:-1], second[:-1], strict=True):
            for user in list(mine.users):
                if user is not begin and user is not other:
                    user.replace_input_with(mine, other)
        for mine, before, other in zip(first[1:], second, second[1:], strict=False):
            other.replace_input_with(before, mine)
    legalize_graph(graph_module)
    graph_module.recompile()
    return graph_module


def _logarithms(graph_module: fx.GraphModule, samples: torch.Tensor) -> torch.Tensor:
    predict = graph_predictor(graph_module)
    with torch.no_grad():
        return torch.cat([predict(input_ids=ids).float().log_softmax(-1) for ids in samples.split(4)])


def orders(graph_module: fx.GraphModule, blocks: int, samples: torch.Tensor, most: int) -> Iterator[tuple[int, ...]]:
    """Yield pairs to join, one more each time: the one after which the divergence on the samples is least."""
    dense = _logarithms(graph_module, samples)

    def cost(pairs: Sequence[int]) -> float:
        slim = _logarithms(join(graph_module, blocks, pairs), samples)
        return float((dense.exp() * (dense - slim)).sum(-1).mean())

    alone = {place: cost([place]) for place in range(blocks - 1)}
    pairs: tuple[int, ...] = ()
    while len(pairs) < most:
        free = [place for place in alone if all(abs(place - other) > 1 for other in pairs)]
        best = min(sorted(free, key=alone.__getitem__)[:_CANDIDATES], key=lambda place: cost((*pairs, place)))
        pairs = (*pairs, best)
        yield pairs


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of texts; else built-in text.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Further files to measure on.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a model, or GGUF file; else the demo model.")] = None,
    calibration: Annotated[str, typer.Option(help="File of the folder that pairs are chosen by.")] = "c4_sample.jsonl",
    samples: Annotated[int, typer.Option(min=1, help="Samples of it.")] = 16,
    pairs: Annotated[int, typer.Option(min=1, help="Most pairs to join.")] = 8,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 60,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sample, and of a window.")] = 128,
    out: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
) -> None:
    """Join neighbouring blocks, pair by pair, and measure predictions beside those of the dense model."""
    console = widened(Console())
    dense, tokenizer, name = load_named(model)
    protocol = Protocol(name, calibration, samples, tokens, kept_back(data, calibration), windows, (tokens,))
    texts = read_texts(tokenizer, data, calibration, protocol, text or ())
    blocks = dense.config.get_text_config().num_hidden_layers
    taken = texts.calibration[:samples]
    converted: Any = copy.deepcopy(dense)
    converted.to(dtype=torch.bfloat16)
    graph_module = fxprune.trace(converted).graph_module
    rows: list[JoinedRow] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(dense, tokenizer, texts, protocol, KeptReference(converted, Path(folder)))
        for chosen in orders(graph_module, blocks, taken, pairs):
            run = graph_predictor(join(graph_module, blocks, chosen))
            found = bench.whole(str(chosen), run, dense, tokenizer).at(tokens)
            apart = {text: one.divergence for text, one in found.items() if one.divergence is not None}
            rows.append(
                JoinedRow(
                    chosen,
                    {text: (one.ratio, one.ratio_error) for text, one in apart.items()},
                    fmean(one.mean for one in apart.values()),
                    fmean(one.agreement for one in apart.values()),
                )
            )
            cells = ", ".join(f"{text} x{ratio:.2f}" for text, (ratio, _) in rows[-1].ratios.items())
            console.print(f"{len(chosen)} pairs, {chosen}: {cells}", markup=False, highlight=False, soft_wrap=True)
    write_results(out, {"model": name, "blocks": blocks, "windows": windows, "tokens": tokens, "samples": samples,
                        "rows": [asdict(row) for row in rows]})  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
