"""Test the comparison of the paper's method with its reference implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.reference import REFERENCE, ReferenceRow, first_tokens, reference_rows
from tests.models import tiny, token_ids


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    """A token for each letter."""
    return {"input_ids": [ord(letter) for letter in text]}


def test_samples_begin_the_texts_that_are_long_enough() -> None:
    found = first_tokens(tokenizer, ["abc", "abcd", "bcdef", "cdef"], samples=2, tokens=4)
    assert found.tolist() == [[97, 98, 99, 100], [98, 99, 100, 101]]
    with pytest.raises(ValueError, match="1 texts have 5 tokens; 2 are needed"):
        first_tokens(tokenizer, ["abcde", "abc"], samples=2, tokens=5)


@pytest.mark.slow
def test_every_order_of_the_paper_is_compared() -> None:
    model = tiny("llama")
    select = "select-by-group-ratio{group_ratio=0.25}"
    rows = list(reference_rows(model, token_ids(2, 8), token_ids(2, 8), select=select, kinds=["mlp"]))
    assert [(row.order, row.reference) for row in rows] == list(REFERENCE.items())
    assert all(torch.tensor(row.found).isfinite() for row in rows)
    assert str(ReferenceRow("vector", 100.0, 101.0)) == "vector: 101.0, reference 100.0 (+1.0%)"
