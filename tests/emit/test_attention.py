"""A model under each attention implementation of its class, and left as it was."""

from __future__ import annotations

from typing import Any

import torch

from fxprune.emit.load import attending, configs_of, implementations
from fxprune.graph.context import evaluating
from fxprune.modelling.block_config import block_config
from tests.emit.small import small
from tests.models import tiny, token_ids


def test_a_class_has_its_own_first_and_what_it_can_be_switched_to() -> None:
    model = tiny("llama", num_hidden_layers=1)
    assert implementations(model) == ("sdpa", "eager", "flex_attention")
    model.set_attn_implementation("eager")
    assert implementations(model) == ("eager", "sdpa", "flex_attention")
    assert implementations(tiny("bloom", num_hidden_layers=1)) == ("eager",)


def test_a_model_runs_under_another_and_is_as_it_was() -> None:
    model: Any = tiny("llama", num_hidden_layers=1)
    layer = model.model.layers[0]
    layer.self_attn.config = block_config(model.config, {})
    seen = []
    layer.self_attn.register_forward_pre_hook(lambda module, _: seen.append(module.config._attn_implementation))
    with torch.no_grad():
        for name in implementations(model):
            with attending(model, name) as taken:
                assert taken
                model(token_ids(), use_cache=False)
    assert seen == ["sdpa", "eager", "flex_attention"]
    assert model.config._attn_implementation == layer.self_attn.config._attn_implementation == "sdpa"


def test_what_a_model_does_not_take_is_told() -> None:
    model = small()
    before = [dict(vars(config)) for config in configs_of(model)]
    with attending(model, "flash_attention_2") as taken:
        assert not taken
    assert [dict(vars(config)) for config in configs_of(model)] == before


def test_each_module_gets_its_mode_back() -> None:
    model = small().train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
