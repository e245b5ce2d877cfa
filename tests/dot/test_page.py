"""The page of a picture: everything is in one file, and tells about each box and line."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import networkx as nx
import pytest

from fxprune.draw.atlas import Atlas
from fxprune.draw.graphviz import draw
from fxprune.draw.view import contracted
from fxprune.draw.write import page, write_dot

SVG = '<?xml version="1.0"?><!-- x --><svg viewBox="0 0 9 9"><g id="axis0" class="node"></g></svg>'


@pytest.fixture(scope="module")
def text(small: nx.Graph) -> str:
    atlas = Atlas(small)
    shown = [axis for axis, data in small.nodes(data=True) if data["role"] == "parameter"]
    return page(draw(atlas, contracted(atlas, "title", shown)), "A <title>", SVG)


def items_of(text: str) -> dict[str, dict[str, str]]:
    return json.loads(text.partition('id="items">')[2].partition("</script>")[0])


def test_the_page_tells_the_rule_and_the_reason(text: str) -> None:
    items = items_of(text)
    named = {item["name"]: item for item in items.values()}
    assert "frozen, 2 units: an output of the model" in named["b.weight[0]"]["text"]
    assert "group " in named["a.weight[0]"]["text"] and "\n" in named["a.weight[0]"]["text"]
    line = named["a.weight[0] → b.weight[1]"]
    assert "aten.tanh.default (at tanh) to tanh[1]" in line["text"] and "tanh  self[a, b] → out[a, b]" in line["text"]
    assert items[line["source"]]["name"] == "a.weight[0]" and items[line["target"]]["name"] == "b.weight[1]"


def test_the_page_stands_alone(text: str) -> None:
    assert text.startswith("<!DOCTYPE html>") and '<svg viewBox="0 0 9 9">' in text and "<?xml" not in text
    assert "<title>A &lt;title&gt;</title>" in text and "{{" not in text
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://", text.replace("http://www.w3.org", ""))


@pytest.mark.browser
def test_a_browser_searches_and_tells(small: nx.Graph, tmp_path: Path, browser: str) -> None:
    """Typing marks what is found, Enter chooses it, and the panel has its rule."""
    write_dot(small, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{TYPED}</script></body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [browser, *options, (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    panel = done.stdout.partition("<aside")[2].partition("</aside>")[0]
    assert "<h2>b.weight[1]</h2>" in panel and "tanh  self[a, b] → out[a, b]" in panel
    assert ">1 found</output>" in done.stdout and re.search(r'class="node item found chosen"', done.stdout)


TYPED = """
search.value = "parameter b.weight, axis 1";
search.dispatchEvent(new Event("input"));
search.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
"""
