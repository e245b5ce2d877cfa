"""Perplexity of a language model on fixed windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

__all__ = ["logits_of", "perplexity"]


def perplexity(
    model: Callable[..., Any],
    ids: torch.Tensor,
    batch: int = 4,
    *,
    progress: bool = False,
) -> float:
    """exp of the mean next-token cross-entropy over all windows.

    Windows are independent: stride equals length, and each predicts all its tokens but the first. Sums are
    kept in float64, logits are widened to float32.

    Args:
        model: A Hugging Face model, a GraphModule or any callable that takes `input_ids=` and returns logits
            `(batch, tokens, vocabulary)`, alone, first in a tuple, or as `.logits`. Modules run in
            evaluation mode and get their mode back; a GraphModule keeps the mode that it was traced in.
        ids: Token ids, `(windows, tokens)`, with at least two tokens a window.
        batch: Windows in one call; the last call may have fewer.
        progress: Show a progress bar.

    Raises:
        ValueError: There is nothing to predict.
        TypeError: The model returned something without logits.
    """
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"ids of shape {tuple(ids.shape)} hold no next token; give (windows, tokens >= 2)")
    options = {"use_cache": False} if isinstance(model, PreTrainedModel) else {}
    device = _device_of(model)
    total = 0.0
    with torch.inference_mode(), _evaluation(model):
        for chunk in track(ids.split(batch), description="perplexity", disable=not progress, transient=True):
            chunk = chunk.to(device)
            logits = logits_of(model(input_ids=chunk, **options))
            total += _loss_sum(logits, chunk)
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: an object with `.logits`, a mapping, a tuple or the tensor itself.

    Raises:
        TypeError: There are none.
    """
    if isinstance(output, Tensor):
        return output
    found: Any = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"no logits in a {type(output).__name__}; the model must return a tensor, a tuple or .logits")
    return found


def _loss_sum(logits: Tensor, ids: Tensor) -> float:
    """The sum of the next-token cross-entropies of one batch, in nats."""
    predicted = logits[:, :-1].float().flatten(0, 1)
    return nn.functional.cross_entropy(predicted, ids[:, 1:].flatten(), reduction="none").double().sum().item()


def _device_of(model: Callable[..., Any]) -> torch.device | None:
    """Where the model's first parameter lives; `None` where it has none, and ids stay where they are."""
    if not isinstance(model, nn.Module):
        return None
    return next((parameter.device for parameter in model.parameters()), None)


@contextmanager
def _evaluation(model: Callable[..., Any]) -> Iterator[None]:
    """A module is in evaluation mode inside and has its mode back outside; a GraphModule is left as it is."""
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule) or not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
