"""Blocks built one by one."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedConfig

from fxprune.modelling.blocks import BUILT_AT, builder_of, names_index


class Numbered(nn.Module):
    """Is of another kind at index 0, or where there are few layers."""

    def __init__(self, config: Any, layer_idx: int, mode: str = "") -> None:
        super().__init__()
        self.layer_idx, self._block_index, self.heads = layer_idx, layer_idx, layer_idx
        self.inner = nn.Identity() if layer_idx == 0 or config.depth < 3 else nn.Linear(2, 2)


def config(**fields: Any) -> PreTrainedConfig:
    """A config of a few fields."""
    made = PreTrainedConfig()
    vars(made).update(fields)
    return made


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        *((name, True) for name in ("layer_idx", "idx", "index", "layer_id", "block_id", "layer_number", "layer_num")),
        *((name, False) for name in ("pad_token_id", "heads", "num_layers", "depth")),
    ],
)
def test_names_of_an_index(name: str, answer: bool) -> None:
    assert names_index(name) is answer


def test_a_flag_or_a_word_that_a_class_asks_for_is_what_its_block_holds() -> None:
    class Flagged(nn.Module):
        """Wants a flag, and a word by name."""

        def __init__(self, config: Any, layer_idx: int, causal: bool, *, mode: str) -> None:
            super().__init__()
            self.causal, self.mode, self.layer_idx = causal, mode, layer_idx

    build = builder_of(Flagged(None, 0, True, mode="wide"), None)
    assert build is not None
    held = vars(build(config(), 3))
    assert (held["causal"], held["mode"], held["layer_idx"]) == (True, "wide", 3)
    number: Any = 8
    assert builder_of(Flagged(None, 0, number, mode="wide"), None) is None, "it may be a size"

    class Second(nn.Module):
        """Wants a flag in the place of an index."""

        def __init__(self, config: Any, causal: bool) -> None:
            super().__init__()
            self.causal = causal

    again = builder_of(Second(None, False), None)
    assert again is not None and vars(again(config(), 3))["causal"] is False


def test_a_flag_with_a_default_is_read_off_the_modules_inside() -> None:
    """T5's first block has relative positions, which its attention holds; its index is the third argument."""

    class Inner(nn.Module):
        """Holds the flag."""

        def __init__(self, relative: bool) -> None:
            super().__init__()
            self.relative = relative

    class Outer(nn.Module):
        """Passes the flag on."""

        def __init__(self, config: Any, relative: bool = False, layer_idx: int | None = None) -> None:
            super().__init__()
            self.inner, self.other, self.layer_idx = Inner(relative), Inner(False), layer_idx

    again = builder_of(Outer(None, True, 0), None)
    assert again is not None
    block: Any = again(config(), 2)
    assert (block.inner.relative, block.layer_idx) == (True, 2)


def test_a_kind_is_built_where_its_class_builds_it() -> None:
    build = builder_of(Numbered(config(depth=1), 0), {"index": 2, "fields": {"depth": 3}})
    given = config(depth=1)
    assert build is not None
    block = build(given, 0)
    held = vars(block)
    assert isinstance(block.inner, nn.Linear) and given.depth == 1
    assert (held["layer_idx"], held["_block_index"], held["heads"]) == (0, 0, 2)
    assert held[BUILT_AT] == {"index": 2, "fields": {"depth": 3}}
    again = builder_of(block, held[BUILT_AT])
    assert again is not None and isinstance(again(given, 0).inner, nn.Linear)
