"""What a dry run finds out about a prune before any weight is read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune.checkpoint.read import load_config_only
from fxprune.cli import dry_run
from fxprune.cli.dry_run import Activations, _count_samples, _traced_tokens, costs_of, peak_memory, sizes_of
from fxprune.cli.preparation import CalibrationText, Prepared, prepare
from fxprune.data.built_in import built_in_text, general_text
from fxprune.graph.counting import count_macs
from tests.cli.folders import save_tiny
from tests.cli.running import output_of
from tests.models import tiny

NO_TEXT = CalibrationText(None, None, None)
GENERAL = len(general_text()) // (4 * 128)
WIDTHS = 3 * 24 + 6 * 16
"""Runs that score residual width, and those that tell how far it goes: of the dense model and of five masked ones."""
DEMO = Activations(total=800_000, alive=5_000, outputs=49_152)
DEMO_WEIGHTS = (0.538e9, 0.43e9)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with a config and no weights."""
    tiny("llama").config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


def test_it_finds_out_from_the_config_what_a_prune_would_do(config: Path, tmp_path: Path) -> None:
    options = ("--recipe", "llm-pruner", "--importance", "l2", "--kinds", "mlp", "--ratio", "0.1")
    found = json.loads(output_of("prune", config, "--dry-run", "--json", *options))
    result = fxprune.prune(tiny("llama"), recipe="llm-pruner", importance="l2", kinds="mlp", ratio=0.1)
    assert found["parameters"] == list(result.report.parameters)
    assert found["widths"] == {name: list(widths) for name, widths in result.report.widths.items()}
    assert found["groups"]["mlp"] == 3 and 0.1 < found["reachable"] < 0.6
    assert found["memory"] > 0 and found["seconds"] > 0, "quality is measured"
    unmeasured = json.loads(output_of("prune", config, "--dry-run", "--json", *options, "--no-eval"))
    assert unmeasured["seconds"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


def test_it_prints_an_estimate_of_the_default(config: Path) -> None:
    output = output_of("prune", config, "--out", config.parent / "slim", "--dry-run")
    words = (
        "what to expect",
        "parameters: 71,664 to ",
        "reachable: ratios of 0 to 0.",
        "memory: about",
        "factor of two",
    )
    assert [word for word in words if word not in output] == []
    assert not (config.parent / "slim").exists()


@pytest.mark.slow
def test_bytes_read_and_written_on_disk_are_estimated(config: Path) -> None:
    """There was no tuning, and nobody could know what it would take."""
    options = ("prune", config, "--out", config.parent / "slim", "--dry-run", "--json", "--low-memory")
    whole, untuned, plain = (
        json.loads(output_of(*options, *more)) for more in ((), ("--tune", "none"), ("--recipe", "llm-pruner"))
    )
    assert whole["read"] - untuned["read"] > 3 * 4 * 57_000 * 50, "three times in each of its steps"
    assert whole["written"] > 12 * 57_000 * 50 and untuned["written"] == plain["written"] == plain["read"] == 0
    assert untuned["read"] > 4 * 71_000 * 127, "once for each token of text that the model writes"


def planned(text: CalibrationText = NO_TEXT, **options: Any) -> tuple[tuple[Any, ...], int, int]:
    """The passes of a prune, the number of samples, and the tokens of one."""

    def unread(*_: Any) -> Any:
        raise NotImplementedError

    passes = fxprune.prune_pipeline(None if text.source is None else (), tokenizer=unread, **options).passes
    return (passes, *_count_samples(Prepared(tuple(passes), None, None), text))


@pytest.mark.parametrize(
    ("recipe", "runs"),
    [
        # generated samples, scores of two criteria, widths, and a fit
        ("fast", 3 * 22 + (64 + 3 * 48) + WIDTHS + 4 * 64),
        ("fast, given text", 3 * 32 + (96 + 3 * 48) + WIDTHS + 4 * 96),
        # generated samples, scores of two criteria, widths, teacher logits, a fit, an epoch, measurements
        ("balanced", 3 * 128 + (192 + 3 * 128) + WIDTHS + (384 + 16) + 4 * 64 + 3 * 384 + 4 * 16),
        ("balanced, twice", 3 * 128 + (192 + 3 * 128) + WIDTHS + (384 + 16) + 4 * 64 + 2 * 3 * 384 + 4 * 16),
        # generated samples, scores, widths, teacher logits of three copies, a fit, an epoch, nine measurements
        ("best", 3 * (3072 - GENERAL) + (256 + 3 * 256) + WIDTHS + (3 * 3072 + 16) + 4 * 128 + 3 * 3 * 3072 + 9 * 16),
        ("llm-pruner", 3 * 10),  # gradients of as many samples as the paper uses
        ("calibrate\nfind-groups\nscore-in-steps{steps=3, importance='wanda{samples=5}'}\nselect-by-ratio", 3 * 5),
    ],
)
def test_the_work_is_that_of_the_samples_that_the_passes_take(recipe: str, runs: int, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 10_000)
    name, _, how = recipe.partition(", ") if recipe[:4] in ("fast", "bala") else (recipe, "", "")
    tune = {"tune": "tune{epochs=2, measurements=3, rank=8, truth=0.2}"} if how == "twice" else {}
    given = CalibrationText(str(text), None, None) if how == "given text" else NO_TEXT
    passes, samples, tokens = planned(given, recipe=name, **tune)
    costs = costs_of(passes, samples)
    assert sum(cost.runs for _, cost in costs) == runs and tokens == 128


def test_samples_are_those_of_the_text(tmp_path: Path) -> None:
    text = CalibrationText(str(tmp_path / "text.txt"), None, 50)
    (tmp_path / "text.txt").write_text("word " * 1000)
    assert planned(text)[1:] == (5000 // 200, 50)
    assert planned(replace(text, samples=3))[1] == 3 and planned(text, recipe="llm-pruner")[1] == 10
    whole = "calibrate{tokens=64}\nfind-groups\nwanda\nselect-by-ratio"
    assert planned(recipe=whole)[1:] == (len(built_in_text()) // 256, 64)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [1, 2]}\n' * 7)
    assert planned(recipe=f"calibrate{{file={json.dumps(str(rows))}}}\nfind-groups\nwanda\nselect-by-ratio")[1] == 7


@pytest.mark.parametrize(
    ("recipe", "measured"), [("fast", 2.4e9), ("balanced", 4.7e9), ("best", 4.8e9), ("llm-pruner", 2.8e9)]
)
def test_memory_is_about_what_was_measured(recipe: str, measured: float) -> None:
    passes, samples, tokens = planned(recipe=recipe)
    given = (costs_of(passes, samples), tokens, DEMO, DEMO_WEIGHTS)
    peak = peak_memory(*given)
    assert peak == pytest.approx(measured, rel=0.2)
    assert peak_memory(*given, in_place=True) <= peak and peak_memory(*given, on_disk=True) < peak - 0.5e9
    scarce = peak_memory(*given, free=2e9)
    assert scarce < peak - 1e9 if recipe == "balanced" else scarce == peak, "the default trains weights where they fit"


def test_sizes_are_those_of_the_graph() -> None:
    def sizes(depth: int) -> Activations:
        traced = fxprune.trace(tiny("llama", num_hidden_layers=depth), dynamic=False).graph_module
        return sizes_of(traced, _traced_tokens(traced) or 0, 2)

    two, four = sizes(2), sizes(4)
    assert two.outputs == four.outputs == tiny("llama").config.vocab_size and two.size == 2
    assert two.alive == pytest.approx(four.alive, rel=0.2) and 1.6 < four.total / two.total < 2.1


def test_work_is_counted_by_the_token(config: Path) -> None:
    """A graph of fixed size counts the work of that size."""
    traced = fxprune.trace(load_config_only(str(config)), dynamic=False).graph_module
    free = fxprune.trace(tiny("llama")).graph_module
    length = next(node.meta["val"].shape[-1] for node in traced.graph.find_nodes(op="placeholder"))
    assert count_macs(traced) / (_traced_tokens(traced) or 0) == pytest.approx(
        count_macs(free, length) / length, rel=0.01
    )


def test_a_target_takes_the_time_of_the_ratio_that_it_is(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is traced for any size then, and its work, that of 64 tokens, was taken for that of the example."""
    monkeypatch.setattr(dry_run, "_flops", lambda: 1e9)
    options = ("prune", config, "--dry-run", "--json", "--recipe", "llm-pruner", "--kinds", "mlp")
    ratio, target = (
        json.loads(output_of(*options, *more))["seconds"] for more in (("--ratio", "0.1"), ("--target", "0.9x params"))
    )
    assert target == pytest.approx(ratio, rel=0.3), "attention costs more the longer the sample is"


def test_a_tokenizer_counts_the_samples_of_a_text(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text("red " * 1280)
    text = CalibrationText(str(tmp_path / "text.txt"), None, None)

    def prepared() -> Prepared:
        return prepare(str(tmp_path / "model"), None, text, {}, needs_tokenizer=False, dry_run=True)

    found = prepared()
    assert found.samples["input_ids"].shape == (10, 128) and _count_samples(found, text) == (10, 128)
    (tmp_path / "model/model.safetensors").unlink()
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    assert prepared().samples is None, "a config alone has no tokenizer"
    assert _count_samples(prepared(), text)[1] == 128


def test_layers_that_go_are_listed(config: Path) -> None:
    """The table was empty where layers alone went."""
    options = ("prune", config, "--dry-run", "--recipe", "llm-pruner", "--kinds", "layer", "--ratio", "0.2")
    assert "│ layer │ 1 │ 1 │ 0 │" in output_of(*options)
    (gone,) = json.loads(output_of(*options, "--json"))["widths"].items()
    assert gone[0].endswith("layer") and gone[1] == [1, 0]
