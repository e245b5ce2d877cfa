"""Folders that the tests of commands read: a dense model, and what prunes of it wrote."""

import copy
from pathlib import Path

import pytest

import fxprune
from tests.cli.folders import save_tiny
from tests.export.small import tokenizer
from tests.models import tiny
from tests.tokens import TEMPLATE


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with a tokenizer of three words."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``dense``, which chats, and ``slim``: a third of its heads is gone, and more of one layer's MLP.

    What is left of the heads is more than a config of the class may say.
    """
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    dense = tiny("llama", num_hidden_layers=2, **sizes)
    chats = copy.copy(tokenizer())
    chats.chat_template = TEMPLATE
    dense.save_pretrained(folder / "dense")
    chats.save_pretrained(folder / "dense")
    recipe = "find-groups, l2, select-by-ratio{ratio=0.2, protect=[]}, shrink{verify}, emit-model, make-report"
    slim = fxprune.Pipeline(recipe)(fxprune.trace(dense).graph_module).graph_module
    fxprune.Result.of(slim).save_pretrained(folder / "slim", chats)
    return folder


@pytest.fixture(scope="package")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options of ``eval`` that name a short text."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("A quiet river runs past the old mill, and nobody counts the boats on it. " * 8)
    return ("--text", path, "--window", 32)
