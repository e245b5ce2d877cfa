"""The kind ``vocab`` of a prune: rows of the vocabulary go first, then units of the other kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fxprune.data.built_in import built_in_text, general_chats
from fxprune.data.samples import FileSamples, token_rows
from fxprune.data.text import TOKENS, calibration_text, is_text, opening_tokens, text_samples
from fxprune.errors import ArgumentError
from fxprune.pipeline.arguments import VOCAB, named_kinds, number
from fxprune.removal.target import DEFAULT_RATIO, Reached, amount_below, parse_target
from fxprune.report.report import Report
from fxprune.trace.inputs import is_hugging_face
from fxprune.vocabulary.model import find_rows
from fxprune.vocabulary.prune import PrunedVocabulary, measure_use, size_after, text_ids, trim
from fxprune.vocabulary.tokenizer import check_kind

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def without_vocab(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the other kinds; those of kinds are None where there are no others."""
    found = dict(values)
    if values["kinds"] is not None:
        found["kinds"] = tuple(kind for kind in named_kinds({"kinds": values["kinds"]}) if kind != VOCAB) or None
    for name, none in (("ratio", None), ("round_to", 1)):
        if isinstance(values[name], Mapping):
            found[name] = {kind: value for kind, value in values[name].items() if kind != VOCAB} or none
    return found


def has_others(values: Mapping[str, Any]) -> bool:
    """Whether options name other kinds beside the vocabulary."""
    return any(kind != VOCAB for kind in named_kinds(values))


def check_alone(values: Mapping[str, Any]) -> None:
    """Refuse options that the kind ``vocab`` cannot be combined with."""
    for name, why in (
        ("inplace", "the vocabulary is cut in a copy"),
        ("offload", "the vocabulary is cut in memory"),
        ("group_ratio", "a vocabulary has no groups"),
        ("scores", "they are for the dense model"),
    ):
        if values.get(name):
            raise _refused(name, f"it cannot be given with the kind vocab: {why}")
    target = values.get("target")
    quantities = {"budget": values["budget"], "target": "params" if target is None else parse_target(target).budget}
    for name, quantity in quantities.items():
        if quantity != "params":
            what = f"{values[name]!r} cannot be given with the kind vocab, which is sized in parameters"
            raise _refused(name, what)
    if values["compensate"] not in (None, "none") and not has_others(values):
        raise _refused("compensate", "only rows of the vocabulary go, for which no other weight can compensate")


def reach(model: nn.Module, target: str) -> Reached:
    """The parameters that a target asks for, as reached by the dense model."""
    dense, word = sum(parameter.numel() for parameter in model.parameters()), "parameters"
    return Reached(target, word, amount_below(target, parse_target(target), dense, word), dense, dense)


def check_parts(model: Any, tokenizer: Any) -> None:
    """Refuse a model or a tokenizer whose vocabulary cannot be pruned."""
    if not is_hugging_face(model):
        raise _refused("kinds", f"{type(model).__name__} is no Hugging Face model, whose vocabulary is known")
    if tokenizer is None:
        raise _refused("tokenizer", "it is needed for the kind vocab, and there is none", "Pass that of the model")
    check_kind(tokenizer)


def _refused(name: str, what: str, remedy: str = "") -> ArgumentError:
    remedy = remedy or f"Leave ${name} or the kind vocab out"
    return ArgumentError(what, where=name, remedy=remedy, argument=name)


def trim_first(
    model: PreTrainedModel, calibration: Any, values: Mapping[str, Any]
) -> tuple[PrunedVocabulary, dict[str, Any] | None]:
    """The model with the rows that stay, and the options of the prune of its other kinds; None if no other units go.

    With one ratio for all kinds, tokens that the calibration text does not use go first, as far as the ratio allows,
    and the other kinds make up for the rest; the vocabulary alone goes on with the tokens used least. A ratio of its
    own is a fraction of the parameters in rows.
    """
    tokenizer, ratio, step = values["tokenizer"], values["ratio"], values["round_to"]
    step = step.get(VOCAB, 1) if isinstance(step, Mapping) else step
    others, total = has_others(values), find_rows(model).size
    if isinstance(ratio, Mapping):
        part = number(f"ratio[{VOCAB!r}]", ratio.get(VOCAB), least=0, below=1)
        size = total - math.ceil(part * total)
    else:
        ratio = DEFAULT_RATIO if ratio is None else ratio
        size = size_after(model, ratio)
    if isinstance(calibration, list):
        use = measure_use(model, (sample["input_ids"].tolist() for sample in calibration))
    else:  # the whole text, not only the samples of it
        if calibration is None:
            text = f"{built_in_text()}\n\n{general_chats(tokenizer)}"
        else:
            text = calibration_text(calibration.text, tokenizer)
        use = measure_use(model, text_ids(tokenizer, [text]), opening_tokens(tokenizer))
    free = others and not isinstance(ratio, Mapping)
    found = trim(model, tokenizer, use, size, free=free, round_to=1 if step == "auto" else step, share=True)
    rest = without_vocab({**values, "tokenizer": found.tokenizer})
    if not others:
        return found, None
    if not isinstance(ratio, Mapping):
        dense, left = found.report.parameters
        rest["ratio"] = 1 - (1 - ratio) * dense / left
    # a smaller fraction is not taken from other kinds: a ratio is reached within half a percentage point
    return found, None if not isinstance(ratio, Mapping) and rest["ratio"] < 1e-3 else rest


def as_rows(model: PreTrainedModel, calibration: Any, tokenizer: Any) -> Any:
    """Calibration samples that can be read more than once: those of a text, or token ids by sample."""
    if is_text(calibration):
        return text_samples(calibration, tokenizer, None, TOKENS)
    if calibration is None or (isinstance(calibration, FileSamples) and calibration.text is not None):
        return calibration
    return [{"input_ids": row[0]} for row in token_rows(calibration, find_rows(model).size)]


def samples_with(found: PrunedVocabulary, calibration: Any) -> Any:
    """Calibration samples by :func:`as_rows` in the tokens that stay."""
    if isinstance(calibration, list):
        rows = found.rewritten(sample["input_ids"].tolist() for sample in calibration)
        return [{"input_ids": torch.tensor(row)} for row in rows]
    if calibration is None:
        return None
    samples, tokens = calibration["input_ids"].shape
    return text_samples(calibration.text, found.tokenizer, samples, tokens)


def report_with(report: Report, found: PrunedVocabulary, ratio: Any, reached: Reached | None = None) -> Report:
    """The report of the other kinds with the size of the vocabulary, sizes of the dense model, and the target."""
    dense, left = found.report.parameters
    gone, rows = dense - left, found.report.rows[0] - found.report.rows[1]
    head = found.model.get_output_embeddings()
    width = 0 if head is None else head.weight.shape[-1]
    size = next(found.model.parameters()).element_size()
    return replace(
        report,
        parameters=(report.parameters[0] + gone, report.parameters[1]),
        macs=(report.macs[0] + report.tokens * rows * width, report.macs[1]),
        memory=None if report.memory is None else (report.memory[0] + gone * size, report.memory[1]),
        ratio=ratio if isinstance(ratio, float | int) else report.ratio,
        reached=None if reached is None else replace(reached, slim=report.parameters[1]),
        vocabulary=found.report.rows,
        notes=(f"vocabulary: {found.report}", *report.notes),
    )
