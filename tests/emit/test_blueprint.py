"""Blueprints: plain data from which a slim model is built."""

from __future__ import annotations

import json

import pytest
from torch import nn

from fxprune.emit.emitter import Blueprint, rebuild
from fxprune.modelling.blocks import BUILT_AT, CannotBuildError
from fxprune.modelling.layerwise import Overrides
from fxprune.modelling.table_rows import INPUTS
from tests.emit.small import SmallModel, small

BLUEPRINT = Blueprint(
    fields={"hidden": 10},
    block_fields={"blocks.0": {"inner": 8}, "blocks.2": {"head_dim": 2}},
    attributes={"norm": {"normalized_shape": (10,)}},
    removed=("blocks.1",),
    written_afterwards={"heads": 5},
    inputs={"blocks.0": {"x": {"axis": 0, "of": 2, "kept": [1]}}},
)


def test_a_blueprint_survives_json() -> None:
    again = Blueprint.from_dict(json.loads(json.dumps(BLUEPRINT.as_dict())))
    assert isinstance(again, Overrides) and again.removed == ("blocks.1",)
    assert json.dumps(again.as_dict()) == json.dumps(BLUEPRINT.as_dict())


def test_a_blueprint_is_followed() -> None:
    dense = small(depth=3)
    vars(dense.blocks[0])["scale"] = 0.25
    slim = rebuild(dense, BLUEPRINT)
    assert isinstance(slim, SmallModel) and all(p.is_meta for p in slim.parameters())
    first, last = slim.blocks
    assert (first.up.out_features, last.up.out_features, last.head_dim, last.layer_idx) == (8, 20, 2, 1)
    assert first.scale == 0.25, "floats are those of the dense model"
    assert vars(first)[INPUTS] == BLUEPRINT.inputs["blocks.0"]
    assert (slim.config.hidden, slim.config.depth, slim.config.heads) == (10, 2, 5)
    assert slim.norm.normalized_shape == (10,)
    assert len(dense.blocks) == 3 and dense.config.hidden == 12, "the dense model stays as it is"


def test_a_block_lacks_what_is_absent_and_is_built_where_its_kind_is() -> None:
    blueprint = Blueprint(fields={"head_dim": 2}, absent={"blocks.1": ["head_dim"]}, block_fields={"blocks.1": {}})
    assert [block.head_dim for block in rebuild(small(depth=2), blueprint).blocks] == [2, 4]
    blueprint = Blueprint(built_at={"blocks.1": {"index": 3, "fields": {"depth": 4}}})
    slim = rebuild(small(depth=2), blueprint)
    assert isinstance(slim.blocks[1].up, nn.Identity) and slim.blocks[1].layer_idx == 1
    assert vars(slim.blocks[1])[BUILT_AT]["index"] == 3 and slim.config.depth == 2
    with pytest.raises(CannotBuildError, match="norm"):
        rebuild(small(), Blueprint(block_fields={"norm": {"inner": 4}}))
