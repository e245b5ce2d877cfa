"""What is in the folder of a checkpoint, and how it gets there."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from fxprune.checkpoint import write
from fxprune.checkpoint.structure import describe
from fxprune.checkpoint.write import MODELLING, save_pretrained
from tests.checkpoint.small import narrow
from tests.models import tiny


@pytest.fixture(scope="module")
def slim() -> Any:
    """A model whose second layer is narrower."""
    return narrow()


def test_the_modelling_file_stands_alone() -> None:
    text = write._modelling("LlamaForCausalLM", "LlamaConfig")
    tree = ast.parse(text)
    roots = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)])
    }
    assert "fxprune" not in roots and {"torch", "transformers"} <= roots
    space: dict[str, Any] = {"__name__": __name__}
    exec(compile(tree, "modelling", "exec"), space)
    assert [kind.__name__ for kind in space["LlamaForCausalLM"].__mro__[:2]] == ["LlamaForCausalLM", "Layerwise"]


def test_an_import_of_several_lines_is_left_out_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("from fxprune.a import (\n    b,\n    c,\n)\nimport os\n")
    module = type(write)("module")
    module.__file__ = str(path)
    assert write._standing_alone(module).split() == ["import", "os"]


def test_the_config_says_how_blocks_differ(slim: Any, tmp_path: Path) -> None:
    structure = save_pretrained(slim, tmp_path / "slim")
    config = json.loads((tmp_path / "slim/config.json").read_text())
    assert config["per_layer_config"] == {"1": {"intermediate_size": 24}}
    assert config["fxprune"]["blocks"] == "model.layers" and config["fxprune"]["class"] == type(slim).__name__
    assert config["auto_map"]["AutoModelForCausalLM"] == f"{MODELLING}.{type(slim).__name__}"
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
