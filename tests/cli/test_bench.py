"""Saved models timed side by side."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.running import refused, run


def test_models_are_timed_side_by_side(models: Path) -> None:
    more = ("--prompt", 8, "--tokens", 3, "--rounds", 1)
    code, output, line = run("bench", models / "dense", models / "slim", *more)
    assert code == 0, line
    assert "┃ dense ┃ slim ┃" in output and output.count(" x) │") == 2
    assert "batch 1, prompt of 8 tokens, then 3; medians of 1 rounds on cpu" in output
    code, output, _ = run("bench", models / "slim", *more, "--batch", 2, "--json")
    found = json.loads(output)["slim"]
    assert code == 0 and (found["batch"], found["prompt"], found["tokens"]) == (2, 8, 3) and found["peak"] is None


def test_a_prompt_beyond_the_context_is_refused(models: Path) -> None:
    assert "256" in refused("bench", models / "slim", "--prompt", 250, "--tokens", 9)
