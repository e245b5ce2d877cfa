"""Saved models timed side by side."""

from __future__ import annotations

import json
from pathlib import Path

import fxprune.cli.bench
import fxprune.cli.several
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


def test_models_are_named_by_their_folders_unless_these_are_called_alike(models: Path, tmp_path: Path) -> None:
    (tmp_path / "slim").symlink_to(models / "slim")
    dense, slim, other = str(models / "dense"), str(models / "slim"), str(tmp_path / "slim")
    assert fxprune.cli.several.checked([dense, slim, dense]) == {"dense": dense, "slim": slim}
    assert fxprune.cli.several.checked([slim, other]) == {slim: slim, other: other}


def test_wrong_uses_end_in_one_line(models: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused("bench", models / "slim", tmp_path / "none")
    assert "the model takes 256" in refused("bench", models / "slim", "--prompt", 250, "--tokens", 9)
