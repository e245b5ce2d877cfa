"""Texts to measure on, by name, by path, or as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.evaluation.perplexity import load_corpus, named_corpora


def test_texts_are_named_by_the_corpus_or_the_file() -> None:
    assert named_corpora(["ptb", "a/b.txt"]) == {"ptb": "ptb", "b": "a/b.txt"}
    assert named_corpora("wikitext2") == {"wikitext2": "wikitext2"}
    assert named_corpora({"mine": "some text"}) == {"mine": "some text"}


def test_a_source_is_a_file_or_text(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("from the file")
    assert load_corpus(tmp_path / "a b.txt") == "from the file"
    assert load_corpus("two words") == "two words"
    with pytest.raises(UnknownNameError, match="word"):
        load_corpus("word")
    with pytest.raises(UnknownNameError):
        load_corpus("no such.txt")


def test_a_hub_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(**_: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(EvaluationError, match="ptb_text_only: cannot be loaded: ConnectionError: no network"):
        load_corpus("ptb")
