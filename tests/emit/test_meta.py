"""Modules are built without storage, and a constructor that refuses says why."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fxprune.emit.snapshot import build_on_meta, on_meta
from fxprune.graph.context import Refusal
from fxprune.modelling.blocks import CannotBuildError


def test_nothing_has_storage_and_nobody_chatters(recwarn: pytest.WarningsRecorder) -> None:
    with on_meta():
        warnings.warn("odd", stacklevel=1)
        assert nn.Linear(3, 2).weight.is_meta and not torch.is_grad_enabled()
    assert len(recwarn) == 0 and torch.is_grad_enabled() and not torch.zeros(1).is_meta


def test_no_first_values_are_drawn_where_there_are_none() -> None:
    with on_meta():
        weight = nn.Linear(3, 2).weight
        assert weight._version == 0 and nn.init.normal_(weight) is weight and nn.init.ones_(tensor=weight) is weight
        real = nn.init.ones_(torch.zeros(2, device="cpu"))
    assert real.tolist() == [1, 1]


def test_what_is_refused_is_told() -> None:
    built = build_on_meta(nn.Linear, 3, out_features=2)
    assert isinstance(built, nn.Linear) and built.weight.is_meta
    assert isinstance(build_on_meta(nn.Linear, 3), Refusal)

    def refuse() -> None:
        raise CannotBuildError("not a block")

    assert str(build_on_meta(refuse)) == "CannotBuildError: not a block"
