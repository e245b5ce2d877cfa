"""Tests: blocks taken out of a model, and the tables passed to those that remain."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.emit import Blueprint, emit, rebuild
from fxprune.emit.blocks import combined_inputs, remove_blocks
from fxprune.emit.layout import survey
from fxprune.modelling.blocks import BUILT_AT
from fxprune.modelling.table_rows import INPUTS, select_inputs
from tests.emit.small import small
from tests.emitted import cut, distance, greedy, logits, padding_error, through_disk
from tests.models import tiny, token_ids


def test_blocks_behind_move_up() -> None:
    model = small(depth=3)
    first, _, last = model.blocks
    vars(last)["window"] = 2
    remove_blocks(model, ("blocks.1",), survey(model))
    assert list(model.blocks) == [first, last] and model.config.depth == 2
    assert (first.layer_idx, last.layer_idx) == (0, 1)
    assert vars(last)["window"] == 2, "not called like an index"
    assert BUILT_AT not in vars(last)


def test_a_block_of_another_kind_says_where_it_was_built() -> None:
    model = small()
    remove_blocks(model, ("blocks.0",), survey(model))
    assert BUILT_AT not in vars(model.blocks[1])
    assert vars(model.blocks[2])[BUILT_AT] == {"index": 3, "fields": {"depth": 4}}
    assert model.blocks[2].layer_idx == 2
    again = small(depth=3)
    remove_blocks(again, (), survey(again))
    assert len(again.blocks) == 3


class Sum(nn.Module):
    """Adds a bias."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The sum, or the input itself."""
        return x if bias is None else x + bias


def test_rows_are_taken_of_what_is_passed() -> None:
    module = Sum()
    select_inputs(module, {"bias": {"axis": 0, "of": 4, "kept": [0, 2, 3]}})
    table = torch.arange(8.0).reshape(8, 1)  # two samples of four heads
    want = torch.tensor([0.0, 2.0, 3.0, 4.0, 6.0, 7.0]).reshape(6, 1)
    zeros = torch.zeros(6, 1)
    for twin in (module, copy.deepcopy(module)):
        assert torch.equal(twin(zeros, bias=table), want)
        assert torch.equal(twin(zeros, table), want), "passed by position"
        assert torch.equal(twin(zeros), zeros)
        assert torch.equal(twin(zeros, torch.ones(1, 1)), zeros + 1), "one for all heads"


def test_rows_of_rows_are_counted_in_the_first_table() -> None:
    module = nn.Sequential(Sum())
    select_inputs(module[0], {"bias": {"axis": 1, "of": 6, "kept": [1, 2, 5]}})
    more = {"0": {"bias": {"axis": 1, "of": 3, "kept": [0, 2]}, "x": {"axis": 0, "of": 2, "kept": [1]}}}
    assert combined_inputs(module, more)["0"] == {
        "bias": {"axis": 1, "of": 6, "kept": [1, 5]},
        "x": {"axis": 0, "of": 2, "kept": [1]},
    }
    assert vars(module[0])[INPUTS]["bias"]["kept"] == [1, 2, 5], "the module itself stays as it is"


@pytest.mark.parametrize(
    ("family", "changes"), [("bloom", {}), ("mpt", {}), ("falcon", {"alibi": True, "num_hidden_layers": 2})]
)
def test_position_biases_stay_with_their_heads(family: str, changes: Mapping[str, Any]) -> None:
    """A head goes, and its bias with it; then another one, of the model that was read from disk."""
    model: Any = tiny(family, **changes)
    for seed, left in ((3, 3), (5, 2)):
        result = cut(model, ("head",), seed=seed, ranking="local", group_ratio=0.3)
        assert type(result.model) is type(model), result.report.model_reasons
        inputs = result.model.fxprune_recipe["inputs"]
        assert {len(entry["kept"]) for entries in inputs.values() for entry in entries.values()} == {left}
        assert distance(logits(result.model), logits(result)) < 1e-4
        assert padding_error(result.model) < 1e-4
        assert torch.equal(greedy(result.model), greedy(result.model, use_cache=False))
        read = through_disk(result)
        assert not read.stock
        assert torch.equal(logits(read.model), logits(result.model))
        model = read.model


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_a_table_is_cut_once_whatever_the_batch(ratio: float) -> None:
    """A block that counts heads as well passes the table on; where both cut it, some batches lost rows twice."""
    result = cut(tiny("bloom"), ("mlp", "head"), ranking="local", group_ratio=ratio)
    assert result.model is not None, result.report.model_reasons
    assert all("self_attention" in path for path in result.model.fxprune_recipe["inputs"])
    for batch in (1, 2, 3, 4, 8):
        ids = token_ids(batch, 9)
        assert distance(logits(result.model, ids), logits(result, ids)) < 1e-4


def without_layer(model: Any, layer: int) -> Any:
    """A model of the same class without one of its layers."""
    gone = f"model.layers.{layer}"
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    emission = emit(model, {name: t for name, t in tensors.items() if not name.startswith(f"{gone}.")}, (gone,))
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


def test_a_recipe_says_which_rows_go_in() -> None:
    dense = tiny("bloom")
    slim = cut(dense, ("head",), ranking="local").model
    recipe = Blueprint.from_dict(slim.fxprune_recipe)
    again = rebuild(dense, recipe)
    assert {path: vars(module).get(INPUTS) for path, module in again.named_modules()} == {
        path: vars(module).get(INPUTS) for path, module in slim.named_modules()
    }
