"""Tokens of a tokenizer, and a tokenizer with some of them that still writes every text.

Each kind of tokenizer must keep some tokens: those without which some text could no longer be written, and, in byte
pair encoding, those that a kept token is merged from. A text that the whole tokenizer writes with kept tokens alone is
then written the same by the trimmed one:

- Byte pair encoding merges the characters of a token in an order that depends on nothing outside it. With all tokens
  of that order kept, and the order of the other merges unchanged, the same merges are applied.
- Unigram takes the sequence of tokens with the highest score; it stays the highest among fewer.
- WordPiece takes the longest token that fits; it stays the longest among fewer.
"""

from __future__ import annotations

import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fxprune.errors import UnsupportedModelError
from fxprune.graph.compat import tree_leaves

_REMEDY = "Leave the kind vocab out: tokenizers of the kinds BPE, Unigram and WordPiece can be trimmed"

_BYTE = re.compile("<0x([0-9A-F]{2})>")


def check_kind(tokenizer: Any) -> None:
    """Refuse a tokenizer of a kind that cannot be trimmed, or that is not fast, with an UnsupportedModelError."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        what = f"{type(tokenizer).__name__} is not a fast tokenizer, whose tokens are known"
        raise UnsupportedModelError(what, where="tokenizer", remedy=_REMEDY)
    kind = type(backend.model).__name__
    if kind not in ("BPE", "Unigram", "WordPiece"):
        raise UnsupportedModelError(f"it is of the kind {kind}", where="tokenizer", remedy=_REMEDY)
    if kind == "BPE" and backend.model.continuing_subword_prefix:
        what = f"it marks tokens inside a word by {backend.model.continuing_subword_prefix!r}"
        raise UnsupportedModelError(what, where="tokenizer", remedy=_REMEDY)


def specification(tokenizer: Any) -> dict[str, Any]:
    """The definition of a tokenizer as data, as for :func:`check_kind`."""
    check_kind(tokenizer)
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def read_tokens(spec: Mapping[str, Any]) -> Tokens:
    """The tokens of a tokenizer by its definition."""
    kinds: dict[str, type[Tokens]] = {"BPE": _Merged, "Unigram": _Scored, "WordPiece": _Longest}
    return kinds[spec["model"]["type"]](spec)


class Tokens(ABC):
    """The tokens of a tokenizer, by its definition."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        model = spec["model"]
        vocabulary = model["vocab"]
        texts = [text for text, _ in vocabulary] if isinstance(vocabulary, list) else None
        self.ids: dict[str, int] = vocabulary if texts is None else {text: i for i, text in enumerate(texts)}
        self.texts = {number: text for text, number in self.ids.items()}
        self.added = frozenset(token["id"] for token in spec["added_tokens"])
        steps = tree_leaves([spec[step] for step in ("normalizer", "pre_tokenizer", "decoder")])
        self._marks = {text for text in steps if isinstance(text, str)}
        self._bytes = {
            int(found[1], 16): number for text, number in self.ids.items() if (found := _BYTE.fullmatch(text))
        }
        self._falls_back = bool(model.get("byte_fallback")) and len(self._bytes) == 256
        unknown = model.get("unk_id") if "unk_id" in model else self.ids.get(model.get("unk_token"))
        self._unknown: tuple[int, ...] = () if unknown is None else (unknown,)

    @property
    def every(self) -> frozenset[int]:
        """All ids, those of added tokens too."""
        return self.added | self.texts.keys()

    @cached_property
    def needed(self) -> frozenset[int]:
        """Ids that must stay, so that every text can be written: added tokens, and characters or bytes."""
        characters = {number for number, text in self.texts.items() if self._is_character(text)}
        if self._falls_back:  # bytes write a character, unless the tokenizer itself replaces it
            characters = {number for number in characters if self.texts[number] in self._marks}
            return self.added.union(self._unknown, characters, self._bytes.values())
        alone = (n for n, text in self.texts.items() if not all(symbol in self.ids for symbol in self._symbols(text)))
        return self.added.union(self._unknown, characters, alone)

    def parts(self, token: int) -> tuple[int, ...]:
        """Tokens that must stay as long as this one does."""
        return ()

    @abstractmethod
    def pieces(self, token: int, gone: Collection[int]) -> tuple[int, ...]:
        """The tokens that write the text of one that goes, where those in ``gone`` are gone as well."""

    def written(self, token: int, gone: Collection[int]) -> tuple[int, ...]:
        """The kept tokens that write the text of a token; itself if it is kept."""
        if token not in gone:
            return (token,)
        return tuple(kept for piece in self.pieces(token, gone) for kept in self.written(piece, gone))

    def _symbols(self, text: str) -> list[str]:
        """The characters of a text as tokens write them."""
        return list(text)

    def _is_character(self, text: str) -> bool:
        return len(self._symbols(text)) == 1

    def _fallback(self, text: str) -> tuple[int, ...]:
        """The tokens of a character without one of its own."""
        if not self._falls_back:
            return self._unknown
        return tuple(self._bytes[byte] for byte in text.encode("utf-8", "surrogatepass"))


