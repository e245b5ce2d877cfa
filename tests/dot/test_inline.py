"""The picture of a layer inside a page."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any
from xml.etree import ElementTree

import pytest

import fxprune
from fxprune.draw.write import layer_svg
from tests.models import tiny

_PROGRAM = """#!/bin/sh
echo '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="there" xmlns:xlink="here"><g>'
grep -c label
echo '</g></svg>'
"""


@pytest.fixture(scope="module")
def graph() -> Any:
    """A model of two layers."""
    return fxprune.trace(tiny("llama", num_hidden_layers=2)).graph_module


def test_a_layer_is_inline_svg(graph: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone between its tags, without what only a file of its own needs."""
    program = tmp_path / "dot"
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    if shutil.which("dot") is None:
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = layer_svg(graph)
    assert found.startswith("<svg") and found.endswith("</svg>") and "xmlns" not in found
    assert ElementTree.fromstring(found.replace("xlink:", "")).tag == "svg"


def test_without_graphviz_or_where_it_fails_there_is_none(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert layer_svg(graph) == ""
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/false")
    assert layer_svg(graph) == ""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, b"no picture"))
    assert layer_svg(graph) == ""
