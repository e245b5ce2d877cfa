"""What is told of a prune before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fxprune
from fxprune.cli import app
from fxprune.cli.dry_run import _counted, _runs, _samples_of, recipe_of
from fxprune.cli.load import load_empty
from fxprune.graph.counting import count_macs
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


@pytest.mark.parametrize(
    ("recipe", "runs"),
    [
        ("fast", 64 + 4 * 64),  # scores, and a fit
        ("balanced", 64 + 192 + 4 * 64 + 2 * 3 * 192),  # scores, what the dense model says, a fit, two epochs of tuning
        ("llm-pruner", 3 * 352),  # gradients
    ],
)
def test_the_work_is_that_of_the_samples_that_a_recipe_takes(recipe: str, runs: int) -> None:
    passes = fxprune.prune_pipeline(None, recipe=recipe, ratio=0.2).passes
    assert _runs(passes, _samples_of(recipe)) == runs


def test_work_is_counted_by_the_token(config: Path) -> None:
    """A graph for one size counts the work of that size, whatever length was asked for."""
    traced = fxprune.trace(load_empty(str(config), None), dynamic=False).graph_module
    free = fxprune.trace(tiny("llama")).graph_module
    length = next(node.meta["val"].shape[-1] for node in traced.graph.find_nodes(op="placeholder"))
    assert count_macs(traced) / (_counted(traced) or 0) == pytest.approx(count_macs(free, length) / length, rel=0.01)
