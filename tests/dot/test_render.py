"""Pictures as files: the suffix says what is written, and what cannot be is refused before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import networkx as nx
import pydot
import pytest

import fxprune
from fxprune.draw.write import DRAWN, SUFFIXES, check_target, write_picture
from fxprune.errors import ArgumentError, FxpruneError

STARTS = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF", ".html": b"<!DOCTYPE html>", ".dot": b"digraph"}

needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="there is no Graphviz here to draw with")


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.svg.gz", ".svg", "x.DOTS"])
def test_unknown_suffixes_are_refused_with_those_there_are(name: str, small: nx.Graph, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError) as refusal:
        fxprune.write_dot(small, tmp_path / name)
    assert all(suffix in str(refusal.value) for suffix in SUFFIXES)
    assert not list(tmp_path.iterdir())


def test_what_graphviz_draws_is_refused_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for suffix in DRAWN:
        with pytest.raises(FxpruneError, match=r"no program dot here.*Install.*\.html"):
            check_target(tmp_path / f"x{suffix}")
    assert check_target(tmp_path / "x.html") == tmp_path / "x.html"
    assert check_target(tmp_path / "x.GV") == tmp_path / "x.GV"


def test_a_missing_folder_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(FxpruneError, match=r"no/x\.dot: cannot be written: no such folder"):
        check_target(tmp_path / "no" / "x.dot")


def test_text_and_pages_need_no_graphviz(small: nx.Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for suffix in (".dot", ".html"):
        fxprune.write_dot(small, tmp_path / f"x{suffix}")
        assert (tmp_path / f"x{suffix}").read_bytes().startswith(STARTS[suffix])
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<svg" not in text and "Graphviz was not there" in text and '<li id="axis0" class="node">a.weight[1]' in text


@needs_graphviz
@pytest.mark.parametrize("suffix", DRAWN)
def test_graphviz_draws(suffix: str, small: nx.Graph, tmp_path: Path) -> None:
    fxprune.write_dot(small, tmp_path / f"x{suffix}")
    assert (tmp_path / f"x{suffix}").read_bytes().startswith(STARTS[suffix])
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


@needs_graphviz
def test_what_graphviz_says_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    broken = pydot.Dot("x", graph_type="digraph", label="<<TABLE>>")
    with pytest.raises(FxpruneError, match="graphviz: it failed"):
        write_picture(broken, "title", tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())
