"""Samples that a language model writes itself: text of all the kinds that it knows, where there is little other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from fxprune.graph.attempts import Refusal, attempt
from fxprune.graph.silence import quiet
from fxprune.graph.surroundings import evaluating, own_randomness
from fxprune.pipeline.progress import Track, no_progress

__all__ = ["can_write", "chat_start", "own_samples", "write_samples"]

_TEMPERATURE = 0.8
"""At 1 a small model rambles, and far below it repeats itself."""

_BATCH = 64
"""Samples that are written at once: a step reads all weights, however few they are, and what they keep takes memory."""

_MARK = "0a9f3c"
"""What a user is made to say, to find out what stands before it."""

_LONGEST = 4
"""One in so many tokens of a sample is of the template of a chat, at the most: longer ones lose their start."""


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
    track: Track = no_progress,
    what: str = "the model writes",
) -> torch.Tensor:
    """Return token ids that a model draws from what it says itself, ``(samples, tokens)``.

    Args:
        model: one that :func:`can_write`.
        starts: what the samples begin with, in turn: token ids ``(starts, fewer than tokens)``.
        samples: how many to write.
        tokens: of each, its start among them.
        seed: for the draws; those of the caller stay as they were.
        track: shows progress over the batches, as ``track(items, what, total)``.
        what: what progress is called.
    """
    device = next(model.parameters()).device
    length = tokens - starts.shape[1]
    drawn = GenerationConfig(
        do_sample=True, temperature=_TEMPERATURE, top_k=0, top_p=1.0, use_cache=True,
        repetition_penalty=1.0, min_new_tokens=length, max_new_tokens=length,
    )  # fmt: skip
    begun = starts[torch.arange(samples) % len(starts)].to(device).split(_BATCH)
    written: list[torch.Tensor] = []
    with evaluating(model), _plainly(model), own_randomness(), torch.no_grad(), quiet(logging.WARNING):
        torch.manual_seed(seed)
        for ids in track(begun, what, len(begun)):
            mask = torch.ones_like(ids)
            written.append(model.generate(ids, attention_mask=mask, generation_config=drawn).cpu())
    return torch.cat(written)


@contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Generate by what is asked alone: transformers fills in what the model's own settings say of all else."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


def own_samples(
    model: Any,
    tokenizer: Any,
    vocabulary: torch.Tensor,
    samples: int,
    tokens: int,
    seed: int,
    track: Track,
) -> torch.Tensor:
    """Return token ids of what a model has to say by itself, ``(samples, tokens)``, for want of other text.

    Each sample begins with one token drawn from the vocabulary; every other one, where the tokenizer has a template for
    chats, as a chat does, up to where a user would speak. Sources: Liu et al., "LLM-QAT: Data-Free Quantization Aware
    Training for Large Language Models" (arXiv 2305.17888), for the token; Xu et al., "Magpie: Alignment Data Synthesis
    from Scratch by Prompting Aligned LLMs with Nothing" (arXiv 2406.08464), for the chat.

    Args:
        model: one that :func:`can_write`.
        tokenizer: its tokenizer.
        vocabulary: the token ids to draw from, ``(ids,)``.
        samples: how many to write.
        tokens: of each.
        seed: for the draws.
        track: shows progress, as ``track(items, what, total)``.
    """
    draw = torch.Generator().manual_seed(seed)
    chat = chat_start(tokenizer)[-max(1, tokens // _LONGEST) :]
    chats = samples // 2 if chat else 0
    starts = vocabulary[torch.randint(len(vocabulary), (samples - chats,), generator=draw)][:, None]
    kinds = (("the model writes", starts, len(starts)), ("the model chats", torch.tensor([chat]), chats))
    written = [write_samples(model, begun, count, tokens, seed, track, what) for what, begun, count in kinds if count]
    return torch.cat(written)[torch.randperm(samples, generator=draw)]


def chat_start(tokenizer: Any) -> list[int]:
    """Return the token ids that a chat begins with, up to where a user speaks; none without a template for chats.

    Args:
        tokenizer: one of transformers, or None.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    asked = [{"role": "user", "content": _MARK}]
    text = attempt(tokenizer.apply_chat_template, asked, tokenize=False)
    before, found, _ = ("", "", "") if isinstance(text, Refusal) else str(text).partition(_MARK)
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]) if found else []
