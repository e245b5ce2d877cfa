"""The command line on a small model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fxprune
from fxprune.recipes import read_recipe
from tests.cli.folders import save_tiny
from tests.cli.running import invoked, shown
from tests.models import tiny, token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a tokenizer of three words."""
    path = tmp_path_factory.mktemp("model")
    save_tiny(path)
    return str(path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_equal_widths_save_a_stock_model(folder: str, out: Path) -> None:
    """What stock transformers reads from the folder is what the plan gives when it is applied."""
    code, output = shown("prune", folder, "--out", out, "--importance", "l2", "--kinds", "head", "--ratio", "0.1")
    assert code == 0, output
    assert "model, plan and report written" in output and "head: 3 to 2 units in 3 group(s)" in output
    report = json.loads((out / "report.json").read_text())
    assert f"{report['achieved']:.2%} of the parameters removed" in output
    plan = fxprune.Plan.from_json((out / "plan.json").read_text())
    with torch.no_grad():
        slim = AutoModelForCausalLM.from_pretrained(out).eval()(token_ids()).logits
        expected = fxprune.apply(tiny("llama"), plan)(input_ids=token_ids()).logits
    torch.testing.assert_close(slim, expected, atol=1e-5, rtol=1e-4)
    assert (out / "tokenizer.json").exists()


def test_differing_widths_save_a_checkpoint_of_ours(folder: str, out: Path) -> None:
    options = ("--importance", "l2", "--kinds", "mlp", "--ratio", "0.05", "--protect", 1, 1)
    code, output = shown("prune", folder, "--out", out, *options)
    assert code == 0, output
    assert "mlp: 88 to" in output and "in 1 group(s)" in output
    assert "fxprune.from_pretrained loads it" in output
    plan = fxprune.Plan.from_json((out / "plan.json").read_text())
    assert {name.split(".")[2] for name in plan.kept} == {"1"}
    with torch.no_grad():
        slim = fxprune.from_pretrained(out)(token_ids()).logits
        expected = fxprune.apply(tiny("llama"), plan)(input_ids=token_ids()).logits
    torch.testing.assert_close(slim, expected, atol=1e-5, rtol=1e-4)
    assert shown("prune", folder, "--out", out, *options)[0] == 0, "an earlier checkpoint is replaced"


def test_a_folder_is_pruned_with_its_weights_on_disk(folder: str, out: Path) -> None:
    options = ("--importance", "l2", "--kinds", "mlp", "--ratio", "0.05")
    code, output = shown("prune", folder, "--out", out, *options, "--low-memory")
    assert code == 0 and "fxprune.from_pretrained loads it" in output, output
    assert (out / "plan.json").exists() and [path.name for path in out.parent.iterdir()] == ["out"]
    assert shown("prune", folder, "--out", out.with_name("plain"), *options)[0] == 0
    assert (out / "plan.json").read_text() == (out.with_name("plain") / "plan.json").read_text()


def test_widths_that_the_config_refuses_save_a_checkpoint_of_ours(folder: str, out: Path) -> None:
    """A config may validate itself as it is saved, which ended in a traceback after all the work."""
    code, output = shown("prune", folder, "--out", out, "--importance", "l1", "--kinds", "channel")
    assert code == 0, output
    assert "fxprune.from_pretrained loads it" in output
    assert fxprune.from_pretrained(out).config.hidden_size < 48


def test_uniform_saves_a_stock_model(folder: str, out: Path) -> None:
    code, output = shown("prune", folder, "--out", out, "--importance", "l2", "--uniform")
    assert code == 0, output
    assert "any transformers loads it" in output
    assert AutoModelForCausalLM.from_pretrained(out).config.intermediate_size < 88


def test_without_a_slim_model_the_graph_is_saved(folder: str, out: Path) -> None:
    code, output = shown("prune", folder, "--out", out, "--importance", "l2", "--kinds", "head_dim", "--ratio", "0.05")
    assert code == 0, output
    assert "torch.export.load" in output
    names = {"model.pt2", "plan.json", "report.json", "report.html", "run.yaml"}
    assert {path.name for path in out.iterdir()} == names


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prune_calibrates_on_a_file(folder: str, out: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["red green blue"] * 8
    text = "\n".join(lines if suffix == ".txt" else (json.dumps({"text": line, "n": 7}) for line in lines))
    path = out.with_name(f"calibration{suffix}")
    path.write_text(text)
    seen: list[torch.Tensor] = []
    prune = fxprune.prune

    def watched(model: object, data: torch.Tensor, **options: object) -> object:
        seen.append(data)
        return prune(model, data, **options)

    monkeypatch.setattr(fxprune, "prune", watched)
    options = ("--ratio", "0.05", "--calibration", path, "--samples", 4, "--tokens", 6, "--recipe", "llm-pruner")
    code, output = shown("prune", folder, "--out", out, *options)
    assert code == 0, output
    assert seen[0].tolist() == [[1, 2, 3, 1, 2, 3]] * 4


def test_prune_passes_its_options_on(folder: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def prune(model: object, data: object, **options: object) -> None:
        seen.update(options)
        raise fxprune.FxpruneError("seen")

    monkeypatch.setattr(fxprune, "prune", prune)
    values = {"ratio": 0.3, "importance": "taylor", "taylor": "first", "reduction": "max", "ranking": "global"}
    values |= {"round_to": 4, "seed": 7, "compensate": "least-squares", "tune": "none"}
    values |= {"recipe": "fast", "norm": "masked"}
    flags = [item for name, value in values.items() for item in (f"--{name.replace('_', '-')}", value)]
    code, _ = shown("prune", folder, "--out", out, "--kinds", "mlp, expert", "--protect", 1, 2, "--in-place", *flags)
    assert code == 2
    assert callable(seen.pop("track")) and callable(seen.pop("tokenizer"))
    values |= {"kinds": ["mlp", "expert"], "protect": (1, 2), "inplace": True, "uniform": False, "group_ratio": None}
    assert seen == values


def test_recipes_are_listed_and_printed_to_be_edited(folder: str, out: Path) -> None:
    code, output = shown("recipes")
    assert code == 0 and all(name in output for name in ("balanced", "fast", "best", "llm-pruner", "what it costs"))
    code, printed = shown("recipes", "llm-pruner")
    text = read_recipe("llm-pruner").text
    assert code == 0 and printed.split() == text.split()
    mine = out.with_name("mine.txt")
    mine.write_text(text.replace("\ntaylor\n", "\nl1{kinds=[mlp]}\n").replace("ratio\n", "ratio{kinds=[mlp]}\n"))
    code, output = shown("prune", folder, "--out", out, "--recipe", mine, "--protect", 0, 0, "--ratio", "0.1")
    assert code == 0, output
    assert "mlp: 88 to" in output and "head" not in output
    code, output = shown("recipes", "blanced")
    assert code == 2 and "Did you mean 'balanced'" in output


def test_passes_lists_all_with_their_stage() -> None:
    code, output = shown("passes")
    assert code == 0
    for name in fxprune.pass_names():
        assert f"│ {name} │ {fxprune.load_pass(name).stage} │" in output
    assert "Units are scored uniformly at random" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ratio", "1.5", "--importance", "l2"), "ratio is 1.5"),
        (("--kinds", "mpl", "--importance", "l2"), "Did you mean 'mlp'"),
        (("--importance", "l3"), "unknown importance 'l3'. Did you mean"),
        (("--recipe", "blanced"), "Did you mean 'balanced'"),
        (("--calibration", "/no/such/file.txt"), "No such file"),
        (
            ("--calibration", __file__, "--samples", "10", "--tokens", "9000"),
            "tokens are fewer than 10 samples of 9,000",
        ),
    ],
)
def test_nonsense_ends_in_one_line(folder: str, out: Path, arguments: tuple[str, ...], says: str) -> None:
    result = invoked("prune", folder, "--out", str(out), *arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says in lines[0]
    assert "Traceback" not in result.output and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("graph", "/no/such/folder"), "error: /no/such/folder: no such folder or file"),
        (("prune", "./no/such", "--out", "x"), "error: ./no/such: no such folder or file"),
        (("graph", "FOLDER", "--dot", "x.dot", "--layer", "9"), "unknown layer 9"),
        (("graph", "FOLDER", "--dot", "x.dot", "--group", "model/chanel"), "Did you mean 'model/channel'"),
        (("explain", "FOLDER", "lm_head.wight", "0"), "Did you mean 'lm_head.weight'"),
        (("explain", "FOLDER", "lm_head.weight", "0"), "an output of the model"),
        (("explain", "FOLDER", "lm_head.weight", "1", "--group", "model/chanel"), "Did you mean 'model/channel'"),
    ],
)
def test_unknown_names_end_in_one_line(folder: str, arguments: tuple[str, ...], says: str) -> None:
    code, output = shown(*(folder if argument == "FOLDER" else argument for argument in arguments))
    assert code == 2 and output.startswith("error: ") and says in output


def test_broken_lines_of_json_are_named(folder: str, out: Path) -> None:
    path = out.with_name("calibration.jsonl")
    path.write_text('{"words": "red"}\n')
    code, output = shown("prune", folder, "--out", out, "--calibration", path)
    assert code == 2 and "line 1: none of the known fields" in output and "field 'text'" in output


def test_folder_without_a_config_is_named(tmp_path: Path) -> None:
    code, output = shown("graph", tmp_path)
    assert code == 2 and f"{tmp_path}: cannot be loaded" in output


@pytest.mark.parametrize(("ratio", "meant"), [("20", "20% is 0.2"), ("35.5", "35.5% is 0.355"), ("-1", "ratio is -1")])
def test_percent_are_told_from_fractions(folder: str, out: Path, ratio: str, meant: str) -> None:
    code, output = shown("prune", folder, "--out", out, "--importance", "l2", "--ratio", ratio)
    assert code == 2 and meant in output and not out.exists(), output
