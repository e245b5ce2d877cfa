"""Moments of tokens: the fit, and the search for how much to hold it back."""

from __future__ import annotations

import pytest
import torch
from fxprune.passes.compensate.least_squares import Damping, Moments, Stack, best_damping


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


def test_matrices_with_few_tokens_are_held_back_more() -> None:
    """All by what a matrix has on average; one with none stays, and one alone is as without the others."""
    few, many, none = moments(0, 3, 0.01), moments(0, 60, 0.01), Moments.of(torch.zeros(1, 4))
    stack = Stack((few, many, none))
    for each in (False, True):
        damping = Damping(1.0, each)
        change = stack.solve(damping)
        assert float(change[0].norm()) < float(few.solve(damping).norm())
        assert float(change[1].norm()) > float(many.solve(damping).norm())
        assert not change[2].any()
        assert torch.equal(Stack((few,)).solve(damping)[0], few.solve(damping))
        assert stack.error(change) == few.error(change[0]) + many.error(change[1])
    assert best_damping(stack, Stack((moments(3, 3, 0.01), moments(1, 60, 0.01), none))).strength < float("inf")
    both = many.square + few.square
    stack.take(Stack((none, few, none)))
    assert torch.equal(stack.of_each[1].square, both) and stack.finite()


def test_a_solution_leaves_what_is_known_of_the_tokens_as_it_was() -> None:
    known = moments(0, 60, 0.01)
    square = known.square.clone()
    for each in (False, True):
        assert torch.equal(known.solve(Damping(0.3, each)), known.solve(Damping(0.3, each)))
    known.square[0, 0] = -1e9
    with pytest.raises(torch.linalg.LinAlgError):
        known.solve(Damping(0.3))
    known.square[0, 0] = square[0, 0]
    assert torch.equal(known.square, square)
