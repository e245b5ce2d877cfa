"""Perplexity on windows of tokens, on the paper's corpora or on files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from fxprune.data.text import read_text
from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.graph.context import clear_errors, unprinted
from fxprune.masking.parts import InBlocks
from fxprune.offload.ranks import add_up, input_device, is_sharded, turns
from fxprune.pipeline.arguments import function, instance, refuse, told, whole_number
from fxprune.pipeline.contract import Track, no_progress

__all__ = [
    "CORPORA",
    "Perplexity",
    "load_corpus",
    "logits_of",
    "named_corpora",
    "perplexity",
    "sliding_windows",
    "text_perplexity",
]

CORPORA: Mapping[str, Mapping[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test", "field": "text"},
    "ptb": {
        "path": "ptb-text-only/ptb_text_only",
        "name": "penn_treebank",
        "split": "validation",
        "field": "sentence",
        "revision": "refs/convert/parquet",
    },
}
"""Data sets by name, in the splits that the paper measures; the hub's Parquet copy where the original is a script."""

_FILES = (".txt", ".jsonl", ".json")


def named_corpora(texts: str | Path | Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str | Path]:
    """Return what to measure on, by name.

    Args:
        texts: names out of :data:`CORPORA` and paths, alone or in a sequence; or a mapping from names of your own to
            those, or to text itself.
    """
    wanted = "names of texts, paths of files, or a mapping from names to these or to text itself"
    given: Any = texts
    if isinstance(given, bytes) or not isinstance(given, str | Path | Iterable):
        raise refuse("texts", given, wanted, EvaluationError)
    named = dict(texts) if isinstance(texts, Mapping) else {}
    items = named.values() if named else [texts] if isinstance(texts, str | Path) else list(texts)
    for item in (*items, *named):
        if not isinstance(item, str | Path) or not str(item):
            raise refuse("texts", item, wanted, EvaluationError)
    if isinstance(texts, Mapping):
        return named
    return {str(item) if str(item) in CORPORA else Path(item).stem: item for item in items}


def load_corpus(source: str | Path) -> str:
    """Return the text of a known corpus, of a local file, or ``source`` itself where it holds a line break or a blank.

    Raises:
        UnknownNameError: neither a known corpus nor a file.
        EvaluationError: the data set cannot be loaded.
    """
    if isinstance(source, str) and source in CORPORA:
        return _from_hub(**CORPORA[source])
    path = Path(source)
    if isinstance(source, str) and path.suffix not in _FILES and (" " in source or "\n" in source):
        return source
    if not path.is_file():
        raise UnknownNameError("corpus", str(source), CORPORA)
    return read_text(path)


def _from_hub(field: str, **where: Any) -> str:
    try:
        import datasets
    except ImportError as error:
        raise EvaluationError(
            "the package `datasets` is not installed",
            where=where["path"],
            remedy="pip install 'fxprune[eval]', or give a local text file",
        ) from error
    try:
        rows = datasets.load_dataset(**where)
    except Exception as error:  # the network, the hub and the loader of the data set raise what they like
        raise EvaluationError(
            f"cannot be loaded: {type(error).__name__}: {error}",
            where=where["path"],
            remedy="Check the connection, or give a local text file",
        ) from error
    return "\n\n".join(rows[field])


_RUNS = "Pass a language model that takes input_ids, and the tokenizer that belongs to it"

_LARGEST = 700.0
"""Nats: exp of more than 709 is more than a float holds."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was taken.

    Args:
        value: exp of the mean next-token cross-entropy.
        standard_error: of ``value``, from the spread of the mean cross-entropy over windows.
        window: tokens the model sees at once.
        stride: tokens from the start of one window to the next; each window predicts what none before it did.
        windows: how many were measured.
        predicted: tokens predicted.
    """

    value: float
    standard_error: float
    window: int
    stride: int
    windows: int
    predicted: int


