"""Entries of a GGUF file about its tokenizer: made from a tokenizer, or copied from the dense model's file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from fxprune.errors import ExportError
from fxprune.export.gguf.format import load_data

_OWN = "Pass the tokenizer that the model was trained with, or a GGUF file that holds it"
_OWN_IN_SHELL = (
    "Save the model's own tokenizer in its folder, or run `fxprune export` with --like and a GGUF file that holds it"
)
_REMEDY = "Pass like='dense.gguf', a GGUF file of the dense model, and its entries are copied"
_SHELL = (
    "`fxprune export` with --like and a GGUF file of the dense model copies its entries; `fxprune prune` "
    "writes the folder to export"
)
_PREFIX = "tokenizer."


@dataclass(frozen=True)
class Entry:
    """One entry of a file: its full name, value, type in the format, and the type of the items of a list."""

    key: str
    value: Any
    kind: gguf.GGUFValueType
    inner: gguf.GGUFValueType | None = None


def copy_tokenizer(path: str | os.PathLike[str], rows: int) -> list[Entry]:
    """All entries of a GGUF file about its tokenizer, which must have ``rows`` tokens."""
    try:
        fields = gguf.GGUFReader(path).fields
    except (OSError, ValueError, IndexError) as error:
        what = f"cannot be read as a GGUF file: {error}"
        raise ExportError(what, where=os.fspath(path), remedy="Pass the GGUF file of the dense model") from error
    found = [
        Entry(name, entry.contents(), entry.types[0], entry.types[-1] if len(entry.types) > 1 else None)
        for name, entry in fields.items()
        if name.startswith(_PREFIX)
    ]
    tokens = next((len(entry.value) for entry in found if entry.key == f"{_PREFIX}ggml.tokens"), None)
    if tokens != rows:
        has = "no tokens" if tokens is None else f"{tokens:,} tokens"
        raise ExportError(f"has {has}, and the model {rows:,}", where=os.fspath(path), remedy=_OWN, shell=_OWN_IN_SHELL)
    return found


def describe_tokenizer(tokenizer: Any, rows: int) -> list[Entry]:
    """Entries for a tokenizer of transformers.

    Args:
        tokenizer: a fast tokenizer: byte pair encoding over bytes, or over characters with byte fallback.
        rows: rows of the embedding; those without a token get names made up.

    Raises:
        ExportError: it is of another kind, has more tokens than rows, or splits text in a way unknown to the format.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"{type(tokenizer).__name__} is not a fast tokenizer", where="tokenizer", remedy=_REMEDY, shell=_SHELL
        )
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise ExportError(f"is of the kind {spec['model']['type']}", where="tokenizer", remedy=_REMEDY, shell=_SHELL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    byte_level = next((step for step in _pre_tokenizers(spec) if step["type"] == "ByteLevel"), None)
    if byte_level is not None:
        model = load_data("tokenizers")["models"]["bytes"]
        made = {"model": model, "pre": _pre_name(spec, byte_level), "merges": merges}
    else:
        made = _with_byte_fallback(spec, merges)
    tokens, types = _tokens(tokenizer, spec, rows)
    made |= {"tokens": tokens, "token_type": types}
    if "scores" in made:
        made["scores"] = [made["scores"].get(token, -1e6) for token in tokens]
    theirs = ("bos", "eos", "unknown", "seperator", "padding", "mask")  # codespell:ignore
    for their, our in zip(theirs, ("bos", "eos", "unk", "sep", "pad", "mask"), strict=True):
        number = getattr(tokenizer, f"{our}_token_id", None)
        made |= {} if number is None else {f"{their}_token_id": number}
    ids = tokenizer("a")["input_ids"]
    made |= {
        "add_bos_token": ids[:1] == [tokenizer.bos_token_id],
        "add_eos_token": ids[-1:] == [tokenizer.eos_token_id],
    }
    entries = [entry_of(f"{_PREFIX}ggml.{name}", value) for name, value in made.items()]
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return [*entries, entry_of(f"{_PREFIX}chat_template", template)] if template else entries


def entry_of(key: str, value: Any) -> Entry:
    """An entry of the type that a value has in the format."""
    kind = gguf.GGUFValueType.get_type(value)
    if kind == gguf.GGUFValueType.INT32:
        kind = gguf.GGUFValueType.UINT32
    return Entry(key, value, kind)


def _pre_tokenizers(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    step = spec.get("pre_tokenizer") or {}
    steps: list[Mapping[str, Any]] = step.get("pretokenizers", [step] if step else [])
    return steps


def _normalizers(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps that change a text before it is split."""
    if step is None or "normalizers" not in step:
        return [] if step is None else [step]
    return [inner for part in step["normalizers"] for inner in _normalizers(part)]


def _check_changes(changes: list[str]) -> None:
    """Refuse a tokenizer that changes a text before it is split: engines merge the text as it is.

    That they leave out the composition of characters (``NFC``) is accepted, as by all who write such files.
    """
    if changes:
        what = f"changes a text before it is split, for which the format has no name: {', '.join(changes)}"
        raise ExportError(what, where="tokenizer", remedy=_REMEDY, shell=_SHELL)


def _pre_name(spec: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Name in the format for the way in which a tokenizer splits text before it merges bytes."""
    prefix = ["add_prefix_space"] if last.get("add_prefix_space") else []
    _check_changes([*(step["type"] for step in _normalizers(spec.get("normalizer")) if step["type"] != "NFC"), *prefix])
    patterns = []
    for step in _pre_tokenizers(spec):
        if step["type"] == "Digits" and step.get("individual_digits"):
            patterns.append("digits")
        elif step["type"] == "Split" and not step.get("invert") and step["behavior"] == "Isolated":
            patterns.append(str(step["pattern"].get("Regex", step["pattern"])))
        elif step["type"] != "ByteLevel":
            patterns.append(str(step))
    found = {
        "split": patterns,
        "byte_level_regex": bool(last.get("use_regex", True)),
        "ignore_merges": bool(spec["model"].get("ignore_merges")),
    }
    for way in load_data("tokenizers")["pre"]:
        name = way["name"]
        if found == {"ignore_merges": False} | {key: value for key, value in way.items() if key != "name"}:
            return str(name)
    what = f"splits text in a way that has no name here: {patterns}"
    raise ExportError(what, where="tokenizer", remedy=_REMEDY, shell=_SHELL)


def _with_byte_fallback(spec: Mapping[str, Any], merges: Iterable[str]) -> dict[str, Any]:
    """Entries of byte pair encoding over characters; the score of a token is the negative rank of its merge."""
    if not spec["model"].get("byte_fallback"):
        raise ExportError(
            "neither encodes bytes nor falls back to them", where="tokenizer", remedy=_REMEDY, shell=_SHELL
        )
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        scores.setdefault(left + right, -float(rank))
    normalizers = _normalizers(spec.get("normalizer"))
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}  # engines take it for each character to be
    _check_changes([s["type"] for s in normalizers if s["type"] not in ("Prepend", "NFC") and s != blank])
    steps = [*normalizers, *_pre_tokenizers(spec)]
    prepends = [step["type"] == "Prepend" or step.get("prepend_scheme") in ("always", "first") for step in steps]
    return {
        "model": load_data("tokenizers")["models"]["characters"],
        "pre": "default",
        "scores": scores,
        "add_space_prefix": any(prepends),
    }


def _tokens(tokenizer: Any, spec: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    kinds = gguf.TokenType
    by_number = {number: text for text, number in tokenizer.get_vocab().items()}
    highest = max(by_number)
    if highest >= rows:
        raise ExportError(
            f"has {highest + 1:,} tokens, and the model {rows:,}", where="tokenizer", remedy=_OWN, shell=_OWN_IN_SHELL
        )
    types = {number: kinds.NORMAL for number in by_number}
    if spec["model"].get("byte_fallback"):
        types |= {number: kinds.BYTE for number, text in by_number.items() if re.fullmatch("<0x..>", text)}
    for number, token in tokenizer.added_tokens_decoder.items():
        types[number] = kinds.CONTROL if token.special else kinds.USER_DEFINED
    if tokenizer.unk_token_id is not None and all(step["type"] != "ByteLevel" for step in _pre_tokenizers(spec)):
        types[tokenizer.unk_token_id] = kinds.UNKNOWN
    texts = [by_number.get(number, f"[PAD{number}]") for number in range(rows)]
    return texts, [int(types.get(number, kinds.UNUSED)) for number in range(rows)]
