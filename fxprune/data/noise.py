"""Samples with some of their tokens replaced: more of what a model may be given than a small text holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fxprune.data.calibration import IGNORED, Sample

__all__ = ["noised", "plain_tokens"]

_UNTOUCHED = 0.25
"""Of the copies, so many keep all their tokens: what a model is used for is text without noise."""

_ANY = 0.5
"""Of the replaced tokens, so many become any token at all; the others become one of the samples."""


def plain_tokens(tokenizer: Any, classes: int) -> torch.Tensor:
    """Return the ids of all tokens of a tokenizer that stand for text; none where it cannot tell.

    Args:
        tokenizer: one of transformers, or None.
        classes: ids from here on are none that the model knows.
    """
    listed = getattr(tokenizer, "get_vocab", None)
    if not callable(listed):
        return torch.empty(0, dtype=torch.long)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}.union(getattr(tokenizer, "all_special_ids", ()))
    return torch.tensor(sorted(i for i in set(listed().values()) - special if i < classes), dtype=torch.long)


def noised(
    samples: Sequence[Sample], name: str, copies: int, most: float, vocabulary: torch.Tensor, seed: int
) -> tuple[Sample, ...]:
    """Return copies of samples with other tokens in some places; all samples once, then all of them again.

    In one copy out of four nothing is replaced. In the others, a part of the tokens that is drawn anew for each, from
    none to ``most``: by tokens of other places of the samples, or by any of the vocabulary. The first token stays, and
    as labels those that were put in do not count. What a model says after words that do not belong there is as much of
    what it knows, and no copy is like another to learn by heart.

    Args:
        samples: without noise.
        name: of the input that holds token ids, ``(1, tokens)``.
        copies: of each sample.
        most: part of the tokens that is replaced at most.
        vocabulary: token ids to replace by; empty for those of the samples alone.
        seed: for the draws.
    """
    draw = torch.Generator().manual_seed(seed)
    known = torch.cat([sample.inputs[name].reshape(-1).cpu() for sample in samples])
    return tuple(_copy(sample, name, most, known, vocabulary, draw) for _ in range(copies) for sample in samples)


def _copy(
    sample: Sample, name: str, most: float, known: torch.Tensor, vocabulary: torch.Tensor, draw: torch.Generator
) -> Sample:
    if float(torch.rand((), generator=draw)) < _UNTOUCHED:
        return sample
    ids = sample.inputs[name]
    size, part = ids.numel(), most * float(torch.rand((), generator=draw))
    hit = torch.rand(size, generator=draw) < part
    hit[0] = False
    other = known[torch.randint(len(known), (size,), generator=draw)]
    if len(vocabulary):
        any_token = vocabulary[torch.randint(len(vocabulary), (size,), generator=draw)]
        other = torch.where(torch.rand(size, generator=draw) < _ANY, any_token, other)
    hit = hit.view(ids.shape).to(ids.device)
    replaced = torch.where(hit, other.to(ids).view(ids.shape), ids)
    labels = sample.labels.masked_fill(hit, IGNORED) if sample.labels.shape == ids.shape else sample.labels
    return dataclasses.replace(sample, inputs={**sample.inputs, name: replaced}, labels=labels)
