"""Names of the dense model become names of the slim one."""

from __future__ import annotations

import pytest

from fxprune.emit.snapshot import names_in, slim_name


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


def test_a_removed_block_without_a_number_moves_nothing() -> None:
    assert slim_name("a.last.weight", ("a.last",)) is None
    assert slim_name("a.2.weight", ("a.last",)) == "a.2.weight"


def test_names_within_a_module() -> None:
    assert names_in({"a.b.c": 1, "a.bc": 2, "a.b": 3}, "a.b") == {"c": 1}
