"""A trace shares the weights of the model, does not change it, and names the line at which it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from fxprune.errors import TraceError
from fxprune.graph.facts import Notes, Runnable, Shaped, facts_of
from fxprune.graph.tensors import weights
from fxprune.trace.capture import trace
from tests.models import tiny, token_ids
from tests.oracle import Net


def test_a_graph_computes_the_same_as_the_model_with_its_tensors() -> None:
    model = tiny("llama", num_hidden_layers=1)
    config, names = model.config.to_dict(), {id(parameter) for parameter in model.parameters()}
    traced = trace(model)
    graph_module = traced.graph_module
    with torch.no_grad():
        assert torch.allclose(graph_module(input_ids=token_ids()).logits, model(token_ids()).logits, atol=1e-5)
    assert names <= {id(tensor) for _, tensor in weights(graph_module)}
    assert model.config.to_dict() == config and traced.model is model and traced.notes == ()
    facts = facts_of(graph_module)
    assert Runnable in facts and Shaped in facts and facts[Notes].lines == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_graph_moves_between_dtypes(dtype: torch.dtype) -> None:
    """The dtype of the model is read at run time, a cast to float32 stays one."""
    net = Net(lambda net, x: net.a(x.float().to(net.a.weight.dtype)), a=nn.Linear(3, 4))
    graph_module = trace(net, {"x": torch.randn(2, 3)}).graph_module
    net.to(dtype)
    graph_module.to(dtype)
    assert graph_module(x=torch.randn(2, 3, dtype=dtype)).dtype == dtype


def test_named_outputs_that_no_graph_returns_are_left_out() -> None:
    """PI0 returns the cache of its prefix, although it is called without one."""
    net = Net(lambda net, x: CausalLMOutputWithPast(None, net.a(x), DynamicCache()), a=nn.Linear(3, 4))
    x = torch.randn(2, 3)
    found = trace(net, {"x": x}).graph_module(x=x)
    assert found.keys() == {"logits"} and torch.allclose(found.logits, net(x=x).logits)


@pytest.mark.parametrize("grad", [True, False])
def test_attention_with_a_function_among_its_arguments_is_refused_with_a_way_out(grad: bool) -> None:
    """FlexAttention was a ``KeyError``, told as a defect, or advice about data-dependent Python."""

    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        q = net.a(x)[:, None]
        with torch.set_grad_enabled(grad):
            return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + (i - j))  # type: ignore[return-value]

    with pytest.raises(TraceError, match=r"flex_attention as torch\.nn\.functional\.scaled_dot_product_attention"):
        trace(Net(body, a=nn.Linear(3, 4)), {"x": torch.randn(2, 7, 3)})
