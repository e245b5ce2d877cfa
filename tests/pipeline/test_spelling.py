"""Passes as text, and text as passes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.errors import PassError, UnknownNameError
from fxprune.pipeline.arguments import read_spelling, split
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass, parse_pass


@pytest.mark.parametrize(
    ("spelled", "fields"),
    [
        ("taylor{order=first reduction=prod}", {"order": "first", "reduction": "prod", "memory": "auto"}),
        ("taylor{order=first, reduction=prod}", {"order": "first", "reduction": "prod"}),
        (" taylor ", {"order": "mix", "reduction": "sum"}),
        ("taylor{}", {"order": "mix"}),
        ("select-by-ratio{ratio=0.35 round-to=8 protect=(1,2)}", {"ratio": 0.35, "round_to": 8, "protect": (1, 2)}),
        ("select-by-ratio{ratio=3e-1, protect=(), uniform=False}", {"ratio": 0.3, "protect": (), "uniform": False}),
        ("select-by-ratio{protect=None, kinds='mlp'}", {"protect": None, "kinds": ("mlp",)}),
        ("l1{kinds=('channel',)}", {"kinds": ("channel",)}),
        ("l2{kinds=('mlp', 'head')}", {"kinds": ("mlp", "head")}),
        ("l2{kinds=[mlp, head], reduction=max}", {"kinds": ("mlp", "head"), "reduction": "max"}),
        ("l2{kinds=mlp}", {"kinds": ("mlp",)}),
        ("calibrate{file='a, b {c}.jsonl'}", {"file": "a, b {c}.jsonl"}),
    ],
)
def test_passes_are_spelled_with_their_arguments(spelled: str, fields: dict[str, Any]) -> None:
    step = parse_pass(spelled)
    assert step.name == spelled.split("{")[0].strip()
    assert {name: getattr(step, name) for name in fields} == fields
    assert str(parse_pass(str(step))) == str(step)


@pytest.mark.parametrize(
    ("spelled", "error", "text"),
    [
        ("taylor{order=mix", PassError, "no closing brace"),
        ("select-by-ratio{ratio=0.3, ratio=0.2}", PassError, "ratio is given twice"),
        (
            "save-checkpoint{folder=/tmp/x}",
            PassError,
            "folder=/tmp/x: .*Put text that is not one word, such as a path, in quotes",
        ),
        ("taylor{ordre=mix}", UnknownNameError, "argument of pass taylor 'ordre'.*Did you mean 'order'"),
        ("slice-parameter", UnknownNameError, "Did you mean 'slice-parameters'"),
    ],
)
def test_misspelled_passes_are_refused(spelled: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        parse_pass(spelled)
    with pytest.raises(UnknownNameError, match=r"Known: kinds, memory, order, reduction, samples$"):
        load_pass("taylor", speed=1)


@given(
    st.lists(
        st.one_of(
            st.integers(),
            st.booleans(),
            st.none(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(alphabet=st.characters(codec="ascii", exclude_characters="\\"), max_size=8),
            st.lists(st.text(alphabet="ab-_.", min_size=1), max_size=3).map(tuple),
        ),
        max_size=4,
    )
)
def test_what_is_spelled_is_read_back(values: list[Any]) -> None:
    from fxprune.pipeline.arguments import spelled_value

    arguments = {f"key{i}": value for i, value in enumerate(values)}
    said = ", ".join(f"{key}={spelled_value(value)}" for key, value in arguments.items())
    assert read_spelling(f"name{{{said}}}") == ("name", arguments)


def test_a_pipeline_is_read_back_from_its_text() -> None:
    parts = list(split("a, b{c, d}\n'e, f', (g, [h, i])", ",\n"))
    assert parts == ["a", "b{c, d}", "'e, f'", "(g, [h, i])"], "outside brackets and quotes"
    text = "find-groups\nl2{kinds=[mlp, head]}\n# a comment\n(select-by-ratio{ratio=0.3}, shrink)"
    pipeline = Pipeline(text)
    assert [step.name for step in pipeline.steps] == ["find-groups", "l2", "pipeline"]
    assert str(pipeline) == "find-groups\nl2{kinds=[mlp, head]}\n(select-by-ratio{ratio=0.3}, shrink)"
    assert str(Pipeline(str(pipeline))) == str(pipeline)
    assert str(Pipeline("find-groups, l2, shrink")) == "find-groups\nl2\nshrink"
    assert str(Pipeline([Pipeline("l1"), "l2"])) == "(l1)\nl2"
