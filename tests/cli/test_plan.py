"""Plans shown, compared and applied."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fxprune
import fxprune.cli.console
from fxprune.cli.plan import read_plan
from fxprune.report.report import Report
from tests.cli.running import output_of, refused, run
from tests.models import token_ids

NAME = "model.layers.{}.mlp.{}.weight"


def plan(*blocks: int, kept: int = 5, removed: tuple[str, ...] = (), norm: str = "sliced") -> fxprune.Plan:
    """A plan that leaves the first of 8 channels of some blocks."""
    axes = {NAME.format(b, part): {axis: list(range(kept))} for b in blocks for part, axis in (("up", 0), ("down", 1))}
    sizes = {name: dict.fromkeys(by_axis, 8) for name, by_axis in axes.items()}
    return fxprune.Plan(axes, removed, sizes, norm)


def written(path: Path, what: fxprune.Plan) -> Path:
    path.write_text(what.to_json())
    return path


def test_what_went_is_shown_by_block_and_kind(models: Path) -> None:
    output = output_of("plan", "show", models / "slim")
    assert "│ model.layers.0 │ 4 to 3 │ 96 to" in output and "25.0% of 8 removed" in output
    dense, slim = json.loads((models / "slim/report.json").read_text())["parameters"]
    assert f"parameters: {dense:,} to {slim:,}, " in output and "norms over removed units: sliced" in output
    assert run("plan", "show", models / "slim/plan.json") == (0, output, "")


def test_a_command_before_it_that_was_quiet_does_not_silence_it(tmp_path: Path) -> None:
    path = written(tmp_path / "plan.json", fxprune.Plan())
    fxprune.cli.console.set_output(quiet=True)
    assert "the plan removes nothing" in output_of("plan", "show", path)


def test_a_plan_without_a_report_is_shown_by_parameters(tmp_path: Path) -> None:
    path = written(tmp_path / "plan.json", plan(0, removed=("model.layers.1",)))
    output = output_of("plan", "show", path)
    assert "│ model.layers.0 │ mlp.up.weight[0] and 1 more │ 8 │ 3 │" in output
    assert "layer removed: model.layers.1" in output and "there is no report.json" in output
    assert "the plan removes nothing" in output_of("plan", "show", written(path, fxprune.Plan()))


def test_a_plan_beside_a_file_is_found(tmp_path: Path) -> None:
    written(tmp_path / "slim.plan.json", plan(0))
    report = Report((10, 9), (20, 18), 64, widths={"model.layers.0/mlp": (8, 5)})
    (tmp_path / "slim.report.json").write_text(report.to_json())
    found = read_plan(tmp_path / "slim.gguf")
    assert (found.plan, found.widths, found.parameters) == (plan(0), report.widths, report.parameters)
    assert read_plan(tmp_path / "slim.plan.json") == found
    for wrong in ("[]", '{"widths": {"mlp": [8]}, "parameters": [10, 9]}', '{"widths": {}, "parameters": [0, 9]}'):
        (tmp_path / "slim.report.json").write_text(wrong)
        assert "slim.report.json: it is not a report" in refused("plan", "show", tmp_path / "slim.gguf")


def test_a_plan_is_shown_and_compared_without_torch(models: Path) -> None:
    """Its import takes seconds."""
    code = "import sys; from fxprune.cli import app; app(standalone_mode=False); print('torch' in sys.modules)"
    for arguments in (["show", models / "slim"], ["diff", models / "slim", models / "slim"]):
        command = [sys.executable, "-c", code, "plan", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"


def test_json_has_all_axes(tmp_path: Path) -> None:
    output = output_of("plan", "show", written(tmp_path / "plan.json", plan(0, norm="masked")), "--json")
    axes = [{"block": "model.layers.0", "axes": ["mlp.up.weight[0]", "mlp.down.weight[1]"], "size": 8, "removed": 3}]
    assert json.loads(output) == {"norm": "masked", "removed_blocks": [], "widths": {}, "axes": axes, "vocabulary": []}


def test_plans_that_differ_end_in_1(tmp_path: Path) -> None:
    one = written(tmp_path / "a.json", plan(0, 1, removed=("model.layers.3",)))
    other = written(tmp_path / "b.json", plan(1, 2, kept=6, norm="masked"))
    code, output, _ = run("plan", "diff", one, other)
    assert code == 1
    for block, alone, second, both in ((0, 3, 0, 0), (1, 1, 0, 2), (2, 0, 2, 0)):
        row = f"│ model.layers.{block} │ mlp.up.weight[0] and 1 more │ 8 │ {alone} │ {second} │ {both} │"
        assert row in output
    assert "layer removed only by the first: model.layers.3" in output
    assert "norms over removed units: sliced in the first, masked in the second" in output
    code, output, _ = run("plan", "diff", one, other, "--json")
    data = json.loads(output)
    assert code == 1 and not data["same"] and data["removed_blocks"] == {"first": ["model.layers.3"], "second": []}
    assert [one["first"] for one in data["axes"]] == [3, 1, 0]


def test_plans_for_models_of_different_sizes_are_not_compared(tmp_path: Path) -> None:
    one, other = plan(0), plan(0)
    other.sizes[NAME.format(0, "up")][0] = 9  # type: ignore[index]
    line = refused("plan", "diff", written(tmp_path / "a.json", one), written(tmp_path / "b.json", other))
    assert "model.layers.0.mlp.up.weight[0]: the plans are for axes of different sizes" in line


def test_tokens_that_stay_are_shown_and_compared(tmp_path: Path) -> None:
    """A plan of the vocabulary alone removes something."""
    path = written(tmp_path / "plan.json", fxprune.Plan(vocabulary=(0, 2, 5)))
    output = output_of("plan", "show", path)
    assert "tokens that stay: 3" in output and "removes nothing" not in output
    other = written(tmp_path / "other.json", fxprune.Plan())
    code, output, _ = run("plan", "diff", path, other)
    assert code == 1 and "tokens that stay: 3 in the first, all in the second" in output


def test_a_plan_makes_the_same_model_again(models: Path, tmp_path: Path) -> None:
    output = output_of("apply", models / "dense", models / "slim", "--out", tmp_path / "out")
    assert f"model, plan and report written to {tmp_path / 'out'}" in output
    assert run("plan", "diff", models / "slim", tmp_path / "out") == (0, "the plans remove the same", "")
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
    output_of("apply", tmp_path / "tuned", models / "slim/plan.json", "--out", tmp_path / "slim.pt2")
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
