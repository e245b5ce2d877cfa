"""Built-in text is long, the same on every call, and says nothing twice."""

from __future__ import annotations

import pytest
import torch

from fxprune.data.built_in import (
    built_in_samples,
    built_in_text,
    general_chats,
    general_text,
    offline_docstrings,
    offline_text,
)
from fxprune.data.text import token_windows
from tests.tokens import character_tokenizer

TOKENS = 600


@pytest.mark.parametrize(
    ("text", "least"), [(general_text, 120_000), (offline_text, 300_000), (offline_docstrings, 100_000)]
)
def test_a_text_is_long_and_repeats_no_paragraph(text: object, least: int) -> None:
    assert callable(text)
    parts = text().split("\n\n")
    assert sum(map(len, parts)) > least and len(set(parts)) == len(parts)
    assert text() == text() == text().strip()


def test_texts_share_no_paragraph() -> None:
    whole = [*built_in_text().split("\n\n"), *offline_docstrings().split("\n\n")]
    assert len(set(whole)) == len(whole)


def test_samples_are_of_general_text_as_far_as_it_goes() -> None:
    tokenizer = character_tokenizer()
    general, windows = (token_windows(tokenizer, text, TOKENS) for text in (general_text(), built_in_text()))
    rest = windows[len(general) :]
    few = built_in_samples(tokenizer, TOKENS, 4)
    assert torch.equal(few, general[[i * len(general) // 4 for i in range(4)]])
    more = built_in_samples(tokenizer, TOKENS, len(general) + 2)
    assert torch.equal(more, torch.cat([general, rest[[0, len(rest) // 2]]]))
    assert torch.equal(built_in_samples(tokenizer, TOKENS), windows)
    assert built_in_samples(tokenizer, TOKENS, 0).shape == (0, TOKENS)
    assert torch.equal(built_in_samples(tokenizer, TOKENS, 10**9), windows)
    assert torch.equal(built_in_samples(tokenizer, TOKENS, 10**9, beyond=False), general)


def test_a_model_that_chats_gets_chats_in_its_own_template() -> None:
    tokenizer = character_tokenizer(chat=True)
    chats = general_chats(tokenizer)
    first = [{"role": "user", "content": "What is the largest planet in the solar system?"}]
    assert chats.startswith(tokenizer.apply_chat_template(first, tokenize=False)) and len(chats) > 50_000
    assert chats == general_chats(tokenizer) and general_chats(character_tokenizer()) == ""
    plain, more = (built_in_samples(character_tokenizer(chat), TOKENS, 10**9, beyond=False) for chat in (False, True))
    ids = tokenizer(f"{general_text()}\n\n{chats}", add_special_tokens=False)["input_ids"]
    assert torch.equal(more[: len(plain)], plain) and len(more) == len(ids) // TOKENS > len(plain) + 100
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert general_chats(tokenizer) == "", "samples are there all the same"
