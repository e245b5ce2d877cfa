"""Test the benchmarks of discovery and recovery, the smaller ones, and the pages of all results."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import benchmarks.vocabulary as benchmark
import fxprune
from benchmarks import discovery, pages, recover, score_memory, sweep, vision, waiting
from benchmarks.common import Shape, local_tasks, write_random
from benchmarks.discovery import Discovery, compare, measure_in_process, summarise
from benchmarks.joined import block_sums, join, orders
from benchmarks.norms import SMALL, byte_loss, small_rows, train_small
from benchmarks.pages import results_page, vocabulary_page
from benchmarks.reference import REFERENCE, ReferenceRow, first_tokens, reference_rows
from benchmarks.score_memory import WAYS, measure
from fxprune.checkpoint.manifest import read_manifest
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
def test_ways_to_wait_are_timed_alone_and_beside_other_work() -> None:
    done = run_main(waiting.main, "--steps", "1", "--rounds", "1")
    assert done.exit_code == 0, done.output
    assert "spin briefly" in done.output and "sleep at once" in done.output and "beside a busy process" in done.output


SUMS = [{"instruction": f"Add {i} and 1.", "input": "", "output": f"It is {i + 1}."} for i in range(40)]
QUESTIONS = [{"query": f"Is {i} even?", "choices": ["no", "yes"], "gold": (i + 1) % 2} for i in range(8)]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("rows.json", "texts.jsonl", "book.txt", "quiz.jsonl")}
    found["rows.json"].write_text(json.dumps(SUMS))
    found["texts.jsonl"].write_text("\n".join(json.dumps({"text": f"Text number {i}."}) for i in range(30)))
    found["book.txt"].write_text("x " * 2050)
    found["quiz.jsonl"].write_text("\n".join(map(json.dumps, QUESTIONS)))
    return found


def test_rows_are_drawn_alike_from_each_file(files: dict[str, Path]) -> None:
    paths = [files[name] for name in ("rows.json", "texts.jsonl", "book.txt")]
    rows = recover.training_rows(paths, 12, seed=0)
    assert [sum("instruction" in row for row in rows), len(rows)] == [4, 11]
    assert sorted(len(row["text"]) for row in rows[8:]) == [100, 2000, 2000]
    assert rows == recover.training_rows(paths, 12, seed=0) != recover.training_rows(paths, 12, seed=1)
    assert len(recover.without(rows, f"... {rows[4]['text']} ...")) == 10


def test_rows_of_every_form_are_kept_unless_they_are_measured_on(tmp_path: Path) -> None:
    """Chats once counted as empty text, which every text contains."""
    chat = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    rows = [chat, {"text": "a text"}, {"text": "another"}, SUMS[0]]
    (tmp_path / "rows.json").write_text(json.dumps([chat, "a text", *rows[2:]]))
    assert sorted(map(str, recover.training_rows([tmp_path / "rows.json"], 9, 0))) == sorted(map(str, rows))
    assert recover.without(rows, "measured on") == rows
    assert recover.without(rows, "Hi.\n\nHello. And a text.") == rows[2:]


def test_texts_of_one_folder_have_names_of_their_own() -> None:
    found = recover.named([Path("a/test.txt"), Path("a/valid.txt"), Path("b/test.txt")])
    assert found == {"a/test": Path("a/test.txt"), "a/valid": Path("a/valid.txt"), "b": Path("b/test.txt")}


def test_calibration_is_spread_over_the_rows() -> None:
    tokenizer = character_tokenizer()
    windows = recover.calibration_windows(tokenizer, [{"text": "a" * 50}, {"text": "b" * 50}], samples=3, tokens=20)
    assert windows.shape == (3, 20)
    assert [tokenizer.decode(window)[0] for window in windows] == ["a", "a", "b"]


def test_the_start_of_a_text_is_measured_as_well(files: dict[str, Path]) -> None:
    files["book.txt"].write_text("abcdefgh" * 20)
    found = recover.starts(character_tokenizer(), {"book": files["book.txt"], "built-in": "some text"}, 3, 16)
    assert found == {"book, its start": "abcdefgh" * 6}


def test_each_half_of_the_questions_is_asked_by_itself(files: dict[str, Path]) -> None:
    first, second = (local_tasks([files["quiz.jsonl"]], half)["quiz"] for half in ("first", "second"))
    assert (first.start, first.stop, second.start, second.stop) == (0, 4, 4, None)
    assert run_main(recover.main, "--half", "secnd").exit_code == 2


@pytest.fixture
def recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of results of a recovery, by a tiny model in place of the demo model."""
    monkeypatch.setattr(recover, "load_demo_model", lambda *_: (tiny("llama"), character_tokenizer()))
    monkeypatch.setattr(recover, "RESULTS", tmp_path / "results" / "recovery.json")
    return recover.RESULTS


