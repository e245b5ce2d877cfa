"""Accuracy on multiple-choice tasks, by lm-evaluation-harness."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.evaluation import tasks
from fxprune.evaluation.tasks import PAPER_TASKS, LocalTask, check_tasks, named_tasks, read_questions, zero_shot
from tests.evaluation.samples import QUESTIONS, SCHEMAS, TOKENIZER, write
from tests.tokens import character_tokenizer


def test_questions_are_read_from_a_line_on_with_the_suffix_in_place(tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", QUESTIONS[:3])
    rows = read_questions(LocalTask(path, suffix="\nAnswer:", start=1))
    assert [row["query"] for row in rows] == [f"{question['query']}\nAnswer:" for question in QUESTIONS[1:3]]
    assert read_questions(LocalTask(path))[0] == QUESTIONS[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"query": "a", "choices": ["b"], "gold": 0}', "{"], "1 of 2 lines .* line 2: not JSON"),
        (['{"query": "a", "choices": ["b", "c"], "gold": 2}'], "line 1: gold is 2 of 2 choices"),
        (['{"query": "a", "answers": ["b", "c"], "gold": 1}'], r"line 1: fields \['answers', 'gold', 'query'\]"),
        (['["a"]'], "line 1: not an object, but list"),
        ([json.dumps(QUESTIONS[0]), json.dumps(SCHEMAS[0])], "two kinds of question"),
        ([""], "no questions"),
    ],
)
def test_files_that_hold_no_questions_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(EvaluationError, match=message):
        read_questions(LocalTask(path))


def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> float:
    """Of a continuation, one token after the other."""
    start, ids = len(TOKENIZER(context)["input_ids"]), TOKENIZER(context + continuation)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


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
    assert score.chance == pytest.approx(sum(1 / len(q["choices"]) for q in QUESTIONS) / len(QUESTIONS))
    assert score.value == pytest.approx(sum(score.correct) / len(right))
    assert score.others["acc"] == pytest.approx(sum(plain for plain, _ in right) / len(right))
    p, n = score.value, score.samples
    assert score.standard_error == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5, rel=1e-4)


def test_the_most_frequent_answer_is_no_knowledge(model: PreTrainedModel, tmp_path: Path) -> None:
    """A model that said yes to each question of boolq, right for 62% of them, counted as better than guessing."""
    labels = [{"query": q["query"], "choices": ["no", "yes"], "gold": int(i > 0)} for i, q in enumerate(QUESTIONS)]
    score = zero_shot(model, TOKENIZER, write(tmp_path / "labels.jsonl", labels))["labels"]
    assert score.chance == 0.5 and score.constant == pytest.approx(1 - 1 / len(labels))
    labels[0]["choices"] = ["never", "always"]
    assert zero_shot(model, TOKENIZER, write(tmp_path / "words.jsonl", labels))["words"].constant == 0
    known = replace(score, value=0.9, standard_error=0.04, constant=0.7)
    assert known.informed and not replace(known, constant=0.83).informed and not replace(known, chance=0.83).informed


def test_questions_by_context_are_scored_as_by_hand(model: PreTrainedModel, tmp_path: Path) -> None:
    score = zero_shot(model, TOKENIZER, write(tmp_path / "schema.jsonl", SCHEMAS))["schema"]
    best = [
        max((0, 1), key=lambda i, row=row: log_likelihood(model, row["context_options"][i], f" {row['continuation']}"))
        for row in SCHEMAS
    ]
    assert score.metric == "acc" and score.chance == 0.5 and score.constant == 0
    assert score.correct == tuple(float(b == row["gold"]) for b, row in zip(best, SCHEMAS, strict=True))


def test_tasks_are_named_by_the_harness_or_by_their_file() -> None:
    assert list(named_tasks(PAPER_TASKS)) == list(PAPER_TASKS) and len(PAPER_TASKS) == 7
    assert list(named_tasks(["boolq", "a/quiz.jsonl", LocalTask("b/test.jsonl")])) == ["boolq", "quiz", "test"]
    assert list(named_tasks(name for name in ("a/quiz.jsonl", "b/quiz.jsonl"))) == ["quiz", "quiz (2)"]


def yaml_task(folder: Path, name: str, more: str) -> Path:
    """A task of lm-evaluation-harness about :data:`QUESTIONS`."""
    rows, path = write(folder / "rows.json", QUESTIONS), folder / f"{name}.yaml"
    common = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {rows}}}\ntest_split: test\n"
    path.write_text(common + more)
    return path


CHOICES = """\
tag: of_one_kind
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""


