"""Calibration data in any common form, read as single checked samples with labels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.data.calibration import IGNORED, Sample, embedding_rows
from fxprune.data.rows import json_lines
from fxprune.errors import CalibrationError, FxpruneError
from fxprune.graph.compat import is_free, size_hint, tree_leaves
from fxprune.graph.context import Refusal
from fxprune.graph.facts import add_note
from fxprune.pipeline.arguments import format_value

Tensors = Mapping[str, torch.Tensor]

LABELS = "labels"
"""The name that most models have for their labels."""

DECODER = "decoder_input_ids"
"""The input of transformers' encoder-decoders that is made from labels."""

_WANTED = "Pass token ids as a LongTensor (samples, tokens), a list of tokenised dicts or a DataLoader"
_NO_DATA = "Choose an importance that needs no data, such as l1 or l2"
_TOKENISE = (
    "Tokenise the text first, as in tokenizer(text, return_tensors='pt').input_ids; on the command line, --calibration "
    "takes text"
)


def check_samples(name: str, data: Any) -> Any:
    """Return ``data``, the argument ``name``, if its type can hold samples; none are read."""
    if isinstance(data, str | bytes | os.PathLike):
        raise _error(f"cannot read {type(data).__name__}", remedy=_TOKENISE)
    if isinstance(data, type) or not isinstance(data, torch.Tensor | np.ndarray | Mapping | Iterable):
        raise _error(f"cannot read {format_value(data)}")
    if isinstance(data, torch.Tensor):
        _check_tensor("it", data, "calibration")
    if isinstance(data, torch.Tensor | np.ndarray) and (data.ndim != 2 or not _is_whole(data)):
        raise _error(format_value(data))
    return data


class FileSamples(dict[str, torch.Tensor]):
    """Token ids ``(samples, tokens)`` as a batch by name, with where they are from, and the text itself."""

    def __init__(self, ids: torch.Tensor, source: str, text: Any = None) -> None:
        super().__init__(input_ids=ids)
        self.source, self.text = source, text


def is_in_memory(data: Any) -> bool:
    """Whether reading ``data`` has no effect: loaders and generators run code, draw numbers and may end."""
    return isinstance(data, torch.Tensor | np.ndarray | Mapping | list | tuple)


def read_calibration(
    data: Any,
    graph_module: fx.GraphModule,
    *,
    next_token: bool = True,
    shift: Callable[[torch.Tensor], torch.Tensor] | None = None,
    named: Sequence[str] = (LABELS,),
    most: int | None = None,
) -> tuple[Sample, ...]:
    """Samples of calibration data: one for each row, without padding.

    Args:
        next_token: whether labels are those of next tokens; if not, they may have any form.
        named: the names that labels of any form may have.
        shift: makes the tokens that a decoder reads, if a sample has none, from its labels, or from its tokens.
        most: most tokens of a sample; the rest of longer ones is left out, with a note. None for any number.
        data: token ids ``(samples, tokens)``; a batch by name of the input, as tokenizers return it; a list of
            tokenised dicts with ``input_ids`` and, if padded, ``attention_mask`` and, if given, ``labels``; or any
            iterable of such batches (a DataLoader). If the graph takes the mask and a fixed number of tokens, padding
            stays, and padded positions do not count as next tokens.

    Raises:
        CalibrationError: there are no samples, or one does not fit the graph: fewer than two tokens, a value that is
            not finite, a token id without an embedding, another shape or dtype.
    """
    inputs, others = _inputs(graph_module)
    names = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    reader = _Reader(inputs, next_token, shift, named, most)
    samples = tuple(
        replace(sample, inputs={name: sample.inputs.get(name, others.get(name)) for name in names})
        for sample in reader.samples(data)
    )
    if reader.cut:
        add_note(graph_module, positions_note(most))
    return samples


def positions_note(most: int | None) -> str:
    """A note that samples were made shorter, since the model has no more positions."""
    return f"samples have at most {most:,} tokens, as many as the model has positions"


def check_tokens(data: Any, rows: int | None, next_token: bool = True) -> None:
    """Refuse what :func:`read_calibration` will refuse for a model of ``input_ids`` alone, before there is a graph.

    ``rows`` are those of its embedding; None if other ids have a meaning as well.
    """
    if is_in_memory(data):
        for _ in token_rows(data, rows, next_token):
            pass