@pytest.mark.slow
def test_a_run_writes_the_section_of_the_results_page(recovered: Path, files: dict[str, Path], tmp_path: Path) -> None:
    options = "--samples 2 --recipe fast --windows 2 --window 64 --asked 3 --learning-rate 5e-3 --json"
    paths = {"data": files["rows.json"], "text": files["book.txt"], "questions": files["quiz.jsonl"]}
    command = [*options.split(), *(part for name, path in paths.items() for part in (f"--{name}", str(path)))]
    command += ["--out", str(tmp_path / "out")]
    outcome = run_main(recover.main, *command)
    assert outcome.exit_code == 0
    data = json.loads(recovered.read_text())
    assert [column["name"] for column in data["columns"]] == ["dense", "pruned", "recovered"]
    assert data["columns"][1]["parameters"] == data["columns"][2]["parameters"] < data["columns"][0]["parameters"]
    assert data["settings"]["held_out_loss"][1] < data["settings"]["held_out_loss"][0]
    assert data["settings"]["data"] == ["rows.json"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"comparison.{s}" for s in ("json", "md", "png")}
    page = results_page(recovered.parent)
    assert "## Recovery: `make bench-recover`" in page
    assert ("| average accuracy retained on quiz | 100.0% ± 0.0% |" in page) is (data["retained_of"] == ["quiz"])


@pytest.mark.slow
def test_a_slim_model_saved_before_is_recovered(recovered: Path, files: dict[str, Path], tmp_path: Path) -> None:
    result = fxprune.prune(tiny("llama"), ratio=0.2, recipe="llm-pruner", importance="l2")
    result.save_pretrained(tmp_path / "slim")
    command = ["--slim", str(tmp_path / "slim"), "--recipe", "fast", "--windows", "2", "--window", "64", "--json"]
    command += ["--data", str(files["rows.json"]), "--text", str(files["book.txt"]), "--keep", str(tmp_path / "kept")]
    outcome = run_main(recover.main, *command)
    assert outcome.exit_code == 0
    data = json.loads(recovered.read_text())
    assert data["columns"][1]["parameters"] == result.report.parameters[1]
    assert data["settings"]["passes"] == json.loads(json.dumps(result.report.passes))
    assert data["settings"]["slim"] == "slim" and "keep" not in data["settings"]
    kept = fxprune.from_pretrained(tmp_path / "kept")
    assert kept.num_parameters() == result.report.parameters[1]
    manifest = read_manifest(tmp_path / "kept")
    assert manifest.read_plan(tmp_path / "kept") == result.plan
    assert manifest.read_report(tmp_path / "kept") is not None


TINY = Shape("tiny", hidden=32, ffn=48, layers=2, heads=4, kv_heads=4)


def made_up(trace: float, groups: int = 3, nodes: int = 100) -> Discovery:
    return Discovery({"trace": trace, "graph": 0.5, "groups": 0.25}, nodes, groups, start_gb=0.1, peak_gb=0.2)


@pytest.mark.slow
def test_ours_counts_every_group_and_grows_by_layers():
    found = [discovery.measure_ours(replace(TINY, layers=n)) for n in (2, 3, 4)]
    with torch.device("meta"):
        model = LlamaForCausalLM(TINY.config())
    graph = fxprune.dependency_graph(fxprune.trace(model, dynamic=False))
    kinds = Counter(group.kind for group in fxprune.find_groups(graph))
    assert list(found[0].seconds) == ["trace", "graph", "groups"] and found[0].groups == kinds.total()
    assert kinds["mlp"] == kinds["head"] == kinds["layer"] == TINY.layers and kinds["channel"] == 1
    assert found[0].peak_gb >= found[0].start_gb > 0
    for counts in ([m.nodes for m in found], [m.groups for m in found]):
        assert counts[2] - counts[1] == counts[1] - counts[0] > 0


