"""Passes by name, through the entry points of the group ``fxprune.passes``."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import fxprune
from fxprune.errors import UnknownNameError
from fxprune.pipeline import registry
from fxprune.pipeline.registry import arguments_of, example_of, in_order, pass_class, pass_names, plain
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


def test_the_stages_have_their_passes() -> None:
    assert set(pass_names("importance")) >= {"random", "l1", "l2", "taylor"}
    assert set(pass_names("shrink")) >= {"shrink", "bypass-blocks", "slice-parameters", "rewrite-literals"}
    with pytest.raises(UnknownNameError, match="nothing"):
        pass_names("nothing")


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
    assert example_of(pass_class("calibrate")) == "calibrate{tokens=128, written=0, added=0, programs=0.0, seed=0}"
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
