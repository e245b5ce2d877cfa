"""Samples that a language model writes itself: text of all the kinds that it knows, where there is little other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from fxprune.graph.silence import quiet
from fxprune.graph.surroundings import evaluating

__all__ = ["can_write", "write_samples"]

_TEMPERATURE = 0.8
"""At 1 a small model rambles, and far below it repeats itself."""

_BATCH = 128
"""Samples that are written at once: a step reads all weights, however few samples there are."""


def can_write(model: nn.Module) -> bool:
    """Whether a model continues token ids, as decoders of transformers do.

    Args:
        model: any model.
    """
    can = getattr(model, "can_generate", None)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return callable(can) and bool(can()) and not encodes


def write_samples(
    model: Any,
    starts: torch.Tensor,
    samples: int,
    tokens: int,
    seed: int,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
) -> torch.Tensor:
    """Return token ids that a model draws from what it says itself, ``(samples, tokens)``.

    With text of its own a model can be taught what it knew beyond the kind of text that was given. Source: Liu et al.,
    "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models" (arXiv 2305.17888), which draws the first
    token at random.

    Args:
        model: one that :func:`can_write`.
        starts: what the samples begin with, in turn: token ids ``(starts, fewer than tokens)``.
        samples: how many to write.
        tokens: of each, its start among them.
        seed: for the draws; those of the caller stay as they were.
        track: shows progress over the batches.
    """
    device = next(model.parameters()).device
    length = tokens - starts.shape[1]
    drawn = GenerationConfig(
        do_sample=True, temperature=_TEMPERATURE, top_k=0, top_p=1.0, use_cache=True,
        repetition_penalty=1.0, min_new_tokens=length, max_new_tokens=length,
    )  # fmt: skip
    begun = starts[torch.arange(samples) % len(starts)].to(device).split(_BATCH)
    forked: Sequence[torch.device] = [device] if device.type == "cuda" else []
    written: list[torch.Tensor] = []
    with evaluating(model), torch.random.fork_rng(forked), torch.no_grad(), quiet(logging.WARNING):
        torch.manual_seed(seed)
        for ids in track(begun, len(begun)):
            mask = torch.ones_like(ids)
            written.append(model.generate(ids, attention_mask=mask, generation_config=drawn).cpu())
    return torch.cat(written)
