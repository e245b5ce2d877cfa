"""Repeated blocks are found by their form."""

from __future__ import annotations

import pytest
from torch import nn

from fxprune.graph.facts import find_blocks, owner_block, within
from tests.models import tiny


def block(width: int = 3) -> nn.Module:
    """A module that has parts of its own."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


class Other(nn.Module):
    """A block of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 3)


def test_blocks_are_the_outermost_and_in_order() -> None:
    assert find_blocks(tiny("llama")) == tuple(f"model.layers.{i}" for i in range(3))
    nested = nn.ModuleDict({"stack": nn.ModuleList(nn.ModuleList([block(), block()]) for _ in range(2))})
    assert find_blocks(nested) == ("stack.0", "stack.1")


def test_a_list_of_plain_modules_or_of_all_different_ones_is_no_stack() -> None:
    assert find_blocks(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])) == ()
    assert find_blocks(nn.ModuleList([block(), Other()])) == ()


def test_blocks_of_a_few_classes_may_repeat_in_a_list_alone() -> None:
    mixed = [Other(), block(), Other()]
    assert find_blocks(nn.ModuleList(mixed)) == ("0", "1", "2")
    assert find_blocks(nn.Sequential(*mixed)) == ()


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("m.layers.1", "m.layers.1"),
        ("m.layers.1.a.weight", "m.layers.1"),
        ("m.layers.10.a", None),
        ("m.norm", None),
        ("layers.1", None),
        ("m.layers.1.", "m.layers.1"),
        ("", None),
    ],
)
def test_names_belong_to_the_block_they_lie_in(name: str, owner: str | None) -> None:
    blocks = ("m.layers.0", "m.layers.1")
    assert owner_block(name, blocks) == owner
    assert within(name, blocks) == (owner is not None and name != owner)
