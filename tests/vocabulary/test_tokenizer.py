"""Tokenizers with fewer tokens write every text, and a text of kept tokens as the whole tokenizer does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fxprune.vocabulary.choose import Use, choose_tokens
from fxprune.vocabulary.pieces import read_tokens, specification
from fxprune.vocabulary.prune import text_ids
from fxprune.vocabulary.tokenizer import trimmed_tokenizer
from tests.vocabulary.small import ENGLISH, KINDS, lines, tokenizer


def trimmed(kind: str, part: float) -> tuple[Any, tuple[int, ...]]:
    """A tokenizer that keeps a part of the tokens that may go, chosen by English words, and their ids."""
    whole = tokenizer(kind)
    tokens = read_tokens(specification(whole))
    size = len(tokens.needed) + round(part * (len(tokens.every) - len(tokens.needed)))
    (ids,) = text_ids(whole, [" ".join(ENGLISH)])
    kept = choose_tokens(tokens, Use(Counter(ids)), size, tokens.needed)
    assert len(kept) == size < len(tokens.every)
    return trimmed_tokenizer(whole, kept), kept


@pytest.mark.parametrize("part", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back_as_it_did(kind: str, part: float, tmp_path: Path) -> None:
    whole = tokenizer(kind)
    slim, kept = trimmed(kind, part)
    slim.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(slim) is type(whole) and len(slim) == len(kept)
    unchanged = 0
    for line in lines():
        ids, new = whole(line)["input_ids"], slim(line)["input_ids"]
        assert slim.decode(new, skip_special_tokens=True) == whole.decode(ids, skip_special_tokens=True)
        assert again(line)["input_ids"] == new
        if set(ids) <= set(kept):
            unchanged += 1
            assert [kept[number] for number in new] == ids
    assert unchanged > 3 or not part


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_templates_keep_their_meaning(kind: str) -> None:
    whole = tokenizer(kind)
    slim, kept = trimmed(kind, 0.0)
    assert slim.special_tokens_map == whole.special_tokens_map
    for name in ("bos", "eos", "pad", "unk", "cls", "sep", "mask"):
        old, new = (getattr(one, f"{name}_token_id", None) for one in (whole, slim))
        assert (None if new is None else kept[new]) == old
    pair = slim("the fox", "the dog")["input_ids"]
    assert slim.decode(pair) == whole.decode(whole("the fox", "the dog")["input_ids"])
    if kind != "bert":
        (number,) = slim("<|im_start|>", add_special_tokens=False)["input_ids"][-1:]
        assert kept[number] == whole.convert_tokens_to_ids("<|im_start|>")
