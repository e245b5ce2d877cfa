"""A tokenizer with some of its tokens, and ids numbered anew."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fxprune.errors import UnsupportedModelError
from fxprune.vocabulary.pieces import specification

__all__ = ["renumbered", "trimmed_tokenizer"]


def trimmed_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """A tokenizer of the same class with the tokens ``kept``, ids in order; the new id of each is its place.

    Everything else is as it was: merges keep their order, and normalisation, templates and settings are those of the
    whole tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers; it stays as it is.
        kept: what :func:`~fxprune.vocabulary.choose.choose_tokens` returned.

    Raises:
        UnsupportedModelError: its class does not load the tokens that it is given.
    """
    new = {old: place for place, old in enumerate(kept)}
    spec = _trimmed(specification(tokenizer), new)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        settings = folder / "tokenizer_config.json"
        written = json.loads(settings.read_text(encoding="utf-8"))
        written.pop("added_tokens_decoder", None)  # the same tokens are in the definition, with their ids
        settings.write_text(json.dumps(written), encoding="utf-8")
        (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        found = type(tokenizer).from_pretrained(folder)
    if found.get_vocab() != Tokenizer.from_str(json.dumps(spec)).get_vocab():
        what = f"{type(tokenizer).__name__} adds tokens of its own when it is loaded"
        raise UnsupportedModelError(what, where="tokenizer", remedy="Leave the kind vocab out")
    found.name_or_path = found.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return found


def renumbered(value: Any, new: Mapping[int, int]) -> Any:
    """A setting with new ids in place of the old ones: a number, or lists of them."""
    if isinstance(value, list | tuple):
        return type(value)(renumbered(one, new) for one in value)
    return new.get(value, value) if type(value) is int else value


def _trimmed(spec: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The definition of a tokenizer with the tokens that ``new`` gives an id."""
    model = dict(spec["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
        model["unk_id"] = renumbered(model["unk_id"], new)
    else:
        model["vocab"] = {text: new[number] for text, number in model["vocab"].items() if number in new}
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _is_whole(merge, model)]
    added = [{**token, "id": new[token["id"]]} for token in spec["added_tokens"]]
    found = {**spec, "model": model, "added_tokens": added}
    if spec["post_processor"] is not None:
        found["post_processor"] = _processor(spec["post_processor"], new)
    if spec["padding"] is not None:
        found["padding"] = {**spec["padding"], "pad_id": renumbered(spec["padding"]["pad_id"], new)}
    return found


def _is_whole(merge: str | Sequence[str], model: Mapping[str, Any]) -> bool:
    """Whether both tokens that a merge joins stay, and the one that it makes."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return all(token in model["vocab"] for token in (left, right, left + right))


def _processor(step: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Post-processor of a tokenizer with new ids."""
    found = dict(step)
    if "processors" in step:
        found["processors"] = [_processor(one, new) for one in step["processors"]]
    if step["type"] == "TemplateProcessing":
        special = step["special_tokens"].items()
        found["special_tokens"] = {text: {**one, "ids": renumbered(one["ids"], new)} for text, one in special}
    for name in ("sep", "cls"):
        if name in step:
            text, number = step[name]
            found[name] = [text, new[number]]
    return found