@clear_errors("perplexity", _RUNS, EvaluationError)
def text_perplexity(
    model: Callable[..., Any],
    tokenizer: Any,
    text: str,
    *,
    window: int = 256,
    stride: int | None = None,
    limit: int | None = None,
    batch: int = 4,
    track: Track = no_progress,
) -> Perplexity:
    """Return the perplexity of a text as one run of tokens.

    Args:
        model: as for :func:`perplexity`.
        tokenizer: turns text into ids; no special tokens are added.
        text: what to predict; what is left after the last whole window is dropped.
        window: tokens of a window.
        stride: tokens between the starts of two windows; None for ``window``, so that windows do not overlap.
        limit: the most windows, taken at even distances through the text; None for all.
        batch: windows in one call.
        track: shows progress, as ``track(items, what, total)``.

    Raises:
        EvaluationError: the text is shorter than one window, or a number is out of range.
    """
    stride = window if stride is None else stride
    function("tokenizer", tokenizer, "the tokenizer of the model", EvaluationError)
    instance("text", text, str, "the text itself", EvaluationError)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    windows, first = sliding_windows(ids, window, stride, limit)
    sums = _loss_sums(model, windows, first, batch, track)
    counts = (window - first).double()
    value = _exp(float(sums.sum() / counts.sum()))
    return Perplexity(value, value * _ratio_error(sums, counts), window, stride, len(windows), int(counts.sum()))


