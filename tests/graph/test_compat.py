"""The private torch names behave as assumed."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxprune.graph.compat import (
    UNKNOWN_SIZE,
    clear_symbolic_caches,
    fake_mode,
    is_free,
    size_hint,
    size_range,
)


def sizes(low: int | None = None) -> torch.Size:
    """The shape of an input whose first axis varies, and whose second does not."""
    program = torch.export.export(
        nn.Linear(6, 4), (torch.zeros(3, 6),), dynamic_shapes=({0: torch.export.Dim("batch", min=low, max=50)},)
    )
    node = next(node for node in program.graph.nodes if node.name == "input")
    return node.meta["val"].shape


def test_a_symbolic_size_is_free_and_has_a_hint_and_a_bound_unless_it_depends_on_data() -> None:
    batch, width = sizes()
    assert (is_free(batch), is_free(width)) == (True, False)
    assert (size_hint(batch), size_hint(width)) == (3, 6)
    assert (size_range(batch)[1], size_range(width)) == (50, (6, 6))
    with fake_mode():
        found = torch.zeros(5).nonzero().shape[0]
    assert is_free(found)
    assert size_hint(found) == UNKNOWN_SIZE


def test_nothing_is_remembered_of_a_trace_that_is_over() -> None:
    """Each trace left its symbols and all results on them, a megabyte or two, where no garbage collector looks."""
    start = ShapeEnv.__init__
    with clear_symbolic_caches():
        with clear_symbolic_caches():
            found = ShapeEnv()
            found.fake_tensor_cache["a call"] = "its result"  # type: ignore[index,assignment]
        assert found.fake_tensor_cache
    assert not found.fake_tensor_cache
    assert ShapeEnv.__init__ is start
    with clear_symbolic_caches():
        found.fake_tensor_cache["a later call"] = "its result"  # type: ignore[index,assignment]
    assert not found.fake_tensor_cache
