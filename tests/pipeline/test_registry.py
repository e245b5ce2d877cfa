"""Passes by name and as text, and their arguments."""

import sys
from collections import OrderedDict
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxprune
from fxprune.errors import ArgumentError, FxpruneError, PassError, RatioError, UnknownNameError
from fxprune.pipeline import registry
from fxprune.pipeline.arguments import (
    argument,
    format_value,
    number,
    read_spelling,
    split,
)
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import (
    arguments_of,
    example_of,
    in_order,
    load_pass,
    parse_pass,
    pass_class,
    pass_names,
    plain,
)
from tests.forked import in_processes
from tests.models import tiny
from tests.pipeline.test_contract import test_a_registered_pass_keeps_the_contract as keeps_the_contract

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from fxprune import argument
from fxprune.passes.importance.base import ImportancePass, axis_sums


@dataclass(frozen=True, eq=False)
class LargestImportancePass(ImportancePass):
    """A slice is worth its largest weight."""

    name: ClassVar[str] = "largest"
    power: float = argument(1.0, "Exponent of the weights.", above=0)

    def positions(self, graph_module, wanted):
        """The largest weights."""
        get = dict(graph_module.named_parameters(remove_duplicate=False))
        return {(n, i): axis_sums(get[n].detach().abs() ** self.power, i) for n, i in wanted}
'''


def install(folder: Path, name: str, code: str | None, *entries: str) -> None:
    """Put a package into a folder of packages as pip would."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fxprune.passes]\n" + "\n".join(entries) + "\n")
    if code is not None:
        (folder / f"{name}.py").write_text(code)


@pytest.mark.slow
def test_a_foreign_package_registers_a_pass_that_keeps_the_contract(tmp_path: Path) -> None:
    """The same checks as for our own, in a process where a foreign package and two broken ones are installed."""
    install(tmp_path, "plugin", PLUGIN, "largest = plugin:LargestImportancePass")
    install(tmp_path, "broken", "import a_package_that_is_not_there", "broken = broken:BrokenPass")
    install(tmp_path, "odd", "value = 3", "odd = odd:value", "absent = odd:Absent")

    def work(rank: int) -> list[str]:
        sys.path.insert(0, str(tmp_path))
        registry._entries.cache_clear()
        assert {"largest", "broken", "odd", "absent"} <= set(pass_names())
        assert "largest" in pass_names("importance") and "broken" not in pass_names("importance")
        keeps_the_contract("largest", tmp_path / "kept")
        result = fxprune.prune(tiny("llama", num_hidden_layers=2), importance="largest{power=2}", protect=())
        assert result.report.verification_error < 1e-4
        told = []
        for name in ("broken", "odd", "absent"):
            with pytest.raises(fxprune.FxpruneError) as caught:
                fxprune.load_pass(name)
            told.append(str(caught.value))
        return told

    ((broken, odd, absent),) = in_processes(work, 1, tmp_path / "meeting")
    assert "cannot be imported from broken:BrokenPass: ModuleNotFoundError" in broken
    assert "the other passes work without it" in broken
    assert "is no class of passes" in odd and "AttributeError" in absent


@pytest.mark.parametrize("name", fxprune.pass_names())
def test_every_argument_has_a_doc_line_and_every_example_is_read_back(name: str) -> None:
    made = pass_class(name)
    assert [argument for argument, _, doc in arguments_of(made) if not doc] == []
    assert str(fxprune.load_pass(name)) == str(fxprune.Pipeline(example_of(made)))


def test_an_argument_that_is_an_object_has_no_default_to_write() -> None:
    arguments = {argument: (default, doc) for argument, default, doc in arguments_of(pass_class("calibrate"))}
    assert arguments["tokens"][0] == "128" and arguments["tokens"][1]
    assert arguments["data"][0] == "" and arguments["file"][0] == "''"
    expected = "calibrate{tokens=128, written=0, added=0, per_given=0.5, programs=0.0, languages=0.25, seed=0}"
    assert example_of(pass_class("calibrate")) == expected
    assert (
        plain("``ratio`` of :data:`ORDERS`, see :func:`~fxprune.prune`") == "`ratio` of `ORDERS`, see `fxprune.prune`"
    )


def test_givers_stand_before_takers_and_broken_ones_last(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("broken", "no.such.module:BrokenPass", registry._GROUP)
    entries = {**registry._entries(), "broken": entry}
    monkeypatch.setattr(registry, "_entries", lambda: entries)
    order = in_order()
    assert sorted(order) == sorted(fxprune.pass_names()) and order[-1] == "broken"
    steps = ["bypass-blocks", "slice-parameters", "rewrite-literals"]
    assert [name for name in order if name in steps] == steps


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
        ("select-by-ratio{ratio=0.3, ratio=0.2}", PassError, "ratio is given twice"),
        (
            "save-checkpoint{folder=/tmp/x}",
            PassError,
            "folder=/tmp/x: .*Put text that is not one word, such as a path, in quotes",
        ),
        ("slice-parameter", UnknownNameError, "Did you mean 'slice-parameters'"),
    ],
)
def test_misspelled_passes_are_refused(spelled: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        parse_pass(spelled)
    known = "batch, channel_samples, kinds, memory, order, precision, reduction, samples"
    with pytest.raises(UnknownNameError, match=f"Known: {known}$"):
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


@pytest.mark.parametrize(
    ("value", "bounds", "says"),
    [
        (1, {"least": 0, "below": 1}, r"ratio is 1\. Pass a number in \[0, 1\)"),
        (0, {"above": 0}, r"ratio is 0\. Pass a number above 0"),
        (-1, {"least": 0}, r"a number of 0 or more"),
        (2, {"most": 1}, r"a number of 1 or less"),
        (True, {}, "ratio is True"),
        (10**400, {}, "ratio is 1000"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(value: Any, bounds: dict[str, float], says: str) -> None:
    with pytest.raises(RatioError, match=says):
        number("ratio", value, error=RatioError, **bounds)


def test_values_are_formatted_in_few_words() -> None:
    for value, words in (
        (None, "None"),
        (int, "the class int"),
        (object(), "an object"),
        (torch.ones(2, 3), "a torch.float32 tensor of shape (2, 3)"),
        (np.ones(2, dtype=int), "an int64 array of shape (2,)"),
        (torch.tensor(3), "3"),
        ([1, 2], "[1, 2]"),
    ):
        assert format_value(value) == words
    assert len(format_value("x" * 5000)) < 100
    for columns in range(1, 40):  # lines of a tensor, wherever they are cut
        assert format_value(OrderedDict(a=torch.ones(2, columns))).startswith("OrderedDict([('a', tensor([[")
    error = FxpruneError("it is\nbroken.", where="here", remedy="Mend it")
    assert str(error) == "here: it is broken. Mend it", "an error is one line"


def test_a_misspelled_limit_is_refused_where_it_is_declared() -> None:
    with pytest.raises(ArgumentError, match=r"it takes no atleast. Limits are least, most, above and below"):
        argument(1, "A number.", atleast=2)
    with pytest.raises(ArgumentError, match="doc is 5"):
        argument(1, 5)  # type: ignore[arg-type]
