"""Moments of tokens: the fit, and the search for how much to hold it back."""

from __future__ import annotations

import pytest
import torch
from fxprune.passes.compensate.moments import Damping, Moments, best_damping


def moments(seed: int, tokens: int, noise: float) -> Moments:
    """Of tokens whose fourth input is far larger than the others, wanted through a map with noise."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, 4, generator=generator) * torch.tensor([1.0, 1.0, 1.0, 50.0])
    D = X @ torch.tensor([[1.0], [-1.0], [0.5], [0.0]]) + noise * torch.randn(tokens, 1, generator=generator)
    found = Moments.of(torch.zeros(1, 4))
    found.add(X, D)
    return found


@pytest.mark.parametrize("each", [False, True])
def test_the_search_finds_the_best_on_the_ladder(each: bool) -> None:
    for noise in (0.01, 3.0, 30.0):
        front, back = moments(0, 8, noise), moments(1, 8, noise)
        found = best_damping(front, back)
        ladder = [Damping(d, each) for d in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)]
        errors = [back.error(front.solve(damping)) for damping in ladder]
        assert back.error(front.solve(found)) <= min(0.0, *errors) + 1e-9


def test_one_large_input_does_not_hold_the_others_fast() -> None:
    front, back = moments(0, 200, 0.01), moments(1, 200, 0.01)
    assert best_damping(front, back).each
    change = front.solve(Damping(0.03, each=True))
    assert torch.allclose(change[:3, 0], torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), atol=0.1)
    assert float(front.solve(Damping(0.03))[:3].abs().max()) < 0.2


def test_infinite_damping_changes_nothing() -> None:
    found = moments(0, 20, 1.0)
    assert not found.solve(Damping(float("inf"))).any() and found.error(found.solve(Damping(float("inf")))) == 0
    assert best_damping(found, moments(2, 20, 0.0)).strength < float("inf")
