"""Test pictures as DOT files, images and HTML pages."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import networkx as nx
import pydot
import pytest
import torch
from torch import nn

import fxprune
import fxprune.draw.write
from fxprune.axes import factors
from fxprune.discovery.explain import frozen_axes
from fxprune.draw.atlas import Atlas
from fxprune.draw.graphviz import FROZEN, _quoted, draw, hue_of
from fxprune.draw.view import contracted
from fxprune.draw.write import RENDERED, check_target, html_page, layer_svg, write_dot, write_picture
from fxprune.errors import FxpruneError
from fxprune.removal.plan import Plan
from fxprune.trace import Traced
from tests.models import tiny
from tests.oracle import Net

SVG = '<?xml version="1.0"?><!-- x --><svg viewBox="0 0 9 9"><g id="axis0" class="node"></g></svg>'


@pytest.fixture(scope="module")
def text(small: nx.Graph) -> str:
    atlas = Atlas(small)
    shown = [axis for axis, data in small.nodes(data=True) if data["role"] == "parameter"]
    _, items = draw(atlas, contracted(atlas, "title", shown))
    return html_page(items, "A <title>", SVG)


def test_the_page_shows_rules_and_reasons_and_stands_alone(text: str) -> None:
    items = json.loads(text.partition('id="items">')[2].partition("</script>")[0])
    named = {item["name"]: item for item in items.values()}
    assert "frozen, 2 units: an output of the model" in named["b.weight[0]"]["text"]
    assert "group " in named["a.weight[0]"]["text"] and "\n" in named["a.weight[0]"]["text"]
    line = named["a.weight[0] → b.weight[1]"]
    assert "aten.tanh.default (at tanh) to tanh[1]" in line["text"] and "tanh  self[a, b] → out[a, b]" in line["text"]
    assert items[line["source"]]["name"] == "a.weight[0]" and items[line["target"]]["name"] == "b.weight[1]"
    assert text.startswith("<!DOCTYPE html>") and '<svg viewBox="0 0 9 9">' in text and "<?xml" not in text
    assert "<title>A &lt;title&gt;</title>" in text and "{{" not in text
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://", text.replace("http://www.w3.org", ""))


@pytest.mark.browser
def test_a_browser_searches_and_shows_rules(small: nx.Graph, tmp_path: Path, browser: str) -> None:
    """Typing marks matches, Enter chooses one, and the panel shows its rule."""
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


STARTS = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF", ".html": b"<!DOCTYPE html>", ".dot": b"digraph"}

needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="there is no Graphviz here to draw with")


def test_images_are_refused_without_graphviz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for suffix in RENDERED:
        with pytest.raises(FxpruneError, match=r"program dot is not installed.*Install.*\.html"):
            check_target(tmp_path / f"x{suffix}")
    assert check_target(tmp_path / "x.html") == tmp_path / "x.html"
    assert check_target(tmp_path / "x.GV") == tmp_path / "x.GV"


def test_text_and_pages_need_no_graphviz(small: nx.Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for suffix in (".dot", ".html"):
        fxprune.write_dot(small, tmp_path / f"x{suffix}")
        assert (tmp_path / f"x{suffix}").read_bytes().startswith(STARTS[suffix])
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<svg" not in text and "written without Graphviz" in text
    assert '<li id="axis0" class="node">a.weight[1]' in text


@needs_graphviz
@pytest.mark.parametrize("suffix", RENDERED)
def test_graphviz_draws(suffix: str, small: nx.Graph, tmp_path: Path) -> None:
    fxprune.write_dot(small, tmp_path / f"x{suffix}")
    assert (tmp_path / f"x{suffix}").read_bytes().startswith(STARTS[suffix])
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


@needs_graphviz
def test_errors_of_graphviz_are_reported_and_nothing_is_written(tmp_path: Path) -> None:
    broken = pydot.Dot("x", graph_type="digraph", label="<<TABLE>>")
    with pytest.raises(FxpruneError, match="graphviz: drawing failed"):
        write_picture(broken, {}, "title", tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())


def graph_of(model: nn.Module, **inputs: torch.Tensor) -> nx.Graph:
    return fxprune.dependency_graph(fxprune.trace(model, inputs or None, dynamic=False))


@pytest.fixture(scope="module")
def traced() -> Traced:
    return fxprune.trace(tiny("llama"), dynamic=False)


@pytest.fixture(scope="module")
def llama(traced: Traced) -> nx.Graph:
    return fxprune.dependency_graph(traced)


@pytest.fixture(scope="module")
def deep() -> nx.Graph:
    """Twelve layers, with more groups than the legend has rows."""
    return graph_of(tiny("llama", num_hidden_layers=12))


@pytest.fixture(scope="module")
def first(llama: nx.Graph, tmp_path_factory: pytest.TempPathFactory) -> Picture:
    return Picture(tmp_path_factory.mktemp("first"), llama, layer=0)


class Picture:
    """A DOT file and its contents; test_graphviz checks that pydot reads the same from the text."""

    def __init__(self, folder: Path, graph: nx.Graph, **options: object) -> None:
        self.path = folder / "picture.dot"
        with mock.patch.object(fxprune.draw.write, "write_picture", wraps=write_picture) as written:
            write_dot(graph, self.path, **options)
        self.text = self.path.read_text(encoding="utf-8")
        self.dot = written.call_args.args[0]
        self.clusters = {plain(c.get_name()): c for c in inner_clusters(self.dot)}
        found = [n for c in (self.dot, *self.clusters.values()) for n in c.get_nodes()]
        self.nodes = {plain(n.get_name()): n for n in found if n.get("id")}
        lines = [e for e in self.dot.get_edges() if e.get("style") != "dotted"]
        self.lines = {(plain(e.get_source()), plain(e.get_destination())): e for e in lines}
        self.legend = self.dot.get("label")
        self.title = plain(self.clusters["cluster_picture"].get("label"))

    def colours(self, name: str) -> list[str]:
        return plain(self.nodes[name].get("fillcolor")).split(":")

    def tip(self, name: str) -> str:
        return plain(self.nodes[name].get("tooltip"))


def plain(text: str) -> str:
    return text.strip('"')


def inner_clusters(graph: pydot.Graph) -> Iterator[pydot.Graph]:
    for inner in graph.get_subgraphs():
        yield inner
        yield from inner_clusters(inner)


def test_clusters_nest_as_modules_do(llama: nx.Graph, tmp_path: Path) -> None:
    picture = Picture(tmp_path, llama, layer=2)
    block = picture.clusters["cluster_model.layers.2"]
    attention = picture.clusters["cluster_model.layers.2.self_attn"]
    assert plain(attention.get_name()) in {plain(c.get_name()) for c in block.get_subgraphs()}
    inside = picture.clusters["cluster_model.layers.2.self_attn.q_proj"]
    names = {f"model.layers.2.self_attn.q_proj.weight[{i}]" for i in (0, 1)}
    assert {plain(n.get_name()) for n in inside.get_nodes()} == names
    assert plain(attention.get("label")) == "self_attn"


def test_default_is_the_middle_block_with_tens_of_nodes(deep: nx.Graph, tmp_path: Path) -> None:
    picture = Picture(tmp_path, deep)
    assert 10 < len(picture.nodes) < 60 and len(picture.lines) < len(picture.nodes) * 1.5
    assert {name.split(".")[2] for name in picture.nodes if ".layers." in name} == {"6"}
    assert "model.rotary_emb.inv_freq[0]" in picture.nodes


def test_one_colour_for_each_group_and_the_legend_names_them(llama: nx.Graph, first: Picture) -> None:
    taken: dict[str, str] = {}
    for group in fxprune.find_groups(llama):
        names = {f"{m.name}[{m.axis}]" for m in group.members} & first.nodes.keys()
        if group.factor is None or not names:
            continue
        shared = set.intersection(*(set(first.colours(name)) for name in names))
        holding = (a for a, data in llama.nodes(data=True) if group.factor in factors(data["expr"]))
        others = first.nodes.keys() - {f"{a.tensor}[{a.dim}]" for a in holding}
        own = {c for c in shared if not any(c in first.colours(other) for other in others)}
        assert own, group.name
        assert group.name in first.legend
        taken[group.name] = min(c for c in own if f'BGCOLOR="{c}" BORDER="1" WIDTH="24"></TD><TD' in first.legend)
    assert len(taken) == 6


def test_frozen_axes_are_grey_with_the_reason(llama: nx.Graph, tmp_path: Path) -> None:
    for module, reason in (("model.embed_tokens", "looked up by number"), ("lm_head", "an output of the model")):
        picture = Picture(tmp_path, llama, layer=module)
        assert picture.colours(f"{module}.weight[0]") == [FROZEN]
        assert FROZEN not in picture.colours(f"{module}.weight[1]")
        tip = picture.tip(f"{module}.weight[0]")
        assert f"frozen, 131 units: {frozen_axes(llama)[f'{module}.weight[0]']}" in tip and reason in tip
        assert "frozen: cannot be removed" in picture.legend


def test_tooltips_name_tensor_axis_expression_op_and_node_and_labels_are_short(first: Picture) -> None:
    tip = first.tip("model.layers.0.self_attn.q_proj.weight[0]")
    assert "parameter model.layers.0.self_attn.q_proj.weight, axis 0, 48 positions" in tip
    assert "(kv_head:3 * query_head:2 * [head_dim:4 | head_dim:4])" in tip
    assert "group model.layers.0/head: 3 units, exact" in tip
    line = first.lines["model.layers.0.mlp.gate_proj.weight[0]", "model.layers.0.mlp.down_proj.weight[1]"]
    assert plain(line.get("label")).replace("\\n", " ") == "linear · silu · mul · linear"
    assert "aten.silu.default (at silu) to silu[2]" in plain(line.get("tooltip"))
    for item in (*first.nodes.values(), *first.dot.get_edges(), *first.clusters.values()):
        assert item.get("tooltip")
    labels = {name: plain(node.get("label")) for name, node in first.nodes.items()}
    assert labels["model.layers.0.mlp.down_proj.weight[1]"] == "down_proj.weight[1]\\nmlp:88"
    assert max(len(line) for label in labels.values() for line in label.split("\\n")) < 40


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lines_of_each_group_form_a_tree_in_order_of_execution(family: str, llama: nx.Graph, tmp_path: Path) -> None:
    """The n axes of a group take n - 1 lines, however many ops couple them."""
    graph = llama if family == "llama" else graph_of(tiny(family, n_layer=1))
    picture = Picture(tmp_path, graph, layer=0)
    most = 0
    for group in fxprune.find_groups(graph):
        if group.factor is None:
            continue
        holding = (a for a, data in graph.nodes(data=True) if group.factor in factors(data["expr"]))
        shown = {f"{a.tensor}[{a.dim}]" for a in holding} & picture.nodes.keys()
        if not shown and group.block not in (None, "model.layers.0"):
            continue
        most += len(shown) - 1
        tree = nx.Graph()
        tree.add_nodes_from(shown)
        for pair, line in picture.lines.items():
            if shown.issuperset(pair) and any(unit.endswith(group.kind) for unit in units(line)):
                tree.add_edge(*pair)
        assert nx.is_connected(tree), group.name
    assert 0 < len(picture.lines) <= most
    assert nx.is_directed_acyclic_graph(nx.DiGraph(picture.lines.keys()))
    if family == "llama":  # lines between parallel projections are avoided
        query, value, out = (f"model.layers.0.self_attn.{name}_proj.weight[{i}]" for name, i in ("q0", "v0", "o1"))
        assert {(query, out), (value, out)} <= picture.lines.keys() and (query, value) not in picture.lines


def units(line: pydot.Edge) -> set[str]:
    """Kinds of units that are coupled over a line, from its tooltip."""
    heads = [part for part in plain(line.get("tooltip")).split("\\n") if ": from " in part]
    return {unit for head in heads for unit in head.partition(":")[0].split(", ")}


def test_group_shows_all_that_the_search_reaches(llama: nx.Graph, tmp_path: Path) -> None:
    group = next(g for g in fxprune.find_groups(llama) if g.name == "model.layers.1/head")
    picture = Picture(tmp_path, llama, group=group)
    holding = {a for a, data in llama.nodes(data=True) if group.factor in factors(data["expr"])}
    reached = nx.node_connected_component(llama.subgraph(holding), group.trigger)
    assert picture.nodes.keys() == {f"{a.tensor}[{a.dim}]" for a in reached}
    assert any(node.get("style") == '"filled,rounded"' for node in picture.nodes.values())
    marked = [name for name, node in picture.nodes.items() if plain(node.get("peripheries")) == "2"]
    assert marked == [f"{group.trigger.tensor}[{group.trigger.dim}]"]
    assert plain(picture.nodes[marked[0]].get("label")).startswith("trigger: ")
    solid = [line for line in picture.lines.values() if line.get("style") == "solid"]
    assert len(solid) == len(reached) - 1
    by_name = Picture(tmp_path, llama, group="model.layers.1/head")
    assert by_name.text == picture.text


def test_group_in_a_layer_shows_the_part_there_and_one_of_a_layer_its_block(
    llama: nx.Graph, first: Picture, tmp_path: Path
) -> None:
    assert Picture(tmp_path, llama, group="model.layers.0/layer").nodes.keys() == first.nodes.keys()
    picture = Picture(tmp_path, llama, group="model/channel", layer=1)
    assert "model.layers.1.mlp.up_proj.weight[1]" in picture.nodes
    assert not any("layers.0" in name or "layers.2" in name for name in picture.nodes)
    assert "the part in model.layers.1" in picture.title


def test_layer_by_index_and_path_and_any_module_by_path(llama: nx.Graph, tmp_path: Path) -> None:
    for layer in (-1, 2, "2", "model.layers.2"):
        assert "model.layers.2, block 3 of 3" in Picture(tmp_path, llama, layer=layer).title
    names = Picture(tmp_path, llama, layer="model.layers.0.mlp").nodes
    assert {name.split(".")[4] for name in names} == {"gate_proj", "up_proj", "down_proj"}


def test_everything_holds_every_parameter_axis_and_draws_equal_blocks_once(deep: nx.Graph, tmp_path: Path) -> None:
    text = Picture(tmp_path, deep, everything=True, fold=False).text
    wanted = [axis for axis, data in deep.nodes(data=True) if data["role"] == "parameter"]
    assert len(wanted) > 180
    assert all(f'"{a.tensor}[{a.dim}]" [' in text for a in wanted)
    assert text.count('" -> "') < 2.5 * len(wanted)
    assert "more groups: their names are in the tooltips" in text
    picture = Picture(tmp_path, deep, everything=True)
    assert picture.title == "The whole model: 12 blocks, of which 1 drawn"
    assert plain(picture.clusters["cluster_model.layers.0"].get("label")) == "layers.0 to 11: 12 blocks, the same"
    assert len(picture.nodes) < 40 and not any(".layers.1." in name for name in picture.nodes)
    assert "model.layers.0/mlp and 11 alike" in picture.legend and "thick frame" in picture.legend
    (line,) = (line for pair, line in picture.lines.items() if pair[1] == "model.norm.weight[0]")
    assert plain(line.get("label")) == "through 11 more blocks"


def test_a_group_across_the_model_is_drawn_folded(llama: nx.Graph, tmp_path: Path) -> None:
    picture = Picture(tmp_path, llama, group="model/channel")
    assert plain(picture.clusters["cluster_model.layers.0"].get("label")) == "layers.0 to 2: 3 blocks, the same"
    assert {"model.embed_tokens.weight[1]", "lm_head.weight[1]"} <= picture.nodes.keys()
    assert not any(".layers.1." in name for name in picture.nodes)
    shown = nx.Graph(picture.lines.keys())
    assert nx.is_connected(shown) and set(shown) == picture.nodes.keys()
    whole = Picture(tmp_path, llama, group="model/channel", fold=False)
    assert any(".layers.1." in name for name in whole.nodes)


def test_the_stream_runs_through_its_sums(llama: nx.Graph, first: Picture, tmp_path: Path) -> None:
    sums = [name for name, node in first.nodes.items() if node.get("shape") == "circle"]
    assert len(sums) == 2 and all(plain(first.nodes[name].get("label")) == "+" for name in sums)
    assert all("residual add" in first.tip(name) for name in sums) and "residual add" in first.legend
    (source,) = (name for name, node in first.nodes.items() if plain(node.get("label")).startswith("stream"))
    thick = [pair for pair, line in first.lines.items() if line.get("penwidth") == "5"]
    assert sorted(thick) == sorted([(source, sums[0]), (sums[0], sums[1])])
    assert {a for a, b in first.lines if b in sums} > {
        f"model.layers.0.{p}.weight[0]" for p in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert "residual add" not in Picture(tmp_path, llama, layer="model.layers.0.mlp").legend


@pytest.mark.parametrize("options", [{"layer": 0}, {"layer": 1}, {"everything": True, "fold": False}])
def test_a_tied_embedding_leaves_the_stream_between_the_sums(
    tied: nx.Graph, options: dict[str, object], tmp_path: Path
) -> None:
    """The last sum was joined to the first one, through the head and the embedding."""
    picture = Picture(tmp_path, tied, **options)
    sums = [name for name, node in picture.nodes.items() if node.get("shape") == "circle"]
    thick = {pair for pair, line in picture.lines.items() if line.get("penwidth") == "5"}
    assert len(sums) >= 2 and set(itertools.pairwise(sums)) < thick


@pytest.fixture(scope="module")
def tied() -> nx.Graph:
    """Two layers whose embedding and head share a weight."""
    return graph_of(tiny("llama", num_hidden_layers=2, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def plan(llama: nx.Graph) -> Plan:
    """Fewer channels in the MLPs, fewest in the first block; the last block goes."""
    kept = {}
    for block, left in ((0, 22), (1, 66)):
        up, down = ({axis: list(range(left))} for axis in (0, 1))
        names = {"gate_proj": up, "up_proj": up, "down_proj": down}
        kept |= {f"model.layers.{block}.mlp.{name}.weight": axes for name, axes in names.items()}
    return Plan(kept, ("model.layers.2",))


def test_a_plan_is_laid_over_a_layer(llama: nx.Graph, plan: Plan, tmp_path: Path) -> None:
    picture = Picture(tmp_path, llama, layer=0, plan=plan)
    name = "model.layers.0.mlp.down_proj.weight[1]"
    assert plain(picture.nodes[name].get("label")) == "down_proj.weight[1]\\nmlp:88→22\\n25% stays"
    assert plain(picture.nodes[name].get("fillcolor")) == f"{hue_of('mlp')};0.2500:#ffffff"
    assert plain(picture.nodes[name].get("style")) == "striped"
    assert "the plan leaves 25.0% of it" in picture.tip(name)
    untouched = "model.layers.0.mlp.down_proj.weight[0]"
    assert picture.colours(untouched) == [hue_of("channel")] and "100.0%" in picture.tip(untouched)
    assert "88 → 22" in picture.legend and "untouched" in picture.legend


def test_a_plan_is_laid_over_the_whole_model(llama: nx.Graph, plan: Plan, tmp_path: Path) -> None:
    picture = Picture(tmp_path, llama, everything=True, plan=plan)
    label = plain(picture.clusters["cluster_model.layers.0"].get("label"))
    assert label == "layers.0 to 2: 3 blocks, the same\\lmodel.layers.2 removed as a whole\\l"
    name = "model.layers.0.mlp.down_proj.weight[1]"
    assert plain(picture.nodes[name].get("label")) == "down_proj.weight[1]\\nmlp:88→22..66\\n50% stays"
    row = picture.legend.partition("% that stays in block")[2].partition(">mlp</TD>")[2]
    assert re.findall(r">(\d+)</TD>", row) == ["25", "75", "0"]
    single = Picture(tmp_path, llama, everything=True, plan=plan, fold=False)
    assert plain(single.clusters["cluster_model.layers.2"].get("label")) == "2: removed as a whole"
    assert "dashed" in single.clusters["cluster_model.layers.2"].get("style")


def test_without_blocks_everything_is_shown_and_odd_names_are_quoted(tmp_path: Path) -> None:
    """No blocks, a parameter of the model itself, and a module with syntax of DOT in its name."""

    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = net.parts.values()
        return second(first(x * net.scale).relu()).relu()  # type: ignore[no-any-return]

    parts = nn.ModuleDict({"a -> <b>; {": nn.Linear(6, 10), "d": nn.Linear(10, 4)})
    net = Net(body, scale=nn.Parameter(torch.ones(6)), parts=parts)
    picture = Picture(tmp_path, graph_of(net, x=torch.ones(2, 6)))
    assert {"scale[0]", "parts.d.weight[1]"} <= picture.nodes.keys()
    assert len(picture.nodes) == 7
    assert "parts.a -> <b>; {.weight[0]" in picture.nodes
    assert _quoted('a "b" \\c\n') == r'"a \"b\" \\c\n"'
    check_renders(picture.path)


def check_renders(path: Path) -> None:
    """Graphviz draws the file without errors; if it is not installed, pydot reads it."""
    program = shutil.which("dot")
    if program is None:
        assert pydot.graph_from_dot_file(str(path)) is not None
        return
    done = subprocess.run([program, "-Tsvg", str(path)], capture_output=True, text=True, check=True, timeout=60)
    assert "Error" not in done.stderr and "<svg" in done.stdout


@needs_graphviz
@pytest.mark.parametrize("family", ["llama", "falcon", "gemma3_text"])
def test_graphviz_renders(family: str, llama: nx.Graph, tmp_path: Path) -> None:
    """A label on a line within a rank of nested clusters once made Graphviz fail on whole models."""
    graph = llama if family == "llama" else graph_of(tiny(family))
    for options in ({}, {"everything": True}, {"group": fxprune.find_groups(graph)[1].name}):
        write_dot(graph, tmp_path / "picture.dot", **options)
        check_renders(tmp_path / "picture.dot")


_PROGRAM = """#!/bin/sh
echo '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="there" xmlns:xlink="here"><g>'
grep -c label
echo '</g></svg>'
"""


def test_a_layer_is_inline_svg_or_empty(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The element alone, without namespaces and the header of a file; empty without Graphviz and if it fails."""
    program = tmp_path / "dot"
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    if shutil.which("dot") is None:
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = layer_svg(traced.graph_module)
    assert found.startswith("<svg") and found.endswith("</svg>") and "xmlns" not in found
    assert ElementTree.fromstring(found.replace("xlink:", "")).tag == "svg"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert layer_svg(traced.graph_module) == ""
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/false")
    assert layer_svg(traced.graph_module) == ""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, b"no picture"))
    assert layer_svg(traced.graph_module) == ""
