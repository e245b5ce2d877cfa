"""Config fields: which ones a constructor looks at, and how they are written."""

from __future__ import annotations

from fxprune.emit.snapshot import Reads, keep_blocks, own_entries, part_of, record_reads, value_of
from fxprune.modelling.block_config import put_fields
from tests.emit.small import SmallBlock, SmallConfig


def test_the_fields_a_constructor_reads_are_recorded() -> None:
    config = SmallConfig()
    reads = record_reads(config, lambda config: SmallBlock(config, 0))
    assert reads == Reads(("heads", "hidden", "inner"), ("head_dim",))
    assert type(config) is SmallConfig


def test_absent_fields_asked_for_with_a_default_are_hollow() -> None:
    reads = record_reads(SmallConfig(), lambda config: getattr(config, "groups", None) or config.depth)
    assert reads == Reads(("depth",), ("groups",))


def test_all_fields_count_where_the_constructor_refuses_the_config() -> None:
    def refuse(config: SmallConfig) -> None:
        raise ValueError(config.hidden)

    assert {"depth", "heads", "hidden", "inner"} <= set(record_reads(SmallConfig(), refuse).integers)


def test_fields_are_written_past_validation() -> None:
    config = SmallConfig()
    put_fields(config, {"hidden": 7, "new": 3})
    assert (value_of(config, "hidden"), value_of(config, "new"), value_of(config, "head_dim")) == (7, 3, None)
    assert part_of(config, "") is config


def test_a_list_of_the_same_integer_holds_that_one() -> None:
    config = SmallConfig()
    vars(config).update(same=[3, 3], others=(3, 4), flags=[True, True], none=[])
    assert [value_of(config, name) for name in ("same", "others", "flags", "none")] == [3, None, None, None]
    put_fields(config, {"same": 2, "others": 5, "hidden": 7})
    assert (config.same, config.others, config.hidden) == ([2, 2], (5, 5), 7)
    reads = record_reads(config, lambda config: (config.same[0], config.flags[0]))
    assert reads.integers == ("same",)


def test_a_block_reads_its_own_entries_of_lists() -> None:
    config = SmallConfig()
    vars(config).update(heads_of=[3, 4, 5], kinds=["a", "b", "c"], pairs=[1, 2], pad_token_ids=[1, 2, 3])
    assert own_entries(config, 3, 1) == {"heads_of": 4}
    assert own_entries(config, 3, 3) == {}, "of another list of blocks"


def test_lists_with_one_entry_a_block_are_shortened() -> None:
    config = SmallConfig(depth=3)
    vars(config).update(kinds=["a", "b", "c"], sizes=(1, 2, 3), others=[1, 2], eos_token_ids=[4, 5, 6])
    keep_blocks(config, "depth", 3, [0, 2])
    assert (config.kinds, config.sizes, config.others, config.depth) == (["a", "c"], (1, 3), [1, 2], 2)
    assert config.eos_token_ids == [4, 5, 6]
    keep_blocks(config, "", 2, [1])
    assert (config.kinds, config.depth) == (["c"], 2), "nothing counts the blocks but the lists"
