"""The choice of tokens: what a text uses stays, and what it makes longer by the least goes first."""

from __future__ import annotations

from typing import Any

import pytest

from fxprune.vocabulary.prune import Use, best_order, choose_tokens, measure_use
from fxprune.vocabulary.tokenizer import Tokens, read_tokens


def tokens_of(model: dict[str, Any]) -> Tokens:
    """Tokens of a tokenizer that does nothing but split words."""
    steps = dict.fromkeys(("normalizer", "pre_tokenizer", "decoder"))
    return read_tokens({"model": model, "added_tokens": [], **steps})


def merged(*merges: str, alphabet: str = "abcd") -> Tokens:
    """Byte pair encoding with these merges, in order, and ids after those of the alphabet."""
    texts = [*alphabet, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    return tokens_of({"type": "BPE", "vocab": {text: i for i, text in enumerate(texts)}, "merges": list(merges)})


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
    tokens = tokens_of({"type": "BPE", "vocab": texts, "merges": ["a b"], "ignore_merges": True})
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
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u00e9"]
    model = {"type": "BPE", "vocab": {text: i for i, text in enumerate(texts)}, "merges": [], "byte_fallback": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = {"normalizer": replace, "pre_tokenizer": None, "decoder": None}
    tokens = read_tokens({"model": {**model, "unk_token": "<unk>"}, "added_tokens": [], **steps})
    assert tokens.every - tokens.needed == {258} and tokens.pieces(258, ()) == (0xC3 + 1, 0xA9 + 1)


def test_a_used_character_is_not_free_where_one_byte_writes_it() -> None:
    """The text is not longer by it, but no model has seen it written so: digits went, and quality with them."""
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "0", "1", "\u00e9"]
    model = {"type": "BPE", "vocab": {text: i for i, text in enumerate(texts)}, "merges": [], "byte_fallback": True}
    tokens = tokens_of({**model, "unk_token": "<unk>"})
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