def token_rows(data: Any, rows: int | None, next_token: bool = True) -> Iterator[torch.Tensor]:
    """Yield the token ids ``(1, tokens)`` of each sample for a model of ``input_ids``; see :func:`check_tokens`."""
    inputs = [_Input("input_ids", (None, None), True, rows)]
    return (sample.inputs["input_ids"] for sample in _Reader(inputs, next_token).samples(data))


def read_token_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read tokenised rows from a file of JSON lines."""
    try:
        rows = [json.loads(line) for _, line in json_lines(Path(path).read_text(encoding="utf-8-sig"))]
        return [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise CalibrationError(
            f"not tokenised JSON lines: {error}", where=str(path), remedy='Write {"input_ids": [...]} on each line'
        ) from error


@dataclass(frozen=True)
class _Input:
    """A tensor that a graph takes: its sizes (None if free), whether it holds integers, rows of its embedding."""

    name: str
    shape: tuple[int | None, ...]
    whole: bool
    rows: int | None


def _inputs(graph_module: fx.GraphModule) -> tuple[list[_Input], dict[str, Any]]:
    """The tensors that a graph takes, and its other inputs by name, with the values that they were traced with."""
    rows = embedding_rows(graph_module)
    found: list[_Input] = []
    others: dict[str, Any] = {}
    for node in (node for node in graph_module.graph.nodes if node.op == "placeholder"):
        name, value = str(node.target), node.meta["val"]
        if isinstance(value, torch.Tensor):
            shape = tuple(None if is_free(size) else size_hint(size) for size in value.shape)
            found.append(_Input(name, shape, not value.is_floating_point(), rows.get(name)))
        elif any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            raise _error(f"the model takes a {type(value).__name__} for {name}, samples hold tensors", remedy=_NO_DATA)
        else:
            others[name] = value
    if not found:
        raise _error("the graph takes no tensor", remedy=_NO_DATA)
    return found, others


def _error(what: str, where: str = "calibration", remedy: str = _WANTED) -> CalibrationError:
    return CalibrationError(what, where=where, remedy=remedy)


@dataclass(frozen=True)
class _Reader:
    """Reads samples of the tensors that a graph takes; the other fields are arguments of :func:`read_calibration`."""

    inputs: Sequence[_Input]
    next_token: bool = True
    shift: Callable[[torch.Tensor], torch.Tensor] | None = None
    named: Sequence[str] = (LABELS,)
    most: int | None = None
    cut: set[int] = field(default_factory=set)
    """Numbers of tokens of the samples that had more than ``most``."""

    @property
    def first(self) -> _Input:
        return self.inputs[0]

    def samples(self, data: Any) -> Iterator[Sample]:
        """Yield each sample with its tensors alone."""
        check_samples("calibration", data)
        number = 0
        for batch in self._batches(data):
            for row in self._rows(batch, number):
                yield self._sample(row, f"calibration sample {number}")
                number += 1
        if not number:
            raise _error("the calibration data is empty", remedy="Pass at least one sample")

    def _batches(self, data: Any) -> Iterator[Tensors]:
        if isinstance(data, torch.Tensor | np.ndarray):
            yield {self.first.name: _tensor(self.first.name, data, "calibration")}
            return
        number = 0
        try:
            for item in [data] if isinstance(data, Mapping) else data:
                for part in _parts(item, self.first.name):
                    yield self._as_batch(part, f"calibration item {number}")
                number += 1
        except FxpruneError:
            raise
        except Exception as error:  # data sets and loaders run the user's code
            raise _error(f"item {number} cannot be read: {Refusal(error)}") from error

    def _as_batch(self, item: Any, where: str) -> Tensors:
        """Tensors of a batch by name; a single sample becomes a batch of one."""
        name = self.first.name
        if isinstance(item, list | tuple) and item and isinstance(item[0], torch.Tensor | np.ndarray):
            several = sum(isinstance(part, torch.Tensor | np.ndarray) and part.ndim > 0 for part in item)
            if several > 1:
                remedy = "Pass dicts that name them, as in {'input_ids': ids, 'attention_mask': mask}"
                raise _error(f"{several} tensors without names", where, remedy)
            item = item[0] if several else item  # a TensorDataset yields tuples
        fields: Mapping[str, Any] = item if isinstance(item, Mapping) else {name: item}
        if name not in fields:
            raise _error(f"a sample without {name!r}, only {sorted(map(str, fields))}", where, _TOKENISE)
        tensors = {
            str(key): _tensor(key, value, where)
            for key, value in fields.items()
            if key == name or (value is not None and (key in (*self.named, "attention_mask") or _is_numbers(value)))
        }
        first = tensors[name]
        if not first.dim():
            raise _error(f"{name} is the single number {format_value(first)}", where)
        alone = first.dim() == 1 if self.first.whole else first.dim() == len(self.first.shape) - 1
        return {key: value[None] if alone else value for key, value in tensors.items()}

    def _rows(self, batch: Tensors, number: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the rows of a batch, without padding."""
        names = [known.name for known in self.inputs]
        batch = {key: value for key, value in batch.items() if key in (*names, "attention_mask", *self.named)}
        size = len(batch[names[0]])
        mask_input = next((known for known in self.inputs if known.name == "attention_mask"), None)
        # if the graph takes the mask too, padding can be cut off only if it also takes fewer tokens
        is_cut = mask_input is None or (
            mask_input.whole and mask_input.shape == self.first.shape and mask_input.shape[-1:] == (None,)
        )
        for i in range(size):
            where = f"calibration sample {number + i}"
            odd = next((key for key, value in batch.items() if not value.dim() or len(value) != size), None)
            if odd is not None and size > 1:  # of one sample a tensor may have any rows, as those of its patches
                raise _error(f"{odd} is {format_value(batch[odd])} beside {size} samples of {names[0]}", where)
            row = {key: value if size == 1 else value[i : i + 1] for key, value in batch.items()}
            mask, shape = row.get("attention_mask") if is_cut else None, row[names[0]].shape
            if "attention_mask" not in names:
                row.pop("attention_mask", None)
            if mask is not None:
                if mask.shape != shape:
                    what = f"attention_mask is of shape {tuple(mask.shape)} beside input of shape {tuple(shape)}"
                    raise _error(what, where, "Pass a mask with one number for each token, or none")
                if mask.is_floating_point() and not bool(mask.isfinite().all()):
                    what = "attention_mask has values that are not finite"
                    raise _error(what, where, "Pass 1 for tokens and 0 for padding")
                keep = mask[0].bool()
                row = {key: value[:, keep] if value.shape == shape else value for key, value in row.items()}
            yield self._shortened(row)

    def _shortened(self, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a sample, those of tokens cut off after :attr:`most`."""
        ids = row[self.first.name]
        if self.most is None or self.first.rows is None or ids.dim() != 2:
            return row
        long = [
            key
            for key, value in row.items()
            if (value.shape == ids.shape or (key in (LABELS, DECODER) and value.dim() == 2))
            and value.shape[1] > self.most
        ]
        self.cut.update(row[key].shape[1] for key in long)
        return {key: value[:, : self.most] if key in long else value for key, value in row.items()}

    def _sample(self, row: dict[str, torch.Tensor], where: str) -> Sample:
        first = self.first
        tokens = row.get(LABELS, row[first.name] if first.whole else None)
        if self.shift is not None and tokens is not None and tokens.dim() == 2:
            row.setdefault(DECODER, self.shift(tokens))
        for known in self.inputs:
            if known.name not in row:
                raise _error(f"a sample without {known.name!r}, which the model takes", where)
        values = {known.name: _checked(row[known.name], known, where) for known in self.inputs}
        read = values[first.name]
        if not self.next_token or (LABELS not in row and not first.whole):
            none = torch.full_like(read, IGNORED) if first.whole and read.dim() == 2 else torch.zeros(1, 0)
            return Sample(values, none.long(), {name: row[name] for name in self.named if name in row} or None)
        labels = row.get(LABELS, read)
        mask = values.get("attention_mask")
        if LABELS not in row and mask is not None and not mask.is_floating_point() and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, IGNORED)
        if labels.dim() != 2 or not _is_whole(labels):
            remedy = f"Pass labels (samples, tokens), {IGNORED} to ignore one"
            raise _error(f"labels are {format_value(labels)}", where, remedy)
        if first.whole and self.shift is None and labels.shape != read.shape:
            what = f"labels are {format_value(labels)}, and {first.name} {format_value(read)}"
            raise _error(what, where, "Pass as many labels as tokens")
        if labels.shape[1] < 2:
            raise _error("fewer than two tokens: there is nothing to predict", where, "Pass longer samples")
        if bool((labels[:, 1:] == IGNORED).all()):
            raise _error(f"all labels are {IGNORED}: there is nothing to predict", where, "Leave labels out")
        return Sample(values, labels.long())


def _parts(item: Any, name: str) -> list[Any]:
    """The item itself, or its rows if they differ in length, as a tokenizer returns several texts without padding."""
    rows = item.get(name) if isinstance(item, Mapping) else None
    if not isinstance(rows, list | tuple) or len({len(row) for row in rows if isinstance(row, list | tuple)}) < 2:
        return [item]

    def of_row(value: Any, number: int) -> Any:
        by_row = isinstance(value, list | tuple) or (isinstance(value, torch.Tensor) and value.dim() > 1)
        return value[number] if by_row and len(value) == len(rows) else value

    return [{key: of_row(value, number) for key, value in item.items()} for number in range(len(rows))]


def _is_numbers(value: Any) -> bool:
    """Whether a field holds numbers: others, such as the text, describe a sample and are not for the model."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return True
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    return all(isinstance(item, int | float | Sequence) and not isinstance(item, str | bytes) for item in value)


def _tensor(name: Any, value: Any, where: str) -> torch.Tensor:
    if isinstance(value, str | bytes) or (isinstance(value, Sequence) and any(isinstance(i, str) for i in value)):
        raise _error(f"{name} is text", where, _TOKENISE)
    try:
        if isinstance(value, np.ndarray):  # torch takes neither foreign byte orders, nor negative strides, nor unsigned
            kind = value.dtype.newbyteorder("=")
            if kind.kind == "u" and kind.itemsize == 8:
                value = np.minimum(value, np.iinfo(np.int64).max)  # far above any vocabulary
            if kind.kind == "u" and kind.itemsize > 1:
                kind = np.dtype(np.int64)
            value = np.ascontiguousarray(value, dtype=kind)
        found = torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError, RecursionError, OverflowError) as error:
        raise _error(f"{name} is {format_value(value)}, not a tensor: {Refusal(error)}", where) from error
    _check_tensor(str(name), found, where)
    return found


