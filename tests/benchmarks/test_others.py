"""Test the smaller benchmarks, each on tiny models, and the pages of all results."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.vocabulary as benchmark
import fxprune
from benchmarks import pages, score_memory, sweep, vision, waiting
from benchmarks.common import Shape, write_random
from benchmarks.joined import block_sums, join, orders
from benchmarks.norms import SMALL, byte_loss, small_rows, train_small
from benchmarks.pages import results_page, vocabulary_page
from benchmarks.reference import REFERENCE, ReferenceRow, first_tokens, reference_rows
from benchmarks.score_memory import WAYS, measure
from fxprune.evaluation.comparison import graph_predictor
from fxprune.recipes import Recipe
from tests.benchmarks.command import run_main
from tests.models import tiny, token_ids
from tests.oracle import Net
from tests.tokens import character_tokenizer
from tests.vocabulary.small import lines, tokenizer
from tests.vocabulary.test_prune import model_for


def test_the_pages_are_those_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all their tables, and the figures that the command line prints."""
    docs, figures = pages.DOCS, pages.DEMO.read_text()
    (tmp_path / "demo.json").write_text(figures)
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    monkeypatch.setattr(pages, "DEMO", tmp_path / "demo.json")
    pages.main()
    assert (tmp_path / "demo.json").read_text() == figures
    for name in ("results.md", "latency.md", "quality.md", "vocabulary.md"):
        assert (tmp_path / name).read_text() == (docs / name).read_text(), "make results"
    assert "balanced" in (tmp_path / "quality.svg").read_text() and (tmp_path / "latency_cpu.svg").exists()


def test_the_same_pieces_are_compared() -> None:
    assert [len(piece) for piece in benchmark.pieces_of("a" * 2000, 5000)] == [800, 800]
    assert benchmark.pieces_of("a" * 2000, 800) == ["a" * 800]
    assert benchmark.ratio_of([2.0], [1.0]) == (2.0, 0.0)
    assert benchmark.ratio_of([2.0, 4.0], [1.0, 2.0]) == (2.0, 0.0)
    ratio, error = benchmark.ratio_of([1.0, 3.0], [1.0, 2.0])
    assert ratio == pytest.approx(4 / 3) and error == pytest.approx(math.sqrt(2 * 2 * (1 / 3) ** 2) / 3)


def test_a_run_writes_rows_and_the_page_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["\n".join(lines(80, seed)) for seed in range(5)]
    (tmp_path / "c4_sample.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "wikitext2").mkdir()
    for place in ("wiki_sample.txt", "wikitext2/test.txt"):
        (tmp_path / place).write_text(texts[0])
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "load_named", lambda _: (model_for("gpt2"), tokenizer("gpt2"), "tiny"))
    result = run_main(benchmark.main, "--data", str(tmp_path), "--ratio", "0.2", "--characters", "1600")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "vocabulary-tiny.json").read_text())
    dense, slim = written["rows"]
    assert slim["tokens"] < dense["tokens"] and len(slim["texts"]) == 3
    assert all(text["over_dense"] > 0 and text["bits_per_byte"] > 0 for text in slim["texts"].values())
    page = vocabulary_page([written])
    assert f"| 20% | {slim['tokens']} | " in page and "wiki_sample.txt (2 pieces)" in page


def letters(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) for letter in text]}


def test_samples_begin_the_texts_that_are_long_enough() -> None:
    found = first_tokens(letters, ["abc", "abcd", "bcdef", "cdef"], samples=2, tokens=4)
    assert found.tolist() == [[97, 98, 99, 100], [98, 99, 100, 101]]
    with pytest.raises(ValueError, match="1 texts have 5 tokens; 2 are needed"):
        first_tokens(letters, ["abcde", "abc"], samples=2, tokens=5)


@pytest.mark.slow
def test_every_order_of_the_paper_is_compared() -> None:
    model = tiny("llama")
    select = "select-by-group-ratio{group_ratio=0.25}"
    rows = list(reference_rows(model, token_ids(2, 8), token_ids(2, 8), select=select, kinds=["mlp"]))
    assert [(row.order, row.reference) for row in rows] == list(REFERENCE.items())
    assert all(torch.tensor(row.found).isfinite() for row in rows)
    assert str(ReferenceRow("vector", 100.0, 101.0)) == "vector: 101.0, reference 100.0 (+1.0%)"


IDS = torch.arange(18).reshape(2, 9)


