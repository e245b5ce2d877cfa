"""Tokenizers with fewer tokens write every text, and a text of kept tokens as the whole tokenizer does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
)

from fxprune.errors import UnsupportedModelError
from fxprune.vocabulary.prune import Use, choose_tokens, text_ids
from fxprune.vocabulary.tokenizer import read_tokens, specification, trimmed_tokenizer
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
    texts = lines()
    old, new, stored = (one(texts)["input_ids"] for one in (whole, slim, again))
    assert stored == new
    back, before = (one.batch_decode(ids, skip_special_tokens=True) for one, ids in ((slim, new), (whole, old)))
    assert back == before
    written = {*kept}
    unchanged = [(a, b) for a, b in zip(old, new, strict=True) if written.issuperset(a)]
    assert all([kept[number] for number in b] == a for a, b in unchanged)
    assert len(unchanged) > 3 or not part


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


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("gpt2", GPT2Tokenizer),
        ("qwen", Qwen2Tokenizer),
        ("llama", LlamaTokenizer),
        ("gemma", GemmaTokenizer),
        ("t5", T5Tokenizer),
    ],
)
def test_classes_that_build_their_own_tokenizer_get_the_tokens_that_stay(kind: str, own: Any, tmp_path: Path) -> None:
    """They take the vocabulary from the file, and make the rest themselves."""
    model = specification(tokenizer(kind))["model"]
    merges = {"merges": [tuple(merge) for merge in model["merges"]]} if "merges" in model else {}
    vocabulary = [tuple(entry) for entry in model["vocab"]] if kind == "t5" else model["vocab"]
    whole = own(vocab=vocabulary, **merges, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokens = read_tokens(specification(whole))
    size = (len(tokens.needed) + len(tokens.every)) // 2
    kept = choose_tokens(tokens, Use({}), size, tokens.needed)
    slim = trimmed_tokenizer(whole, kept)
    slim.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(slim) is type(again) is own and len(slim) == size < len(whole)
    texts = lines(100)
    old, new = whole(texts)["input_ids"], slim(texts)["input_ids"]
    assert again(texts)["input_ids"] == new
    assert slim.batch_decode(new) == whole.batch_decode(old)


def test_other_kinds_of_tokenizers_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1}, unk_token="<unk>"))
    with pytest.raises(UnsupportedModelError, match="of the kind WordLevel"):
        specification(PreTrainedTokenizerFast(tokenizer_object=words))
    marked = Tokenizer(models.BPE({"a": 0, "##b": 1}, [], continuing_subword_prefix="##"))
    with pytest.raises(UnsupportedModelError, match="marks tokens inside a word by '##'"):
        specification(PreTrainedTokenizerFast(tokenizer_object=marked))
    with pytest.raises(UnsupportedModelError, match="is not a fast tokenizer"):
        specification(len)
