"""GGUF files on the command line: one goes in, one comes out; and checkpoints become files."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import fxprune
from benchmarks.engines.llama_cpp import LlamaServer
from fxprune.export.gguf.write import most_common_type
from tests.cli.running import refused, shown
from tests.export.small import even, tokenizer
from tests.models import VOCABULARY, token_ids


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file in eight bits."""
    path = tmp_path_factory.mktemp("dense") / "dense.gguf"
    model = even("llama", hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4)
    return fxprune.export_model(model, path, tokenizer=tokenizer(), quantization="q8_0")


def test_a_gguf_file_goes_in_and_a_smaller_one_comes_out(dense: Path, tmp_path: Path) -> None:
    """It has the type and the tokenizer of the one that was read, and computes what the plan makes of the model."""
    out = tmp_path / "slim.gguf"
    options = ("--recipe", "llm-pruner", "--importance", "l2", "--kinds", "mlp", "--ratio", 0.1, "--protect", 1, 0)
    code, output = shown("prune", dense, "--out", out, *options)
    assert code == 0 and f"written to {out}: `fxprune serve` and programs that read GGUF files run it" in output, output
    assert {path.name for path in tmp_path.iterdir()} == {
        *("slim.gguf", "slim.plan.json", "slim.report.json", "slim.report.html", "slim.run.yaml")
    }
    assert 0.05 < json.loads((tmp_path / "slim.report.json").read_text())["achieved"] < 0.15
    before, after = gguf.GGUFReader(dense).fields, gguf.GGUFReader(out).fields
    assert after["general.architecture"].contents() == "deci"
    assert after["deci.feed_forward_length"].contents() == [128, 96]
    copied = [name for name in before if name.startswith("tokenizer.")]
    assert len(copied) > 5 and all(before[name].contents() == after[name].contents() for name in copied)
    assert most_common_type(out) == "q8_0"
    model = AutoModelForCausalLM.from_pretrained(dense.parent, gguf_file=dense.name)
    plan = fxprune.Plan.from_json((tmp_path / "slim.plan.json").read_text())
    ids = token_ids(1, 9)
    with torch.no_grad():
        want = fxprune.apply(model, plan)(input_ids=ids).logits[0, -1].log_softmax(-1)
    got = LlamaServer(out).log_probabilities(ids[0].tolist(), VOCABULARY)
    torch.testing.assert_close(got, want, atol=0.05, rtol=0)


def test_a_model_that_the_format_cannot_hold_is_refused_before_it_is_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    even("gpt_neox").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(fxprune, "prune", lambda *_, **__: pytest.fail("it was pruned"))
    line = refused("prune", tmp_path / "dense", "--out", tmp_path / "slim.gguf", "--importance", "l2")
    assert "the format cannot express this model" in line
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_folder_becomes_a_file(tmp_path: Path) -> None:
    even("llama").save_pretrained(tmp_path / "stock")
    tokenizer().save_pretrained(tmp_path / "stock")
    code, output = shown("export", tmp_path / "stock", tmp_path / "slim.gguf", "--quantization", "f32")
    assert code == 0 and output.endswith("written: `fxprune serve` and programs that read GGUF files run it"), output
    code, output = shown("export", tmp_path / "stock", tmp_path / "again.gguf", "--like", tmp_path / "slim.gguf")
    assert code == 0, output
    names = [name for name in gguf.GGUFReader(tmp_path / "slim.gguf").fields if name.startswith("tokenizer.")]
    assert set(names) <= set(gguf.GGUFReader(tmp_path / "again.gguf").fields)
