"""What aligned widths buy is measured, kept, and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError
from fxprune.evaluation import speed as widths
from fxprune.evaluation.speed import Widths, measure_widths, read_widths, write_widths
from tests.models import tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FXPRUNE_WIDTHS", str(tmp_path / "cache" / "widths.json"))
    return tmp_path / "cache" / "widths.json"


def test_widths_of_a_multiple_are_multiples_of_nothing_coarser() -> None:
    for multiple in widths.MULTIPLES:
        near = widths._near(1536, multiple)
        assert all(0 < width < 1536 and width % multiple == 0 for width in near)
        assert multiple == widths.MULTIPLES[-1] or all(width % (2 * multiple) for width in near)


def test_costs_are_over_the_least() -> None:
    found = measure_widths(8, 512, rounds=1)
    assert set(found.costs) == set(widths.MULTIPLES) and min(found.costs.values()) == 1
    assert found.device == widths.device_name(CPU)


def test_each_width_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [{multiple: 1.0 + multiple for multiple in widths.MULTIPLES}, dict.fromkeys(widths.MULTIPLES, 2.0)]
    calls: list[int] = []
    monkeypatch.setattr(widths, "_times", lambda *_: calls.append(1) or times)
    found = measure_widths(8, 512)
    assert len(calls) == 1 and found.costs == {multiple: (1 + multiple) / 2 for multiple in widths.MULTIPLES}


def test_the_best_is_the_finest_that_costs_little_more() -> None:
    assert Widths("x", {1: 1.2, 8: 1.04, 16: 1.02, 32: 1.0}).best() == 16
    assert Widths("x", {1: 1.0, 32: 1.0}).best() == 1


def test_what_was_measured_is_kept_by_device(kept: Path) -> None:
    write_widths(Widths("another", {1: 1.0}))
    here = Widths(widths.device_name(CPU), {1: 1.5, 8: 1.0})
    assert write_widths(here) == kept and read_widths(CPU) == here
    write_widths(Widths(here.device, {1: 1.0, 8: 1.5}))
    assert read_widths(CPU).best() == 1 and "another" in kept.read_text()


@pytest.mark.parametrize("text", ["[", "[1]", '{"x": {"a": 1}}', '{"x": 3}'])
def test_a_file_of_something_else_is_refused(kept: Path, text: str) -> None:
    kept.parent.mkdir()
    kept.write_text(text)
    with pytest.raises(ArgumentError, match="holds no widths"):
        read_widths(CPU)


@pytest.mark.parametrize(("hidden", "width"), [(0, 512), (8, 511), (8, "wide")])
def test_sizes_that_tell_nothing_are_refused(hidden: int, width: int) -> None:
    with pytest.raises(ArgumentError):
        measure_widths(hidden, width)


def test_the_file_is_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXPRUNE_WIDTHS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert widths.widths_file() == Path("/somewhere/fxprune/widths.json")


def test_a_prune_reads_it(kept: Path) -> None:
    model = tiny("llama")
    with pytest.raises(ArgumentError, match=r"measured on .*none"):
        fxprune.prune(model, importance="l2", ratio=0.1, kinds="mlp", round_to="auto")
    write_widths(Widths(widths.device_name(CPU), {1: 1.5, 4: 1.0}))
    result = fxprune.prune(model, importance="l2", ratio=0.1, kinds="mlp", round_to="auto")
    assert result.model is not None and any("round_to=auto is 4" in note for note in result.report.notes)
    whole = model.config.intermediate_size
    for module in result.model.modules():
        if isinstance(module, nn.Linear) and module.out_features < whole:
            assert module.out_features % 4 == 0 or module.out_features > whole - 4
    assert "round_to=auto" in str(fxprune.prune_pipeline(importance="l2", ratio=0.1, round_to="auto"))
