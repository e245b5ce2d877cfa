"""What passes say of themselves."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

import fxprune
from fxprune.pipeline import registry
from fxprune.pipeline.registry import Argument, arguments_of, example_of, in_order, pass_class, plain


@pytest.mark.parametrize("name", fxprune.pass_names())
def test_every_argument_has_a_doc_line_and_every_example_is_read_back(name: str) -> None:
    made = pass_class(name)
    assert [one.name for one in arguments_of(made) if not one.doc] == []
    assert str(fxprune.load_pass(name)) == str(fxprune.Pipeline(example_of(made)))


def test_an_argument_that_is_an_object_has_no_default_to_write() -> None:
    arguments = {one.name: one for one in arguments_of(pass_class("calibrate"))}
    assert arguments["tokens"] == Argument(
        "tokens", "128", "of a sample of the built-in text, or of one that the model writes."
    )
    assert arguments["data"].default == "" and arguments["file"].default == "''"
    assert example_of(pass_class("calibrate")) == "calibrate{tokens=128, written=0, seed=0}"


def test_givers_stand_before_takers_and_broken_ones_last(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("broken", "no.such.module:BrokenPass", registry._GROUP)
    monkeypatch.setattr(registry, "_entries", lambda: {**entries, "broken": entry})
    order = in_order(fxprune.pass_names())
    assert sorted(order) == sorted(fxprune.pass_names()) and order[-1] == "broken"
    steps = ["bypass-blocks", "slice-parameters", "rewrite-literals"]
    assert [name for name in order if name in steps] == steps


entries = dict(registry._entries())


def test_docstrings_lose_their_markup() -> None:
    assert (
        plain("``ratio`` of :data:`ORDERS`, see :func:`~fxprune.prune`") == "`ratio` of `ORDERS`, see `fxprune.prune`"
    )
