"""Models side by side: numbers, their errors, tables and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import fxprune
from fxprune.errors import EvaluationError
from fxprune.evaluation.comparison import Column, Comparison, Evaluation, compare_models
from fxprune.evaluation.perplexity import Perplexity
from fxprune.evaluation.tasks import TaskScore
from tests.evaluation.samples import QUESTIONS, TEXT, TOKENIZER, write


def column(name: str, correct: tuple[float, ...], perplexity: float = 10.0) -> Column:
    score = TaskScore("acc", sum(correct) / len(correct), 0.1, len(correct), correct=correct)
    taken = Perplexity(perplexity, 0.5, 256, 256, 4, 1020)
    return Column(name, 1000, 2000, 4000, 1.5, Evaluation({"text": taken}, {"quiz": score}))


def test_retained_fraction_and_its_error_are_those_of_paired_answers() -> None:
    dense, slim = (1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 0.0, 0.0)
    comparison = Comparison((column("dense", dense), column("pruned", slim, 12.0)))
    rest = torch.tensor(slim, dtype=torch.float64) - torch.tensor(dense, dtype=torch.float64) * (2 / 3)
    kept = comparison.retained("pruned")
    assert kept == pytest.approx((2 / 3, float(rest.std() / 4**0.5) / 0.75))
    assert comparison.retained("dense") == (1.0, 0.0)
    data = json.loads(comparison.to_json())
    assert data["columns"][1]["retained"] == pytest.approx(2 / 3)
    assert "correct" not in data["columns"][0]["evaluation"]["tasks"]["quiz"]


def test_what_the_first_model_guesses_is_no_part_of_what_is_retained() -> None:
    quiz, guess = (1.0, 1.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0)

    def asked(name: str, right: tuple[float, ...]) -> Column:
        plain = column(name, right)
        score = TaskScore("acc", 0.25, 0.2, 4, correct=guess, chance=0.25)
        tasks = {"quiz": replace(plain.evaluation.tasks["quiz"], chance=0.5), "guess": score}
        return replace(plain, evaluation=Evaluation({}, tasks))

    comparison = Comparison((asked("dense", quiz), asked("slim", (1.0, 1.0, 0.0, 0.0))))
    kept = comparison.retained("slim")
    assert comparison.informed == ("quiz",) and kept is not None and kept[0] == pytest.approx(2 / 3)
    assert dict((row[0], row[1]) for row in comparison.rows())["retained, but for guess"] == "100.0% ± 0.0%"
    assert comparison.to_dict()["retained_of"] == ["quiz"]
    nothing = Comparison((asked("dense", (1.0, 0.0, 1.0, 0.0)),))
    assert nothing.retained("dense") is None


def test_three_models_are_measured_alike(model: PreTrainedModel, tmp_path: Path) -> None:
    result = fxprune.prune(model, None, importance="l2", protect=())
    models = {"dense": model, "pruned": result.model, "recovered": result.model}
    path = write(tmp_path / "even.jsonl", QUESTIONS)
    comparison = compare_models(
        models, TOKENIZER, latency_shape=(1, 8), rounds=2, texts={"text": TEXT}, tasks=path, window=40
    )
    dense, pruned, _ = comparison.columns
    assert (dense.parameters, pruned.parameters) == result.report.parameters
    assert (dense.macs, pruned.macs) == result.report.macs
    assert pruned.memory < dense.memory and pruned.latency_ms > 0
    table = comparison.to_markdown().splitlines()
    assert table[0] == "|  | dense | pruned | recovered |"
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "parameters", "MACs at 64 tokens", "memory, MB", "latency, ms at 1 x 8", "perplexity, text", "even, acc_norm",
        "average", *(["retained"] if comparison.informed else []),
    ]  # fmt: skip
    assert comparison.table("title").row_count == len(table) - 2
    picture = comparison.plot(tmp_path / "comparison.png")
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000


def test_nothing_measured_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no perplexities and no tasks"):
        Comparison((Column("dense", 1, 1, 1, 1.0, Evaluation()),)).plot(tmp_path / "empty.png")
