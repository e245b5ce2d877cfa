"""Quality of a slim model beside the dense one, and speed: of calls, of generation, of aligned widths."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import generic

import fxprune
from fxprune.data.built_in import offline_docstrings
from fxprune.data.calibration import HeldOut
from fxprune.errors import ArgumentError, CalibrationError, EvaluationError, FxpruneError
from fxprune.evaluation import speed
from fxprune.evaluation.comparison import BUILT_IN, WINDOWS, measure_quality, quality_of
from fxprune.evaluation.perplexity import paired_perplexities, text_perplexity
from fxprune.evaluation.speed import (
    Widths,
    measure_speed,
    measure_widths,
    read_widths,
    time_interleaved,
    timed_call,
    write_widths,
)
from fxprune.report.quality import Quality
from fxprune.report.report import Report
from tests import remembered
from tests.evaluation.samples import TOKENIZER
from tests.models import tiny
from tests.tokens import character_tokenizer

WEIGHTS: dict[str, Any] = {"recipe": "llm-pruner", "importance": "l2", "ratio": 0.1, "protect": ()}


def words(count: int) -> str:
    """Text without a phrase that occurs twice."""
    return " ".join(f"{random.Random(i).random():.12f}"[2:] for i in range(count))


@pytest.fixture(scope="module")
def result(model: PreTrainedModel) -> fxprune.Result:
    return fxprune.prune(model, tokenizer=TOKENIZER, **WEIGHTS)


def test_a_prune_measures_what_evaluate_measures(model: PreTrainedModel, result: fxprune.Result) -> None:
    (found,) = result.report.quality.texts  # type: ignore[union-attr]
    options: dict[str, Any] = {"texts": {"text": offline_docstrings()}, "window": found.window, "windows": WINDOWS}
    theirs = fxprune.evaluate(model, TOKENIZER, **options)
    ours = fxprune.evaluate(result, TOKENIZER, reference=model, **options)
    (again,) = quality_of(theirs, ours).texts
    assert (found.text, found.windows, found.window, found.tokens) == (BUILT_IN, 12, 256, again.tokens)
    for name in ("perplexity", "bits_per_byte", "ratio", "divergence", "agreement"):
        torch.testing.assert_close(getattr(found, name), getattr(again, name), rtol=1e-4, atol=1e-5)
    (answer,) = result.report.quality.answers  # type: ignore[union-attr]
    assert answer.question.endswith("?") and answer.dense != answer.slim


def test_measuring_changes_nothing(model: PreTrainedModel, result: fxprune.Result) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    other = fxprune.prune(model, tokenizer=TOKENIZER, eval=False, **WEIGHTS)
    assert other.plan == result.plan and other.report.quality is None
    assert other.report.unmeasured == "it was not asked for"
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    measured = other.evaluate(model, TOKENIZER)
    assert measured.report.quality is not None and measured.report.unmeasured == "" and not model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_the_prune_used_is_not_measured_on(model: PreTrainedModel) -> None:
    text = words(400)
    half = len(text) // 2 // 64 * 64
    seen = [torch.tensor(TOKENIZER(text[:half])["input_ids"])[None]]
    assert len(seen[0][0]) == half
    pair = paired_perplexities(model, model, TOKENIZER, text, window=64, seen=seen)
    rest = text_perplexity(model, TOKENIZER, text[half:], window=64)
    assert pair[0].value == pytest.approx(rest.value) == pytest.approx(pair[1].value)
    assert pair[0].windows == rest.windows and pair[1].divergence is not None and pair[1].divergence.agreement == 1
    with pytest.raises(FxpruneError, match="all of the text was used"):
        paired_perplexities(model, model, TOKENIZER, text[: half - 10], window=64, seen=seen)


def test_a_text_of_the_user_is_measured_where_it_was_not_used(model: PreTrainedModel, tmp_path: Path) -> None:
    text = words(900)
    (tmp_path / "mine.txt").write_text(text)
    ids = torch.tensor(TOKENIZER(text)["input_ids"])
    for used, name in ((len(ids) // 2, "mine.txt"), (len(ids) - 100, BUILT_IN)):
        rows = ids[: used // 50 * 50].view(-1, 50)
        result = fxprune.prune(model, rows, tokenizer=TOKENIZER, eval_text=tmp_path / "mine.txt", **WEIGHTS)
        (found,) = result.report.quality.texts  # type: ignore[union-attr]
        assert (found.text, found.windows) == (name, 12)
        told = [note for note in result.report.notes if "mine.txt" in note]
        assert bool(told) == (name == BUILT_IN), "it was replaced in silence"
    with pytest.raises(CalibrationError, match="it is a folder"):
        fxprune.prune(model, tokenizer=TOKENIZER, eval_text=tmp_path)


@pytest.mark.parametrize(
    ("count", "why"),
    [
        (3, "a text of 38 tokens holds no window of 256"),
        (60, "3 windows are left that the prune did not use, and 4 are needed"),
    ],
)
def test_a_text_that_is_too_short_is_told(model: PreTrainedModel, tmp_path: Path, count: int, why: str) -> None:
    (tmp_path / "mine.txt").write_text(words(count))
    result = fxprune.prune(model, tokenizer=TOKENIZER, eval_text=tmp_path / "mine.txt", **WEIGHTS)
    note = f"quality was measured on {BUILT_IN} in place of mine.txt: {why}"
    assert note in result.report.notes and result.report.quality is not None
    again = Report.from_dict(result.report.to_dict())
    assert again.quality == result.report.quality and again.quality.notes == (note,)


def test_a_model_of_too_few_positions_for_an_answer_has_figures() -> None:
    """The perplexities went with the answer."""
    short = tiny("gpt2", n_layer=2, n_positions=48)
    result = fxprune.prune(short, tokenizer=TOKENIZER, **WEIGHTS)
    quality = result.report.quality
    assert quality is not None and quality.texts[0].window == 48 and quality.answers == (), result.report.unmeasured
    (note,) = quality.notes
    assert note.startswith("no question is answered: ") and note in result.report.notes
    assert note.endswith(" tokens at once, and the model has 48 positions")


@pytest.mark.slow
def test_samples_that_stop_training_count_as_used(model: PreTrainedModel) -> None:
    """Tuning stops by windows of the text that is measured on."""
    recipe = "calibrate{tokens=64, samples=4}, find-groups, l2, select-by-ratio{protect=[]}, record-teacher, "
    recipe += "shrink, tune{epochs=1, measurements=1}, emit-model, make-report"
    result = fxprune.prune(model, tokenizer=TOKENIZER, recipe=recipe, ratio=0.1)
    held = fxprune.facts_of(result.graph_module)[HeldOut].samples
    assert len(held) == 16
    assert TOKENIZER.decode(held[0].inputs["input_ids"][0]) in offline_docstrings()
    assert result.report.quality is not None
    pair = paired_perplexities(
        result.model, model, TOKENIZER, offline_docstrings(), window=256, limit=12,
        seen=[sample.inputs["input_ids"] for sample in held],
    )  # fmt: skip
    assert result.report.quality.texts[0].perplexity[0][0] == pytest.approx(pair[0].value, rel=1e-4)


OF_ANOTHER = character_tokenizer()
OF_ANOTHER.add_tokens([f"{letter}{vowel}" for letter in "bcdfghklmnprstvwx" for vowel in "aeiou"])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "there was no tokenizer"),
        ({"tokenizer": TOKENIZER, "inplace": True}, "the model was pruned in place, and the dense one is gone"),
        ({"tokenizer": len}, "takes no keyword arguments"),
        ({"tokenizer": OF_ANOTHER}, "the model knows 0 to 130"),
    ],
)
def test_the_report_gives_the_reason_why_nothing_was_measured(options: dict[str, Any], why: str) -> None:
    result = fxprune.prune(tiny("llama"), **WEIGHTS, **options)
    assert result.model is not None and result.report.quality is None and why in result.report.unmeasured
    assert f"Not measured: {result.report.unmeasured}." in result.report.to_html().replace("&#39;", "'")


def test_a_model_without_answers_has_figures(model: PreTrainedModel, result: fxprune.Result) -> None:
    found = measure_quality(model, result.model, TOKENIZER, window=32)
    assert found.answers == () and found.texts[0].windows == WINDOWS


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


def test_jobs_take_turns_in_alternating_order_after_a_round_to_warm_up() -> None:
    order: list[str] = []

    def job(name: str) -> int:
        order.append(name)
        return len(order)

    found = time_interleaved({name: lambda name=name: job(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "abc" + "abc" + "cba"
    assert found == {"a": [4, 9], "b": [5, 8], "c": [6, 7]}


def test_a_timed_call_is_made_until_it_takes_long_enough() -> None:
    calls: list[int] = []
    job = timed_call(lambda: calls.append(1), least_s=0.0)
    before = len(calls)
    assert job() > 0 and len(calls) - before >= 1
    many = timed_call(lambda: calls.append(1), least_s=1e-3)
    before = len(calls)
    many()
    assert len(calls) - before > 1


def test_speed_and_memory_of_generation_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the model and random numbers stay as they were, and nothing is asked for by a deprecated name."""
    model = tiny("llama")
    slim = remembered.pruned("llama", importance="l2", kinds="head", ratio=0.05, protect=()).model
    seen: list[tuple[str, int]] = []

    def track(items: Any, what: str, total: int) -> Any:
        seen.append((what, total))
        return items

    warned: list[str] = []
    monkeypatch.setattr(generic.logger, "warning_once", warned.append)
    model.generation_config.do_sample, before = True, torch.get_rng_state()
    found = measure_speed({"dense": model, "slim": slim}, prompt=7, tokens=4, batch=2, rounds=2, track=track)
    assert model.generation_config.do_sample and torch.equal(before, torch.get_rng_state())
    assert [words for words in warned if "past_key_values" in words] == []
    assert seen == [("generating", 3)] and list(found) == ["dense", "slim"]
    dense, less = found["dense"], found["slim"]
    assert (dense.batch, dense.prompt, dense.tokens, dense.peak) == (2, 7, 4, None)
    heads, layers, width = model.config.num_key_value_heads, model.config.num_hidden_layers, 8
    assert dense.cache == 2 * layers * 2 * heads * (7 + 4 - 1) * width * 4, "keys and values of all but the last token"
    assert less.cache is not None and less.cache < dense.cache and less.weights < dense.weights
    assert dense.prefill_rate == pytest.approx(2 * 7 / dense.prefill_ms * 1e3)
    assert dense.speed_up == (1, 1, 1) and 0 < less.speed_up[1] <= less.speed_up[0] <= less.speed_up[2]
    assert dense.to_dict()["decode_rate"] == pytest.approx(2 / dense.decode_ms * 1e3)


