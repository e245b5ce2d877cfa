"""What `--quiet` leaves of each command: the result where that is what a command is for, else nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fxprune
from fxprune.cli import console
from tests.cli.running import refused, run

SMALL = ("--prompt", 8, "--tokens", 3, "--rounds", 1)
FAST = ("--epochs", 1, "--batch", 4)


@pytest.fixture(autouse=True)
def usual_output() -> Iterator[None]:
    yield
    console.set_output()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": f"What is {i} and one?", "output": f"{i + 1}."} for i in range(8)]))
    return path


@pytest.mark.parametrize(
    ("command", "options", "result"),
    [("eval", ("--windows", 1), "perplexity"), ("bench", SMALL, "a further token, ms")],
)
def test_tables_are_all_that_is_left_of_measurements(
    models: Path, command: str, options: tuple[object, ...], result: str
) -> None:
    code, output, told = run(command, models / "slim", *options, "--quiet")
    assert (code, told) == (0, "") and result in output
    assert "loading" in run(command, models / "slim", *options)[2]


def test_the_text_is_all_that_is_left_of_generating(models: Path) -> None:
    more = ("generate", models / "slim", "so it", "--max-new-tokens", 4)
    code, output, told = run(*more, "-q")
    assert (code, told) == (0, "") and output == run(*more)[1]


def test_nothing_is_left_of_what_writes(models: Path, rows: Path, tmp_path: Path) -> None:
    plan, quiet = models / "slim/plan.json", "--quiet"
    assert run("apply", models / "dense", plan, "--out", tmp_path / "again", quiet) == (0, "", "")
    assert run("export", tmp_path / "again", tmp_path / "slim.pt2", quiet) == (0, "", "")
    assert run("recover", tmp_path / "again", "--data", rows, "--out", tmp_path / "new", *FAST, quiet) == (0, "", "")
    assert (tmp_path / "slim.pt2").is_file() and (tmp_path / "new/recovery.json").is_file()


def test_apply_tells_each_pass_where_asked(models: Path, tmp_path: Path) -> None:
    more = ("apply", models / "dense", models / "slim/plan.json", "--out", tmp_path / "again")
    assert "--quiet and --verbose" in refused(*more, "--quiet", "--verbose")
    assert "bypass-blocks: " in run(*more, "--verbose")[2]


def test_training_is_in_the_dtype_and_on_the_device_asked_for(
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
    assert "CUDA_VISIBLE_DEVICES=1" in refused(*more, "--device", "cuda:1")
    assert "Did you mean 'float32'" in refused(*more, "--dtype", "float31")
