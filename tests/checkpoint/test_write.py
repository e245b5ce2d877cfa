"""What is in the folder of a checkpoint, and how it gets there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxprune.checkpoint.read import from_pretrained
from fxprune.checkpoint.structure import MODELLING, describe
from fxprune.checkpoint.write import save_pretrained, write_folder
from fxprune.errors import CheckpointError
from tests.checkpoint.small import narrow
from tests.models import tiny


@pytest.fixture(scope="module")
def slim() -> Any:
    """A model whose second layer is narrower."""
    return narrow()


def test_the_config_says_how_blocks_differ(slim: Any, tmp_path: Path) -> None:
    structure = save_pretrained(slim, tmp_path / "slim")
    config = json.loads((tmp_path / "slim/config.json").read_text())
    assert config["per_layer_config"] == {"1": {"intermediate_size": 24}}
    assert config["fxprune"]["blocks"] == "model.layers" and config["fxprune"]["class"] == type(slim).__name__
    classes = {"AutoConfig": "LlamaConfig", "AutoModel": "LlamaModel", "AutoModelForCausalLM": type(slim).__name__}
    assert list(config["auto_map"].items()) == [(name, f"{MODELLING}.{kind}") for name, kind in classes.items()]
    assert structure == describe(slim)


def test_a_model_is_as_it_was_after_it_was_saved(slim: Any, tmp_path: Path) -> None:
    kind, unsaved = type(slim.config), set(slim.model.rotary_emb._non_persistent_buffers_set)
    slim.model.rotary_emb.inv_freq.mul_(2)
    save_pretrained(slim, tmp_path / "slim")
    slim.model.rotary_emb.inv_freq.div_(2)
    assert type(slim.config) is kind and slim.model.rotary_emb._non_persistent_buffers_set == unsaved


def test_where_a_stock_model_comes_from(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=1, _name_or_path="owner/name")
    save_pretrained(model, tmp_path / "stock")
    manifest = json.loads((tmp_path / "stock/fxprune.json").read_text())
    assert manifest["source"] == {"class": type(model).__name__, "name": "owner/name"} and manifest["stock"]
    assert not (tmp_path / f"stock/{MODELLING}.py").exists()


def test_more_files_go_into_the_folder_with_the_model(slim: Any, tmp_path: Path) -> None:
    """A folder that holds something else is taken by force: plain files stay, weights that a loader would take go."""
    target = tmp_path / "slim"
    target.mkdir()
    for name in ("notes", "model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (target / name).write_text("mine")
    with pytest.raises(CheckpointError, match="not an fxprune checkpoint"):
        save_pretrained(slim, target)
    save_pretrained(slim, target, force=True, also=lambda folder: (folder / "run").write_text(str(folder != target)))
    assert (target / "run").read_text() == "True" and (target / "notes").read_text() == "mine"
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]
    assert not (target / "pytorch_model.bin").exists() and from_pretrained(target) is not None


def test_a_folder_is_filled_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new", fill)
    assert list(tmp_path.iterdir()) == []
