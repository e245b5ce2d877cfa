"""Test that the examples run and print the expected lines."""

import ast
import importlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from examples.models import load, wants_demo
from fxprune.cli import demo
from fxprune.rules import registry
from tests.tiers import tiers

ROOT = Path(__file__).parents[2]

PRINTED = {
    "mixture_of_experts": r"layers\.1/expert: 8 to 6\n.*with 6 experts, two for each token\nit generates 8",
    "op_rule": r"without a rule: 0 groups.*\nwith a rule: 40 units of gate\.weight.*down\.weight\n2\d\.\d%",
    "own_criterion": r"\d+\.\d% of the parameters removed\n\d+ of \d+ parameters lose the same",
    "plain_module": r"2\d\.\d% of the.*\nstep 0: loss \d.*\nstep 9: loss [01]\..*\nthe program .* output: True",
    "serve_with_llama_cpp": r"\d+\.\d% of the parameters removed\nthe file has 0\.\d MB\nThe capital of France is.+",
}
"""Pattern of the output of each example."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run on the tiny model, and remove the rules that examples added."""
    monkeypatch.setattr(sys, "argv", ["example"])
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


def test_there_is_one_test_an_example() -> None:
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__", "models"}
    assert scripts == set(PRINTED)
    assert "`examples/`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", tiers(PRINTED, "op_rule", "plain_module"))
def test_an_example_runs(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(f"examples.{name}").main()
    printed = capfd.readouterr().out
    assert re.search(PRINTED[name], printed), printed


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_ends_cells_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny model in place of the demo model, with outputs stored for readers."""
    model, tokenizer = load()
    model.save_pretrained(tmp_path / "demo")
    tokenizer.save_pretrained(tmp_path / "demo")
    monkeypatch.setattr(demo, "demo_checkpoint", lambda: tmp_path / "demo")
    display = ModuleType("IPython.display")
    vars(display)["SVG"] = str
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    notebook = ROOT / "examples/tour.ipynb"
    assert notebook.stat().st_size < 1_000_000
    names: dict[str, Any] = {}
    shown = []
    with warnings.catch_warnings():
        for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                where = f"cell {number}"
                body = ast.parse("".join(cell["source"]))
                last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
                exec(compile(body, where, "exec"), names)
                value = None if last is None else eval(compile(ast.Expression(last.value), where, "eval"), names)
                assert not any(output["output_type"] == "error" for output in cell["outputs"]), where
                assert value is None or cell["outputs"], f"{where}: run it and store what it shows"
                shown += [type(value).__name__] if "<table" in getattr(value, "_repr_html_", str)() else []
    assert shown == ["Traced", "Group", "Pipeline", "Result", "Plan"]
    assert {"report.html", "slim"} <= {path.name for path in tmp_path.iterdir()}


def test_the_demo_model_is_taken_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load()
    assert model.config.hidden_size == 64 and tokenizer("the").input_ids == [259, *tokenizer("e").input_ids]
    monkeypatch.setattr(sys, "argv", ["example", "--demo"])
    assert wants_demo()
