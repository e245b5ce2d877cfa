"""Perplexity on windows of tokens, on the paper's corpora or on files, and divergence from a reference model."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn

from fxprune.data.calibration import most_positions
from fxprune.data.named import CORPORA, ROW_SUFFIXES, is_data_set, load_named, unused_name
from fxprune.data.text import calibration_text, is_text, opening_tokens, read_text, unknown_token, unseen
from fxprune.errors import EvaluationError, FxpruneError, PositionsError, UnknownNameError
from fxprune.graph.context import attempt, eval_mode, silence_stderr, wrap_errors
from fxprune.masking.parts import PartwiseModel
from fxprune.offload.ranks import all_reduce, input_device, is_sharded, shard_indices
from fxprune.pipeline.arguments import format_value, function, instance, refuse, whole_number
from fxprune.pipeline.contract import Track, no_progress
from fxprune.vocabulary.alignment import Offsets, align, common_ids, has_other_tokens


def named_corpora(texts: Any) -> dict[str, Any]:
    """Texts by name: names of data sets and paths; a data set; or a mapping to these, to text itself, or to lists."""
    wanted = "names of data sets, paths of files, or a mapping from names to these or to text itself"
    if isinstance(texts, bytes) or not isinstance(texts, str | Path | Iterable):
        raise refuse("texts", texts, wanted, EvaluationError)
    if isinstance(texts, Mapping):
        for name, source in texts.items():
            if not isinstance(name, str) or not name or not (is_text(source) and str(source)):
                raise refuse("texts", source if isinstance(name, str) and name else name, wanted, EvaluationError)
        return dict(texts)
    rows = isinstance(texts, Sequence) and len(texts) and isinstance(texts[0], Mapping | list | tuple)
    if (rows or hasattr(texts, "column_names")) and is_text(texts):
        return {"text": texts}
    found: dict[str, Any] = {}
    for item in [texts] if isinstance(texts, str | Path) else texts:
        if not isinstance(item, str | Path) or not str(item):
            raise refuse("texts", item, wanted, EvaluationError)
        name = str(item) if is_data_set(item) else "text" if _is_text_itself(item) else Path(item).stem
        found[unused_name(name, found)] = item
    return found


def load_corpus(source: Any) -> str:
    """Load the text of a data set in the split that papers evaluate on, of a local file, or of a list.

    A source with a blank or line break is the text itself.
    """
    if is_data_set(source):
        return calibration_text(load_named(source, held_out=True))
    if not isinstance(source, str | Path):
        return calibration_text(source)
    if _is_text_itself(source):
        return str(source)
    path = Path(source)
    if not os.path.isfile(path):
        is_path = path.suffix or path.name != str(source)
        why = "it is a folder" if os.path.isdir(path) else "there is no such file" if is_path else ""
        raise UnknownNameError("corpus", str(source), CORPORA, why=why)
    return read_text(path) if path.suffix in ROW_SUFFIXES else calibration_text(path)


def _is_text_itself(source: str | Path) -> bool:
    """Whether a source is neither a path nor a name: it has a blank or a line break, and nothing is called so."""
    has_breaks = isinstance(source, str) and (" " in source or "\n" in source)
    return has_breaks and Path(source).suffix not in ROW_SUFFIXES and not os.path.exists(source)


_REMEDY = "Pass a language model that takes input_ids, and its own tokenizer"

_WIDENED = 2**25
"""Logits that are widened to float32 at once: with a large vocabulary those of a long window take gigabytes."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and its protocol.

    Beside a reference model with other tokens, it is that of the same text for each token of the reference, so that
    both compare; so is ``predicted``.

    Args:
        value: exp of the mean next-token cross-entropy.
        standard_error: standard error of ``value``, from the spread of the mean cross-entropy over windows.
        window: tokens that the model sees at once.
        stride: tokens between the starts of two windows; each window predicts the tokens after those of the last one.
        losses: cross-entropy of each window in nats, summed over the tokens that it predicts; for paired comparison.
    """

    value: float
    standard_error: float
    window: int
    stride: int
    windows: int
    predicted: int
    bits_per_byte: float = 0.0
    bits_per_byte_error: float = 0.0
    divergence: Divergence | None = None
    losses: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Divergence:
    """Distance of a model's predictions from those of a reference model, on the same windows.

    Standard errors are over windows, since tokens of one window are not independent. If the reference has other tokens,
    predictions are compared where a token of each ends, over the tokens that both have.

    Args:
        mean: mean Kullback-Leibler divergence KL(reference || model) of the next token, in nats.
        mean_error: its standard error.
        percentile_99: its 99th percentile over tokens, in nats.
        agreement: fraction of tokens for which both models rank the same token first.
        agreement_error: its standard error.
        ratio: perplexity over that of the reference.
        ratio_error: its standard error, from differences window by window.
        acceptance: probability that speculative decoding accepts a token that the model drafts for the reference: the
            mean over tokens of the sum of the smaller probabilities. Source: Leviathan, Kalman, Matias, "Fast Inference
            from Transformers via Speculative Decoding" (arXiv 2211.17192), theorem 3.5. None in older figures.
        acceptance_error: its standard error.
    """

    mean: float
    mean_error: float
    percentile_99: float
    agreement: float
    agreement_error: float
    ratio: float
    ratio_error: float
    acceptance: float | None = None
    acceptance_error: float | None = None


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
    reference: Callable[..., Any] | None = None,
    reference_tokenizer: Any = None,
    track: Track = no_progress,
) -> Perplexity:
    """Perplexity of a text, in bits per byte too, and the divergence from a reference model.

    Each window begins with the tokens that the tokenizer puts before a text, such as a beginning-of-sequence token;
    they are not predicted.

    Args:
        model: as for :func:`perplexity`.
        window: tokens per window, with those before a text.
        stride: tokens between the starts of two windows; None for as many as a window has of the text, so that windows
            do not overlap.
        limit: most windows, evenly spaced over the text; None for all.
        reference: a model to compare the predictions with, usually the dense one.
        reference_tokenizer: its tokenizer; None for the same one.
    """
    options: dict[str, Any] = {"window": window, "stride": stride, "limit": limit, "batch": batch, "track": track}
    options["reference_tokenizer"] = reference_tokenizer
    return paired_perplexities(model, reference, tokenizer, text, **options)[1]


@wrap_errors("perplexity", _REMEDY, EvaluationError)
def paired_perplexities(
    model: Callable[..., Any],
    reference: Callable[..., Any] | None,
    tokenizer: Any,
    text: str,
    *,
    window: int = 256,
    stride: int | None = None,
    limit: int | None = None,
    batch: int = 4,
    seen: Sequence[Tensor] = (),
    reference_tokenizer: Any = None,
    track: Track = no_progress,
) -> tuple[Perplexity, Perplexity]:
    """Perplexities of a text for a reference model and for another one, which run over it once.

    That of the reference has no meaning if there is none; that of ``model`` has its divergence. Windows that share a
    run of :data:`fxprune.data.text.RUN` tokens with a sample of token ids in ``seen`` are left out. All else is as for
    :func:`text_perplexity`.
    """
    function("tokenizer", tokenizer, "the tokenizer of the model", EvaluationError)
    instance("text", text, str, "the text itself", EvaluationError)
    opening = opening_tokens(tokenizer)
    ids, offsets = _encode(tokenizer, text)
    sizes = itertools.accumulate((len(character.encode("utf-8", "surrogatepass")) for character in text), initial=0)
    size = torch.tensor(list(sizes))[[0, *(end for _, end in offsets)]]
    places, first = sliding_windows(torch.arange(len(ids)), window, stride, None if seen else limit, len(opening))
    if seen:
        # in an order of its own for each text, so that prunes that used other samples share most windows
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
        chosen = order[unseen(ids[places], seen)[order]][:limit].sort().values
        if not len(chosen):
            what = "all of the text was used already"
            raise EvaluationError(what, where="text", remedy="Give a text that no sample was taken from")
        places, first = places[chosen], first[chosen]
    windows = torch.cat([torch.tensor(opening, dtype=torch.long).expand(len(places), -1), ids[places]], dim=1)
    counts = window - first
    start = places.gather(1, (first - len(opening))[:, None]).flatten()
    stop = places[:, -1] + 1
    aligned, words = None, reference_tokenizer
    others = reference is not None and words is not None and has_other_tokens(tokenizer, words)
    if others:
        aligned = _align_windows(places, start, len(opening), text, offsets, tokenizer, words)
        counts = torch.stack([each.theirs[-1] - each.theirs[0] for each in aligned])
        start, stop = (torch.stack([each.ours[end] for each in aligned]) + stop - window for end in (0, -1))
    padded = words is not None and not others
    sums, apart = _measure_windows(model, windows, first, batch, reference, track, aligned, padded=padded)
    counts, read = counts.double(), (size[stop] - size[start]).double()
    step = window - len(opening) if stride is None else stride

    def of(losses: Tensor, divergence: Divergence | None) -> Perplexity:
        mean, error = _ratio_of_sums(losses, counts)
        bits, bits_error = _ratio_of_sums(losses / math.log(2), read)
        value, sizes = _exp(mean), (window, step, len(windows), int(counts.sum()))
        return Perplexity(value, value * error, *sizes, bits, bits_error, divergence, tuple(losses.tolist()))

    divergence = None if reference is None else _divergence_of(sums, apart, counts)
    return of(sums[1], None), of(sums[0], divergence)


def _encode(tokenizer: Any, text: str) -> tuple[Tensor, Sequence[Offsets]]:
    """Token ids of a text ``(tokens,)``, and the place of each."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        ids, offsets = found["input_ids"], found["offset_mapping"]
    else:  # tokenizers in Python know no offsets: the text is shared out evenly
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        offsets = list(itertools.pairwise(len(text) * i // len(ids) for i in range(len(ids) + 1)))
    return torch.tensor(ids, dtype=torch.long), offsets


@dataclass(frozen=True)
class _Aligned:
    """A window of a reference model with other tokens, aligned with one of the model.

    Both models predict the text from the first to the last place of the window where a token of each ends.

    Args:
        ids: of the window for the reference, ``(tokens,)``.
        ours: tokens of the model's window before each of these places.
        theirs: tokens of the reference's window before them.
        common: ids of the tokens that both have, for the model and for the reference.
    """

    ids: Tensor
    ours: Tensor
    theirs: Tensor
    common: tuple[Tensor, Tensor]


def _align_windows(
    places: Tensor, start: Tensor, opening: int, text: str, offsets: Sequence[Offsets], tokenizer: Any, words: Any
) -> list[_Aligned]:
    """The windows of a reference, with the tokenizer ``words``, nearest to those of the model.

    Args:
        places: numbers of the tokens of each window of the model, after ``opening`` ones before the text.
        start: tokens before the first that each predicts.
        offsets: the place of each token in the text.
    """
    theirs, others = _encode(words, text)
    both, begin = align(offsets, others), torch.tensor(opening_tokens(words), dtype=torch.long)
    common = common_ids(tokenizer, words)
    found: list[_Aligned] = []
    for tokens, counted in zip(places, start, strict=True):
        inside = (both.ours >= tokens[0]) & (both.ours <= tokens[-1] + 1)
        ours, other = both.ours[inside], both.theirs[inside]
        used = (ours >= counted) & (other + len(begin) > other[:1])  # the first token is read, not predicted
        ours, after = ours[used], other[used]
        if len(ours) < 2:
            what = "tokens of both models end at no two places of a window"
            raise EvaluationError(what, where="reference", remedy="Give a longer window")
        ids = torch.cat([begin, theirs[other[0] : after[-1]]])
        found.append(_Aligned(ids, ours - tokens[0] + opening, after - other[0] + len(begin), common))
    return found


def _ratio_of_sums(values: Tensor, counts: Tensor) -> tuple[float, float]:
    """Sum of ``values`` over that of ``counts``, and its standard error over windows.

    Source: Cochran, Sampling Techniques (1977), equation 6.13, for an infinite population.
    """
    mean, number = values.sum() / counts.sum(), len(values)
    if number < 2:
        return float(mean), 0.0
    rest = values - counts * mean
    return float(mean), float((rest.square().sum() / (number * (number - 1))).sqrt() / counts.mean())


def sliding_windows(
    ids: Tensor, window: int, stride: int | None, limit: int | None = None, opening: int = 0
) -> tuple[Tensor, Tensor]:
    """Cut token ids ``(tokens,)`` into overlapping windows, with the first position that each predicts.

    The first window predicts all its tokens, without ``opening`` tokens before it all except the first; a later one
    predicts the tokens after the end of the window before it. At most ``limit`` windows are taken, evenly spaced.

    Returns:
        Windows ``(windows, window - opening)``, and positions ``(windows,)`` counted from the first of the opening.
    """
    window = whole_number("window", window, least=max(2, opening + 1), error=EvaluationError)
    body = window - opening
    stride = body if stride is None else whole_number("stride", stride, least=1, most=body, error=EvaluationError)
    if limit is not None:
        limit = whole_number("limit", limit, least=1, error=EvaluationError)
    if len(ids) < body:
        what = f"a text of {len(ids)} tokens holds no window of {window}"
        raise EvaluationError(what, where="perplexity", remedy="Give a longer text or a shorter window")
    found = ids.unfold(0, body, stride)
    first = torch.full((len(found),), max(1, window - stride))
    first[0] = max(1, opening)
    if limit is not None and limit < len(found):
        chosen = torch.linspace(0, len(found) - 1, limit).long()
        found, first = found[chosen], first[chosen]
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
    first = torch.ones(len(ids), dtype=torch.long)
    sums, _ = _measure_windows(model, ids, first, batch, None, track)
    return _exp(float(sums[0].sum()) / (ids.shape[0] * (ids.shape[1] - 1)))


def _exp(mean: float) -> float:
    """Perplexity of a mean cross-entropy in nats."""
    if math.isnan(mean):
        remedy = "Check its weights for values that are not finite"
        raise EvaluationError("the loss is NaN", where="model", remedy=remedy)
    return math.exp(mean) if mean < 700.0 else math.inf  # exp(710) overflows a float


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


def _divergence_of(sums: Tensor, divergences: Tensor, counts: Tensor) -> Divergence:
    """The divergence from the reference model, by :func:`_measure_windows` and the predicted tokens of each window."""
    compared = (~divergences.isnan()).sum(dim=1).double()
    mean, mean_error = _ratio_of_sums(divergences.nansum(dim=1), compared)
    agreement, accepted = (_ratio_of_sums(each, compared) for each in sums[2:])
    lost, lost_error = _ratio_of_sums(sums[0] - sums[1], counts)
    ratio = _exp(lost)
    tokens = divergences[~divergences.isnan()].sort().values
    highest = float(tokens[min(int(0.99 * len(tokens)), len(tokens) - 1)])
    return Divergence(mean, mean_error, highest, *agreement, ratio, ratio * lost_error, *accepted)


def _measure_windows(
    model: Callable[..., Any],
    ids: Tensor,
    first: Tensor,
    batch: int,
    reference: Callable[..., Any] | None,
    track: Track,
    aligned: Sequence[_Aligned] | None = None,
    *,
    padded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums ``(4, windows)`` and divergences ``(windows, window - 1)`` as by :func:`_measure_logits`.

    They are of positions from ``first`` on; with ``aligned``, the reference has other tokens; with ``padded``, it has
    the same, and logits of none behind them may be more or fewer. Several processes share the windows; all of them must
    call this function.
    """
    for name, given in (("model", model), ("reference", reference)):
        if isinstance(given, type) or not (callable(given) or (name == "reference" and given is None)):
            raise EvaluationError(f"{name} is {format_value(given)}", where=name, remedy=_REMEDY)
    batch = 1 if aligned else whole_number("batch", batch, least=1, error=EvaluationError)
    device = None  # ids stay where they are, unless the model is a module
    if isinstance(model, PartwiseModel | nn.Module):
        device = model.device if isinstance(model, PartwiseModel) else input_device(model)
    parts = list(zip(ids.split(batch), first.split(batch), strict=True))
    compared, tokens = reference is not None, ids.shape[1] - 1
    sums = torch.zeros(4, len(ids), dtype=torch.double, device=device)
    divergences = torch.zeros(len(ids) if compared else 0, tokens, dtype=torch.double, device=device)
    shares = shard_indices(len(parts))
    chunks = [parts[turn % len(parts)][0].to(device) for turn in shares]
    largest = [int(given.max()) for given in (ids, torch.cat([one.ids for one in aligned]) if aligned else ids)]
    enough = positions_named((model, reference), ids.shape[1], "window", "Give a shorter $window", largest)
    with contextlib.ExitStack() as modes, enough:
        modules = [each for each in (model, reference) if isinstance(each, nn.Module)]
        # gathering sharded weights needs version counters, which tensors made in inference mode do not have
        modes.enter_context(torch.no_grad() if any(map(is_sharded, modules)) else torch.inference_mode())
        for module in modules:  # a graph keeps the mode that it was traced in
            if module.training and not isinstance(module, fx.GraphModule):
                modes.enter_context(eval_mode(module))
        if track is no_progress:
            modes.enter_context(silence_stderr())
        outputs = _outputs(model, chunks, track)
        read = chunks if aligned is None else [aligned[turn % len(parts)].ids[None].to(device) for turn in shares]
        teachers: Iterator[Any] = iter(()) if reference is None else _outputs(reference, read, no_progress)
        for turn, chunk, output in zip(shares, chunks, outputs, strict=True):
            theirs = next(teachers, None)
            if turn >= len(parts):  # a process with one share less takes part in the collectives
                continue
            counted = torch.arange(1, chunk.shape[1])[None].to(chunk.device) >= parts[turn][1].to(chunk.device)[:, None]
            rows = slice(turn * batch, turn * batch + len(chunk))
            places = None if aligned is None else aligned[turn]
            found, apart = _measure_outputs(output, theirs, chunk, counted, places, padded=padded)
            sums[:, rows] = found.to(device)
            if compared:
                divergences[rows] = apart.to(device)
    all_reduce([sums, divergences] if compared else [sums])
    return sums.cpu(), divergences.cpu()


@contextlib.contextmanager
def positions_named(
    models: Sequence[Any], tokens: int, where: str, remedy: str, largest: Sequence[int]
) -> Iterator[None]:
    """Explain an error of models that run on more tokens than one has positions, or on tokens that one does not know.

    ``largest`` is the largest token id that each of them is given.
    """
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, FxpruneError | torch.OutOfMemoryError):
            raise
        for model, token in zip(models, largest, strict=True):
            table: Any = (
                attempt(model.get_input_embeddings) if isinstance(model, transformers.PreTrainedModel) else None
            )
            if hasattr(table, "weight") and token >= (rows := len(table.weight)):
                raise unknown_token(token, rows) from error
        most = min((number for number in map(most_positions, models) if number), default=tokens)
        if tokens <= most:
            raise
        what = f"{tokens} tokens at once, and the model has {most} positions"
        raise PositionsError(what, where=where, remedy=remedy) from error


def _measure_outputs(
    output: Any, theirs: Any, ids: Tensor, counted: Tensor, aligned: _Aligned | None, *, padded: bool
) -> tuple[Tensor, Tensor]:
    """Sums and divergences as by :func:`_measure_logits`, from the outputs of a model and of a reference or None."""
    logits, target = logits_of(output)[:, :-1], ids[:, 1:]
    if theirs is None:
        return _measure_logits(logits, None, target, counted)
    expected = logits_of(theirs)[:, :-1].to(logits.device)
    if aligned is None:
        if expected.shape[:2] != logits.shape[:2] or not (padded or expected.shape == logits.shape):
            what = f"its logits are of shape {tuple(expected.shape)}, and those of the model of {tuple(logits.shape)}"
            remedy = "Compare models that have the same tokens, or give the tokenizer of the reference, too"
            raise EvaluationError(what, where="reference", remedy=remedy)
        return _measure_logits(logits, expected, target, counted)
    places, others = (each.to(logits.device) for each in (aligned.ours, aligned.theirs))
    ours, theirs = (each.to(logits.device) for each in aligned.common)
    sums, apart = _measure_logits(logits, None, target, _between(places, logits))
    row = aligned.ids.to(logits.device)[None]
    sums[1] = _measure_logits(expected, None, row[:, 1:], _between(others, expected))[0][0]
    size = max(1, _WIDENED // len(ours))
    for here, there in zip((places[:-1] - 1).split(size), (others[:-1] - 1).split(size), strict=True):
        found, wanted = logits[:, here].float()[..., ours], expected[:, there].float()[..., theirs]
        sums[2] += (found.argmax(-1) == wanted.argmax(-1)).double().sum(dim=1)
        divergences, accepted = _divergences(found, wanted)
        sums[3] += accepted.sum(dim=1)
        apart[:, here] = divergences
    return sums, apart


def _measure_logits(logits: Tensor, expected: Tensor | None, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sums ``(4, windows)`` of each window and divergences ``(windows, tokens)``, NaN at tokens that are not predicted.

    The sums are the losses of a model and of the reference in nats, the tokens that both rank first, and those accepted
    as a draft; without a reference only the first is known.

    Args:
        logits: ``(windows, tokens, vocabulary)``; ``expected`` are those of the reference. Where one has more at the
            end, they are compared over those that both have.
        target: next tokens ``(windows, tokens)``; ``counted`` are those of them that are predicted.
    """
    sums = torch.zeros(4, len(target), dtype=torch.double, device=logits.device)
    apart = torch.full(target.shape, math.nan, dtype=torch.double, device=logits.device)
    positions = max(1, _WIDENED // (len(target) * logits.shape[-1]))
    for part in (slice(start, start + positions) for start in range(0, target.shape[1], positions)):
        ours = logits[:, part].float()
        sums[0] += _cross_entropies(ours, target[:, part], counted[:, part])
        if expected is not None:
            wanted = expected[:, part].float()
            sums[1] += _cross_entropies(wanted, target[:, part], counted[:, part])
            shared = min(ours.shape[-1], wanted.shape[-1])
            ours, wanted = ours[..., :shared], wanted[..., :shared]
            sums[2] += ((ours.argmax(-1) == wanted.argmax(-1)) & counted[:, part]).double().sum(dim=1)
            divergences, accepted = _divergences(ours, wanted)
            sums[3] += (accepted * counted[:, part]).sum(dim=1)
            apart[:, part] = divergences.masked_fill(~counted[:, part], math.nan)
    return sums, apart


def _between(places: Tensor, logits: Tensor) -> Tensor:
    """Mask of the next tokens ``(1, tokens)`` between the first and the last of some places in a window."""
    numbers = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    return ((numbers >= places[0]) & (numbers < places[-1]))[None]


def _divergences(logits: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Divergences in nats, and sums of the smaller probabilities, ``(windows, tokens)`` each."""
    wanted, found = expected.log_softmax(-1), logits.log_softmax(-1)
    apart = (wanted.exp() * (wanted - found)).sum(-1).clamp(min=0)
    return apart.double(), torch.minimum(wanted, found).exp().sum(-1).double()


def _cross_entropies(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Sums of the next-token cross-entropies in nats of each window, over the positions that are counted."""
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return (losses.view_as(target).double() * counted).sum(dim=1)


def _outputs(model: Any, chunks: Sequence[Tensor], track: Track) -> Iterator[Any]:
    if isinstance(model, PartwiseModel):
        yield from model.outputs(chunks, lambda steps, total: track(steps, "perplexity", total))
        return
    options = {"use_cache": False} if isinstance(model, transformers.PreTrainedModel) else {}
    for chunk in track(chunks, "perplexity", len(chunks)):
        yield model(input_ids=chunk, **options)
