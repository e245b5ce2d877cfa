"""Updates sit beside the linear maps that a plan shrank, and merge without a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fxprune.errors import RecoveryError
from fxprune.graph.context import eval_mode
from fxprune.recovery.lora import attach_lora, find_targets, merge_lora
from fxprune.recovery.settings import RecoverySettings
from fxprune.removal.plan import Plan
from tests.models import tiny, token_ids


def test_targets_follow_the_plan_through_removed_blocks() -> None:
    model = tiny("llama", num_hidden_layers=2)
    kept = {"model.layers.2.mlp.up_proj.weight": {0: [0]}, "model.layers.2.input_layernorm.weight": {0: [0]}}
    targets = find_targets(model, Plan(kept, ("model.layers.1",)))
    assert targets.modules == ("model.layers.1.mlp.up_proj",) and targets.skipped == {}
    kept = {"model.embed_tokens.weight": {1: [0]}}
    with pytest.raises(RecoveryError, match=r"no projection to train \(model\.embed_tokens\.weight: Embedding has no"):
        find_targets(model, Plan(kept))


def test_without_shrunken_matrices_all_linear_maps_except_the_output_are_trained() -> None:
    model = tiny("llama", num_hidden_layers=2)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for plan in (None, Plan({}, ("model.layers.1",))):
        assert list(find_targets(model, plan).modules) == linear[:-1]
    with pytest.raises(RecoveryError, match="no projection to train"):
        find_targets(model, Plan({"model.norm.weight": {0: [0]}}))


def test_a_tied_output_is_left_alone_and_named() -> None:
    model = tiny("llama", num_hidden_layers=1, tie_word_embeddings=True)
    names = ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight")
    targets = find_targets(model, Plan({name: {1: [0]} for name in names}))
    assert targets.modules == ("model.layers.0.mlp.up_proj",)
    assert "tied" in targets.skipped["lm_head.weight"] and "Embedding" in targets.skipped["model.embed_tokens.weight"]


def test_updates_are_all_that_is_trained_and_merge_into_the_weights() -> None:
    model = tiny("llama", num_hidden_layers=1)
    targets = find_targets(model, Plan({"model.layers.0.mlp.up_proj.weight": {0: [0]}}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = attach_lora(model, targets, RecoverySettings(rank=2))
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 and all("up_proj.lora_" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.1)
    merged, error = merge_lora(wrapped, {"input_ids": token_ids()})
    assert merged is model and error < 1e-4 and set(model.state_dict()) == set(before)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]


def test_updates_of_a_model_whose_config_stock_classes_refuse_are_kept(tmp_path: Path) -> None:
    """PEFT read the config in the folder that the model came from, and training stopped at its first checkpoint."""
    model = tiny("llama", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    model.name_or_path = str(tmp_path)
    wrapped = attach_lora(model, find_targets(model, None), RecoverySettings(rank=2))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_a_model_evaluates_for_a_while() -> None:
    module = nn.Dropout().train()
    with pytest.raises(KeyError), eval_mode(module):
        assert not module.training
        raise KeyError
    assert module.training