@pytest.mark.slow
def test_a_process_measures_the_same_counts_and_reports_failures():
    apart = measure_in_process("theirs", TINY, threads=1, timeout_s=200)
    assert apart.groups == 2 * TINY.layers + 1 and list(apart.seconds) == ["graph", "groups"]
    with pytest.raises(RuntimeError, match="nobody"):
        measure_in_process("nobody", TINY, threads=1, timeout_s=200)


def test_tools_alternate_in_changing_order():
    calls = []

    def measure(tool, shape):
        calls.append(tool)
        return made_up(trace=len(calls))

    rows = compare([TINY], ("ours", "theirs"), 3, measure)
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert [row.tool for row in rows] == ["ours", "theirs"]
    assert (rows[0].seconds["trace"], rows[0].total_s, rows[0].least_s, rows[0].repeats) == (4, 4.75, 1.75, 3)


def test_no_repeats_and_differing_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats=0"):
        compare([TINY], ("ours",), 0, lambda tool, shape: made_up(1))
    with pytest.raises(ValueError, match="tiny"):
        summarise("ours", TINY, [made_up(1), made_up(1, groups=4)])


@pytest.fixture
def run_discovery(monkeypatch, tmp_path):
    """Run the command with made-up measurements; returns the result, what was measured, and the folder of results."""
    monkeypatch.setattr(discovery, "RESULTS", tmp_path / "discovery.json")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    seen = []

    def measure(tool, shape, threads):
        seen.append((tool, shape.name, shape.layers))
        return made_up(1.5 if tool == "ours" else 3.75, nodes=100 * shape.layers)

    monkeypatch.setattr(discovery, "measure_in_process", measure)
    return lambda *arguments: (run_main(discovery.main, "--repeats", "1", *arguments), seen, tmp_path)


def test_the_command_prints_a_row_for_each_tool_and_writes_json(run_discovery, monkeypatch):
    monkeypatch.setattr(discovery, "find_spec", lambda name: True)
    monkeypatch.setattr(discovery, "version", lambda name: "1")
    result, seen, folder = run_discovery("--shapes", "7b,70b", "--json")
    assert result.exit_code == 0, result.output
    tools = ("ours", "theirs", "prune")
    assert seen == [(tool, *shape) for shape in (("7b", 32), ("70b", 80)) for tool in tools]
    content = json.loads((folder / "discovery.json").read_text())
    rows = [(row["tool"], row["shape"]["name"], row["total_s"]) for row in content["rows"]]
    assert rows == [(t, s, 2.25 if t == "ours" else 4.5) for s in ("7b", "70b") for t in tools]
    assert content["environment"]["torch"] == torch.__version__ and "2.0" in result.output


def test_without_torch_pruning_theirs_is_left_out_with_a_note(run_discovery, monkeypatch):
    monkeypatch.setattr(discovery, "find_spec", lambda name: None)
    result, seen, _ = run_discovery("--shapes", "7b")
    assert seen == [("ours", "7b", 32), ("prune", "7b", 32)] and "not installed" in result.output


@pytest.mark.parametrize(
    ("how", "tool", "shape", "depths"),
    [
        ("scaling", "ours", "7b", (2, 8, 20, 40, 80)),
        ("passes", "passes", "narrow", (4, 8, 16, 32, 64, 128)),
    ],
)
def test_shapes_of_growing_depth_are_measured(how, tool, shape, depths, run_discovery):
    result, seen, folder = run_discovery(f"--{how}", "--json")
    assert result.exit_code == 0 and seen == [(tool, shape, n) for n in depths], result.output
    rows = json.loads((folder / f"discovery_{how}.json").read_text())["rows"]
    assert [row["shape"]["layers"] for row in rows] == list(depths)
    result, seen, _ = run_discovery("--shapes", "7b,8b")
    assert result.exit_code != 0 and "8b" in result.output and len(seen) == len(depths)


@pytest.mark.slow
def test_a_prune_and_each_of_its_passes_are_timed():
    found = discovery.measure_prune(TINY)
    assert list(found.seconds) == ["trace", "removal"] and found.groups == 2 * TINY.layers
    found = discovery.measure_passes(TINY).seconds
    assert {"trace", "find-groups", "l2", "select-by-ratio", "slice-parameters", "emit-model"} <= found.keys()
