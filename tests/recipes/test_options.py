"""What can be said of a prune: the same as its arguments, checked, and the arguments of passes it stands for."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import fxprune
from fxprune.errors import ArgumentError
from fxprune.recipes.options import Options


def test_options_are_the_arguments_of_a_prune_and_each_is_explained() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Options)}
    arguments = {name: p.default for name, p in inspect.signature(fxprune.prune).parameters.items()}
    others = ("model", "example_inputs", "device")
    assert fields == {name: value for name, value in arguments.items() if name not in others}
    assert all(f"        {name}:" in (inspect.getsource(Options).split('"""')[1]) for name in fields)


def test_what_is_said_reaches_its_stage() -> None:
    given = Options(kinds="mlp", ratio=0.3, reduction="max", round_to=8, seed=3, inplace=True).by_stage
    assert given["importance"] == {"kinds": ("mlp",), "reduction": "max", "memory": "low"}
    assert given["select"] == {"kinds": ("mlp",), "ratio": 0.3, "round_to": 8}
    assert given[""] == {"seed": 3} and given["tune"] == {}
    stages = ("", "discover", "importance", "select", "verify", "tune")
    assert Options().by_stage == {stage: {} for stage in stages}
    assert given["verify"] == {} and Options(memory="low").by_stage["verify"] == {"by_block": True}
    assert Options(ratio={"mlp": 0.1}).by_stage["select"]["kinds"] == ("mlp",)
    assert Options(uniform=True).by_stage["select"] == {"uniform": True, "protect": ()}
    assert Options(uniform=True).by_stage["discover"] == {"norm": "sliced"}
    assert Options(uniform=True, norm="masked").by_stage["discover"] == {"norm": "masked"}


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in ({"verify": "no"}, {"seed": -1}, {"tokenizer": 3}, {"track": 3}, {"kinds": ()}):
        with pytest.raises(ArgumentError):
            assert Options(**wrong).by_stage is None  # type: ignore[arg-type]
