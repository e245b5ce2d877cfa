"""What a user has set in torch does not reach what is computed inside."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.graph.context import neutral, own_randomness


def test_nothing_of_a_users_context_reaches_inside() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        with neutral():
            made = torch.ones(2, 2)
            product = made @ weight
            assert made.device.type == "cpu" and not made.is_inference()
            assert product.dtype == torch.float32 and product.requires_grad
        assert torch.ones(2).is_meta and torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")


def test_gradients_are_on_where_a_user_has_turned_them_off() -> None:
    before = torch.is_grad_enabled()
    with torch.no_grad(), neutral():
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled() == before


def test_what_is_drawn_inside_draws_nothing_of_the_users() -> None:
    def state() -> list[object]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    plain = state()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(KeyError), own_randomness():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        raise KeyError
    assert state() == plain


def test_code_that_was_compiled_runs_as_it_was_written() -> None:
    calls = []

    def backend(graph: object, inputs: object) -> object:
        calls.append(graph)
        return graph

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    with neutral():
        assert compiled(torch.ones(1)).item() == 2
    assert calls == []
