"""The command line on a small model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fxprune
from fxprune.cli import app
from tests.models import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    return str(path)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


def test_prune_writes_plan_report_and_weights(folder: str, tmp_path: Path) -> None:
    options = ("--importance", "l2", "--kinds", "layer", "--ratio", "0.3")
    code, output = run("prune", folder, "--out", str(tmp_path), *options)
    assert code == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parameters"][1] < report["parameters"][0]
    plan = fxprune.Plan.from_json((tmp_path / "plan.json").read_text())
    assert len(plan.removed_blocks) == 1
    slim = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(slim.model.layers) == 2
    assert sum(p.numel() for p in slim.parameters()) == report["parameters"][1]


def test_prune_of_uneven_layers_writes_the_plan_alone(folder: str, tmp_path: Path) -> None:
    options = ("--importance", "l2", "--kinds", "mlp", "--ratio", "0.05")
    code, output = run("prune", folder, "--out", str(tmp_path), *options)
    assert code == 0 and "the layers differ" in output
    plan = fxprune.Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.kept and not (tmp_path / "model.safetensors").exists()
    assert fxprune.apply(tiny("llama"), plan).plan == plan


def test_graph_lists_groups_and_draws(folder: str, tmp_path: Path) -> None:
    code, output = run("graph", folder, "--dot", str(tmp_path / "layer.dot"), "--layer", "1")
    assert code == 0, output
    assert "model.layers.1/mlp" in output and "renormalised" in output and "rows are looked up" in output
    assert (tmp_path / "layer.dot").read_text().startswith(("digraph", "graph", "strict"))


def test_explain_and_passes(folder: str) -> None:
    code, output = run("explain", folder, "model.layers.0.mlp.down_proj.weight", "1")
    assert code == 0 and "aten.silu.default" in output and "gate_proj.weight[0]" in output
    code, output = run("passes")
    assert code == 0 and all(name in output for name in fxprune.pass_names())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ratio", "1.5", "--importance", "l2"), "ratio is 1.5"),
        (("--kinds", "mpl", "--importance", "l2"), "Did you mean 'mlp'"),
        (("--importance", "l3"), "unknown importance"),
        ((), "Taylor importance needs data"),
        (("--calibration", "/no/such/file.txt"), "error:"),
    ],
)
def test_nonsense_ends_in_one_line(folder: str, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    code, output = run("prune", folder, "--out", str(tmp_path / "out"), *arguments)
    assert code == 2 and says in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_missing_folder() -> None:
    code, output = run("graph", "/no/such/folder")
    assert code == 2 and output.startswith("error:")
