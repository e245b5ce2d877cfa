"""Calibration data: what users have, read as single samples with labels and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxprune.errors import CalibrationError, PassError
from fxprune.graph.compat import is_free
from fxprune.graph.facts import Fact
from fxprune.graph.tensors import device_of, get_tensor

__all__ = [
    "IGNORED",
    "Calibration",
    "Sample",
    "embedding_rows",
    "next_token_loss",
    "read_calibration",
    "read_rows",
    "stacked",
]

IGNORED = -100
"""Label of a token that does not count in the loss: what torch and transformers ignore by default."""


@dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        inputs: keyword inputs of the graph, batch of one.
        labels: what each position of the input is: ``(1, tokens)``; the loss shifts them by one.
    """

    inputs: Mapping[str, torch.Tensor]
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


def read_calibration(data: Any, graph_module: fx.GraphModule) -> tuple[Sample, ...]:
    """Return one sample for each row of ``data``, without padding.

    Args:
        data: a LongTensor ``(samples, tokens)``; a list of tokenised dicts with ``input_ids`` and, if padded,
            ``attention_mask`` and, if given, ``labels``; or any iterable of such batches (a DataLoader).
        graph_module: the graph the samples are for.

    Raises:
        CalibrationError: no samples, a sample of fewer than two tokens, a value that is not finite, or token ids
            the model has no embedding for.
    """
    names = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    rows = embedding_rows(graph_module)
    samples: list[Sample] = []
    for batch in _batches(data, names[0]):
        for sample in _rows(batch, names):
            _check_sample(sample, rows, len(samples))
            samples.append(sample)
    if not samples:
        raise CalibrationError("the calibration data is empty", where="calibration", remedy="Pass at least one sample")
    return tuple(samples)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the tokenised rows in a file of JSON lines.

    Raises:
        CalibrationError: the file cannot be read, or a line is no JSON object of lists of numbers.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        return [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CalibrationError(
            f"not tokenised JSON lines: {error}", where=str(path), remedy='Write {"input_ids": [...]} on each line'
        ) from error


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of each next token.

    Args:
        logits: ``(batch, tokens, vocabulary)``.
        labels: ``(batch, tokens)``, :data:`IGNORED` where a token does not count.
    """
    flat = logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED)


def _batches(data: Any, name: str) -> Iterator[Mapping[str, torch.Tensor]]:
    if isinstance(data, torch.Tensor):
        if data.dim() != 2 or data.is_floating_point():
            raise CalibrationError(
                f"a {data.dtype} tensor of shape {tuple(data.shape)}",
                where="calibration",
                remedy="Pass token ids as a LongTensor (samples, tokens)",
            )
        yield {name: data}
    elif isinstance(data, Iterable) and not isinstance(data, str | Mapping):
        for item in data:
            yield _as_batch(item, name)
    else:
        raise CalibrationError(
            f"cannot read {type(data).__name__}",
            where="calibration",
            remedy="Pass a LongTensor, a list of tokenised dicts or a DataLoader",
        )


def _as_batch(item: Any, name: str) -> Mapping[str, torch.Tensor]:
    fields = dict(item) if isinstance(item, Mapping) else {name: item[0] if isinstance(item, list | tuple) else item}
    if name not in fields:
        raise CalibrationError(f"a sample without {name!r}, only {sorted(fields)}", where="calibration")
    tensors = {key: torch.as_tensor(value) for key, value in fields.items() if not isinstance(value, str)}
    lone = tensors[name].dim() == 1
    return {key: value[None] if lone else value for key, value in tensors.items()}


def _rows(batch: Mapping[str, torch.Tensor], names: Sequence[str]) -> Iterator[Sample]:
    for i in range(len(batch[names[0]])):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        mask = row.pop("attention_mask", None) if "attention_mask" not in names else None
        if mask is not None and mask.shape == row[names[0]].shape:
            keep = mask[0].bool()
            row = {key: value[:, keep] if value.dim() == 2 else value for key, value in row.items()}
        labels = row.get("labels", row[names[0]])
        missing = [name for name in names if name not in row]
        if missing:
            raise CalibrationError(f"a sample without {missing[0]!r}", where=f"calibration sample {i}")
        yield Sample({name: row[name] for name in names}, labels)


def _check_sample(sample: Sample, rows: Mapping[str, int], number: int) -> None:
    where = f"calibration sample {number}"
    if sample.labels.dim() >= 2 and sample.labels.shape[1] < 2:
        raise CalibrationError("fewer than two tokens: there is nothing to predict", where=where)
    for name, value in sample.inputs.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CalibrationError(f"{name} has values that are not finite", where=where, remedy="Clean the data")
        if name in rows and value.numel() and not (int(value.min()) >= 0 and int(value.max()) < rows[name]):
            bad = int(value.max()) if int(value.max()) >= rows[name] else int(value.min())
            raise CalibrationError(
                f"{name} holds {bad}, the model knows 0 to {rows[name] - 1}",
                where=where,
                remedy="Tokenise with the tokenizer of this model",
            )


def embedding_rows(graph_module: fx.GraphModule) -> dict[str, int]:
    """Return how many rows the embedding has, for each input that is looked up in one."""
    found: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and node.args[1].op == "placeholder":
            table = node.args[0]
            if table.op == "get_attr":
                found[str(node.args[1].target)] = get_tensor(graph_module, str(table.target)).shape[0]
    return found


def stacked(samples: Sequence[Sample], graph_module: fx.GraphModule, most: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of inputs, each of samples of the same shape.

    Args:
        samples: single samples.
        graph_module: the graph they are for; one that takes a single batch size gets them one by one.
        most: samples in a batch.
    """
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    size = most if all(is_free(node.meta["val"].shape[0]) for node in inputs) else 1
    alike: dict[tuple[torch.Size, ...], list[Sample]] = {}
    for sample in samples:
        alike.setdefault(tuple(value.shape for value in sample.inputs.values()), []).append(sample)
    device = device_of(graph_module)
    for group in alike.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            yield {name: torch.cat([s.inputs[name] for s in part]).to(device) for name in part[0].inputs}
