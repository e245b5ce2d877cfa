"""Quality of a slim model beside the dense one, on text that the prune did not use."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.data.built_in import offline_docstrings
from fxprune.data.calibration import HeldOut
from fxprune.errors import CalibrationError, FxpruneError
from fxprune.evaluation.comparison import BUILT_IN, WINDOWS, measure_quality, quality_of
from fxprune.evaluation.perplexity import paired_perplexities, text_perplexity
from fxprune.report.quality import Quality
from fxprune.report.report import Report
from tests.models import tiny
from tests.tokens import character_tokenizer

TOKENIZER = character_tokenizer()
WEIGHTS: dict[str, Any] = {"recipe": "llm-pruner", "importance": "l2", "ratio": 0.1, "protect": ()}


def words(count: int) -> str:
    """Text without a phrase that occurs twice."""
    return " ".join(f"{random.Random(i).random():.12f}"[2:] for i in range(count))


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    return tiny("llama")


@pytest.fixture(scope="module")
def result(dense: torch.nn.Module) -> fxprune.Result:
    return fxprune.prune(dense, tokenizer=TOKENIZER, **WEIGHTS)


def test_a_prune_measures_what_evaluate_measures(dense: torch.nn.Module, result: fxprune.Result) -> None:
    (found,) = result.report.quality.texts  # type: ignore[union-attr]
    options: dict[str, Any] = {
        "texts": {"text": offline_docstrings()},
        "window": found.window,
        "windows": WINDOWS,
    }
    theirs = fxprune.evaluate(dense, TOKENIZER, **options)
    ours = fxprune.evaluate(result, TOKENIZER, reference=dense, **options)
    (again,) = quality_of(theirs, ours).texts
    assert (found.text, found.windows, found.window, found.tokens) == (BUILT_IN, 12, 256, again.tokens)
    for name in ("perplexity", "bits_per_byte", "ratio", "divergence", "agreement"):
        torch.testing.assert_close(getattr(found, name), getattr(again, name), rtol=1e-4, atol=1e-5)
    (answer,) = result.report.quality.answers  # type: ignore[union-attr]
    assert answer.question.endswith("?") and answer.dense != answer.slim


def test_measuring_changes_nothing(dense: torch.nn.Module, result: fxprune.Result) -> None:
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    state = torch.get_rng_state()
    other = fxprune.prune(dense, tokenizer=TOKENIZER, eval=False, **WEIGHTS)
    assert other.plan == result.plan and other.report.quality is None
    assert other.report.unmeasured == "it was not asked for"
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    measured = other.evaluate(dense, TOKENIZER)
    assert measured.report.quality is not None and measured.report.unmeasured == "" and not dense.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_what_the_prune_used_is_not_measured_on(dense: torch.nn.Module) -> None:
    text = words(400)
    half = len(text) // 2 // 64 * 64
    seen = [torch.tensor(TOKENIZER(text[:half])["input_ids"])[None]]
    assert len(seen[0][0]) == half
    pair = paired_perplexities(dense, dense, TOKENIZER, text, window=64, seen=seen)
    rest = text_perplexity(dense, TOKENIZER, text[half:], window=64)
    assert pair[0].value == pytest.approx(rest.value) == pytest.approx(pair[1].value)
    assert pair[0].windows == rest.windows and pair[1].divergence is not None and pair[1].divergence.agreement == 1
    with pytest.raises(FxpruneError, match="all of the text was used"):
        paired_perplexities(dense, dense, TOKENIZER, text[: half - 10], window=64, seen=seen)


def test_a_text_of_the_user_is_measured_where_it_was_not_used(dense: torch.nn.Module, tmp_path: Path) -> None:
    text = words(900)
    (tmp_path / "mine.txt").write_text(text)
    ids = torch.tensor(TOKENIZER(text)["input_ids"])
    for used, name, windows in ((len(ids) // 2, "mine.txt", 12), (len(ids) - 100, BUILT_IN, 12)):
        rows = ids[: used // 50 * 50].view(-1, 50)
        result = fxprune.prune(dense, rows, tokenizer=TOKENIZER, eval_text=tmp_path / "mine.txt", **WEIGHTS)
        (found,) = result.report.quality.texts  # type: ignore[union-attr]
        assert (found.text, found.windows) == (name, windows)
    with pytest.raises(CalibrationError, match="it is a folder"):
        fxprune.prune(dense, tokenizer=TOKENIZER, eval_text=tmp_path)


@pytest.mark.slow
def test_samples_that_stop_training_count_as_used(dense: torch.nn.Module) -> None:
    """Tuning stops by windows of the text that is measured on."""
    recipe = "calibrate{tokens=64, samples=4}, find-groups, l2, select-by-ratio{protect=[]}, record-teacher, "
    recipe += "shrink, tune{epochs=1, measurements=1}, emit-model, make-report"
    result = fxprune.prune(dense, tokenizer=TOKENIZER, recipe=recipe, ratio=0.1)
    held = fxprune.facts_of(result.graph_module)[HeldOut].samples
    assert len(held) == 16
    text = TOKENIZER.decode(held[0].inputs["input_ids"][0])
    assert text in offline_docstrings()
    assert result.report.quality is not None
    everything = [torch.tensor(TOKENIZER(offline_docstrings())["input_ids"])[None]]
    pair = paired_perplexities(
        result.model, dense, TOKENIZER, offline_docstrings(), window=256, limit=12,
        seen=[sample.inputs["input_ids"] for sample in held],
    )  # fmt: skip
    assert result.report.quality.texts[0].perplexity[0][0] == pytest.approx(pair[0].value, rel=1e-4)
    with pytest.raises(FxpruneError, match="all of the text was used"):
        paired_perplexities(dense, dense, TOKENIZER, text, window=64, seen=everything)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "there was no tokenizer"),
        ({"tokenizer": TOKENIZER, "inplace": True}, "the model was pruned in place, and the dense one is gone"),
        ({"tokenizer": len}, "takes no keyword arguments"),
    ],
)
def test_the_report_gives_the_reason_why_nothing_was_measured(options: dict[str, Any], why: str) -> None:
    result = fxprune.prune(tiny("llama"), **WEIGHTS, **options)
    assert result.report.quality is None and why in result.report.unmeasured
    assert f"Not measured: {result.report.unmeasured}." in result.report.to_html().replace("&#39;", "'")


def test_a_tokenizer_of_another_model_does_not_lose_the_result() -> None:
    other = character_tokenizer()
    other.add_tokens([f"{letter}{vowel}" for letter in "bcdfghklmnprstvwx" for vowel in "aeiou"])
    result = fxprune.prune(tiny("llama"), tokenizer=other, **WEIGHTS)
    assert result.model is not None and "the model knows 0 to 130" in result.report.unmeasured


def test_a_model_without_answers_has_figures(dense: torch.nn.Module, result: fxprune.Result) -> None:
    found = measure_quality(dense, result.model, TOKENIZER, window=32, windows=2)
    assert found.answers == () and found.texts[0].windows == 2


@pytest.mark.slow
def test_a_result_far_from_the_dense_model_has_advice() -> None:
    values: dict[str, Any] = {"windows": 2, "window": 8, "tokens": 14, "perplexity": ((10.0, 1.0), (30.0, 2.0))}
    values |= {"bits_per_byte": ((1.0, 0.1), (1.6, 0.1)), "divergence": (1.1, 0.1), "agreement": (0.4, 0.1)}
    far = Quality.from_dict({"texts": [{"text": "a <b>", "ratio": (3.0, 0.2), **values}], "answers": []})
    near = Quality.from_dict({"texts": [{"text": "a", "ratio": (1.6, 0.2), **values}], "answers": []})
    report = Report(parameters=(10, 5), macs=(10, 5), tokens=1, quality=far)
    assert "the recipe `best`" in report.advice and "a smaller ratio" in report.advice
    tuned = Report(parameters=(10, 5), macs=(10, 5), tokens=1, quality=far, passes=(("tune", "tune{weights}", 1.0),))
    assert "best" not in tuned.advice and "fxprune recover" in tuned.advice
    assert Report(parameters=(10, 5), macs=(10, 5), tokens=1, quality=near).advice == ""
    page = report.to_html()
    assert (
        "Far from the dense model" in page and "a &lt;b&gt;: 2 windows of 8 tokens" in page and "3.000 ± 0.200" in page
    )
    assert Report.from_dict(report.to_dict()) == report