def _check_tensor(name: str, value: torch.Tensor, where: str) -> None:
    if value.is_meta:
        raise _error(f"{name} is on meta and has no values", where)
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        raise _error(f"{name} is not a plain tensor, it is {value.layout}", where)
    if value.is_complex():
        raise _error(f"{name} is {format_value(value)}", where)


def _is_whole(value: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    kind = value.dtype
    if isinstance(kind, torch.dtype):
        return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    return kind.kind in "iu"


def _checked(value: torch.Tensor, known: _Input, where: str) -> torch.Tensor:
    """One input, checked; token ids as int64."""
    name = known.name
    if known.whole and known.rows is not None and not _is_whole(value):
        raise _error(f"{name} is {format_value(value)}", where)
    fixed = [size for size in (known.shape[0], 1) if size is not None][:1]  # samples come one by one
    wanted = (*fixed, *known.shape[1:])
    fits = value.dim() == len(wanted) and all(w in (None, n) for n, w in zip(value.shape[1:], wanted[1:], strict=False))
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in known.shape)
        remedy = "Pass samples of that shape alone: a model is traced at that of the first, unless it was given another"
        raise _error(f"{name} is {format_value(value)}, the model takes ({sizes})", where, remedy)
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise _error(f"{name} has values that are not finite", where, "Clean the data")
    if known.rows is not None and value.numel() and not 0 <= int(value.min()) <= int(value.max()) < known.rows:
        bad = int(value.max()) if int(value.max()) >= known.rows else int(value.min())
        what = f"{name} holds {bad}, the model knows 0 to {known.rows - 1}"
        remedy, shell = "Tokenise with the tokenizer of this model", "Save the model's own tokenizer in its folder"
        raise CalibrationError(what, where=where, remedy=remedy, shell=shell)
    return value.long() if known.rows is not None else value
