"""Test the benchmark of joined blocks: a joined pair computes the sum of both, each on what the first one reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxprune
from benchmarks.joined import block_sums, join, orders
from fxprune.evaluation.comparison import graph_predictor
from tests.models import tiny

IDS = torch.arange(18).reshape(2, 9)


def test_joined_blocks_of_a_llama_are_those_computed_by_hand() -> None:
    model: Any = tiny("llama", num_hidden_layers=4)
    graph_module = fxprune.trace(model, {"input_ids": IDS}).graph_module
    before = graph_predictor(graph_module)(input_ids=IDS)
    found = graph_predictor(join(graph_module, 4, [2, 0]))(input_ids=IDS)
    body = model.model
    with torch.no_grad():
        x = body.embed_tokens(IDS)
        angles = body.rotary_emb(x, torch.arange(IDS.shape[1])[None])
        for pair in (body.layers[:2], body.layers[2:]):
            read = [layer.input_layernorm(x) for layer in pair]
            parts = [
                layer.self_attn(h, position_embeddings=angles, attention_mask=None)[0]
                for layer, h in zip(pair, read, strict=True)
            ]
            x = x + parts[0] + parts[1]
            one, other = (layer.mlp(layer.post_attention_layernorm(x)) for layer in pair)
            x = x + one + other
        expected = model.lm_head(body.norm(x))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(graph_predictor(graph_module)(input_ids=IDS), before, msg="the graph given stays")


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_blocks_of_other_models_are_found_and_joined(kind: str) -> None:
    graph_module = fxprune.trace(tiny(kind), {"input_ids": IDS}).graph_module
    assert [len(sums) for sums in block_sums(graph_module.graph, 3)[1]] == [2, 2, 2]
    joined = graph_predictor(join(graph_module, 3, [1]))(input_ids=IDS)
    assert joined.isfinite().all() and not torch.equal(joined, graph_predictor(graph_module)(input_ids=IDS))
    with pytest.raises(ValueError, match="6 residual additions are no chain over 4 blocks"):
        block_sums(graph_module.graph, 4)


def test_pairs_do_not_share_a_block() -> None:
    graph_module = fxprune.trace(tiny("llama", num_hidden_layers=5), {"input_ids": IDS}).graph_module
    one, both = orders(graph_module, 5, IDS, 2)
    assert both[0] == one[0] and abs(both[0] - both[1]) > 1
