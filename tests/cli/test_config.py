"""Runs that repeat: `run.yaml` is written beside each output and read in place of flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import fxprune
import fxprune.cli.options
from fxprune.cli.config import run_file, spelled_run
from tests.cli.folders import save_tiny
from tests.cli.running import invoked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    save_tiny(path / "model")
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = invoked(*arguments)
    return result.exit_code, result.stdout, result.stderr


def test_a_run_is_spelled_by_its_options() -> None:
    values = {"model": "demo", "out": Path("slim"), "group_ratio": 0.3, "protect": (1, 2), "uniform": False}
    text = spelled_run({**values, "kinds": None, "as_json": True, "in_place": True})
    assert yaml.safe_load(text) == {
        **{"model": "demo", "out": "slim", "group-ratio": 0.3, "protect": [1, 2], "in-place": True}
    }
    assert run_file(Path("a/slim"), is_file=False) == Path("a/slim/run.yaml")
    assert run_file(Path("a/slim.gguf"), is_file=True) == Path("a/slim.run.yaml")
    assert fxprune.cli.options.Config is not None


def test_a_run_repeats_from_its_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags win over the file; --json prints the report, and notes of others in the folder are kept."""
    monkeypatch.chdir(folder)
    (folder / "slim").mkdir()
    (folder / "slim/notes").write_text("mine")
    options = ("--importance", "l1", "--kinds", "mlp,head", "--ratio", 0.1, "--protect", 1, 0)
    code, _, told = run("prune", "model", "--out", "slim", *options)
    assert code == 2 and "--force" in told
    code, printed, told = run("prune", "model", "--out", "slim", *options, "--force", "--verbose")
    assert code == 0 and "find-groups: " in told and "of the parameters removed" in printed, told
    assert (folder / "slim/notes").read_text() == "mine"
    plan = (folder / "slim/plan.json").read_text()
    code, printed, _ = run("prune", "--config", "slim/run.yaml", "--out", "again", "--json", "--quiet")
    report = json.loads(printed)
    assert code == 0 and report["out"] == "again" and report["ratio"] == 0.1
    assert (folder / "again/plan.json").read_text() == plan
    code, printed, told = run("prune", "--config", "slim/run.yaml", "--ratio", 0.2, "--quiet")
    assert (code, printed, told) == (0, "", "")
    assert json.loads((folder / "slim/report.json").read_text())["ratio"] == 0.2
    assert (folder / "slim/notes").read_text() == "mine"


def test_lists_and_underscores_are_read_as_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    seen: dict[str, object] = {}

    def prune(model: object, data: object, **options: object) -> None:
        seen.update(options)
        raise fxprune.FxpruneError("seen")

    monkeypatch.setattr(fxprune, "prune", prune)
    said = {"model": "model", "out": "new", "kinds": ["mlp", "head"], "group_ratio": 0.25, "round-to": 4}
    Path("mine.yaml").write_text(yaml.safe_dump({**said, "uniform": True, "ranking": None, "recipe": "llm-pruner"}))
    code, _, told = run("prune", "--config", "mine.yaml", "--importance", "l2")
    assert code == 2 and told.endswith("error: seen\n"), told
    assert seen["kinds"] == ["mlp", "head"] and seen["group_ratio"] == 0.25 and seen["round_to"] == 4
    assert seen["uniform"] is True and seen["importance"] == "l2" and seen["ranking"] is None