def test_joined_blocks_of_a_llama_are_those_computed_by_hand() -> None:
    model: Any = tiny("llama", num_hidden_layers=4)
    graph_module = fxprune.trace(model, {"input_ids": IDS}).graph_module
    before = graph_predictor(graph_module)(input_ids=IDS)
    found = graph_predictor(join(graph_module, 4, [2, 0]))(input_ids=IDS)
    body = model.model
    with torch.no_grad():
        x = body.embed_tokens(IDS)
        angles = body.rotary_emb(x, torch.arange(IDS.shape[1])[None])
        for pair in (body.layers[:2], body.layers[2:]):
            read = [layer.input_layernorm(x) for layer in pair]
            parts = [
                layer.self_attn(h, position_embeddings=angles, attention_mask=None)[0]
                for layer, h in zip(pair, read, strict=True)
            ]
            x = x + parts[0] + parts[1]
            one, other = (layer.mlp(layer.post_attention_layernorm(x)) for layer in pair)
            x = x + one + other
        expected = model.lm_head(body.norm(x))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(graph_predictor(graph_module)(input_ids=IDS), before, msg="the graph given stays")


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_blocks_of_other_models_are_found_and_joined(kind: str) -> None:
    graph_module = fxprune.trace(tiny(kind), {"input_ids": IDS}).graph_module
    assert [len(sums) for sums in block_sums(graph_module.graph, 3)[1]] == [2, 2, 2]
    joined = graph_predictor(join(graph_module, 3, [1]))(input_ids=IDS)
    assert joined.isfinite().all() and not torch.equal(joined, graph_predictor(graph_module)(input_ids=IDS))
    with pytest.raises(ValueError, match="6 residual additions are no chain over 4 blocks"):
        block_sums(graph_module.graph, 4)


def test_pairs_do_not_share_a_block() -> None:
    graph_module = fxprune.trace(tiny("llama", num_hidden_layers=5), {"input_ids": IDS}).graph_module
    one, both = orders(graph_module, 5, IDS, 2)
    assert both[0] == one[0] and abs(both[0] - both[1]) > 1


@pytest.mark.slow
def test_a_row_compares_two_norms_of_one_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    for what in list(SMALL)[1:]:
        monkeypatch.delitem(SMALL, what)  # type: ignore[arg-type]
    rows = list(small_rows(0.25, models=1, steps=2))
    assert [row.what for row in rows] == ["latents, random scores", "latents, taylor scores"]
    assert all(row.sliced != row.masked and row.dense < 6 and row.removed == 0.25 for row in rows)


@pytest.mark.slow
def test_training_lowers_the_loss_and_is_deterministic() -> None:
    windows = torch.arange(64).repeat(16, 1)
    first, again, longer = (train_small("latents", windows, steps, seed=1) for steps in (1, 1, 12))
    assert byte_loss(first, windows) == byte_loss(again, windows) > byte_loss(longer, windows)


@pytest.mark.slow
def test_every_way_goes_over_all_samples(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    total = write_random(source, Shape.of_width(64, 96, 2).config(), shard_bytes=100_000)
    assert len(list(source.glob("*.safetensors"))) > 2
    for way in WAYS:
        found = measure(way, source, 2, 8)
        assert found.way == way and found.seconds > 0
        assert found.over_weights == pytest.approx(found.peak_gb * 1e9 / total)


@pytest.mark.slow
def test_the_command_prints_and_writes_its_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_memory, "RESULTS", tmp_path / "score_memory.json")
    monkeypatch.setattr(score_memory, "WAYS", {name: WAYS[name] for name in ("plain training", "mix, low")})
    sizes = ["--hidden", "64", "--ffn", "96", "--layers", "2", "--samples", "2", "--tokens", "8"]
    done = run_main(score_memory.main, *sizes, "--json")
    assert done.exit_code == 0 and "mix, low" in done.output
    data = json.loads((tmp_path / "score_memory.json").read_text())
    assert [row["way"] for row in data["rows"]] == ["plain training", "mix, low"]
    assert "| mix, low | " in results_page(tmp_path) and "on 2 x 8 tokens" in results_page(tmp_path)


@pytest.mark.slow
def test_prunes_are_timed_alone_and_together() -> None:
    recipe = Recipe(
        "short", "calibrate, find-groups, l2, select-by-ratio, least-squares, shrink, emit-model, make-report"
    )
    options = {"tokenizer": character_tokenizer(), "protect": (), "verify": False}
    alone, whole = sweep.measure(tiny("llama"), token_ids(4, 16), [0.1, 0.2], [recipe], **options)
    assert list(alone) == ["short-0.1", "short-0.2"] and min(whole, *alone.values()) > 0


@pytest.mark.parametrize("norm", [False, True])
def test_both_tools_prune_a_network_and_are_compared_with_masking(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str) -> Any:
        torch.manual_seed(0)
        parts = {"first": nn.Conv2d(3, 20, 3), "second": nn.Conv2d(20, 25, 3), "out": nn.Linear(25, 1000)}
        body = lambda m, x: m.out(m.norm(m.second(m.first(x).relu()).mean((-1, -2))))  # noqa: E731
        net = Net(body, **parts, norm=nn.LayerNorm(25) if norm else nn.Identity())
        return net.eval(), torch.randn(2, 3, 8, 8)

    monkeypatch.setattr(vision, "make", make)
    ours, theirs = vision.ours("own/network"), vision.theirs("own/network")
    assert ours.exact and 0.65 < ours.parameters < 0.75
    assert theirs.exact is not norm and 0.65 < theirs.parameters < 0.9


def test_an_error_is_a_row() -> None:
    row = vision._work("timm/there is no such model", "ours")
    assert row.error and not row.exact


@pytest.mark.slow
def test_both_policies_are_timed_alone_and_beside_other_work() -> None:
    done = run_main(waiting.main, "--steps", "1", "--rounds", "1")
    assert done.exit_code == 0, done.output
    assert "ACTIVE" in done.output and "PASSIVE" in done.output and "beside a busy process" in done.output
