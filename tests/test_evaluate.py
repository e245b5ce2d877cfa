"""Perplexity by window and stride, tasks by the harness, and models side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import fxprune
from fxprune.comparison import Column, Comparison, compare_models
from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.evaluation import (
    CORPORA,
    PAPER_TASKS,
    Evaluation,
    LocalTask,
    Perplexity,
    TaskScore,
    text_perplexity,
    zero_shot,
)
from fxprune.evaluation.perplexity import sliding_windows
from fxprune.evaluation.zeroshot import named_tasks
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer

TOKENIZER = character_tokenizer()
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps for an hour or two. " * 2
QUESTIONS = [
    {"query": f"Is {a} even?", "choices": ["no", "yes", "it may be"], "gold": (a + 1) % 2} for a in range(2, 9)
]
SCHEMAS = [
    {"context_options": ["The cup is full so it", "The cup is empty so I"], "continuation": "spills.", "gold": i % 2}
    for i in range(4)
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> float:
    """Of a continuation, one token after the other."""
    start, ids = len(TOKENIZER(context)["input_ids"]), TOKENIZER(context + continuation)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


# Perplexity


@pytest.mark.parametrize(("window", "stride"), [(20, 20), (20, 7), (16, 1)])
def test_perplexity_predicts_each_token_once_with_as_much_context_as_there_is(
    model: PreTrainedModel, window: int, stride: int
) -> None:
    ids = TOKENIZER(TEXT)["input_ids"]
    losses, done = [], 0
    for start in range(0, len(ids) - window + 1, stride):
        part = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logits = model(part).logits[0].double().log_softmax(-1)
        first = max(1, done - start)
        losses.append([-float(logits[i - 1, part[0, i]]) for i in range(first, window)])
        done = start + window
    flat = [loss for part in losses for loss in part]
    found = text_perplexity(model, TOKENIZER, TEXT, window=window, stride=stride)
    assert found.value == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    assert (found.window, found.stride) == (window, stride)
    assert (found.windows, found.predicted) == (len(losses), len(flat))


def test_standard_error_is_that_of_the_windows_means(model: PreTrainedModel) -> None:
    found = text_perplexity(model, TOKENIZER, TEXT, window=20)
    windows = torch.tensor(TOKENIZER(TEXT)["input_ids"])[: 20 * found.windows].view(-1, 20)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double().log_softmax(-1)
    means = -logits.gather(2, windows[:, 1:, None])[..., 0].mean(dim=1)
    expected = found.value * float(means.std() / len(means) ** 0.5)
    assert found.standard_error == pytest.approx(expected, rel=1e-5)


def test_limited_windows_are_spread_over_the_text() -> None:
    windows, first = sliding_windows(torch.arange(100), window=10, stride=5, limit=3)
    assert windows[:, 0].tolist() == [0, 45, 90]
    assert first.tolist() == [1, 5, 5]


@pytest.mark.parametrize(
    ("window", "stride", "limit", "tokens"),
    [(1, 1, None, 9), (4, 5, None, 9), (4, 0, None, 9), (4, 4, 0, 9), (9, 9, None, 8)],
)
def test_windows_that_predict_nothing_are_refused(window: int, stride: int, limit: int | None, tokens: int) -> None:
    with pytest.raises(EvaluationError, match="window"):
        sliding_windows(torch.arange(tokens), window, stride, limit)


def test_texts_are_files_known_names_or_text_itself(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(**options: Any) -> Any:
        asked.append(options)
        return {"text": [TEXT, TEXT], "sentence": [TEXT]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (tmp_path / "note.txt").write_text(TEXT)
    found = fxprune.evaluate(model, TOKENIZER, texts=["wikitext2", "ptb", tmp_path / "note.txt"], window=40)
    named = fxprune.evaluate(model, TOKENIZER, texts={"mine": TEXT}, window=40)
    assert list(found.perplexities) == ["wikitext2", "ptb", "note"] and list(named.perplexities) == ["mine"]
    assert found.perplexities["note"] == named.perplexities["mine"] == found.perplexities["ptb"]
    assert [(o["path"], o["split"]) for o in asked] == [(CORPORA[n]["path"], CORPORA[n]["split"]) for n in CORPORA]
    with pytest.raises(UnknownNameError, match="'wikitext2'"):
        fxprune.evaluate(model, TOKENIZER, texts="wikitext")
    with pytest.raises(EvaluationError, match="no texts and no tasks"):
        fxprune.evaluate(model, TOKENIZER, texts=())


def test_a_graph_is_measured_on_texts_and_refused_on_tasks(model: PreTrainedModel, tmp_path: Path) -> None:
    result = fxprune.prune(model, None, importance="l2", protect=())
    of_graph = fxprune.evaluate(result.graph_module, TOKENIZER, texts={"a": TEXT}, window=40)
    of_result = fxprune.evaluate(result, TOKENIZER, texts={"a": TEXT}, window=40)
    assert of_graph.perplexities["a"].value == pytest.approx(of_result.perplexities["a"].value, rel=1e-4)
    with pytest.raises(EvaluationError, match="tasks need a Hugging Face model, not a"):
        zero_shot(result.graph_module, TOKENIZER, write(tmp_path / "q.jsonl", QUESTIONS))


# Tasks


def test_local_questions_are_scored_as_by_hand(model: PreTrainedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "even.jsonl", QUESTIONS)
    score = zero_shot(model, TOKENIZER, {"even": LocalTask(path, suffix="\nAnswer:")})["even"]
    right = []
    for question in QUESTIONS:
        context = f"{question['query']}\nAnswer:"
        sums = [log_likelihood(model, context, f" {choice}") for choice in question["choices"]]
        lengths = [len(choice) for choice in question["choices"]]
        normed = [total / length for total, length in zip(sums, lengths, strict=True)]
        plain, by_length = sums.index(max(sums)), normed.index(max(normed))
        right.append((plain == question["gold"], by_length == question["gold"]))
    assert score.metric == "acc_norm" and score.samples == len(QUESTIONS)
    assert score.correct == tuple(float(norm) for _, norm in right)
    assert score.value == pytest.approx(sum(score.correct) / len(right))
    assert score.others["acc"] == pytest.approx(sum(plain for plain, _ in right) / len(right))
    p, n = score.value, score.samples
    assert score.standard_error == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5, rel=1e-4)


def test_questions_by_context_are_scored_as_by_hand(model: PreTrainedModel, tmp_path: Path) -> None:
    score = zero_shot(model, TOKENIZER, write(tmp_path / "schema.jsonl", SCHEMAS))["schema"]
    best = [
        max((0, 1), key=lambda i, row=row: log_likelihood(model, row["context_options"][i], f" {row['continuation']}"))
        for row in SCHEMAS
    ]
    assert score.metric == "acc"
    assert score.correct == tuple(float(b == row["gold"]) for b, row in zip(best, SCHEMAS, strict=True))


def test_measuring_leaves_model_tokenizer_and_random_numbers_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    path = write(tmp_path / "even.jsonl", QUESTIONS)
    slim = fxprune.prune(model, None, importance="l2", protect=())
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    slim.model.train()
    before, state = list(slim.model.parameters()), torch.get_rng_state()
    first = fxprune.evaluate(slim, tokenizer, texts=(), tasks=path, questions=4)
    assert slim.model.training and tokenizer.pad_token is None
    assert torch.equal(state, torch.get_rng_state())
    assert all(a is b for a, b in zip(before, slim.model.parameters(), strict=True))
    assert first.tasks["even"].samples == 4
    assert slim.model.eval()(token_ids()).logits.allclose(slim(token_ids()).logits, atol=1e-5)


def test_tasks_are_named_by_the_harness_or_by_their_file() -> None:
    assert list(named_tasks(PAPER_TASKS)) == list(PAPER_TASKS) and len(PAPER_TASKS) == 7
    assert list(named_tasks(["boolq", "a/quiz.jsonl", LocalTask("b/test.jsonl")])) == ["boolq", "quiz", "test"]


def test_a_task_that_nobody_knows_is_told(model: PreTrainedModel) -> None:
    with pytest.raises(EvaluationError, match=r"no_such_task.*jsonl"):
        zero_shot(model, TOKENIZER, "no_such_task")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"query": "a", "choices": ["b"], "gold": 0}', "{"], "1 of 2 lines .* line 2: not JSON"),
        (['{"query": "a", "choices": ["b", "c"], "gold": 2}'], "line 1: gold is 2 of 2 choices"),
        (['{"query": "a", "answers": ["b", "c"], "gold": 1}'], r"line 1: fields \['answers', 'gold', 'query'\]"),
        (['["a"]'], "line 1: a list, not an object"),
        ([json.dumps(QUESTIONS[0]), json.dumps(SCHEMAS[0])], "two kinds of question"),
        ([""], "no questions"),
    ],
)
def test_files_that_hold_no_questions_are_refused(
    model: PreTrainedModel, tmp_path: Path, lines: list[str], message: str
) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(EvaluationError, match=message):
        zero_shot(model, TOKENIZER, path)


# Side by side


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
        "average", "retained",
    ]  # fmt: skip
    assert comparison.table("title").row_count == 8
    picture = comparison.plot(tmp_path / "comparison.png")
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000


def test_nothing_measured_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no perplexities and no tasks"):
        Comparison((Column("dense", 1, 1, 1, 1.0, Evaluation()),)).plot(tmp_path / "empty.png")
