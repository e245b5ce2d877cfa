"""Slim models of every family, made once for all tests that ask about them, and what can be asked of each."""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import fxprune
from tests.models import FAMILIES, MORE_FAMILIES, tiny, token_ids

EVERY_FAMILY = (*FAMILIES, *MORE_FAMILIES)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@cache
def uneven(family: str) -> fxprune.Result:
    """A model of ``family`` without a third of its channels and heads, chosen at random: layers differ in width."""
    return cut(tiny(family), ("mlp", "head"))


@cache
def shallow(family: str) -> fxprune.Result:
    """A model of ``family`` without one of its layers, and without a third of the channels of the others."""
    return cut(tiny(family), ("mlp", "layer"))


@cache
def uniform(family: str) -> fxprune.Result:
    """A model of ``family`` without a third of its channels and heads, the same number in every layer."""
    return cut(tiny(family), ("mlp", "head"), ranking="local", uniform=True)


def cut(model: PreTrainedModel, kinds: tuple[str, ...], **options: Any) -> fxprune.Result:
    """``model`` without a third of its units of ``kinds``, chosen at random from all layers."""
    given = {
        "importance": "random",
        "select": "select-by-group-ratio{group_ratio=0.34}",
        "ranking": "global",
        "protect": (),
        **options,
    }
    return fxprune.prune(model, None, kinds=kinds, **given)


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Of a few fixed tokens, in float32: ``(samples, tokens, vocabulary)``."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=token_ids() if ids is None else ids).logits
    return found.float()


def greedy(model: Any, **options: Any) -> torch.Tensor:
    """Tokens that a model says after a few fixed ones."""
    found: torch.Tensor = model.generate(token_ids(), **{**GREEDY, **options})
    return found


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference of two tensors."""
    return float((first - second).abs().max())


@dataclass(frozen=True)
class Reloaded:
    """A slim model that went to disk and back.

    Attributes:
        model: what was read.
        stock: whether stock transformers reads it by its config alone.
    """

    model: PreTrainedModel
    stock: bool


@cache
def reloaded(family: str) -> Reloaded:
    """The model that :func:`uneven` gives, saved and loaded."""
    return through_disk(uneven(family))


def through_disk(result: fxprune.Result, **options: Any) -> Reloaded:
    """The slim model of ``result``, saved and loaded; ``options`` go to the loader."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slim"
        structure = result.save_pretrained(path)
        return Reloaded(fxprune.from_pretrained(path, **options), structure.is_stock)


def padding_error(model: Any) -> float:
    """How far the next token's logits move when the prompt is padded on the left, and masked there."""
    ids = token_ids()
    padded = torch.cat([torch.zeros(len(ids), 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long().expand_as(padded)
    options = {**GREEDY, "max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options).logits[0]
    return distance(whole, model.generate(padded, attention_mask=mask, **options).logits[0])


def widths(result: fxprune.Result, kind: str) -> dict[str, tuple[int, int]]:
    """Units before and after of the groups of ``kind`` that shrank."""
    named = ((name.rpartition("/")[2].partition(".")[0], name, sizes) for name, sizes in result.report.widths.items())
    return {name: sizes for found, name, sizes in named if found == kind}
