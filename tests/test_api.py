"""The face: options that cannot work are refused before anything is traced; see end_to_end for what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxprune.api import prune, prune_pipeline
from fxprune.errors import ArgumentError, FxpruneError, PassError, UnknownNameError
from fxprune.pipeline.registry import load_pass


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"importance": "tailor"}, UnknownNameError, "unknown importance 'tailor'.*Did you mean 'taylor'"),
        ({"importance": "least-squares"}, UnknownNameError, "unknown importance 'least-squares'"),
        ({"compensate": "least-cubes"}, UnknownNameError, "unknown compensate"),
        ({"select": "shrink"}, UnknownNameError, "unknown select"),
        ({"importance": "taylor{ordre=mix}"}, UnknownNameError, "Did you mean 'order'"),
        ({"importance": "taylor{order=mix"}, PassError, "no closing brace"),
        ({"importance": "taylor{order=secnd}"}, UnknownNameError, r"unknown order 'secnd'\. Did you mean 'second'"),
        ({"kinds": ("heads",)}, UnknownNameError, "Did you mean 'head'"),
        ({"kinds": ()}, FxpruneError, "kinds is empty"),
        ({"ratio": 1.0}, FxpruneError, r"\[0, 1\)"),
        ({"budget": "parms"}, UnknownNameError, "Did you mean 'params'"),
        ({"budget": "bytes@q8"}, UnknownNameError, "Did you mean 'q8_"),
        ({"importance": "score-in-steps{steps=0}"}, FxpruneError, "of 1 or more"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    for call in (prune_pipeline, lambda **given: prune(torch.nn.Linear(2, 2), **given)):
        with pytest.raises(error, match=text):
            call(**options)


def test_passes_are_taken_as_they_are() -> None:
    mine = load_pass("l1", kinds=("channel",))
    assert prune_pipeline(importance=mine, verify=False).passes[1] is mine


def test_weights_of_a_module_cannot_be_offloaded() -> None:
    with pytest.raises(ArgumentError, match="the weights of a module are in memory already"):
        prune(torch.nn.Linear(2, 2), offload="work")
    with pytest.raises(ArgumentError, match=r"model is 3\. Pass a torch.nn.Module, a folder"):
        prune(3)  # type: ignore[arg-type]
