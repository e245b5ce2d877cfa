"""Snapshots of modules, configs and names."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fxprune.emit.snapshot import (
    MISSING_AXIS,
    Reads,
    block_entries,
    build_on_meta,
    keep_blocks,
    mismatches,
    part_of,
    record_reads,
    shapes_of,
    slim_name,
    take_snapshot,
    value_of,
    without_storage,
)
from fxprune.graph.context import Refusal
from fxprune.modelling.blocks import CannotBuildError, put_fields
from tests.emit.small import SmallBlock, SmallConfig


def test_shapes_and_attributes_of_modules_and_the_axes_on_which_they_differ() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    shapes = shapes_of(model)
    assert shapes["0.weight"] == shapes["1.weight"] == (2, 3)
    assert shapes["2.running_mean"] == (2,) and shapes["2.num_batches_tracked"] == ()
    snapshot = take_snapshot(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(5)), skip=("1",))
    assert snapshot.shapes == {"0.weight": (4,), "0.bias": (4,)}
    assert snapshot.numbers == {("0", "normalized_shape"): (4,)}
    assert snapshot.scalars == {("0", "eps"): 1e-5, ("0", "elementwise_affine"): True}, "what is skipped is left out"
    have = {"a": (2, 3), "b": (4,), "c": (1,), "d": (5,)}
    want = {"a": (2, 4), "b": (4,), "c": (1, 1), "e": (5,)}
    assert mismatches(have, want) == {("a", 1), ("c", MISSING_AXIS), ("d", MISSING_AXIS), ("e", MISSING_AXIS)}


@pytest.mark.parametrize(
    ("name", "slim"),
    [
        ("a.blocks.0.up.weight", "a.blocks.0.up.weight"),
        ("a.blocks.1.up.weight", None),
        ("a.blocks.1", None),
        ("a.blocks.2.up.weight", "a.blocks.1.up.weight"),
        ("a.blocks.12", "a.blocks.10"),
        ("a.blocks.10.up", None),
        ("a.blocks", "a.blocks"),
        ("a.blocks_more.2", "a.blocks_more.2"),
        ("b.blocks.2", "b.blocks.2"),
        ("norm.weight", "norm.weight"),
    ],
)
def test_blocks_after_a_removed_one_move_up(name: str, slim: str | None) -> None:
    assert slim_name(name, ("a.blocks.1", "a.blocks.10")) == slim
    assert slim_name(name, ()) == name
    assert slim_name("a.last.weight", ("a.last",)) is None
    assert slim_name("a.2.weight", ("a.last",)) == "a.2.weight", "a block without a number moves nothing"


def test_nothing_has_storage_and_nobody_chatters(recwarn: pytest.WarningsRecorder) -> None:
    with without_storage():
        warnings.warn("odd", stacklevel=1)
        assert nn.Linear(3, 2).weight.is_meta and not torch.is_grad_enabled()
    assert len(recwarn) == 0 and torch.is_grad_enabled() and not torch.zeros(1).is_meta
    with without_storage():  # no first values are drawn
        weight = nn.Linear(3, 2).weight
        assert weight._version == 0 and nn.init.normal_(weight) is weight and nn.init.ones_(tensor=weight) is weight
        real = nn.init.ones_(torch.zeros(2, device="cpu"))
    assert real.tolist() == [1, 1]


def test_what_is_refused_is_told() -> None:
    built = build_on_meta(nn.Linear, 3, out_features=2)
    assert isinstance(built, nn.Linear) and built.weight.is_meta
    assert isinstance(build_on_meta(nn.Linear, 3), Refusal)

    def refuse() -> None:
        raise CannotBuildError("not a block")

    assert str(build_on_meta(refuse)) == "CannotBuildError: not a block"


def test_the_fields_a_constructor_reads_are_recorded() -> None:
    config = SmallConfig()
    reads = record_reads(config, lambda config: SmallBlock(config, 0))
    assert reads == Reads(("heads", "hidden", "inner"), ("head_dim",))
    assert type(config) is SmallConfig
    reads = record_reads(SmallConfig(), lambda config: getattr(config, "groups", None) or config.depth)
    assert reads == Reads(("depth",), ("groups",)), "an absent field, read with a default"

    def refuse(config: SmallConfig) -> None:
        raise ValueError(config.hidden)

    assert {"depth", "heads", "hidden", "inner"} <= set(record_reads(SmallConfig(), refuse).integers)


def test_fields_are_written_past_validation() -> None:
    config = SmallConfig()
    put_fields(config, {"hidden": 7, "new": 3})
    assert (value_of(config, "hidden"), value_of(config, "new"), value_of(config, "head_dim")) == (7, 3, None)
    assert part_of(config, "") is config
    config = SmallConfig()
    vars(config).update(same=[3, 3], others=(3, 4), flags=[True, True], none=[])
    assert [value_of(config, name) for name in ("same", "others", "flags", "none")] == [3, None, None, None]
    put_fields(config, {"same": 2, "others": 5, "hidden": 7})
    assert (config.same, config.others, config.hidden) == ([2, 2], (5, 5), 7)
    reads = record_reads(config, lambda config: (config.same[0], config.flags[0]))
    assert reads.integers == ("same",)


def test_lists_have_one_entry_a_block_and_are_shortened() -> None:
    config = SmallConfig()
    vars(config).update(heads_of=[3, 4, 5], kinds=["a", "b", "c"], pairs=[1, 2], pad_token_ids=[1, 2, 3])
    assert block_entries(config, 3, 1) == {"heads_of": 4}
    assert block_entries(config, 3, 3) == {}, "of another list of blocks"
    config = SmallConfig(depth=3)
    vars(config).update(kinds=["a", "b", "c"], sizes=(1, 2, 3), others=[1, 2], eos_token_ids=[4, 5, 6])
    keep_blocks(config, "depth", 3, [0, 2])
    assert (config.kinds, config.sizes, config.others, config.depth) == (["a", "c"], (1, 3), [1, 2], 2)
    assert config.eos_token_ids == [4, 5, 6]
    keep_blocks(config, "", 2, [1])
    assert (config.kinds, config.depth) == (["c"], 2), "nothing counts the blocks but the lists"
