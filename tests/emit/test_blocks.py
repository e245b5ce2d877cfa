"""Removal of whole blocks, and row selection in the tables passed to the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.emit import Blueprint, emit, rebuild
from fxprune.emit.structure import combined_inputs
from fxprune.modelling.blocks import BUILT_AT
from fxprune.modelling.table_rows import INPUTS, select_inputs
from tests.emitted import cut, distance, greedy, logits, padding_error, through_disk
from tests.models import all_tensors, tiny, token_ids
from tests.tiers import SLOW


def test_rows_of_rows_are_counted_in_the_first_table() -> None:
    module = nn.Sequential(nn.Bilinear(1, 1, 1))
    select_inputs(module[0], {"bias": {"axis": 1, "of": 6, "kept": [1, 2, 5]}})
    more = {"0": {"bias": {"axis": 1, "of": 3, "kept": [0, 2]}, "x": {"axis": 0, "of": 2, "kept": [1]}}}
    assert combined_inputs(module, more)["0"] == {
        "bias": {"axis": 1, "of": 6, "kept": [1, 5]},
        "x": {"axis": 0, "of": 2, "kept": [1]},
    }
    assert vars(module[0])[INPUTS]["bias"]["kept"] == [1, 2, 5], "the module itself stays as it is"


BIASED = [("falcon", {"alibi": True, "num_hidden_layers": 2}, 1), ("bloom", {}, 2), ("mpt", {}, 1)]


@pytest.mark.parametrize(
    ("family", "changes", "cuts"), [BIASED[0], *(pytest.param(*row, marks=SLOW) for row in BIASED[1:])]
)
def test_position_biases_stay_with_their_heads(family: str, changes: Mapping[str, Any], cuts: int) -> None:
    """A head is removed, and its bias with it; then another one, of the model that was read from disk."""
    model: Any = tiny(family, **changes)
    for seed, left in ((3, 3), (5, 2))[:cuts]:
        result = cut(model, ("head",), seed=seed, ranking="local", select="select-by-group-ratio{group_ratio=0.3}")
        assert isinstance(result.model, type(model)), result.report.model_reasons
        inputs = result.model.fxprune_blueprint["inputs"]
        assert {len(entry["kept"]) for entries in inputs.values() for entry in entries.values()} == {left}
        assert distance(logits(result.model), logits(result)) < 1e-4
        assert padding_error(result.model) < 1e-4
        assert torch.equal(greedy(result.model), greedy(result.model, use_cache=False))
        read = through_disk(result)
        assert not read.stock
        assert torch.equal(logits(read.model), logits(result.model))
        model = read.model


def test_a_table_is_cut_once_whatever_the_batch() -> None:
    """A block that counts heads as well passes the table on; when both selected rows, some batches lost rows twice."""
    dense = tiny("bloom", n_layer=2)
    result = cut(dense, ("mlp", "head"), ranking="local", select="select-by-group-ratio{group_ratio=0.5}")
    assert result.model is not None, result.report.model_reasons
    assert all("self_attention" in path for path in result.model.fxprune_blueprint["inputs"])
    for batch in (1, 2, 3, 4, 8):
        ids = token_ids(batch, 9)
        assert distance(logits(result.model, ids), logits(result, ids)) < 1e-4
    again = rebuild(dense, Blueprint.from_dict(result.model.fxprune_blueprint))
    assert {path: vars(module).get(INPUTS) for path, module in again.named_modules()} == {
        path: vars(module).get(INPUTS) for path, module in result.model.named_modules()
    }


def without_layer(model: Any, layer: int) -> Any:
    """A model of the same class without one of its layers."""
    gone = f"model.layers.{layer}"
    emission = emit(
        model, {name: t for name, t in all_tensors(model).items() if not name.startswith(f"{gone}.")}, (gone,)
    )
    assert emission.model is not None, emission.reasons
    return emission.model


def test_a_layer_keeps_its_kind_where_layers_before_it_go(tmp_path: Path) -> None:
    """Layer 0 has no experts, by its index. Layers 1 and 2 have some, also when they are the first two."""
    dense = tiny("qwen2_moe", num_hidden_layers=3)
    slim = without_layer(dense, 0)
    assert [type(layer.mlp) for layer in slim.model.layers] == [type(layer.mlp) for layer in dense.model.layers[1:]]
    place = vars(slim.model.layers[0])[BUILT_AT]
    assert (place["index"], place["fields"]["num_hidden_layers"]) == (1, 3)
    assert BUILT_AT not in vars(slim.model.layers[1])
    structure = fxprune.save_pretrained(slim, tmp_path / "slim")
    assert not structure.is_stock and "another kind of block" in structure.differences[-1]
    read = fxprune.from_pretrained(tmp_path / "slim")
    assert [layer.self_attn.layer_idx for layer in read.model.layers] == [0, 1]
    assert distance(logits(read), logits(slim)) < 1e-5
    assert torch.equal(greedy(read), greedy(slim, use_cache=False))
    last = without_layer(read, 1)
    assert vars(last.model.layers[0])[BUILT_AT]["index"] == 1
    fxprune.save_pretrained(last, tmp_path / "last")
    assert distance(logits(fxprune.from_pretrained(tmp_path / "last")), logits(last)) < 1e-5
