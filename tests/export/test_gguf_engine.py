"""GGUF files give the same logits in the engine as their models in transformers, whatever their blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.engines.llama_cpp import LlamaServer
from fxprune.export.gguf.format import arch_named
from fxprune.export.gguf.write import export_gguf
from tests.export.small import even, tokenizer, uneven, without
from tests.models import VOCABULARY, token_ids

TIED = {"tie_word_embeddings": True}
LLAMA_3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}

UNEVEN: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "deci"),
    ("llama", TIED, "deci"),
    ("llama", {"attention_bias": True, "mlp_bias": True}, "deci"),
    ("llama", LLAMA_3, "deci"),
    ("mistral", {}, "deci"),
    ("qwen2", {}, "deci"),
    ("qwen2", TIED, "deci"),
    ("phi3", {}, "deci"),
    ("ernie4_5", {}, "deci"),
    ("seed_oss", {}, "deci"),
    ("qwen3", TIED, "openelm"),
]
EVEN: list[tuple[str, dict[str, Any], str]] = [
    ("llama", LLAMA_3, "llama"),
    ("qwen2", {}, "qwen2"),
    ("qwen3", {}, "qwen3"),
    ("phi3", {}, "phi3"),
    ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}, "smollm3"),
    ("gemma", {}, "gemma"),
    ("gemma2", {"query_pre_attn_scalar": 10}, "gemma2"),
    ("granite", {}, "granite"),
    ("olmo2", {}, "olmo2"),
    ("starcoder2", {}, "starcoder2"),
    ("gpt2", {}, "gpt2"),
    ("stablelm", {}, "stablelm"),
    ("cohere", {}, "command-r"),
    ("nemotron", {}, "nemotron"),
    ("phi", {}, "phi2"),
    ("glm4", {}, "glm4"),
    ("ernie4_5", {}, "ernie4_5"),
    ("seed_oss", {}, "deci"),
    ("arcee", {}, "arcee"),
]


def named(case: tuple[str, dict[str, Any], str]) -> str:
    return " ".join((case[0], *case[1], case[2]))


def largest_difference(model: PreTrainedModel, path: Path, *, flash: bool) -> float:
    """Of the log-probabilities of the next token, after a few and after many."""
    engine, found = LlamaServer(path, flash=flash), []
    for count in (1, 20):
        ids = token_ids(1, count)
        with torch.no_grad():
            want = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        found.append((engine.log_probabilities(ids[0].tolist(), VOCABULARY) - want).abs().max())
    return float(max(found))


def check(model: PreTrainedModel, path: Path, arch: str) -> None:
    export_gguf(model, path, tokenizer=tokenizer(), quantization="f32")
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == arch
    tabled = arch_named(arch).activation == "gelu"  # which the engine looks up in half precision
    assert largest_difference(model, path, flash=False) < (5e-3 if tabled else 1e-4)
    assert largest_difference(model, path, flash=True) < 5e-3, "queries and the mask are half precision here"


@pytest.mark.parametrize("case", UNEVEN, ids=named)
def test_blocks_may_differ_in_every_way(case: tuple[str, dict[str, Any], str], tmp_path: Path) -> None:
    check(uneven(case[0], **case[1]), tmp_path / "slim.gguf", case[2])


@pytest.mark.parametrize("case", EVEN, ids=named)
def test_equal_blocks_go_under_the_architecture_of_their_type(
    case: tuple[str, dict[str, Any], str], tmp_path: Path
) -> None:
    check(even(case[0], **case[1]), tmp_path / "slim.gguf", case[2])


@pytest.mark.parametrize(("family", "arch"), [("llama", "deci"), ("qwen3", "openelm")])
@pytest.mark.parametrize(
    ("attention", "mlp"),
    [((1,), (2,)), ((0,), (0,)), ((0,), (3,)), ((3,), (0,)), ((), (1, 3)), ((3,), (3,)), ((0, 2), ())],
)
def test_blocks_may_be_without_attention_or_mlp(
    family: str, arch: str, attention: tuple[int, ...], mlp: tuple[int, ...], tmp_path: Path
) -> None:
    """The engine drops what attention gives where an MLP has no width, and takes all sizes from the first block."""
    model = without(uneven(family, **TIED), attention, mlp)
    check(model, tmp_path / "slim.gguf", arch)
