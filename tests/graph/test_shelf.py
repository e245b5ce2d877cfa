"""Tensors in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxprune.graph.shelf import shelved, stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_stored_tensor_is_as_it_was_and_leaves_no_file(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.randint(100, (300, 401)).to(dtype).t()
    with shelved(tmp_path):
        found = stored(value)
        small = torch.ones(3)
        assert stored(small) is small, "a mapping takes whole pages"
    assert torch.equal(found, value) and found.dtype == dtype and found.data_ptr() != value.data_ptr()
    assert list(tmp_path.iterdir()) == []
    found.add_(1)
    assert torch.equal(found, value + 1)
    assert stored(value) is value, "where nothing was said, memory is"
