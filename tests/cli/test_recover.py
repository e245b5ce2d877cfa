"""Saved models trained from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fxprune
from fxprune.checkpoint.manifest import read_manifest
from tests.cli.running import run
from tests.models import token_ids


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    rows = [{"instruction": f"What is {i} and one?", "output": f"It is {i + 1}."} for i in range(8)]
    path.write_text(json.dumps(rows))
    return path


FAST = ("--epochs", 1, "--batch", 4, "--learning-rate", "1e-3")


@pytest.mark.slow
def test_a_slim_model_comes_back_trained_with_its_plan(models: Path, rows: Path, tmp_path: Path) -> None:
    slim, out, folder = models / "slim", tmp_path / "out", tmp_path / "run"
    more = ("--data", rows, "--out", out, "--distil", models / "dense", "--folder", folder)
    code, output, line = run("recover", slim, *more, *FAST)
    assert code == 0, line
    assert "2 steps on 7 samples" in output and f"model written to {out}" in output
    assert run("plan", "diff", slim, out)[0] == 0
    before, after = read_manifest(slim), read_manifest(out)
    assert (after.plan, after.report, after.source) == (before.plan, before.report, before.source)
    assert (out / "report.json").read_text() == (slim / "report.json").read_text()
    assert json.loads((out / "recovery.json").read_text())["steps"] == 2
    old, new = (fxprune.from_pretrained(place) for place in (slim, out))
    moved = {name for name, tensor in new.state_dict().items() if not torch.equal(tensor, old.state_dict()[name])}
    assert moved and moved <= set(fxprune.Plan.from_json((slim / "plan.json").read_text()).kept)
    code, output, line = run("recover", slim, *more, *FAST)
    assert code == 0 and "note: resumed at step 2" in output, line


@pytest.mark.slow
def test_a_dense_model_stays_a_stock_checkpoint(models: Path, rows: Path, tmp_path: Path) -> None:
    code, _, line = run("recover", models / "dense", "--data", rows, "--out", tmp_path / "out", *FAST, "--rank", 2)
    assert code == 0, line
    assert not (tmp_path / "out/plan.json").exists()
    with torch.no_grad():
        tuned, dense = (
            AutoModelForCausalLM.from_pretrained(place)(token_ids()).logits
            for place in (tmp_path / "out", models / "dense")
        )
    assert tuned.shape == dense.shape and not torch.equal(tuned, dense)


@pytest.mark.slow
def test_training_has_the_dtype_and_the_device_asked_for(
    models: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}
    recover = fxprune.recover

    def watched(*given: object, **options: object) -> object:
        seen.update(options)
        return recover(*given, **options)

    monkeypatch.setattr(fxprune, "recover", watched)
    more = ("recover", models / "dense", "--data", rows, "--out", tmp_path / "out", *FAST)
    code, _, line = run(*more, "--dtype", "bfloat16", "--device", "cpu")
    assert code == 0, line
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert seen["arguments"] == {"use_cpu": True}