def test_models_that_cannot_be_timed_are_refused(model: PreTrainedModel) -> None:
    refused: list[tuple[dict[str, Any], dict[str, int], str]] = [
        ({"dense": model}, {"tokens": 1}, "tokens is 1"),
        ({"dense": model}, {"prompt": 0}, "prompt is 0"),
        ({"dense": model}, {"prompt": 999}, "the model takes 256"),
        ({}, {}, "models by name"),
        ({"dense": nn.Linear(1, 1)}, {}, "a Hugging Face model"),
    ]
    for models, options, says in refused:
        with pytest.raises(EvaluationError, match=says):
            measure_speed(models, **options)


CPU = torch.device("cpu")


@pytest.fixture
def widths_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of measured widths, apart for a test."""
    monkeypatch.setenv("FXPRUNE_WIDTHS", str(tmp_path / "cache" / "widths.json"))
    return tmp_path / "cache" / "widths.json"


def test_widths_of_a_multiple_are_multiples_of_nothing_coarser() -> None:
    for multiple in speed.MULTIPLES:
        near = speed._aligned_widths(1536, multiple)
        assert all(0 < width < 1536 and width % multiple == 0 for width in near)
        assert multiple == speed.MULTIPLES[-1] or all(width % (2 * multiple) for width in near)


def test_costs_are_over_the_least_and_each_width_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every width was timed once for each of all widths."""
    timed: list[Any] = []
    monkeypatch.setattr(speed, "timed_call", lambda call, **_: timed.append(call) or (lambda: 1.0))
    found = measure_widths(8, 512, rounds=1)
    assert len(timed) == 2 * (3 * (len(speed.MULTIPLES) - 1) + 1)
    assert set(found.costs) == set(speed.MULTIPLES) and min(found.costs.values()) == 1
    assert found.device == speed.device_name(CPU)
    times = [{multiple: 1.0 + multiple for multiple in speed.MULTIPLES}, dict.fromkeys(speed.MULTIPLES, 2.0)]
    calls: list[int] = []
    monkeypatch.setattr(speed, "_column_times", lambda *_: calls.append(1) or times)
    found = measure_widths(8, 512)
    assert len(calls) == 1 and found.costs == {multiple: (1 + multiple) / 2 for multiple in speed.MULTIPLES}
    assert Widths("x", {1: 1.2, 8: 1.04, 16: 1.02, 32: 1.0}).best() == 16
    assert Widths("x", {1: 1.0, 32: 1.0}).best() == 1
    for hidden, width in ((0, 512), (8, 511), (8, "wide")):
        with pytest.raises(ArgumentError):
            measure_widths(hidden, width)  # type: ignore[arg-type]


