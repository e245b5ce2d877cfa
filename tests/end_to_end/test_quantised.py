"""Slim folders with uneven layers quantised by torchao and LLM Compressor, as docs/serving.md shows it.

Neither is an extra of this package; where they are installed, these tests run.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from tests.models import tiny, token_ids
from tests.test_docs import blocks_of, run


@pytest.mark.parametrize(
    ("package", "names"), [("torchao", ("quantised", "again")), ("llmcompressor", ("slim", "again"))]
)
def test_a_quantised_folder_computes_what_was_saved(
    package: str, names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    dense = tiny("llama", num_hidden_layers=3, hidden_size=64, intermediate_size=160, **heads)
    options: dict[str, Any] = {"importance": "l2", "recipe": "llm-pruner", "protect": (1, 0)}
    result = fxprune.prune(dense, ratio=0.2, **options)
    sizes = {(one.mlp.up_proj.out_features, one.self_attn.k_proj.out_features) for one in result.model.model.layers}
    assert len(sizes) > 1
    result.save_pretrained("slim")
    (block,) = [block for block in blocks_of("docs/serving.md", "python") if package in block.reason]
    found: dict[str, Any] = {"fxprune": fxprune}
    run(block, found)
    ids = token_ids(2, 9)
    with torch.no_grad():
        saved, loaded, exact = (model(ids).logits for model in (*(found[name] for name in names), result.model))
    torch.testing.assert_close(loaded, saved, atol=1e-4, rtol=1e-4)
    assert (saved - exact).abs().max() > 0