def sliding_windows(ids: Tensor, window: int, stride: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Cut a run of tokens into windows, and say from which position on each predicts.

    Args:
        ids: token ids ``(tokens,)``.
        window: tokens of a window, at least two.
        stride: from one start to the next, 1 to ``window``.
        limit: the most windows, at even distances; None for all.

    Returns:
        Windows ``(windows, window)`` and positions ``(windows,)``. The first window of a text predicts all its tokens
        but the first; a later one those that the window before it did not reach.

    Raises:
        EvaluationError: nothing would be predicted.
    """
    window, stride = _size("window", window), _size("stride", stride)
    limit = None if limit is None else _size("limit", limit)
    if window < 2 or not 1 <= stride <= window or (limit is not None and limit < 1):
        raise EvaluationError(
            f"window={window}, stride={stride}, limit={limit}",
            where="perplexity",
            remedy="Give a window of 2 tokens or more, a stride of 1 to window, and a positive limit",
        )
    if len(ids) < window:
        raise EvaluationError(
            f"a text of {len(ids)} tokens holds no window of {window}",
            where="perplexity",
            remedy="Give a longer text or a shorter window",
        )
    found = ids.unfold(0, window, stride)
    first = torch.full((len(found),), max(1, window - stride))
    first[0] = 1
    if limit is not None and limit < len(found):
        chosen = torch.linspace(0, len(found) - 1, limit).long()
        return found[chosen], first[chosen]
    return found, first


@clear_errors("perplexity", _RUNS, EvaluationError)
def perplexity(
    model: Callable[..., Any],
    ids: torch.Tensor,
    batch: int = 4,
    *,
    track: Track = no_progress,
) -> float:
    """Return exp of the mean next-token cross-entropy over all windows.

    Windows are independent: stride equals length, and each predicts all its tokens but the first. Sums are
    kept in float64, logits are widened to float32.

    Args:
        model: a Hugging Face model, a GraphModule or any callable that takes ``input_ids=`` and returns logits
            ``(batch, tokens, vocabulary)``, alone, first in a tuple, or as ``.logits``. Modules run in
            evaluation mode and get their mode back; a GraphModule keeps the mode that it was traced in.
        ids: token ids ``(windows, tokens)``, with at least two tokens a window.
        batch: windows in one call; the last call may have fewer.
        track: shows progress, as ``track(items, what, total)``.

    Raises:
        EvaluationError: there is nothing to predict, or the model returned something without logits.
    """
    wanted = "token ids (windows, tokens), integers with two tokens a window or more"
    instance("ids", ids, Tensor, wanted, EvaluationError)
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_meta or not len(ids):
        raise EvaluationError(f"ids are {told(ids)}", where="ids", remedy=f"Pass {wanted}")
    if ids.shape[1] < 2:
        raise EvaluationError(f"{told(ids)} holds no next token", where="ids", remedy=f"Pass {wanted}")
    sums = _loss_sums(model, ids, torch.ones(len(ids), dtype=torch.long), batch, track)
    return _exp(float(sums.sum()) / (ids.shape[0] * (ids.shape[1] - 1)))


def _size(name: str, value: Any) -> int:
    return whole_number(name, value, least=1, error=EvaluationError)


def _exp(mean: float) -> float:
    """Return the perplexity of a mean cross-entropy in nats.

    Raises:
        EvaluationError: it is no number.
    """
    if math.isnan(mean):
        raise EvaluationError(
            "the loss is NaN", where="model", remedy="Check its weights for values that are not finite"
        )
    return math.exp(mean) if mean < _LARGEST else math.inf


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returned: an object with ``.logits``, a mapping, a tuple or the tensor itself.

    Raises:
        EvaluationError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    found: Any = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise EvaluationError(
            f"there are no logits in {told(output)}",
            where="what the model returns",
            remedy="Let it return a tensor, a tuple or an object with .logits",
        )
    return found


def _loss_sums(model: Callable[..., Any], ids: Tensor, first: Tensor, batch: int, track: Track) -> Tensor:
    """Return sums of next-token cross-entropies in nats, ``(windows,)``, over positions from ``first`` on.

    Several processes share the windows; all of them have to call.
    """
    if isinstance(model, type) or not callable(model):
        raise EvaluationError(f"model is {told(model)}", where="model", remedy=_RUNS)
    batch = _size("batch", batch)
    device = _device_of(model)
    parts = list(zip(ids.split(batch), first.split(batch), strict=True))
    sums = [torch.zeros(len(start), dtype=torch.double, device=device) for _, start in parts]
    shown = nullcontext() if track is not no_progress else unprinted()
    own = turns(len(parts))
    sharded = isinstance(model, nn.Module) and is_sharded(model)  # what gathers weights counts their versions
    with torch.no_grad() if sharded else torch.inference_mode(), _evaluation(model), shown:
        chunks = [parts[turn % len(parts)][0].to(device) for turn in own]
        for turn, chunk, output in zip(own, chunks, _outputs(model, chunks, track), strict=True):
            found = _window_sums(logits_of(output), chunk, parts[turn % len(parts)][1])
            if turn < len(parts):
                sums[turn] = found.to(device)
    together = torch.cat(sums)
    add_up([together])
    return together.cpu()


def _outputs(model: Any, chunks: Sequence[Tensor], track: Track) -> Iterator[Any]:
    """Yield what a model returns for each batch of windows."""
    if isinstance(model, InBlocks):
        yield from model.outputs(chunks, lambda steps, total: track(steps, "perplexity", total))
        return
    options = {"use_cache": False} if isinstance(model, PreTrainedModel) else {}
    for chunk in track(chunks, "perplexity", len(chunks)):
        yield model(input_ids=chunk, **options)


def _window_sums(logits: Tensor, ids: Tensor, first: Tensor) -> Tensor:
    predicted = logits[:, :-1].float().flatten(0, 1)
    losses = nn.functional.cross_entropy(predicted, ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    counted = torch.arange(1, ids.shape[1])[None] >= first[:, None]
    return (losses.double() * counted.to(losses.device)).sum(dim=1)


def _ratio_error(sums: Tensor, counts: Tensor) -> float:
    """Return the standard error of ``sum(sums) / sum(counts)``; 0 where one window leaves it unknown.

    Source: Cochran, Sampling Techniques (1977), equation 6.13, without the finite population correction.
    """
    number = len(sums)
    if number < 2:
        return 0.0
    rest = sums - counts * (sums.sum() / counts.sum())
    return float((rest.square().sum() / (number * (number - 1))).sqrt() / counts.mean())


def _device_of(model: Callable[..., Any]) -> torch.device | None:
    """Return where ids go; None where that cannot be told, and they stay where they are."""
    if isinstance(model, InBlocks):
        return model.device
    return input_device(model) if isinstance(model, nn.Module) else None


@contextmanager
def _evaluation(model: Callable[..., Any]) -> Iterator[None]:
    """Keep a module in evaluation mode for a while; leave a graph, which has one mode only, as it is."""
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule) or not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
