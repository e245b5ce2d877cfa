"""What tracing may let vary, and what the code of a model fixes without saying so."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from transformers import PreTrainedModel

from fxprune.data.verification import make_inputs
from fxprune.graph.compat import is_free
from fxprune.graph.counting import count_macs
from fxprune.trace.capture import trace
from fxprune.trace.limits import pin_sizes
from tests.oracle import Net
from tests.zoo import tiny_model, token_ids


def free_axes(graph_module: fx.GraphModule) -> list[bool]:
    """Of each axis of the first input, whether its size may vary."""
    node = next(node for node in graph_module.graph.nodes if node.op == "placeholder")
    return [is_free(size) for size in node.meta["val"].shape]


def test_batch_and_tokens_of_a_plain_model_vary() -> None:
    traced = trace(tiny_model("llama"))
    assert free_axes(traced.graph_module) == [True, True]
    assert traced.notes == ()
    assert pin_sizes(traced.graph_module) == ""


def test_a_number_of_chunks_that_export_takes_for_a_constant_fixes_the_tokens() -> None:
    """Seven tokens are one chunk of 16; counting multiply-accumulates at 64 tokens then failed, and pruning too."""
    traced = trace(tiny_model("mamba2"))
    assert free_axes(traced.graph_module) == [True, False]
    assert traced.notes == ("runs at input_ids of shape (any, 7) alone",)
    assert count_macs(traced.graph_module) > 0
    assert make_inputs(traced.graph_module, None, seed=0)["input_ids"].shape == (2, 7)
    assert traced.graph_module(input_ids=token_ids(3, 7)).logits.shape[:2] == (3, 7)


def test_a_size_that_is_one_number_is_fixed() -> None:
    """Its symbol stood for a variable size although tracing had found it to be 7."""
    traced = trace(tiny_model("cpmant"))
    assert free_axes(traced.graph_module) == [True, False]
    assert traced.notes == ("runs at input_ids of shape (any, 7) alone",)


@pytest.mark.parametrize("rows", [9, 200])
def test_a_range_that_ends_is_said(rows: int) -> None:
    def body(self: Net, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) + self.table[: x.shape[1]].reshape(x.shape[1], 5)

    net = Net(body, lin=nn.Linear(4, 5), table=torch.randn(rows, 5))
    traced = trace(net.eval(), {"x": torch.randn(2, 7, 4)})
    assert free_axes(traced.graph_module) == [True, True, False]
    assert traced.notes == (f"holds for x.shape[1] <= {rows}",)
    assert make_inputs(traced.graph_module, None, seed=0)["x"].shape[1] == (7 if rows == 9 else 16)
    assert count_macs(traced.graph_module) > 0


@pytest.mark.parametrize("model_type", ["granitemoeshared", "fuyu"])
def test_no_cache_is_traced_where_the_config_or_forward_hides_the_word(model_type: str) -> None:
    """`use_cache` among the keywords alone fixed all sizes; a config without it let the cache into the outputs."""
    model: PreTrainedModel = tiny_model(model_type)
    before = model.config.to_dict()
    traced = trace(model)
    assert free_axes(traced.graph_module) == [True, True]
    assert traced.notes == ()
    assert model.config.to_dict() == before
