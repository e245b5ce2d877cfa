"""What is told of a prune before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fxprune
from fxprune.cli import app
from fxprune.cli.dry_run import recipe_of
from tests.models import tiny


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with a config and no weights."""
    tiny("llama").config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


def test_it_tells_from_the_config_what_a_prune_would_do(config: Path, tmp_path: Path) -> None:
    options = ("--importance", "l2", "--kinds", "mlp", "--ratio", "0.1")
    done = CliRunner().invoke(app, ["prune", str(config), "--dry-run", "--json", *options])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    result = fxprune.prune(tiny("llama"), importance="l2", kinds="mlp", ratio=0.1)
    assert told["parameters"] == list(result.report.parameters)
    assert told["widths"] == {name: list(widths) for name, widths in result.report.widths.items()}
    assert told["groups"]["mlp"] == 3 and 0.1 < told["reachable"] < 0.6
    assert told["memory"] > 0 and told["seconds"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


def test_it_prints_what_a_person_reads(config: Path) -> None:
    shutil.rmtree(config.parent / "slim", ignore_errors=True)
    done = CliRunner().invoke(app, ["prune", str(config), "--out", str(config.parent / "slim"), "--dry-run"])
    assert done.exit_code == 0, done.output
    for words in ("what to expect", "parameters: 71,664 to ", "reachable: ratios of 0 to 0.", "memory: about", "rough"):
        assert words in done.stdout
    assert not (config.parent / "slim").exists()


@pytest.mark.parametrize(
    ("given", "recipe"), [({}, "balanced"), ({"taylor": "mix"}, "llm-pruner"), ({"recipe": "fast"}, "fast")]
)
def test_the_recipe_is_that_of_a_prune(given: dict[str, str], recipe: str) -> None:
    assert recipe_of({"recipe": None, "importance": None, "taylor": None, **given}) == recipe
