"""What a model has to do at least: operations before the first token, bytes for each token after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from transformers import DynamicCache, PreTrainedModel

from fxprune.graph.counting import count_macs
from fxprune.masking.masked_run import UntouchedRun

__all__ = ["Case", "Work", "work_of"]


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        phase: `prefill`, which reads `tokens` tokens and gives what comes next, or `decode`, which gives one more token
            after as many.
        batch: Sequences at once.
        tokens: In each.
    """

    phase: str
    batch: int
    tokens: int

    @property
    def made(self) -> int:
        """Tokens read or given in one call."""
        return self.batch * (self.tokens if self.phase == "prefill" else 1)

    def __str__(self) -> str:
        return f"{self.phase} {self.batch} x {self.tokens}"


@dataclass(frozen=True)
class Work:
    """What the sizes of a model say.

    Attributes:
        parameters: All of them, tied ones once.
        macs: By length, the multiply-accumulates of one sequence, with an output for each position.
        head: Those of the output layer at one position.
        weights: Numbers that a decoding step reads: all parameters, but of an embedding that is not tied one row.
        cache: Keys and values that are kept for each token.
    """

    parameters: int
    macs: Mapping[int, int]
    head: int
    weights: int
    cache: int

    def least(self, case: Case, *, last_only: bool, weight_bytes: float, cache_bytes: float) -> float:
        """Operations, or bytes, that a case takes at least.

        Args:
            case: What is timed.
            last_only: The output layer runs at the last position alone.
            weight_bytes: Bytes of one weight.
            cache_bytes: Bytes of one number in the cache.
        """
        if case.phase == "prefill":
            return case.batch * (self.macs[case.tokens] - (self.head * (case.tokens - 1) if last_only else 0))
        return self.weights * weight_bytes + case.batch * case.tokens * self.cache * cache_bytes


def work_of(model: PreTrainedModel, graph_module: fx.GraphModule, lengths: Iterable[int]) -> Work:
    """Count what the sizes of a decoder-only language model say.

    Args:
        model: The model.
        graph_module: Its graph.
        lengths: Of the sequences that will be read.
    """
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
        macs={tokens: count_macs(graph_module, tokens, UntouchedRun) for tokens in sorted(set(lengths))},
        head=head.weight.numel() if head is not None else 0,
        weights=parameters - (0 if tied else embedding.weight.numel()),
        cache=sum(t.numel() for t in kept if t is not None),
    )
