"""The model card of a checkpoint: what it says, that its lines work, and whose it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import fxprune
from fxprune.checkpoint.manifest import Manifest, read_manifest
from fxprune.checkpoint.write import model_card
from tests.checkpoint.small import narrow
from tests.models import tiny, token_ids


@pytest.fixture(scope="module")
def uneven() -> fxprune.Result:
    """A slim model whose layers differ."""
    return fxprune.prune(tiny("llama"), importance="l2", kinds=("mlp",), ratio=0.1, protect=(1, 0))


@pytest.fixture
def folder(uneven: fxprune.Result, tmp_path: Path) -> Path:
    """Its checkpoint."""
    uneven.save_pretrained(tmp_path / "slim")
    return tmp_path / "slim"


def snippets(folder: Path) -> list[str]:
    """The Python of a card, with the folder where it is."""
    found = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    return [code.replace(f'"{folder.name}', f'"{folder}') for code in found]


def test_a_card_says_what_came_of_the_model(uneven: fxprune.Result, folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["fxprune", "pruned"]
    assert card.data.license is None and card.data.base_model is None
    dense, slim = uneven.report.parameters
    assert f"| parameters | {dense:,} | {slim:,} | {-uneven.report.achieved:+.1%} |" in card.text
    for words in (
        "trust_remote_code=True",
        "vllm serve slim --model-impl transformers",
        "select-by-ratio{",
        "differ by",
    ):
        assert words in card.text
    assert "\n\n\n" not in card.text and "None" not in card.text


def test_the_code_on_a_card_runs(uneven: fxprune.Result, folder: Path) -> None:
    names: dict[str, Any] = {"dense": tiny("llama")}
    with torch.no_grad():
        expected = uneven.model(token_ids()).logits
        for code in snippets(folder):
            exec(code, names)
            held = names.pop("model", None) or names.pop("slim").model
            torch.testing.assert_close(held(token_ids()).logits, expected)
    assert len(snippets(folder)) == 3


def test_a_stock_checkpoint_is_loaded_by_its_class(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=1, _name_or_path="owner/name")
    fxprune.save_pretrained(model, tmp_path / "stock")
    card = ModelCard.load(tmp_path / "stock/README.md")
    assert card.data.base_model == "owner/name" and "trust_remote_code" not in card.text
    names: dict[str, Any] = {}
    for code in snippets(tmp_path / "stock"):
        exec(code, names)
        assert type(names.pop("model")) is type(model)


def test_what_the_dense_card_says_of_its_licence_is_kept(tmp_path: Path) -> None:
    model = narrow()
    dense = tmp_path / "dense"
    dense.mkdir()
    model.config._name_or_path = str(dense)
    said = "---\nlicense: other\nlicense_name: ours\nlanguage: en\nmetrics: [bleu]\n---\n# A model\n"
    for text, licence in ((said, "other"), ("---\n[\n---\n", None), ("", None)):
        (dense / "README.md").write_text(text)
        fxprune.save_pretrained(model, tmp_path / "slim")
        data = ModelCard.load(tmp_path / "slim/README.md").data
        assert data.license == licence and data.metrics is None
        assert data.get("license_name") == (licence and "ours") and data.language == (licence and "en")
    assert "`dense`" in (tmp_path / "slim/README.md").read_text()


def test_a_card_of_someone_else_stays(uneven: fxprune.Result, folder: Path) -> None:
    """Ours is written anew; one that was edited or written by hand is kept, whatever is saved over it."""
    ours = (folder / "README.md").read_text()
    uneven.save_pretrained(folder)
    assert (folder / "README.md").read_text() == ours
    (folder / "README.md").write_text(f"{ours}\nMine.\n")
    (folder / "report.html").unlink()
    fxprune.from_pretrained(folder, verify=True)
    for _ in range(2):
        uneven.save_pretrained(folder)
        assert (folder / "README.md").read_text() == f"{ours}\nMine.\n"
    assert (folder / "report.html").is_file()
    (folder / "README.md").unlink()
    fxprune.from_pretrained(folder)
    uneven.save_pretrained(folder)
    assert (folder / "README.md").read_text() == ours and "README.md" in read_manifest(folder).files


def test_without_a_report_a_card_says_how_to_load(tmp_path: Path) -> None:
    model = narrow()
    model.save_pretrained(tmp_path)
    text = model_card(model, tmp_path, Path("slim"), Manifest({}, False, {}), None)
    assert "How to load" in text and "How it was made" not in text and "report.html" not in text
