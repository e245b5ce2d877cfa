"""What is told of a prune before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fxprune
from fxprune.cli import app
from fxprune.cli.costs import runs_of, there_are
from fxprune.cli.dry_run import _counted, _recipe_of, _samples
from fxprune.cli.load import load_empty
from fxprune.cli.memory import ModelWeights, Sizes, memory_of, sizes_of
from fxprune.cli.preparation import Prepared, most_samples, prepare
from fxprune.cli.preparation import planned as passes_of
from fxprune.data.built_in import built_in_text, general_text
from fxprune.graph.counting import count_macs
from tests.cli.folders import save_tiny
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
    told = ("what to expect", "parameters: 71,664 to ", "reachable: ratios of 0 to 0.", "memory: about", "an estimate")
    assert [words for words in told if words not in done.stdout] == []
    assert not (config.parent / "slim").exists()


@pytest.mark.parametrize(
    ("given", "recipe"), [({}, "balanced"), ({"taylor": "mix"}, "llm-pruner"), ({"recipe": "fast"}, "fast")]
)
def test_the_recipe_is_that_of_a_prune(given: dict[str, str], recipe: str) -> None:
    assert _recipe_of({"recipe": None, "importance": None, "taylor": None, **given}) == recipe


VALUES = {
    **{"recipe": None, "importance": None, "taylor": None, "calibration": None, "samples": None, "tokens": None},
    **{"low_memory": False, "compensate": None, "tune": None},
}
BUILT_IN = len(built_in_text()) // (4 * 128)
GENERAL = len(general_text()) // (4 * 128)
DEMO = Sizes(all=800_000, alive=5_000, said=49_152)
DEMO_WEIGHTS = ModelWeights(0.538e9, 0.43e9)


def planned(**given: Any) -> tuple[tuple[Any, ...], int, int]:
    """The passes of a prune, the samples there are to take from, and the tokens of one."""
    values = {**VALUES, **given}
    passes = passes_of(
        values, {name: values[name] for name in ("recipe", "importance", "taylor", "compensate", "tune")}
    )
    return (passes, *_samples(Prepared(passes, None, None), values))


@pytest.mark.parametrize(
    ("recipe", "runs"),
    [
        ("fast", 3 * 22 + 64 + 4 * 64),  # what the model writes of them, scores, and a fit
        ("fast, given text", 64 + 4 * 64),
        ("fast, from files", 64 + 4 * 64),  # the model writes nothing, and as much built-in text takes its place
        # what the model writes, scores, what the dense model says, a fit, an epoch of tuning by that, four measurements
        ("balanced", 3 * 96 + 64 + (288 + 16) + 4 * 64 + 3 * 288 + 4 * 16),
        ("balanced, twice", 3 * 96 + 64 + (288 + 16) + 4 * 64 + 2 * 3 * 288 + 4 * 16),
        # what the model writes, scores, what the dense model says of three copies of it, a fit, an epoch of tuning by
        # them, nine measurements
        ("best", 3 * (1024 - GENERAL) + 128 + (3 * 1024 + 16) + 4 * 128 + 3 * 3 * 1024 + 9 * 16),
        ("llm-pruner", 3 * 10),  # gradients, of as many samples of the built-in text as the paper uses
        ("calibrate{samples=40}\nfind-groups\nwanda{samples=64}\nselect-by-search{trials=2, samples=8}", 40 + 6 * 8),
        ("calibrate\nfind-groups\nscore-in-steps{steps=3, importance='wanda{samples=5}'}\nselect-by-ratio", 3 * 5),
        ("calibrate{samples=26}\nfind-groups\nl2\nselect-by-gates{samples=6, epochs=1}", 20 * 4 + 4 * 6),
    ],
)
def test_the_work_is_that_of_the_samples_that_the_pipeline_says(recipe: str, runs: int, tmp_path: Path) -> None:
    """It assumed 352 samples of built-in text, whatever a pipeline said."""
    longer = {"recipe": "balanced", "tune": "tune{epochs=2, measurements=3}"}
    text = tmp_path / "text.txt"
    text.write_text("word " * 10_000)
    other = {
        **{"balanced, twice": longer, "fast, from files": {"recipe": "fast", "low_memory": True}},
        "fast, given text": {"recipe": "fast", "calibration": text, "tokens": 128},
    }
    passes, there, tokens = planned(**other.get(recipe, {"recipe": recipe}))
    assert runs_of(passes, there) == runs and tokens == 128


def test_samples_are_those_of_the_text_there_is(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 1000)
    assert planned(calibration=text, tokens=50)[1:] == (5000 // 200, 50)
    assert planned(calibration=text, samples=3, tokens=50)[1] == 3
    assert planned(recipe="calibrate{tokens=64}\nfind-groups\nwanda\nselect-by-ratio")[1:] == (
        there_are(None, 64),
        64,
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [1, 2]}\n' * 7)
    assert planned(recipe=f"calibrate{{file={json.dumps(str(rows))}}}\nfind-groups\nwanda\nselect-by-ratio")[1] == 7
    assert most_samples(planned(taylor="mix")[0]) == 10 and most_samples(planned()[0]) is None
    assert planned(taylor="mix", calibration=text, tokens=50)[1] == 10


def test_what_is_kept_on_disk_is_not_tuned() -> None:
    passes, there, _ = planned(low_memory=True)
    assert "tune" not in [step.name for step in passes]
    on_disk = ModelWeights(0.538e9, 0.43e9, on_disk=True)
    assert memory_of(passes, there, 128, DEMO, on_disk) < memory_of(passes, there, 128, DEMO, DEMO_WEIGHTS) - 0.5e9


@pytest.mark.parametrize(
    ("recipe", "measured"), [("fast", 1.7e9), ("balanced", 3.0e9), ("best", 4.5e9), ("llm-pruner", 2.3e9)]
)
def test_memory_is_about_what_was_measured(recipe: str, measured: float) -> None:
    """It left out what samples take: 1.5 GB were expected of ``balanced``, which took twice that."""
    passes, there, tokens = planned(recipe=recipe)
    assert memory_of(passes, there, tokens, DEMO, DEMO_WEIGHTS) == pytest.approx(measured, rel=0.2)
    in_place = ModelWeights(0.538e9, 0.43e9, in_place=True)
    assert memory_of(passes, there, tokens, DEMO, in_place) <= memory_of(passes, there, tokens, DEMO, DEMO_WEIGHTS)


def test_sizes_are_those_of_the_graph() -> None:
    def told(depth: int) -> Sizes:
        traced = fxprune.trace(tiny("llama", num_hidden_layers=depth), dynamic=False).graph_module
        return sizes_of(traced, _counted(traced) or 0, 2)

    two, four = told(2), told(4)
    assert two.said == four.said == tiny("llama").config.vocab_size and two.size == 2
    assert two.alive == pytest.approx(four.alive, rel=0.2) and 1.6 < four.all / two.all < 2.1


def test_work_is_counted_by_the_token(config: Path) -> None:
    """A graph for one size counts the work of that size, whatever length was asked for."""
    traced = fxprune.trace(load_empty(str(config), None), dynamic=False).graph_module
    free = fxprune.trace(tiny("llama")).graph_module
    length = next(node.meta["val"].shape[-1] for node in traced.graph.find_nodes(op="placeholder"))
    assert count_macs(traced) / (_counted(traced) or 0) == pytest.approx(count_macs(free, length) / length, rel=0.01)


def test_the_samples_of_a_text_are_those_of_the_prune(tmp_path: Path) -> None:
    """They were guessed by the characters of the text, also where there is a tokenizer that counts them."""
    save_tiny(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("red " * 1280)
    values = {**VALUES, "model": str(tmp_path / "model"), "out": None, "gguf_file": None, "calibration": text}
    values |= {"dry_run": True, "device": None}
    options = {name: None for name in ("recipe", "importance", "taylor", "compensate", "tune")}
    prepared = prepare(values, options)
    assert prepared.samples.shape == (10, 128) and _samples(prepared, values) == (10, 128)
    (tmp_path / "model/model.safetensors").unlink()
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    assert prepare(values, options).samples is None, "a config alone has no tokenizer"
    assert _samples(prepare(values, options), values)[1] == 128
