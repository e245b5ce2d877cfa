"""Logits of the dense model: the classes that are kept are the likeliest ones."""

import pytest
import torch

from fxprune.masking.teacher import largest


@pytest.mark.parametrize("size", [3, 64, 100, 640, 704, 5000, 8192])
@pytest.mark.parametrize("count", [1, 3, 10])
@pytest.mark.parametrize("shape", [(), (7,), (2, 5)])
def test_the_largest_values_are_those_of_topk(size: int, count: int, shape: tuple[int, ...]) -> None:
    count = min(count, size)
    values = torch.randn(*shape, size, generator=torch.Generator().manual_seed(size))
    found, places = largest(values, count)
    assert torch.equal(found, values.topk(count, dim=-1).values)
    assert torch.equal(values.gather(-1, places), found) and found.shape == (*shape, count)
    assert all(len(set(row)) == count for row in places.reshape(-1, count).tolist())


def test_the_largest_of_many_equal_values_are_different_ones() -> None:
    found, places = largest(torch.zeros(2, 640), 9)
    assert not found.any() and all(len(set(row)) == 9 for row in places.tolist())
