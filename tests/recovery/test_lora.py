"""Updates sit beside the linear maps that a plan shrank, and merge without a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from fxprune.errors import RecoveryError
from fxprune.recovery.lora import attach_lora, find_targets
from fxprune.recovery.settings import RecoverySettings
from fxprune.removal.plan import Plan
from tests.models import tiny


def test_targets_are_the_linear_maps_that_shrank() -> None:
    model = tiny("llama", num_hidden_layers=2, tie_word_embeddings=True)
    names = ("model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight")
    kept = {name: {1: [0]} for name in names} | {"model.layers.2.input_layernorm.weight": {0: [0]}}
    targets = find_targets(model, Plan(kept, ("model.layers.1",)))
    assert targets.modules == ("model.layers.1.mlp.up_proj",), "named as in the slim model"
    assert "tied" in targets.skipped["lm_head.weight"] and "Embedding" in targets.skipped["model.embed_tokens.weight"]
    with pytest.raises(RecoveryError, match=r"no projection to train \(model\.embed_tokens\.weight: Embedding has no"):
        find_targets(model, Plan({"model.embed_tokens.weight": {1: [0]}}))
    with pytest.raises(RecoveryError, match="no projection to train"):
        find_targets(model, Plan({"model.norm.weight": {0: [0]}}))
    untied = tiny("llama", num_hidden_layers=2)
    linear = [name for name, module in untied.named_modules() if isinstance(module, nn.Linear)]
    for plan in (None, Plan({}, ("model.layers.1",))):
        assert list(find_targets(untied, plan).modules) == linear[:-1], "all except the output"


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
