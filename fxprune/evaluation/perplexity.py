"""Perplexity on windows of tokens, on the paper's corpora or on files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn

from fxprune.data.rows import load_split
from fxprune.data.text import read_text
from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.graph.context import eval_mode, silence_stderr, wrap_errors
from fxprune.masking.parts import PartwiseModel
from fxprune.offload.ranks import all_reduce, input_device, is_sharded, shard_indices
from fxprune.pipeline.arguments import format_value, function, instance, refuse, whole_number
from fxprune.pipeline.contract import Track, no_progress

__all__ = ["CORPORA", "Perplexity", "load_corpus", "logits_of", "named_corpora", "perplexity", "text_perplexity"]

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
"""Data sets by name, in the splits that the paper uses; the hub's Parquet copy if the original is a script."""

_FILES = (".txt", ".jsonl", ".json")


def named_corpora(texts: str | Path | Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str | Path]:
    """Texts by name: names in :data:`CORPORA` and paths, or a mapping to these or to text itself."""
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
    """Load the text of a known corpus or a local file; a source with a blank or line break is the text itself."""
    if isinstance(source, str) and source in CORPORA:
        options = dict(CORPORA[source])
        field = options.pop("field")
        return "\n\n".join(load_split(**options)[field])
    path = Path(source)
    if isinstance(source, str) and path.suffix not in _FILES and (" " in source or "\n" in source):
        return source
    if not path.is_file():
        raise UnknownNameError("corpus", str(source), CORPORA)
    return read_text(path)


_REMEDY = "Pass a language model that takes input_ids, and its own tokenizer"

_LARGEST = 700.0
"""Nats: exp(710) overflows a float."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and its protocol.

    Args:
        value: exp of the mean next-token cross-entropy.
        standard_error: standard error of ``value``, from the spread of the mean cross-entropy over windows.
        window: tokens that the model sees at once.
        stride: tokens between the starts of two windows; each window predicts the tokens after those of the last one.
    """

    value: float
    standard_error: float
    window: int
    stride: int
    windows: int
    predicted: int


@wrap_errors("perplexity", _REMEDY, EvaluationError)
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
    """Perplexity of a text.

    Args:
        model: as for :func:`perplexity`.
        window: tokens per window.
        stride: tokens between the starts of two windows; None for ``window``, so that windows do not overlap.
        limit: most windows, evenly spaced over the text; None for all.
    """
    stride = window if stride is None else stride
    function("tokenizer", tokenizer, "the tokenizer of the model", EvaluationError)
    instance("text", text, str, "the text itself", EvaluationError)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    windows, first = sliding_windows(ids, window, stride, limit)
    sums = _loss_sums(model, windows, first, batch, track)
    counts = (window - first).double()
    mean = sums.sum() / counts.sum()
    value, number, error = _exp(float(mean)), len(sums), 0.0
    if number > 1:  # of a ratio: Cochran, Sampling Techniques (1977), equation 6.13, for an infinite population
        rest = sums - counts * mean
        error = float((rest.square().sum() / (number * (number - 1))).sqrt() / counts.mean())
    return Perplexity(value, value * error, window, stride, number, int(counts.sum()))


