"""Folders: what cannot be saved or loaded is refused with the file at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune.errors import CheckpointError
from tests.bad_input.refusals import Net, check_table
from tests.models import tiny


@pytest.fixture(scope="module")
def model() -> Any:
    """A small Hugging Face model."""
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint."""
    folder = tmp_path_factory.mktemp("saved") / "whole"
    fxprune.save_pretrained(model, folder)
    return folder


def test_folders_that_hold_no_checkpoint(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [(folder, "folder|nope") for folder in (None, 3, [], "", "/nope/nope", b"x", "a\0b", Path, "nope")]
    check_table(fxprune.from_pretrained, rows, capfd, error=CheckpointError)


def test_options_of_loading(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = {"verify": ("yes", 3), "model_class": (3, "LlamaForCausalLM", Net), "dtype": ("nonsense",)}
    bad |= {"device_map": (3.5,), "attn_implementation": ("nonsense",)}
    rows = [({name: value}, ".") for name, values in bad.items() for value in values]
    check_table(lambda options: fxprune.from_pretrained(saved, **options), rows, capfd)


SAVES: list[tuple[dict[str, Any], str]] = [
    *[({"folder": value}, "folder is") for value in (None, 3, [], "", b"x", "a\0b", Path)],
    *[({"max_shard_size": value}, "max_shard_size is") for value in (0, -1, None, "", "5", "0GB", "x", 1.5, [], True)],
    *[({"tokenizer": value}, "tokenizer is") for value in (3, "x", [], object())],
    *[({"plan": value}, "plan is") for value in (3, "x", {}, fxprune.Plan)],
    *[({"report": value}, "report is") for value in (3, "x", {}, fxprune.Report)],
    *[({"model": value}, "model is") for value in (None, 3, "x", Net(), fxprune.Plan())],
    ({"folder": "/proc/nope/nope"}, "cannot be written"),
]


def test_what_cannot_be_saved(model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = {"model": model, "folder": tmp_path / "new"}
    check_table(lambda bad: fxprune.save_pretrained(**{**given, **bad}), SAVES, capfd, error=CheckpointError)
    assert not list(tmp_path.iterdir())
