"""A GGUF file of a model with fewer tokens writes texts as its folder does, in the engine too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxprune
from benchmarks.engines.llama_cpp import LlamaServer
from tests.tiers import tiers
from tests.vocabulary.small import lines, tokenizer
from tests.vocabulary.test_prune import TEXT, model_for


@pytest.mark.parametrize("kind", tiers(["gpt2", "qwen", "llama", "gemma"], "qwen", "gemma"))
def test_the_engine_writes_texts_as_the_folder_does(kind: str, tmp_path: Path) -> None:
    words = tokenizer(kind)
    model, fewer, _ = fxprune.prune_vocabulary(model_for(kind), words, [TEXT], size=len(words) - 90)
    path = fxprune.export_model(model, tmp_path / "slim.gguf", tokenizer=fewer, quantization="f32")
    server = LlamaServer(path, flash=False)
    for line in lines(60):
        assert server.tokenize(line) == fewer(line)["input_ids"], line
    ids = torch.tensor([fewer(TEXT)["input_ids"][:20]])
    with torch.no_grad():
        want = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    assert (server.log_probabilities(ids[0].tolist(), len(fewer)) - want).abs().max() < 1e-3
