"""The demo model: read once, pruned by a fifth, and the same in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fxprune
from benchmarks.common import load_demo_model
from fxprune.cli import demo as demo_files
from fxprune.errors import FxpruneError

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
TELL = """
import sys, torch
if sys.argv[2] == "stock":
    sys.modules["fxprune"] = None
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    import fxprune
    model = fxprune.from_pretrained(sys.argv[1])
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[3], return_tensors="pt")
print(model.generate(**ids, max_new_tokens=12, do_sample=False)[0].tolist())
"""


def told(model: torch.nn.Module, tokenizer: object) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt")
    return str(model.generate(**ids, max_new_tokens=12, do_sample=False)[0].tolist())


def told_elsewhere(folder: Path, loader: str) -> str:
    command = [sys.executable, "-c", TELL, str(folder), loader, PROMPT]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def demo() -> tuple[fxprune.Traced, Any]:
    """The model's graph, and its tokenizer; pruning leaves both as they are."""
    dense, tokenizer = load_demo_model()
    return fxprune.trace(dense.float()), tokenizer


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "uneven"])
def test_the_demo_model_is_saved_and_loaded(uniform: bool, demo: tuple[fxprune.Traced, Any], tmp_path: Path) -> None:
    traced, tokenizer = demo
    folder = tmp_path / "slim"
    pipeline = fxprune.prune_pipeline(ratio=0.2, importance="l2", uniform=uniform)
    result = fxprune.Result.of(pipeline(traced.graph_module).graph_module)
    structure = result.save_pretrained(folder, tokenizer)
    assert structure.is_stock == uniform
    assert abs(result.report.achieved - 0.2) < 0.005
    parameters = sum(p.numel() for p in result.model.parameters())
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size == pytest.approx(parameters * 4, rel=0.02)
    assert told_elsewhere(folder, "stock" if uniform else "ours") == told(result.model, tokenizer)


def test_the_demo_model_is_read_once_as_plain_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its package first, then from the checkpoint made of it; it knows English, and trains."""
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path))
    original, seen = demo_files.load_gguf, list[Any]()
    monkeypatch.setattr(demo_files, "load_gguf", lambda path: seen.append(original(path)) or seen[-1])
    loaded = [load_demo_model() for _ in range(2)]
    ((of_file, tokenizer),) = seen
    assert [path.name for path in demo_files.demo_checkpoint().parent.iterdir()] == [demo_files.demo_checkpoint().name]
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = of_file(input_ids=ids).logits
    assert tokenizer.decode([int(expected[0, -1].argmax())]).strip() == "Paris"
    for model, words in loaded:
        assert torch.equal(words(PROMPT, return_tensors="pt")["input_ids"], ids)
        assert torch.equal(model(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(input_ids=ids).logits, expected)
    again(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    assert not getattr(again, "is_quantized", False) and not hasattr(again.config, "quantization_config")


def test_a_missing_demo_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_files, "find_spec", lambda name: None)
    with pytest.raises(FxpruneError, match=r"not installed\. Install it: pip install"):
        load_demo_model()
