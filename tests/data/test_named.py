"""Calibration, training and evaluation by the name of a data set, by texts and by data sets in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fxprune.passes.prepare import CalibratePass

import fxprune
from fxprune.data.calibration import Calibration
from fxprune.data.named import is_data_set, load_named
from fxprune.data.rows import read_rows
from fxprune.data.text import calibration_text, calibration_windows, is_text
from fxprune.errors import CalibrationError, DataError
from fxprune.evaluation.perplexity import load_corpus, named_corpora
from fxprune.graph.facts import facts_of
from fxprune.trace import trace
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer

TEXTS = ["one two three " * 20, "four five six " * 20]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was asked of the hub, whose data sets are all the same texts."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, *, split: str, **options: Any) -> Any:
        asked.append((path, name, split, *options))
        return datasets.Dataset.from_dict({"sentence" if "ptb" in path else "text": TEXTS})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_names_files_and_texts_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "here").write_text("a text")
    assert [name for name in ("c4", "wikitext2", "owner/name", "owner/name:small") if not is_data_set(name)] == []
    for name in ("c5", "owner/here", "owner/name.txt", "owner/name.parquet", "/owner/name", "a/b/c", "../c4", "a text"):
        assert not is_data_set(name), name
    assert not is_data_set(Path("owner/name"))
    for text in ("a/" + "b" * 5000, "some words\n" * 1000):  # the system refuses to look for files of such names
        assert not is_data_set(text)


def test_the_same_reader_serves_calibration_training_and_evaluation(asked: list[tuple[Any, ...]]) -> None:
    import datasets

    whole = "\n\n".join(TEXTS)
    for source in ("wikitext2", "ptb", "c4", "owner/name:small", TEXTS, datasets.Dataset.from_dict({"text": TEXTS})):
        assert calibration_text(source) == whole
        assert [row.fields["text"] for row in read_rows(source)] == TEXTS  # type: ignore[union-attr]
        assert load_corpus(source) == whole
    assert [(path, split) for path, _, split, *_ in asked] == [
        *(("Salesforce/wikitext", split) for split in ("train", "train", "test")),
        *(("ptb-text-only/ptb_text_only", split) for split in ("train", "train", "validation")),
        *(("allenai/c4", split) for split in ("train", "train", "validation")),
        *(("owner/name", split) for split in ("train", "train", "test")),
    ]
    assert {name for path, name, *_ in asked if path == "owner/name"} == {"small"}
    assert list(named_corpora(["c4", "owner/name", "a/b.txt"])) == ["c4", "owner/name", "b"]
    assert load_corpus(named_corpora({"mine": TEXTS})["mine"]) == whole


def test_a_data_set_is_read_no_further_than_a_prune_needs(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.data.text._MOST_TEXT", 10)
    assert calibration_text("c4") == TEXTS[0] and calibration_text(TEXTS) == TEXTS[0]


def test_text_calibrates_as_the_windows_of_it_do(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    import datasets

    tokenizer = character_tokenizer()
    graph_module = trace(
        tiny("llama", vocab_size=300, num_hidden_layers=1), {"input_ids": token_ids(2, 8)}
    ).graph_module
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    want = calibration_windows(tokenizer, "\n\n".join(TEXTS), 3, 20, "here")
    sources = {"c4": "c4", "the texts passed": TEXTS, "a.txt": str(tmp_path / "a.txt"), "b": tmp_path / "a.txt"}
    sources["d"] = datasets.Dataset.from_dict({"text": TEXTS})
    sources["e"] = sources["d"]["text"]  # type: ignore[index]
    for name, source in sources.items():
        CalibratePass(data=source, tokenizer=tokenizer, samples=3, tokens=20)(graph_module)
        found = facts_of(graph_module)[Calibration]
        assert torch.equal(torch.cat([one.inputs["input_ids"] for one in found.samples]), want)
        assert found.source == {"b": "a.txt", "d": "the texts passed", "e": "the texts passed"}.get(name, name)
    tokenised = datasets.Dataset.from_dict({"input_ids": want.tolist(), "text": ["a", "b", "c"]})
    assert not is_text(tokenised) and not is_text(want) and not is_text([{"input_ids": [1, 2]}]) and not is_text([])
    CalibratePass(data=tokenised)(graph_module)
    assert len(facts_of(graph_module)[Calibration].samples) == 3


def test_a_prune_takes_texts_and_says_what_they_lack() -> None:
    model, tokenizer = tiny("llama", vocab_size=300, num_hidden_layers=2), character_tokenizer()
    options: dict[str, Any] = {"recipe": "llm-pruner", "importance": "wanda", "ratio": 0.1, "protect": (0, 0)}
    texts = [text * 10 for text in TEXTS]
    result = fxprune.prune(model, texts, tokenizer=tokenizer, **options)
    assert str(result.report.calibration) == "the texts passed: 10 samples, 1,280 tokens, 128 each"
    short = fxprune.prune(
        model, TEXTS, tokenizer=tokenizer, **options
    )  # the recipe's ten samples are the most it takes
    assert str(short.report.calibration) == "the texts passed: 4 samples, 512 tokens, 128 each"
    for calibration, says in (
        (["one"], "3 tokens are fewer than 1 sample of 128. Give a longer text, or samples of fewer tokens"),
        ([""], "it has no text"),
        ([{"question": "who"}], r"row 1: none of the known fields.*\['question'\]"),
        ("nowhere.txt", "nowhere.txt"),
    ):
        with pytest.raises((CalibrationError, DataError), match=says):
            fxprune.prune(model, calibration, tokenizer=tokenizer, **options)


def test_a_data_set_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", offline)
    for name in ("c4", "owner/name"):
        with pytest.raises(DataError, match=r"cannot be loaded: ConnectionError: offline. Give a path ending in"):
            load_named(name)
