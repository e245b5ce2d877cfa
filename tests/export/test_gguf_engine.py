"""GGUF files give the same logits in the engine as their models in transformers, whatever their blocks."""

from collections.abc import Callable
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
from tests.tiers import tiers

TIED = {"tie_word_embeddings": True}
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LLAMA_3 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALED}}

UNEVEN: list[tuple[str, dict[str, Any], str]] = [
    *((family, {}, "deci") for family in ("llama", "mistral", "qwen2", "phi3", "ernie4_5", "seed_oss")),
    *(("llama", TIED, "deci"), ("llama", {"attention_bias": True, "mlp_bias": True}, "deci")),
    *(("llama", LLAMA_3, "deci"), ("qwen2", TIED, "deci"), ("qwen3", TIED, "openelm")),
]
OWN = "qwen2 qwen3 phi3 gemma granite olmo2 starcoder2 gpt2 stablelm nemotron glm4 ernie4_5 arcee"
EVEN: list[tuple[str, dict[str, Any], str]] = [
    *((family, {}, family) for family in OWN.split()),
    *(("cohere", {}, "command-r"), ("phi", {}, "phi2"), ("seed_oss", {}, "deci"), ("llama", LLAMA_3, "llama")),
    ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}, "smollm3"),
    ("gemma2", {"query_pre_attn_scalar": 10}, "gemma2"),
]


def check(model: PreTrainedModel, path: Path, arch: str) -> None:
    """Log-probabilities of the next token are the same, after one token and after many."""
    export_gguf(model, path, tokenizer=tokenizer(), quantization="f32")
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == arch
    tabled = arch_named(arch).activation == "gelu"  # which the engine looks up in half precision
    for flash in (False, True):  # queries and the mask are half precision with flash
        engine = LlamaServer(path, flash=flash)
        for count in (1, 20):
            ids = token_ids(1, count)
            with torch.no_grad():
                want = model(input_ids=ids).logits[0, -1].log_softmax(-1)
            error = (engine.log_probabilities(ids[0].tolist(), VOCABULARY) - want).abs().max()
            assert error < (5e-3 if tabled or flash else 1e-4)


CASES = [(uneven, *case) for case in UNEVEN] + [(even, *case) for case in EVEN]


@pytest.mark.parametrize(
    "case", tiers(CASES, *CASES[::8]), ids=lambda case: " ".join((case[0].__name__, case[1], *case[2], case[3]))
)
def test_uneven_blocks_go_under_a_general_architecture_and_equal_ones_under_that_of_their_type(
    case: tuple[Callable[..., PreTrainedModel], str, dict[str, Any], str], tmp_path: Path
) -> None:
    make, family, changes, arch = case
    check(make(family, **changes), tmp_path / "slim.gguf", arch)


WITHOUT: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    *(((1,), (2,)), ((0,), (0,)), ((0,), (3,)), ((3,), (0,)), ((), (1, 3)), ((3,), (3,)), ((0, 2), ())),
]


@pytest.mark.parametrize("family", tiers(["llama", "qwen3"], "llama"))
@pytest.mark.parametrize("blocks", tiers(WITHOUT, ((0,), (3,)), ((), (1, 3))), ids=str)
def test_blocks_may_be_without_attention_or_mlp(
    family: str, blocks: tuple[tuple[int, ...], tuple[int, ...]], tmp_path: Path
) -> None:
    """The engine drops what attention gives where an MLP has no width, and takes all sizes from the first block."""
    model = without(uneven(family, **TIED), *blocks)
    check(model, tmp_path / "slim.gguf", {"llama": "deci", "qwen3": "openelm"}[family])
