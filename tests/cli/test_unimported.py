"""Arguments of passes read from source: the same names and the same refusals as those of the classes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from fxprune.cli.unimported import check_spelled, checks_of, names_of
from fxprune.errors import FxpruneError, UnknownNameError
from fxprune.pipeline.registry import load_pass, pass_class, pass_names
from fxprune.pipeline.spelling import spelled_fields

VALUES = (0, 1, -1, 2, 0.5, 2.5, 1e30, "sum", "nonsense", True, (), (1, 2))


@pytest.mark.parametrize("name", pass_names())
def test_source_and_class_agree(name: str) -> None:
    """Whatever is refused by the source is refused by the class in the same words, and names are the same."""
    assert names_of(name) == tuple(field.name for field in spelled_fields(pass_class(name)))
    for check in checks_of(name):
        refused = [value for value in VALUES if said_by(check, value)]
        assert refused, f"{check.field} takes anything"
        for value in refused:
            given = {check.field: value}
            assert said_by(check_spelled, name, given) == said_by(load_pass, name, **given)


def said_by(call: Callable[..., Any], *given: Any, **named: Any) -> str:
    """What an error says; nothing where there is none."""
    try:
        call(*given, **named)
    except FxpruneError as error:
        return str(error)
    return ""


def test_most_checks_are_found() -> None:
    found = {(name, check.field) for name in pass_names() for check in checks_of(name)}
    assert {("tune", "epochs"), ("tune", "rank"), ("taylor", "order"), ("taylor", "reduction")} <= found
    assert {("wanda", "samples"), ("least-squares", "reach"), ("record-teacher", "kept")} <= found
    assert {("find-groups", "norm"), ("select-by-search", "ranking"), ("flap", "standardise")} <= found


def test_what_the_suite_does_not_have_is_left_to_the_registry() -> None:
    assert names_of("nonsense") is None and checks_of("nonsense") == ()
    check_spelled("nonsense", {"whatever": 1})
    with pytest.raises(UnknownNameError, match="Did you mean 'epochs'"):
        check_spelled("tune", {"epoch": 2})


def test_it_needs_no_torch() -> None:
    code = "import sys, fxprune.cli.unimported as u; print(len(u.checks_of('tune')) > 4, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
