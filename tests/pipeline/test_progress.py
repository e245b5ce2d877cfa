"""One bar for a whole run."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

import fxprune
from fxprune.pipeline.progress import RunBar, run_bar
from tests.models import tiny


def test_the_bar_goes_over_steps_by_their_work_and_never_back() -> None:
    progress = Progress(console=Console(file=io.StringIO(), force_terminal=True), auto_refresh=False)
    bar = RunBar(["calibrate", "find-groups", "l2"], [8.0, 1.0, 1.0], progress)
    (task,) = progress.tasks
    bar.begin("find-groups")
    bar.begin("calibrate")
    assert (task.total, task.completed, task.description) == (10, 1, "step 2 of 3: calibrate")
    seen = []
    for _ in bar.track(range(4), "writing samples", 4):
        seen.append(task.completed)
        assert list(bar.track("ab", "words", 2)) == ["a", "b"]
    assert seen == [1, 3, 5, 7] and task.description == "step 2 of 3: writing samples"
    for _ in bar.track(range(2), "checking them", 2):
        assert task.completed == 7
    bar.begin("unheard-of")
    bar.begin("l2")
    assert (task.completed, task.description) == (9, "step 3 of 3: l2")


def test_there_is_no_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with run_bar([]) as bar:
        assert bar is None
    assert capsys.readouterr() == ("", "")


def test_a_prune_shows_its_bar_in_a_terminal_unless_told_not_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    options: dict[str, Any] = {"importance": "l2", "recipe": "llm-pruner", "verify": False}
    fxprune.prune(tiny("llama"), **options, progress=False)
    assert capsys.readouterr().err == ""
    fxprune.prune(tiny("llama"), **options)
    assert " of 7: " in capsys.readouterr().err  # quick steps may pass between two frames
