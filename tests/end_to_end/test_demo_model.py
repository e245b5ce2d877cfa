"""The demo model loads from its package, once, as plain weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import load_demo_model
from fxprune.cli import demo as demo_files
from fxprune.data.built_in import offline_text
from fxprune.data.text import token_windows
from fxprune.errors import FxpruneError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory):
    """The demo model read from GGUF, and again from the checkpoint made of it in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        seen = []

        def load_gguf(path: Path):
            seen.append(original(path))
            return seen[-1]

        original = demo_files.load_gguf
        patch.setattr(demo_files, "load_gguf", load_gguf)
        loaded = [load_demo_model() for _ in range(2)]
        folder = demo_files.demo_checkpoint()
    return SimpleNamespace(gguf=seen, loaded=loaded, folder=folder)


def test_demo_model_reads_the_gguf_file_once(demo):
    assert len(demo.gguf) == 1
    assert [path.name for path in demo.folder.parent.iterdir()] == [demo.folder.name]


def test_demo_model_cached_equals_gguf(demo):
    ids = demo.gguf[0][1]("The capital of France is", return_tensors="pt")["input_ids"]
    assert torch.equal(demo.loaded[0][1]("The capital of France is", return_tensors="pt")["input_ids"], ids)
    with torch.no_grad():
        expected = demo.gguf[0][0](input_ids=ids).logits
        for model, _ in demo.loaded:
            assert torch.equal(model(input_ids=ids).logits, expected)


def test_demo_model_knows_english(demo):
    model, tokenizer = demo.loaded[1]
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        following = model(input_ids=ids).logits[0, -1].argmax().item()
    assert tokenizer.decode([following]).strip() == "Paris"


def test_demo_model_saves_and_loads_and_trains(demo, tmp_path):
    model, tokenizer = demo.loaded[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = token_windows(tokenizer, offline_text(), tokens=16, limit=1)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    again(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    assert not getattr(again, "is_quantized", False)
    assert not hasattr(again.config, "quantization_config")


def test_demo_model_missing_says_what_to_do(monkeypatch):
    monkeypatch.setattr(demo_files, "find_spec", lambda name: None)
    with pytest.raises(FxpruneError, match=r"not installed\. Install it: pip install"):
        load_demo_model()