def sliding_windows(ids: Tensor, window: int, stride: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Cut token ids ``(tokens,)`` into overlapping windows, with the first position that each predicts.

    The first window predicts all its tokens except the first; a later one predicts the tokens after the end of the
    window before it. At most ``limit`` windows are taken, evenly spaced.

    Returns:
        Windows ``(windows, window)`` and positions ``(windows,)``.
    """
    window = whole_number("window", window, least=2, error=EvaluationError)
    stride = whole_number("stride", stride, least=1, most=window, error=EvaluationError)
    if limit is not None:
        limit = whole_number("limit", limit, least=1, error=EvaluationError)
    if len(ids) < window:
        what = f"a text of {len(ids)} tokens holds no window of {window}"
        raise EvaluationError(what, where="perplexity", remedy="Give a longer text or a shorter window")
    found = ids.unfold(0, window, stride)
    first = torch.full((len(found),), max(1, window - stride))
    first[0] = 1
    if limit is not None and limit < len(found):
        chosen = torch.linspace(0, len(found) - 1, limit).long()
        return found[chosen], first[chosen]
    return found, first


@wrap_errors("perplexity", _REMEDY, EvaluationError)
def perplexity(model: Callable[..., Any], ids: torch.Tensor, batch: int = 4, *, track: Track = no_progress) -> float:
    """Perplexity over independent windows: exp of the mean next-token cross-entropy.

    Each window predicts all its tokens except the first. Logits are widened to float32 and summed in float64.

    Args:
        model: a Hugging Face model, a GraphModule or any callable that takes ``input_ids=`` and returns logits
            ``(batch, tokens, vocabulary)``, alone, first in a tuple, or as ``.logits``. Modules run in
            evaluation mode, which is restored; a GraphModule keeps the mode that it was traced in.
        ids: token ids ``(windows, tokens)``, at least two tokens per window.
    """
    wanted = "token ids (windows, tokens), integers with at least two tokens per window"
    instance("ids", ids, Tensor, wanted, EvaluationError)
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_meta or not len(ids):
        raise EvaluationError(f"ids are {format_value(ids)}", where="ids", remedy=f"Pass {wanted}")
    if ids.shape[1] < 2:
        raise EvaluationError(f"{format_value(ids)} has no next token", where="ids", remedy=f"Pass {wanted}")
    sums = _loss_sums(model, ids, torch.ones(len(ids), dtype=torch.long), batch, track)
    return _exp(float(sums.sum()) / (ids.shape[0] * (ids.shape[1] - 1)))


def _exp(mean: float) -> float:
    """Perplexity of a mean cross-entropy in nats."""
    if math.isnan(mean):
        remedy = "Check its weights for values that are not finite"
        raise EvaluationError("the loss is NaN", where="model", remedy=remedy)
    return math.exp(mean) if mean < _LARGEST else math.inf


def logits_of(output: Any) -> Tensor:
    """Logits in the output of a model: an object with ``.logits``, a mapping, a tuple or the tensor itself."""
    if isinstance(output, Tensor):
        return output
    found: Any = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        what = f"there are no logits in {format_value(output)}"
        remedy = "Let it return a tensor, a tuple or an object with .logits"
        raise EvaluationError(what, where="output of the model", remedy=remedy)
    return found


def _loss_sums(model: Callable[..., Any], ids: Tensor, first: Tensor, batch: int, track: Track) -> Tensor:
    """Sums of next-token cross-entropies in nats, ``(windows,)``, over positions from ``first`` on.

    Several processes share the windows; all of them must call this function.
    """
    if isinstance(model, type) or not callable(model):
        raise EvaluationError(f"model is {format_value(model)}", where="model", remedy=_REMEDY)
    batch = whole_number("batch", batch, least=1, error=EvaluationError)
    device = None  # ids stay where they are, unless the model is a module
    if isinstance(model, PartwiseModel | nn.Module):
        device = model.device if isinstance(model, PartwiseModel) else input_device(model)
    parts = list(zip(ids.split(batch), first.split(batch), strict=True))
    sums = [torch.zeros(len(start), dtype=torch.double, device=device) for _, start in parts]
    output_shown = nullcontext() if track is not no_progress else silence_stderr()
    shares = shard_indices(len(parts))
    # gathering sharded weights needs version counters, which tensors made in inference mode do not have
    sharded = isinstance(model, nn.Module) and is_sharded(model)
    mode: AbstractContextManager[None] = nullcontext()  # of graphs too, which keep the mode that they were traced in
    if isinstance(model, nn.Module) and not isinstance(model, fx.GraphModule) and model.training:
        mode = eval_mode(model)
    with torch.no_grad() if sharded else torch.inference_mode(), mode, output_shown:
        chunks = [parts[turn % len(parts)][0].to(device) for turn in shares]
        for turn, chunk, output in zip(shares, chunks, _outputs(model, chunks, track), strict=True):
            logits = logits_of(output)[:, :-1].float().flatten(0, 1)
            losses = nn.functional.cross_entropy(logits, chunk[:, 1:].flatten(), reduction="none").view(len(chunk), -1)
            start = parts[turn % len(parts)][1]
            counted = torch.arange(1, chunk.shape[1])[None] >= start[:, None]
            if turn < len(parts):
                sums[turn] = (losses.double() * counted.to(losses.device)).sum(dim=1).to(device)
    together = torch.cat(sums)
    all_reduce([together])
    return together.cpu()


def _outputs(model: Any, chunks: Sequence[Tensor], track: Track) -> Iterator[Any]:
    if isinstance(model, PartwiseModel):
        yield from model.outputs(chunks, lambda steps, total: track(steps, "perplexity", total))
        return
    options = {"use_cache": False} if isinstance(model, transformers.PreTrainedModel) else {}
    for chunk in track(chunks, "perplexity", len(chunks)):
        yield model(input_ids=chunk, **options)
