"""Calls timed side by side, generation speed, and the speed of aligned widths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import generic

import fxprune
from fxprune.errors import ArgumentError, EvaluationError
from fxprune.evaluation import speed
from fxprune.evaluation.speed import (
    Widths,
    measure_speed,
    measure_widths,
    read_widths,
    time_interleaved,
    timed_call,
    write_widths,
)
from tests import remembered
from tests.models import tiny


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


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
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


def test_what_was_measured_is_kept_by_device(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_widths(Widths("another", {1: 1.0}))
    here = Widths(speed.device_name(CPU), {1: 1.5, 8: 1.0})
    assert write_widths(here) == kept and read_widths(CPU) == here
    write_widths(Widths(here.device, {1: 1.0, 8: 1.5}))
    assert read_widths(CPU).best() == 1 and "another" in kept.read_text()
    for text in ("[", "[1]", '{"x": {"a": 1}}', '{"x": 3}'):
        kept.write_text(text)
        with pytest.raises(ArgumentError, match="holds no widths"):
            read_widths(CPU)
    monkeypatch.delenv("FXPRUNE_WIDTHS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert speed.widths_file() == Path("/somewhere/fxprune/widths.json")


def test_a_prune_reads_it(kept: Path) -> None:
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