class _Merged(Tokens):
    """Tokens of byte pair encoding."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__(spec)
        model = spec["model"]
        self._suffix = model.get("end_of_word_suffix") or ""
        self._ranks = {pair: rank for rank, pair in enumerate(map(tuple, model["merges"]))}

    def parts(self, token: int) -> tuple[int, ...]:
        return self._halves.get(token, ())

    def pieces(self, token: int, gone: Collection[int]) -> tuple[int, ...]:
        text = self.texts[token]
        if self._is_character(text):
            return self._fallback(text)
        if token in self._halves:
            return self._halves[token]
        found = ((self.ids[part],) if part in self.ids else self._fallback(part) for part in self._merge(text)[-1])
        return tuple(number for numbers in found for number in numbers)

    @cached_property
    def _halves(self) -> dict[int, tuple[int, int]]:
        """For each token that merges make, the two tokens that its last merge joins."""
        found = {}
        for number, text in self.texts.items():
            if number not in self.added and not self._is_character(text):
                steps = self._merge(text)
                if len(steps) > 1 and len(steps[-1]) == 1:
                    left, right = steps[-2]
                    found[number] = (self.ids[left], self.ids[right])
        return found

    def _merge(self, text: str) -> list[list[str]]:
        """The symbols of a text before the first merge, and after each."""
        symbols = self._symbols(text)
        steps = [symbols]
        while True:
            ranks = [self._ranks.get(pair) for pair in pairwise(symbols)]
            known = [rank for rank in ranks if rank is not None]
            if not known:
                return steps
            place = ranks.index(min(known))
            symbols = [*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :]]
            steps.append(symbols)

    def _symbols(self, text: str) -> list[str]:
        """The characters of a text, the last one with the mark of the end of a word if the text has it."""
        bare = text.removesuffix(self._suffix)
        symbols = list(bare)
        if symbols and len(bare) < len(text):
            symbols[-1] += self._suffix
        return symbols


class _Scored(Tokens):
    """Tokens of a unigram language model."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__(spec)
        self._scores = dict(enumerate(score for _, score in spec["model"]["vocab"]))
        self._longest = max(map(len, self.ids))
        self._lowest = min(self._scores, key=lambda number: self._scores[number])

    @cached_property
    def needed(self) -> frozenset[int]:
        """Ids that must stay; the lowest score is that of unknown characters, too."""
        return super().needed | {self._lowest}

    def pieces(self, token: int, gone: Collection[int]) -> tuple[int, ...]:
        """The sequence of tokens with the highest sum of scores."""
        text = self.texts[token]
        unknown = self._scores[self._lowest] - 10.0  # as the tokenizers library scores it
        best: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]
        for end in range(1, len(text) + 1):
            options: list[tuple[float, int, tuple[int, ...]]] = []
            for start in range(max(0, end - self._longest), end):
                number = self.ids.get(text[start:end])
                if number is not None and number != token and number not in gone and number not in self.added:
                    options.append((best[start][0] + self._scores[number], start, (number,)))
            if all(start < end - 1 for _, start, _ in options):
                character = text[end - 1]
                options.append((best[end - 1][0] + unknown, end - 1, self._fallback(character)))
            best.append(max(options, key=lambda option: option[0]))
        found: list[tuple[int, ...]] = []
        place = len(text)
        while place:
            _, start, numbers = best[place]
            found.append(numbers)
            place = start
        return tuple(number for numbers in reversed(found) for number in numbers)


class _Longest(Tokens):
    """Tokens of WordPiece."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__(spec)
        self._prefix = spec["model"]["continuing_subword_prefix"]

    def pieces(self, token: int, gone: Collection[int]) -> tuple[int, ...]:
        """Greedy longest match."""
        text, inside = self._split(self.texts[token])
        found: list[int] = []
        while text:
            fits = (self.ids.get(self._joined(text[:end], inside)) for end in range(len(text), 0, -1))
            number = next(one for one in fits if one is not None and one != token and one not in gone)
            found.append(number)
            text, inside = text[len(self._split(self.texts[number])[0]) :], True
        return tuple(found)

    def _split(self, text: str) -> tuple[str, bool]:
        return text.removeprefix(self._prefix), text.startswith(self._prefix)

    def _joined(self, text: str, inside: bool) -> str:
        return self._prefix + text if inside else text

    def _symbols(self, text: str) -> list[str]:
        """The characters of a text, those inside a word with the mark of it."""
        bare, inside = self._split(text)
        return [self._joined(character, inside or place > 0) for place, character in enumerate(bare)]


def trimmed_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """A tokenizer of the same class with the tokens ``kept``, ids in order; the new id of each is its place.

    Everything else is as it was: merges keep their order, and normalisation, templates and settings are those of the
    whole tokenizer. ``kept`` is what :func:`~fxprune.vocabulary.prune.choose_tokens` returned.

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
        # those of which both tokens stay, and the one that they make
        model["merges"] = [merge for merge in model["merges"] if {*merge, "".join(merge)} <= model["vocab"].keys()]
    added = [{**token, "id": new[token["id"]]} for token in spec["added_tokens"]]
    found = {**spec, "model": model, "added_tokens": added}
    if spec["post_processor"] is not None:
        found["post_processor"] = _processor(spec["post_processor"], new)
    if spec["padding"] is not None:
        found["padding"] = {**spec["padding"], "pad_id": renumbered(spec["padding"]["pad_id"], new)}
    return found


def _processor(step: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
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
