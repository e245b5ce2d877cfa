"""Whether a slim model computes what its graph does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from fxprune.checkpoint.structure import describe
from fxprune.emit.emitted import Judge, _agree
from fxprune.emit.load import implementations
from fxprune.errors import VerificationError
from fxprune.trace import trace
from fxprune.trace.inputs import meta_twin
from tests.emitted import cut, distance, logits
from tests.models import tiny, token_ids

LATENT = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny("llama", num_hidden_layers=1, hidden_size=24)


@pytest.fixture(scope="module")
def graph(dense: Any) -> Any:
    return trace(dense).graph_module


@pytest.fixture
def judge(dense: Any, graph: Any) -> Judge:
    return Judge(graph, dense, {"input_ids": token_ids(2, 9)})


@pytest.fixture
def candidate(dense: Any) -> Any:
    return copy.deepcopy(dense)


def test_a_model_like_its_graph_is_taken(judge: Judge, candidate: Any) -> None:
    assert judge(candidate)
    candidate.model.norm.weight.data[0] += 1
    assert not judge(candidate)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what eager attention does after all: to its output, for a module."""
    plain = modeling_llama.eager_attention_forward

    def replace(act: Any) -> None:
        def attention(module: Any, *args: Any, **more: Any) -> Any:
            return act(module, plain(module, *args, **more)[0]), None

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)

    return replace


def fail_if_broken(module: Any, output: torch.Tensor) -> torch.Tensor:
    """As SDPA does without a number that eager attention needs."""
    if vars(module).get("broken"):
        raise RuntimeError("sizes of a module")
    return output


def test_what_fails_under_another_implementation_alone_is_refused(judge: Judge, candidate: Any, eager: Any) -> None:
    candidate.model.layers[0].self_attn.broken = True
    eager(fail_if_broken)
    for dense in (judge.dense, meta_twin(judge.dense)):
        judge.dense = dense
        with pytest.raises(VerificationError, match="under eager attention: it does not run: RuntimeError"):
            judge(candidate)


def test_what_differs_under_another_implementation_alone_is_refused(judge: Judge, candidate: Any, eager: Any) -> None:
    """Where the dense model has no values any more, nobody knows what it would do."""
    candidate.model.layers[0].self_attn.broken = True
    eager(lambda module, output: output * (2 if vars(module).get("broken") else 1))
    with pytest.raises(VerificationError, match="under eager attention: it computes something else"):
        judge(candidate)
    judge.dense = meta_twin(judge.dense)
    assert judge(candidate)


def test_an_implementation_that_the_dense_model_fails_says_nothing(judge: Judge, candidate: Any, eager: Any) -> None:
    eager(lambda _, output: output * 2)
    assert judge(candidate)
    eager(lambda _, output: output.view(7))
    assert judge(candidate)
    judge.dense = meta_twin(judge.dense)
    assert judge(candidate)


def test_a_model_in_training_is_compared_in_evaluation_mode(judge: Judge, candidate: Any) -> None:
    """Dropout made every comparison fail, and the reasons spoke of shapes."""
    candidate.model.layers[0].self_attn.attention_dropout = 0.5
    assert judge(candidate.train())
    assert all(module.training for module in candidate.modules())


def test_heads_without_key_heads_of_their_own_go_under_every_implementation() -> None:
    """The config said six key/value heads beside four heads: their quotient was zero, and eager attention broke."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **LATENT)).eval()
    result = cut(model, ("head",))
    slim, config = result.model, result.model.config
    assert config.num_attention_heads == config.num_key_value_heads == 4, result.report.model_reasons
    wanted = result.graph_module(token_ids())[0]
    for name in implementations(slim):
        slim.set_attn_implementation(name)
        with torch.compiler.set_stance("force_eager"):
            assert distance(logits(slim), wanted) < 1e-5, name
    stock = cut(model, ("head",), ranking="local", uniform=True)
    assert describe(stock.model).is_stock, "what a stock checkpoint says has to fit as well"
    assert stock.model.config.num_attention_heads == stock.model.config.num_key_value_heads < 6


def test_outputs_agree_but_for_rounding() -> None:
    want = torch.randn(1, 8, 5)
    assert _agree(want, want + 1e-5) and not _agree(want, want + 1e-2)
    assert not _agree(want, want[:, :4])
    half, off = want.bfloat16(), want.bfloat16()
    off[:, 0] += 1
    assert _agree(half, off), "a router sent one token elsewhere"
    assert not _agree(half, half + 1)


def test_a_model_in_training_gets_its_slim_model() -> None:
    """Dropout made every candidate fail, and the reasons spoke of shapes; each module's mode is kept."""
    model = tiny("llama", num_hidden_layers=1, hidden_size=24, attention_dropout=0.5).train()
    model.model.norm.eval()
    result = cut(model, ("mlp",))
    assert result.model is not None, result.report.model_reasons
    modes = {path: module.training for path, module in result.model.named_modules()}
    assert modes == {path: module.training for path, module in model.named_modules()}
    assert not modes["model.norm"] and modes["model.layers.0.self_attn"]
    assert distance(logits(result.model.eval()), logits(result.graph_module)) < 1e-5
