"""Calibration samples, the loss on them, and samples with replaced tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx, nn

from fxprune.errors import CalibrationError, FxpruneError, PassError
from fxprune.graph.compat import is_free
from fxprune.graph.context import Refusal, unprinted
from fxprune.graph.facts import Fact
from fxprune.graph.tensors import get_tensor
from fxprune.offload.prefetch import place_of

__all__ = [
    "IGNORED",
    "Calibration",
    "Sample",
    "alike",
    "batched",
    "computing",
    "embedding_rows",
    "next_token_loss",
    "noised",
    "plain_tokens",
    "require_logits",
    "spread",
    "stacked",
    "token_input",
]

T = TypeVar("T")

IGNORED = -100
"""Label of a token that does not count in the loss: what torch and transformers ignore by default."""


@dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        inputs: keyword inputs of the graph, in its order: tensors of a batch of one, and what else it was traced with.
        labels: what each position of the input is: ``(1, tokens)``; the loss shifts them by one.
    """

    inputs: Mapping[str, Any]
    labels: torch.Tensor


@dataclass(frozen=True)
class Calibration(Fact):
    """The samples that criteria and fits work on.

    Args:
        samples: one or more.
    """

    missing_error: ClassVar[type[PassError]] = CalibrationError
    remedy: ClassVar[str] = "Pass token ids as calibration, or choose an importance that needs no data"
    samples: tuple[Sample, ...]


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of each next token.

    Args:
        logits: ``(batch, tokens, vocabulary)``.
        labels: ``(batch, tokens)``, :data:`IGNORED` where a token does not count.
    """
    flat = logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED)


def require_logits(outputs: Sequence[torch.Tensor], labels: torch.Tensor, name: str) -> torch.Tensor:
    """Return the logits among the outputs of a graph: the first one.

    Args:
        outputs: its float outputs, in order.
        labels: what each position of the input is: ``(batch, tokens)``.
        name: the pass that takes a loss, for the message.

    Raises:
        PassError: the first output is not of shape ``(batch, tokens, vocabulary)``.
        CalibrationError: there are more or fewer labels than logits, or one is no token of the vocabulary.
    """
    logits = outputs[0] if outputs else None
    if logits is not None and logits.dim() == 3 and len(logits) == len(labels) and logits.shape[1] != labels.shape[1]:
        raise CalibrationError(
            f"{labels.shape[1]} labels for logits {tuple(logits.shape)}",
            where="calibration",
            remedy="Pass as many labels as tokens, or none where they are the tokens themselves",
        )
    if logits is None or logits.dim() != 3 or logits.shape[:2] != labels.shape:
        found = "no float tensor" if logits is None else f"a tensor of shape {tuple(logits.shape)}"
        raise PassError(
            f"the model gives {found} for labels {tuple(labels.shape)}, not logits (samples, tokens, vocabulary)",
            where=f"pass {name}",
            remedy="It needs a language model; choose an importance without a loss, such as l1, l2 or random",
        )
    counted = labels[labels != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[2]:
        bad = int(counted.min()) if int(counted.min()) < 0 else int(counted.max())
        raise CalibrationError(
            f"labels hold {bad}, the model gives logits for 0 to {logits.shape[2] - 1}",
            where="calibration",
            remedy=f"Label what shall not count with {IGNORED}",
        )
    return logits


@contextmanager
def computing(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Turn what torch raises while a graph computes calibration samples into one error, and print nothing.

    Raises:
        CalibrationError: the graph cannot compute ``inputs``.
    """
    try:
        with unprinted():
            yield
    except (FxpruneError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # ops refuse values that they do not take with whatever error they like
        shapes = ", ".join(
            f"{name} {tuple(value.shape)}" for name, value in inputs.items() if isinstance(value, torch.Tensor)
        )
        raise CalibrationError(
            f"the model cannot compute a sample of {shapes}: {Refusal(error)}",
            where="calibration",
            remedy="Pass samples that the model itself takes, no longer than its positions",
        ) from error


def embedding_rows(graph_module: fx.GraphModule) -> dict[str, int]:
    """Return how many rows the embedding has, for each input that is looked up in one, in the order of the lookups.

    Of an input that is looked up in several, the fewest rows count. An input may be laid out otherwise before.
    """
    found: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.target is not torch.ops.aten.embedding.default:
            continue
        table, looked_up = node.args[:2]
        while _is_view(looked_up):
            looked_up = looked_up.args[0]
        if table.op == "get_attr" and looked_up.op == "placeholder":
            name, rows = str(looked_up.target), get_tensor(graph_module, str(table.target)).shape[0]
            found[name] = min(rows, found.get(name, rows))
    return found


def _is_view(node: fx.Node) -> bool:
    """Whether an op gives what its first argument holds, and does nothing to it."""
    schema = getattr(node.target, "_schema", None)
    alias = schema.returns[0].alias_info if schema is not None and len(schema.returns) == 1 else None
    return alias is not None and not alias.is_write


def token_input(graph_module: fx.GraphModule) -> str | None:
    """Return the name of the input that holds token ids, the first that is looked up; None where none is."""
    return next(iter(embedding_rows(graph_module)), None)


def stacked(samples: Sequence[Sample], graph_module: fx.GraphModule, most: int) -> Iterator[dict[str, Any]]:
    """Yield batches of inputs, each of samples of the same shape.

    Args:
        samples: single samples.
        graph_module: the graph they are for; one that takes a single batch size gets them one by one.
        most: samples in a batch.
    """
    for numbers in alike(samples, graph_module, most):
        yield batched([samples[i] for i in numbers], graph_module)


def alike(samples: Sequence[Sample], graph_module: fx.GraphModule, most: int) -> Iterator[tuple[int, ...]]:
    """Yield the numbers of samples that make up a batch, as :func:`stacked` yields the batches."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    tensors = [node.meta["val"] for node in placeholders if isinstance(node.meta["val"], torch.Tensor)]
    size = most if all(is_free(value.shape[0]) for value in tensors) else 1
    shapes: dict[tuple[torch.Size, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        shapes.setdefault(tuple(v.shape for v in sample.inputs.values() if isinstance(v, torch.Tensor)), []).append(i)
    for group in shapes.values():
        for start in range(0, len(group), size):
            yield tuple(group[start : start + size])


def batched(samples: Sequence[Sample], graph_module: fx.GraphModule) -> dict[str, Any]:
    """Return samples of the same shape as one batch of inputs, on the device that the graph runs on."""
    device = place_of(graph_module)
    return {
        name: torch.cat([s.inputs[name] for s in samples]).to(device) if isinstance(value, torch.Tensor) else value
        for name, value in samples[0].inputs.items()
    }


def spread(samples: Sequence[T], most: int | None) -> tuple[T, ...]:
    """Return no more than ``most`` of the samples, evenly spread over them; all of them for None."""
    if most is None or most >= len(samples):
        return tuple(samples)
    return tuple(samples[i * len(samples) // most] for i in range(most))


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