def test_what_was_measured_is_kept_by_device(widths_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_widths(Widths("another", {1: 1.0}))
    here = Widths(speed.device_name(CPU), {1: 1.5, 8: 1.0})
    assert write_widths(here) == widths_file and read_widths(CPU) == here
    write_widths(Widths(here.device, {1: 1.0, 8: 1.5}))
    assert read_widths(CPU).best() == 1 and "another" in widths_file.read_text()
    for text in ("[", "[1]", '{"x": {"a": 1}}', '{"x": 3}'):
        widths_file.write_text(text)
        with pytest.raises(ArgumentError, match="holds no widths"):
            read_widths(CPU)
    monkeypatch.delenv("FXPRUNE_WIDTHS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert speed.widths_file() == Path("/somewhere/fxprune/widths.json")


def test_a_prune_reads_it(widths_file: Path) -> None:
    options: dict[str, Any] = {"importance": "l2", "ratio": 0.1, "kinds": "mlp", "round_to": "auto"}
    with pytest.raises(ArgumentError, match=r"measured on .*none"):
        remembered.pruned("llama", **options)
    write_widths(Widths(speed.device_name(CPU), {1: 1.5, 4: 1.0}))
    result = remembered.pruned("llama", **options)
    assert result.model is not None and any("round_to=auto is 4" in note for note in result.report.notes)
    whole = tiny("llama").config.intermediate_size
    for module in result.model.modules():
        if isinstance(module, nn.Linear) and module.out_features < whole:
            assert module.out_features % 4 == 0 or module.out_features > whole - 4
    assert "round_to=auto" in str(fxprune.prune_pipeline(importance="l2", ratio=0.1, round_to="auto"))
