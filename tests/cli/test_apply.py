"""A plan applied from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fxprune
from tests.cli.running import refused, run
from tests.models import token_ids


def test_a_plan_makes_the_same_model_again(models: Path, tmp_path: Path) -> None:
    code, output, _ = run("apply", models / "dense", models / "slim", "--out", tmp_path / "out")
    assert code == 0 and f"model, plan and report written to {tmp_path / 'out'}" in output
    assert run("plan", "diff", models / "slim", tmp_path / "out")[0] == 0
    with torch.no_grad():
        again, slim = (
            fxprune.from_pretrained(folder)(token_ids()).logits for folder in (tmp_path / "out", models / "slim")
        )
    assert torch.equal(again, slim)


@pytest.mark.slow
def test_a_sibling_loses_the_same_structures_and_keeps_its_own_numbers(models: Path, tmp_path: Path) -> None:
    sibling = AutoModelForCausalLM.from_pretrained(models / "dense")
    with torch.no_grad():
        sibling.lm_head.weight.mul_(2)
    sibling.save_pretrained(tmp_path / "tuned")
    code, _, line = run("apply", tmp_path / "tuned", models / "slim/plan.json", "--out", tmp_path / "slim.pt2")
    assert code == 0, line
    assert {path.name for path in tmp_path.iterdir()} == {
        *("tuned", "slim.pt2", "slim.plan.json", "slim.report.json", "slim.report.html")
    }
    assert run("plan", "diff", models / "slim", tmp_path / "slim.pt2")[0] == 0
    program = torch.export.load(tmp_path / "slim.pt2").module()
    with torch.no_grad():
        want = 2 * fxprune.from_pretrained(models / "slim")(token_ids()).logits
        torch.testing.assert_close(program(input_ids=token_ids())["logits"], want, atol=1e-4, rtol=1e-4)


def test_options_are_passed_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def apply(model: object, plan: object, data: dict[str, torch.Tensor], **options: object) -> None:
        seen.update(options, shape=tuple(data["input_ids"].shape))
        raise fxprune.FxpruneError("seen")

    monkeypatch.setattr(fxprune, "apply", apply)
    (tmp_path / "text.txt").write_text("some words " * 40)
    options = ("--compensate", "least-squares", "--tune", "tune{epochs=1}", "--calibration", tmp_path / "text.txt")
    more = ("--samples", 3, "--tokens", 16, "--norm", "masked", "--in-place")
    line = refused("apply", models / "dense", models / "slim", "--out", tmp_path / "out", *options, *more)
    assert line == "seen"
    assert callable(seen.pop("track")) and callable(seen.pop("tokenizer"))
    wanted = {"compensate": "least-squares", "tune": "tune{epochs=1}", "norm": "masked", "inplace": True}
    assert seen == {**wanted, "shape": (3, 16)}
