"""The models that are compared, each saved in its own folder, and the work that their sizes imply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from transformers import DynamicCache, PreTrainedModel

import fxprune
from benchmarks.engines.base import Case, Engine, Source
from fxprune.graph.counting import count_macs

SELECT = "select-by-ratio{protect=[0.07, 0.04], first=[mlp], ratio=%s, round_to=[[mlp, %s]]}"
"""The selection of the default recipe. Speed does not depend on which units go, so scores need no data here."""

_REFERENCE_ENGINE = "transformers"
"""The engine in which models pruned by other means are compared."""


@dataclass(frozen=True)
class Work:
    """Work that the sizes of a model imply.

    Attributes:
        parameters: Number of parameters, tied ones once.
        macs: Multiply-accumulates of one sequence with logits of every position, by length.
        head: Multiply-accumulates of the output layer at one position.
        weights: Parameters that a decoding step reads: all except an embedding that is not tied.
        cache: Elements of keys and values of one token.
    """

    parameters: int
    macs: Mapping[int, int]
    head: int
    weights: int
    cache: int

    def least(self, case: Case, *, last_only: bool, weight_bytes: float, cache_bytes: float) -> float:
        """Least work of a case: multiply-accumulates of a prefill, bytes read by a decoding step."""
        if case.phase == "prefill":
            return case.batch * (self.macs[case.tokens] - (self.head * (case.tokens - 1) if last_only else 0))
        return self.weights * weight_bytes + case.batch * case.tokens * self.cache * cache_bytes


def count_work(model: PreTrainedModel, graph_module: fx.GraphModule, lengths: Iterable[int]) -> Work:
    """Count the work of a decoder-only language model on sequences of some lengths."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tied = head is not None and head.weight is embedding.weight
    cache: Any = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    kept = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return Work(
        parameters=parameters,
        macs={tokens: count_macs(graph_module, tokens) for tokens in sorted(set(lengths))},
        head=head.weight.numel() if head is not None else 0,
        weights=parameters - (0 if tied else embedding.weight.numel()),
        cache=sum(t.numel() for t in kept if t is not None),
    )


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        name: `dense`, `slim 20%`, and so on.
        ratio: Fraction of the parameters removed; 0 for the dense model.
        source: The saved model.
        work: Work that its sizes imply.
        everywhere: Measured in every engine, or only in transformers.
    """

    name: str
    ratio: float
    source: Source
    work: Work
    everywhere: bool = True

    def runs_in(self, engine: type[Engine]) -> bool:
        """Whether it is measured in an engine."""
        return self.everywhere or engine.name == _REFERENCE_ENGINE


def make_candidates(
    dense: Any, tokenizer: Any, ratios: Iterable[float], round_to: int, lengths: Iterable[int], folder: Path
) -> Iterator[Candidate]:
    """Save and count the dense model and, at each ratio, ours, one cut by Torch-Pruning and a stock one.

    Torch-Pruning cuts the dense model to the widths of ours, if no heads were removed. The stock model has the same
    width in each layer, and so the class of the dense model.
    """
    lengths = list(lengths)
    source = Source(folder / "dense")
    dense.save_pretrained(source.folder)
    tokenizer.save_pretrained(source.folder)
    traced = fxprune.trace(dense).graph_module
    yield Candidate("dense", 0.0, source, count_work(dense, traced, lengths))

    def pruned(**options: Any) -> fxprune.Result:
        pipeline = fxprune.prune_pipeline(recipe="llm-pruner", importance="l2", verify=False, **options)
        return fxprune.Result.of(pipeline(traced).graph_module)

    for ratio in ratios:
        slim = pruned(select=SELECT % (ratio, round_to))
        target = folder / f"slim-{ratio}"
        slim.save_pretrained(target, tokenizer)
        work = count_work(slim.model, slim.graph_module, lengths)
        yield Candidate(f"slim {ratio:.0%}", ratio, Source(target), work)
        if all(name.endswith("/mlp") for name in slim.report.widths):
            cut = Source(source.folder, widths_of=target)
            yield Candidate(f"Torch-Pruning {ratio:.0%}", ratio, cut, work, everywhere=False)
        uniform = pruned(ratio=ratio, uniform=True, round_to=round_to)
        target = folder / f"stock-{ratio}"
        uniform.save_pretrained(target, tokenizer)
        work = count_work(uniform.model, uniform.graph_module, lengths)
        yield Candidate(f"stock {ratio:.0%}", ratio, Source(target), work, everywhere=False)
