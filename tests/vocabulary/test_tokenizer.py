"""Tokens that stay, and tokenizers that keep them."""

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
from fxprune.vocabulary.prune import Use, best_order, choose_tokens, measure_use, text_ids
from fxprune.vocabulary.tokenizer import Tokens, read_tokens, specification, trimmed_tokenizer
from tests.vocabulary.small import ENGLISH, KINDS, lines, tokenizer


def trimmed(whole: Any, part: float) -> tuple[Any, tuple[int, ...]]:
    """A tokenizer that keeps a part of the tokens that may go, chosen by English words, and their ids."""
    tokens = read_tokens(specification(whole))
    size = len(tokens.needed) + round(part * (len(tokens.every) - len(tokens.needed)))
    (ids,) = text_ids(whole, [" ".join(ENGLISH)])
    kept = choose_tokens(tokens, Use(Counter(ids)), size, tokens.needed)
    assert len(kept) == size < len(tokens.every)
    return trimmed_tokenizer(whole, kept), kept


OWN: dict[str, Any] = {"gpt2": GPT2Tokenizer, "qwen": Qwen2Tokenizer, "llama": LlamaTokenizer}
OWN |= {"gemma": GemmaTokenizer, "t5": T5Tokenizer}
"""Classes that take the vocabulary from the file, and make the rest themselves."""


def rebuilt(kind: str) -> Any:
    """A tokenizer of such a class with the tokens of a kind."""
    model = specification(tokenizer(kind))["model"]
    merges = {"merges": [tuple(merge) for merge in model["merges"]]} if "merges" in model else {}
    vocabulary = [tuple(entry) for entry in model["vocab"]] if kind == "t5" else model["vocab"]
    return OWN[kind](vocab=vocabulary, **merges, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("part", [0.0, 0.3])
@pytest.mark.parametrize(("make", "kind"), [*((tokenizer, kind) for kind in KINDS), *((rebuilt, kind) for kind in OWN)])
def test_every_text_comes_back_as_it_did(make: Any, kind: str, part: float, tmp_path: Path) -> None:
    whole = make(kind)
    slim, kept = trimmed(whole, part)
    slim.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(slim) is type(again) is type(whole) and len(slim) == len(kept)
    texts = lines()
    old, new, stored = (one(texts)["input_ids"] for one in (whole, slim, again))
    assert stored == new
    for skip in (False, True):
        back, before = (one.batch_decode(ids, skip_special_tokens=skip) for one, ids in ((slim, new), (whole, old)))
        assert back == before
    written = {*kept}
    unchanged = [(a, b) for a, b in zip(old, new, strict=True) if written.issuperset(a)]
    assert all([kept[number] for number in b] == a for a, b in unchanged)
    assert len(unchanged) > 3 or not part


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_templates_keep_their_meaning(kind: str) -> None:
    whole = tokenizer(kind)
    slim, kept = trimmed(whole, 0.0)
    assert slim.special_tokens_map == whole.special_tokens_map
    for name in ("bos", "eos", "pad", "unk", "cls", "sep", "mask"):
        old, new = (getattr(one, f"{name}_token_id", None) for one in (whole, slim))
        assert (None if new is None else kept[new]) == old
    pair = slim("the fox", "the dog")["input_ids"]
    assert slim.decode(pair) == whole.decode(whole("the fox", "the dog")["input_ids"])
    if kind != "bert":
        (number,) = slim("<|im_start|>", add_special_tokens=False)["input_ids"][-1:]
        assert kept[number] == whole.convert_tokens_to_ids("<|im_start|>")


def test_other_kinds_of_tokenizers_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1}, unk_token="<unk>"))
    with pytest.raises(UnsupportedModelError, match="of the kind WordLevel"):
        specification(PreTrainedTokenizerFast(tokenizer_object=words))
    marked = Tokenizer(models.BPE({"a": 0, "##b": 1}, [], continuing_subword_prefix="##"))
    with pytest.raises(UnsupportedModelError, match="marks tokens inside a word by '##'"):
        specification(PreTrainedTokenizerFast(tokenizer_object=marked))
    with pytest.raises(UnsupportedModelError, match="is not a fast tokenizer"):
        specification(len)