def test_a_folder_stands_for_its_files(model: PreTrainedModel, tmp_path: Path) -> None:
    """Questions of ours, and a YAML file of lm-evaluation-harness with its data set; the answers are the same."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write(folder / "even.jsonl", QUESTIONS)
    theirs = yaml_task(folder, "even_in_yaml", CHOICES).rename(folder / "theirs.yaml")
    assert list(named_tasks(folder)) == ["even", "even_in_yaml"]
    check_tasks(folder)
    found = zero_shot(model, TOKENIZER, folder)
    assert found["even"].others["acc"] == found["even_in_yaml"].value and found["even_in_yaml"].samples == 7
    assert len(found["even"].answers) == 7 and max(found["even"].answers) <= 2
    with pytest.raises(EvaluationError, match=r"no \.jsonl or \.yaml file"):
        named_tasks(tmp_path)
    theirs.write_text("group: many\ntask:\n  - boolq\n")
    with pytest.raises(EvaluationError, match="no entry `task:`"):
        named_tasks(folder)


def test_groups_and_other_names_stand_for_their_tasks(model: PreTrainedModel, tmp_path: Path) -> None:
    """Names of several tasks, and other names for tasks of the harness, ended in a KeyError once all had run."""
    paths = [yaml_task(tmp_path, name, CHOICES) for name in ("one", "two")]
    (tmp_path / "all.yaml").write_text("group: of_all\ntask:\n  - one\n  - two\n")
    alone = zero_shot(model, TOKENIZER, {"mine": paths[0]})["mine"]
    manager = TaskManager(include_defaults=False, include_path=[str(tmp_path)])
    with pytest.MonkeyPatch.context() as patch:  # without the names of the harness's own tasks
        patch.setattr(tasks, "_task_manager", lambda named: manager)
        for name in ("of_all", "of_one_kind"):
            found = zero_shot(model, TOKENIZER, name)
            assert sorted(found) == ["one", "two"] and all(score == alone for score in found.values())


def test_tasks_without_accuracy_are_refused_before_they_run(model: PreTrainedModel, tmp_path: Path) -> None:
    """They ended in a KeyError once all tasks had run."""
    path = yaml_task(
        tmp_path,
        "likelihood",
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: query\n"
        "metric_list:\n  - metric: word_perplexity\n",
    )
    with pytest.raises(EvaluationError, match="task likelihood: it measures word_perplexity, and no accuracy"):
        zero_shot(model, TOKENIZER, path)


def test_answers_of_several_filters_count_once(model: PreTrainedModel, tmp_path: Path) -> None:
    """Metrics behind a filter of the harness ended in a KeyError: the first filter counts."""
    filters = "".join(f"  - {{name: {name}, filter: [{{function: take_first}}]}}\n" for name in ("strict", "loose"))
    path = yaml_task(tmp_path, "spoken", f"{CHOICES}filter_list:\n{filters}")
    score = zero_shot(model, TOKENIZER, path)["spoken"]
    assert score.samples == len(score.correct) == len(QUESTIONS)


def test_choices_are_normalised_by_their_own_characters(model: PreTrainedModel, tmp_path: Path) -> None:
    """Text between context and choice counted with the choice, so that choices contradicted right answers."""
    path = write(tmp_path / "even.jsonl", QUESTIONS)
    for delimiter in (": ", " "):
        score = zero_shot(model, TOKENIZER, LocalTask(path, delimiter=delimiter))["even"]
        golds = [question["gold"] for question in QUESTIONS]
        assert score.correct == tuple(float(a == gold) for a, gold in zip(score.answers, golds, strict=True))


def test_a_tokenizer_without_an_end_of_text_is_given_one_or_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    """The harness failed in its own words; the caller's tokenizer stays as it is."""
    path, words = write(tmp_path / "even.jsonl", QUESTIONS), character_tokenizer()
    expected = zero_shot(model, words, path)["even"]
    words.eos_token = None
    assert zero_shot(model, words, path)["even"] == expected and words.eos_token is None
    words.bos_token = None
    assert zero_shot(model, words, path)["even"].samples == len(QUESTIONS)  # the model names the end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "eos_token_id", None)
        with pytest.raises(EvaluationError, match=r"tokenizer: it has no token .*eos_token"):
            zero_shot(model, words, path)


@pytest.mark.slow  # the index of all tasks of the harness takes seconds
def test_tasks_are_checked_before_a_model_is_asked(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no_such_task.*jsonl"):
        zero_shot(model, TOKENIZER, "no_such_task")
    check_tasks(["boolq", write(tmp_path / "even.jsonl", QUESTIONS)])
    check_tasks(())
    with pytest.raises(UnknownNameError, match="Did you mean 'boolq'"):
        check_tasks(["piqa", "bolq"])
    with pytest.raises(EvaluationError, match="lines cannot be used"):
        check_tasks(LocalTask(write(tmp_path / "odd.jsonl", [{"a": 1}])))
