"""What a user names as a model: the demo model, folders, files and ids told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxprune
import fxprune.cli.naming
from fxprune.cli import load
from fxprune.cli.console import set_output
from fxprune.cli.demo import demo_gguf, demo_name
from fxprune.errors import FxpruneError
from tests.cli.folders import save_tiny
from tests.export.small import tokenizer
from tests.models import tiny


def test_paths_never_go_to_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    fxprune.cli.naming.check_exists("owner/name")
    fxprune.cli.naming.check_exists("name")
    for name in ("models/name", "./name", "~/name", "/name", "name/", "a/b/c", "name.gguf", "two words"):
        with pytest.raises(FxpruneError, match="no such folder or file"):
            fxprune.cli.naming.check_exists(name)


def test_demo_is_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "demo_checkpoint", lambda: tmp_path)
    assert load.where_and_file("demo", None)["pretrained_model_name_or_path"] == str(tmp_path)
    assert demo_name().endswith("135M-Instruct") and demo_gguf().suffix == ".gguf"


def test_a_quiet_command_shows_no_bar_of_another_package(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With --quiet, a bar of transformers told that tensors of a GGUF file were converted."""
    fxprune.export_model(tiny("llama", num_hidden_layers=1), tmp_path / "dense.gguf", tokenizer=tokenizer())
    capfd.readouterr()
    set_output(quiet=True)
    try:
        load.load_model(str(tmp_path / "dense.gguf"), None)
    finally:
        set_output()
    assert capfd.readouterr() == ("", "")


def test_a_model_comes_in_the_dtype_and_on_the_device_that_were_asked_for(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    model, words = load.load_either(str(tmp_path), None, with_tokenizer=True, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16 and words("red").input_ids == [1]
    assert load.load_empty(str(tmp_path), None).device.type == "meta"
    with pytest.raises(FxpruneError, match="cannot be used"):
        load.load_model(str(tmp_path), None, device="cuda:99")