def tokens_of(model: dict[str, Any], **steps: Any) -> Tokens:
    """Tokens of a tokenizer that does nothing but split words, unless it has other ``steps``."""
    none = dict.fromkeys(("normalizer", "pre_tokenizer", "decoder"))
    return read_tokens({"model": model, "added_tokens": [], **none, **steps})


def with_bytes(*texts: str, **steps: Any) -> Tokens:
    """Characters of byte pair encoding, behind the 257 tokens of bytes and of what is unknown."""
    every = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *texts]
    model = {"type": "BPE", "vocab": {text: i for i, text in enumerate(every)}, "merges": [], "byte_fallback": True}
    return tokens_of({**model, "unk_token": "<unk>"}, **steps)


def merged(*merges: str, alphabet: str = "abcd") -> Tokens:
    """Byte pair encoding with these merges, in order, and ids after those of the alphabet."""
    texts = [*alphabet, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    pairs = [merge.split() for merge in merges]
    return tokens_of({"type": "BPE", "vocab": {text: i for i, text in enumerate(texts)}, "merges": pairs})


def chosen(tokens: Tokens, size: int, counts: dict[str, int], expected: dict[str, float] | None = None) -> str:
    """The texts of the tokens that stay, behind the alphabet."""
    used = {tokens.ids[text]: count for text, count in counts.items()}
    use = Use(used, {tokens.ids[text]: sum_ for text, sum_ in (expected or {}).items()})
    kept = choose_tokens(tokens, use, size, tokens.needed)
    return " ".join(tokens.texts[number] for number in kept if len(tokens.texts[number]) > 1)


def test_a_token_stays_as_long_as_one_that_is_merged_from_it() -> None:
    """Without ``ab`` no text would be merged to ``abc``."""
    tokens = merged("a b", "ab c", "c d")
    assert tokens.parts(tokens.ids["abc"]) == (tokens.ids["ab"], tokens.ids["c"])
    assert chosen(tokens, 6, {"abc": 3, "cd": 2}) == "ab abc"
    assert chosen(tokens, 5, {"abc": 3, "cd": 2}) == "ab"
    assert chosen(tokens, 5, {"abc": 3, "cd": 4}) == "cd"


def test_uses_pass_on_to_the_pieces() -> None:
    """Once ``abc`` is gone, ``ab`` is used as often as both were."""
    tokens = merged("a b", "ab c", "c d", "d a")
    assert chosen(tokens, 6, {"ab": 1, "abc": 2, "cd": 4, "da": 2}) == "ab cd"


def test_of_unused_tokens_that_which_the_model_expects_stays() -> None:
    tokens = merged("a b", "b c", "c d")
    assert chosen(tokens, 5, {}) == "ab"
    assert chosen(tokens, 5, {}, {"cd": 0.1, "ab": 0.01}) == "cd"
    assert chosen(tokens, 5, {"bc": 1}, {"cd": 5.0}) == "bc"


def test_the_merges_of_a_token_are_those_that_are_applied() -> None:
    """Of several merges that give one token, the first in order of rank makes it."""
    tokens = merged("b c", "a b", "ab c", "a bc")
    assert tokens.parts(tokens.ids["abc"]) == (tokens.ids["a"], tokens.ids["bc"])


def test_a_token_that_no_merge_makes_is_written_by_what_merges_make() -> None:
    texts = {"a": 0, "b": 1, "ab": 2, "aba": 3}
    tokens = tokens_of({"type": "BPE", "vocab": texts, "merges": [["a", "b"]], "ignore_merges": True})
    assert tokens.parts(3) == () and tokens.pieces(3, ()) == (2, 0)
    assert tokens.written(3, {2, 3}) == (0, 1, 0)


@pytest.mark.parametrize("size", [4, 5, 6])
def test_the_number_of_tokens_is_rounded_up(size: int) -> None:
    tokens = merged("a b", "b c", "c d", "ab c")
    assert len(choose_tokens(tokens, Use({}), size, tokens.needed, round_to=4)) == (4 if size == 4 else 8)
    free = choose_tokens(tokens, Use({tokens.ids["ab"]: 1}), 4, tokens.needed, free=True)
    assert [tokens.texts[number] for number in free[4:]] == ["ab"]


def test_a_character_without_a_token_of_its_own_keeps_the_tokens_that_have_it() -> None:
    """WordPiece would write an unknown token in place of the whole word."""
    texts = ["[UNK]", "a", "##a", "##b", "##ab", "ca", "aa"]
    model = {"type": "WordPiece", "vocab": {text: i for i, text in enumerate(texts)}, "unk_token": "[UNK]"}
    tokens = tokens_of({**model, "continuing_subword_prefix": "##"})
    assert {tokens.texts[number] for number in tokens.every - tokens.needed} == {"##ab", "aa"}
    assert tokens.pieces(tokens.ids["##ab"], ()) == (2, 3) and tokens.pieces(tokens.ids["aa"], ()) == (1, 2)


def test_the_best_scores_write_a_token_of_unigram() -> None:
    vocabulary = [["<unk>", 0.0], ["a", -3.0], ["b", -3.0], ["c", -9.0], ["ab", -4.0], ["bc", -5.0], ["abc", -5.0]]
    tokens = tokens_of({"type": "Unigram", "vocab": vocabulary, "unk_id": 0})
    assert tokens.pieces(6, ()) == (1, 5) and tokens.pieces(6, {5}) == (4, 3)
    assert {0, 1, 2, 3} <= tokens.needed


def test_bytes_write_characters_but_not_those_that_the_tokenizer_replaces() -> None:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    tokens = with_bytes("\u2581", "\u00e9", normalizer=replace)
    assert tokens.every - tokens.needed == {258} and tokens.pieces(258, ()) == (0xC3 + 1, 0xA9 + 1)


def test_a_used_character_is_not_free_where_one_byte_writes_it() -> None:
    """The text is not longer by it, but no model has seen it written so: digits went, and quality with them."""
    tokens = with_bytes("0", "1", "\u00e9")
    assert set(choose_tokens(tokens, Use({257: 5}), 258, tokens.needed)) - tokens.needed == {257}
    assert 257 in choose_tokens(tokens, Use({257: 5}), 0, tokens.needed, free=True)


def test_the_order_is_taken_that_costs_held_out_text_least() -> None:
    tokens = merged("a b", "b c", "c d")
    ab, cd = tokens.ids["ab"], tokens.ids["cd"]

    def taken(use: Use, *, free: bool = False) -> Use:
        return best_order(tokens, use, 5, tokens.needed, free=free)

    told = Use({cd: 7}, heldout=({cd: 3}, {cd: 3}))
    assert taken(told) == Use({cd: 7}), "the rest of the corpus uses it, too"
    assert taken(Use({ab: 6, cd: 1}, heldout=({ab: 3}, {ab: 3}))) == Use({}), "it does not, and the first merges win"
    assert taken(Use({ab: 1, cd: 7}, heldout=({cd: 6}, {ab: 1}))) == Use({}), "the parts differ by more than the orders"
    misled = Use({ab: 6}, {cd: 1.0}, ({ab: 3}, {ab: 3}))
    assert taken(misled, free=True) == Use({ab: 6}), "the model expects another one"
    helped = Use({cd: 6}, {cd: 1.0}, ({cd: 3}, {cd: 3}))
    assert taken(helped) is helped, "the model expects what the rest has not"
    assert taken(Use({ab: 3, cd: 1})) == Use({ab: 3, cd: 1}), "nothing is held out"


def test_a_fifth_of_the_corpus_is_held_out_in_long_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the model expects is read off the rest."""
    read: list[int] = []
    monkeypatch.setattr(
        "fxprune.vocabulary.prune.expected_use", lambda _, rows: read.extend(int(row[1]) for row in rows) or {}
    )
    rows = [[part] * 128 for part in range(50) for _ in range(4)]
    model: Any = None
    use = measure_use(model, rows, [99])
    assert set(use.counts) == set(range(50)) and use.heldout == tuple({part: 512} for part in range(2, 50, 5))
    assert read and not {part % 5 for part in read} & {2}
    assert measure_use(model, [[1, 2, 3]]).heldout == (), "it is too short to be divided"
