"""Models side by side, on texts, tasks and samples of any kind."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import fxprune
from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.evaluation import Perplexity, agreement
from fxprune.evaluation.comparison import Column, Comparison, Evaluation, compare_models
from fxprune.evaluation.tasks import TaskScore, zero_shot
from fxprune.masking.parts import PartwiseModel, parts_by_weights
from tests.evaluation.samples import QUESTIONS, TEXT, TOKENIZER, write
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer


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
    scores = {"a": TaskScore("acc", 0.25, 0.1, 2, correct=(0.0, 0.5)), "b": TaskScore("acc", 0.75, 0.1, 1)}
    assert Evaluation(tasks=scores).average == 0.5 and Evaluation().average is None


def test_flips_and_differences_are_paired_by_question() -> None:
    """Of three right answers one is lost; two of four choices differ, one of which was wrong before and after."""

    def answered(name: str, correct: tuple[float, ...], picks: tuple[int, ...]) -> Column:
        score = TaskScore("acc", 0.0, 0.0, 4, {}, correct, picks)
        return replace(column(name, correct), evaluation=Evaluation(tasks={"quiz": score}))

    dense = answered("dense", (1.0, 1.0, 1.0, 0.0), (0, 0, 1, 2))
    found = Comparison((dense, answered("pruned", (1.0, 0.0, 1.0, 0.0), (0, 1, 1, 0))))
    assert found.difference("pruned", "quiz") == pytest.approx((-0.25, 0.25))
    lost, changed = found.flips("pruned", ["quiz"]) or ((0, 0), (0, 0))
    assert lost == pytest.approx((1 / 3, 1 / 3)) and changed == pytest.approx((0.5, (1 / 12) ** 0.5))
    labels = [row[0] for row in found.rows()]
    assert labels[-2:] == ["right answers lost", "choices changed"]
    assert Comparison((column("dense", (1.0,)), column("pruned", (0.0,)))).flips("pruned", ["quiz"]) is None
    wrong = answered("dense", (0.0,) * 4, (0, 1, 2, 0)), answered("pruned", (0.0,) * 4, (1, 1, 2, 1))
    lost, changed = Comparison(wrong).flips("pruned", ["quiz"]) or ((1, 1), (0, 0))
    assert lost == (0, 0) and changed[0] == 0.5, "choices that changed were not told where none was right"


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
    assert dict((row[0], row[1]) for row in comparison.rows())["retained, except for guess"] == "100.0% ± 0.0%"
    assert comparison.to_dict()["retained_of"] == ["quiz"]
    nothing = Comparison((asked("dense", (1.0, 0.0, 1.0, 0.0)),))
    assert nothing.retained("dense") is None


@pytest.mark.slow
def test_three_models_are_measured_alike(model: PreTrainedModel, slim: fxprune.Result, tmp_path: Path) -> None:
    models = {"dense": model, "pruned": slim.model, "recovered": slim.model}
    path = write(tmp_path / "even.jsonl", QUESTIONS)
    comparison = compare_models(
        models, TOKENIZER, latency_shape=(1, 8), rounds=2, texts={"text": TEXT}, tasks=path, window=40
    )
    dense, pruned, _ = comparison.columns
    assert (dense.parameters, pruned.parameters) == slim.report.parameters
    assert (dense.macs, pruned.macs) == slim.report.macs
    assert pruned.memory < dense.memory and pruned.latency_ms > 0
    table = comparison.to_markdown().splitlines()
    assert table[0] == "|  | dense | pruned | recovered |"
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "parameters", "MACs at 64 tokens", "memory, MB", "latency, ms at 1 x 8", "perplexity, text", "bits per byte",
        "even, acc_norm", "difference", "average", *(["retained"] if comparison.informed else []),
        "right answers lost", "choices changed",
    ]  # fmt: skip
    assert comparison.table("title").row_count == len(table) - 2
    picture = comparison.plot(tmp_path / "comparison.png")
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000
    with pytest.raises(EvaluationError, match="no perplexities and no tasks"):
        Comparison((Column("dense", 1, 1, 1, 1.0, Evaluation()),)).plot(tmp_path / "empty.png")


def test_texts_are_files_or_text_itself(model: PreTrainedModel, tmp_path: Path) -> None:
    """Names of data sets are those of :func:`load_corpus`."""
    (tmp_path / "note.txt").write_text(TEXT)
    found = fxprune.evaluate(model, TOKENIZER, texts=[tmp_path / "note.txt"], window=40)
    named = fxprune.evaluate(model, TOKENIZER, texts={"mine": TEXT}, window=40)
    assert list(found.perplexities) == ["note"] and list(named.perplexities) == ["mine"]
    assert found.perplexities["note"] == named.perplexities["mine"]
    with pytest.raises(EvaluationError, match="no texts and no tasks"):
        fxprune.evaluate(model, TOKENIZER, texts=())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_low_memory_gives_the_same_numbers(family: str) -> None:
    model = tiny(family)
    steps: list[str] = []

    def track(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        for done, item in enumerate(items, start=1):
            steps.append(f"{done} of {total}")
            yield item

    options: dict[str, Any] = {"texts": {"a": TEXT, "b": TEXT[:90]}, "window": 40, "batch": 2}
    whole = fxprune.evaluate(model, TOKENIZER, **options)
    graph_module = fxprune.trace(model).graph_module
    for given in (model, graph_module):
        low = fxprune.evaluate(given, TOKENIZER, **options, memory="low", track=track)
        for name, found in whole.perplexities.items():
            assert low.perplexities[name].value == pytest.approx(found.value, rel=1e-5)
            assert low.perplexities[name].windows == found.windows
    batches = -(-whole.perplexities["a"].windows // 2)
    count = len(parts_by_weights(graph_module)) * batches
    assert count > batches and steps.count(f"{count} of {count}") == 2
    assert PartwiseModel(model)(token_ids(2)).logits.shape[:2] == token_ids(2).shape


def test_parts_are_refused_where_the_graph_takes_more_than_token_ids(model: PreTrainedModel) -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    graph_module = fxprune.trace(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).graph_module
    with pytest.raises(EvaluationError, match="takes input_ids, attention_mask"):
        fxprune.evaluate(graph_module, TOKENIZER, texts={"a": TEXT}, window=40, memory="low")
    with pytest.raises(UnknownNameError, match="'lo'"):
        fxprune.evaluate(model, TOKENIZER, texts={"a": TEXT}, window=40, memory="lo")


def test_measuring_leaves_model_tokenizer_and_random_numbers_alone(slim: fxprune.Result, tmp_path: Path) -> None:
    path = write(tmp_path / "even.jsonl", QUESTIONS)
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    slim.model.train()
    before, state = list(slim.model.parameters()), torch.get_rng_state()
    first = fxprune.evaluate(slim, tokenizer, texts={"a": TEXT}, tasks=path, window=40, questions=4)
    assert slim.model.training and tokenizer.pad_token is None
    assert torch.equal(state, torch.get_rng_state())
    assert all(a is b for a, b in zip(before, slim.model.parameters(), strict=True))
    assert first.tasks["even"].samples == 4
    assert slim.model.eval()(token_ids()).logits.allclose(slim(token_ids()).logits, atol=1e-5)
    of_graph = fxprune.evaluate(slim.graph_module, TOKENIZER, texts={"a": TEXT}, window=40)
    assert of_graph.perplexities["a"].value == pytest.approx(first.perplexities["a"].value, rel=1e-4)
    with pytest.raises(EvaluationError, match="tasks need a Hugging Face model, not a"):
        zero_shot(slim.graph_module, TOKENIZER, path)


def gives(*logits: torch.Tensor, loss: float | None = None, name: str = "logits") -> Any:
    """A model that gives one of some logits for each sample of a batch, by the number in its input."""
    extra = {} if loss is None else {"loss": torch.tensor(loss)}
    return lambda x, labels=None, attention_mask=None: {**extra, name: torch.stack([logits[int(i)] for i in x])}


def says(*scores: float, name: str = "logits") -> Any:
    return gives(torch.tensor(scores), name=name)


X = {"x": torch.tensor([0])}


def test_classes_are_compared_by_what_is_likely_and_by_labels() -> None:
    labelled = [{**X, "labels": torch.tensor([1])}, {**X, "labels": torch.tensor([0])}, X]
    found = agreement(says(0.0, math.log(3)), says(math.log(3), 0.0), labelled)
    assert found.accuracy == (0.5, 0.5) and found.same == 0
    assert found.divergence == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))
    assert [row[0] for row in found.rows()][1:] == [
        "accuracy, 3 samples",
        "divergence, nats",
        "same first class",
        "cosine of the outputs",
    ]


def test_vectors_are_compared_by_their_angle() -> None:
    found = agreement(says(0.0, 2.0, name="embeddings"), says(3.0, 3.0, name="embeddings"), [X])
    assert found.cosine == pytest.approx(math.sqrt(0.5))
    assert found.accuracy is found.divergence is found.same is None


def test_labels_that_do_not_count_are_left_out() -> None:
    model = gives(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    found = agreement(model, model, [{**X, "labels": torch.tensor([[1, 1, -100]])}])
    assert found.accuracy == (0.5, 0.5) and found.same == 1 and found.cosine == pytest.approx(1)


def test_a_model_that_does_not_run_is_refused_in_a_line() -> None:
    with pytest.raises(EvaluationError, match="no samples"):
        agreement(says(1.0, 2.0), says(1.0, 2.0), [])
    with pytest.raises(EvaluationError, match="unexpected keyword"):
        agreement(says(1.0, 2.0), says(1.0, 2.0), [{"y": torch.zeros(1)}])


def test_means_are_over_samples_however_they_are_batched() -> None:
    """A batch of three counted as much as a batch of one, and all four as two samples."""
    torch.manual_seed(0)
    models = [gives(*torch.randn(4, 5, 3)) for _ in range(2)]
    labels = torch.randint(3, (4, 5))
    single = [{"x": torch.tensor([i]), "labels": labels[i : i + 1]} for i in range(4)]
    mixed = [single[0], {"x": torch.tensor([1, 2, 3]), "labels": labels[1:]}]
    alone, batched = (agreement(*models, samples) for samples in (single, mixed))
    assert alone.samples == batched.samples == 4
    for name in ("accuracy", "divergence", "same", "cosine"):
        assert getattr(alone, name) == pytest.approx(getattr(batched, name)), name


def test_a_sample_whose_labels_all_do_not_count_has_no_accuracy() -> None:
    """One such sample made the accuracy of all of them NaN."""
    model = gives(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    samples = [{**X, "labels": torch.tensor([row])} for row in ([1, 1], [-100, -100])]
    assert agreement(model, model, samples).accuracy == (0.5, 0.5)
    assert agreement(model, model, samples[1:]).accuracy is None


def test_padding_does_not_count() -> None:
    """Positions that an attention mask leaves out counted as much as the others."""
    whole = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    spoilt = torch.cat((whole[:2], -whole[2:]))
    mask = torch.tensor([[1, 1, 0]])
    found = agreement(gives(whole), gives(spoilt), [{**X, "attention_mask": mask}])
    assert found.divergence == 0 and found.same == 1 and found.cosine == pytest.approx(1)


def test_classes_of_an_image_are_along_its_second_axis() -> None:
    """Scores (samples, classes, height, width) were taken for distributions over the columns of the image."""
    one, other = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    found = agreement(gives(one), gives(other), [{**X, "labels": one.argmax(0)[None]}])
    wanted, given = one.log_softmax(0), other.log_softmax(0)
    assert found.divergence == pytest.approx(float((wanted.exp() * (wanted - given)).sum(0).mean()), rel=1e-5)
    same = float((one.argmax(0) == other.argmax(0)).float().mean())
    assert found.same == pytest.approx(same) and found.accuracy == pytest.approx((1.0, same))


def test_labels_of_a_model_of_next_tokens_are_those_of_the_next_position() -> None:
    """Each label was compared with what the model predicts after it."""
    logits = 9 * torch.eye(4)[torch.tensor([1, 2, 3])]  # it predicts the next number
    labels = torch.tensor([[0, 1, 2]])
    loss = float(torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:]))
    model = gives(logits, loss=loss)
    assert agreement(model, model, [{**X, "labels": labels}]).accuracy == (1.0, 1.0)
