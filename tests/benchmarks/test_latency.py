"""Test the latency benchmark: counted work, engines, processes, the command and the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import fxprune
from benchmarks.engines import in_torch, vllm
from benchmarks.engines.base import Case, Source, load_model
from benchmarks.latency import __main__ as command
from benchmarks.latency.candidates import Candidate, Work, count_work, make_candidates
from benchmarks.latency.measure import Settings, Speedup, interleaved, measure, read_rows, speedup
from benchmarks.latency.workers import ENGINES, EngineFailed, Task, Worker, Writers
from tests.benchmarks.command import run_main
from tests.export.small import even, tokenizer, uneven
from tests.tiers import tiers

LARGER = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES = [Case(phase, 2, 5) for phase in ("prefill", "decode")]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("models") / "dense"
    even("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Source(folder)


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A slim model with the files of all engines, as their writers leave them; another model cannot be written."""
    options = {"recipe": "llm-pruner", "importance": "l2", "kinds": "mlp", "round_to": {"mlp": 32}}
    result = fxprune.prune(even("llama", **LARGER), ratio=0.1, **options)
    source = Source(tmp_path_factory.mktemp("models") / "slim")
    result.save_pretrained(source.folder, tokenizer())
    writers = Writers(threads=1)
    for name, engine in ENGINES.items():
        if engine.writes:
            writers.write(name, source)
    writers.write("llama.cpp f16", Source(source.folder.with_name("none")))
    failed = writers.wait()
    assert list(failed) == ["llama.cpp f16"] and "Error" in failed["llama.cpp f16"]
    return source


def work(model: PreTrainedModel, *lengths: int) -> Work:
    return count_work(model, fxprune.trace(model).graph_module, lengths)


# Work


@pytest.mark.parametrize("tied", [False, True])
def test_work_follows_from_the_sizes(tied: bool) -> None:
    model = even("llama", tie_word_embeddings=tied)
    found, config = work(model, 4, 8), model.config
    table = config.vocab_size * config.hidden_size
    assert found.head == table and found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights == found.parameters - (0 if tied else table)
    head_dim = model.model.layers[0].self_attn.head_dim
    assert found.cache == 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    scores = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim
    assert found.macs[4] >= 4 * products + 4 * 4 * scores and set(found.macs) == {4, 8}
    assert found.macs[8] - 2 * found.macs[4] == (8 * 8 - 2 * 4 * 4) * scores, "attention alone grows with the square"


@pytest.mark.slow
def test_caches_of_uneven_layers_are_summed() -> None:
    model = uneven("llama")
    assert work(model, 4).cache == 2 * 8 * (3 + 2 + 1 + 1)


def test_least_work_counts_the_output_layer_where_it_runs() -> None:
    found = Work(parameters=100, macs={5: 1000}, head=10, weights=90, cache=4)
    kinds = {"weight_bytes": 2.0, "cache_bytes": 4.0}
    assert found.least(Case("prefill", 3, 5), last_only=False, **kinds) == 3000
    assert found.least(Case("prefill", 3, 5), last_only=True, **kinds) == 3 * (1000 - 40)
    assert found.least(Case("decode", 3, 5), last_only=True, **kinds) == 180 + 3 * 5 * 16
    assert (Case("prefill", 3, 5).processed, Case("decode", 3, 5).processed) == (15, 3)


# Engines


@pytest.mark.parametrize("name", tiers(("transformers", "graph", "onnxruntime", "llama.cpp f16", "llama.cpp q8_0")))
def test_an_engine_reads_a_prompt_and_gives_tokens(name: str, slim: Source) -> None:
    kind = ENGINES[name]
    assert kind.missing("cpu") == "" and kind.prepare(slim).exists()
    engine = kind(slim, "cpu", CASES[0])
    for case in (case for case in CASES if case.phase in kind.phases):
        job = engine.job(case)
        assert job() > 0 and job() > 0


def test_every_decoding_step_follows_the_same_number_of_tokens(dense: Source) -> None:
    engine: Any = ENGINES["transformers"](dense, "cpu", CASES[0])
    seen: list[int] = []
    call = engine.call
    engine.call = lambda **given: (seen.append(given["past_key_values"].get_seq_length()), call(**given))
    engine.job(CASES[1])()
    assert len(seen) > 2 and set(seen) == {5}


def test_vllm_generates_the_tokens_of_each_case(dense: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def SamplingParams(self, max_tokens: int, **_: Any) -> int:  # noqa: N802
            return max_tokens

        def LLM(self, folder: str, **given: Any) -> Module:  # noqa: N802
            self.given = given
            return self

        def generate(self, prompts: list[Any], count: int, **_: Any) -> None:
            assert len(prompts) == 2 and len(prompts[0]["prompt_token_ids"]) == 5
            self.asked.append(count)

    module = Module()
    monkeypatch.setattr(vllm, "import_module", lambda _: module)
    engine = ENGINES["vLLM"](dense, "cpu", CASES[0])
    assert engine.job(CASES[0])() > 0 and module.asked == [1]
    engine.job(CASES[1])()
    assert module.asked == [1, 25, 1] and module.given["max_num_seqs"] == 2


def test_an_engine_with_long_preparation_is_measured_at_one_shape() -> None:
    settings = Settings("cpu", 1, 1, [(1, 4), (2, 5)])
    assert settings.cases_of(ENGINES["torch.compile"]) == [Case("prefill", 1, 4), Case("decode", 1, 4)]
    assert settings.cases_of(ENGINES["graph"]) == [Case("prefill", 1, 4), Case("prefill", 2, 5)]


# Models pruned by other means


@pytest.mark.slow
def test_torch_pruning_gives_the_widths_asked_for(dense: Source, tmp_path: Path) -> None:
    narrow = fxprune.prune(even("llama"), recipe="llm-pruner", importance="l2", kinds="mlp", ratio=0.2, protect=(1, 0))
    narrow.save_pretrained(tmp_path / "narrow", tokenizer())
    engine: Any = ENGINES["transformers"](Source(dense.folder, widths_of=tmp_path / "narrow"), "cpu", CASES[0])
    shapes = [tuple(parameter.shape) for parameter in engine.model.parameters()]
    assert shapes == [tuple(parameter.shape) for parameter in narrow.model.parameters()]
    assert engine.job(CASES[1])() > 0


def test_sizes_that_torch_pruning_cannot_make_are_refused(dense: Source) -> None:
    like = even("llama", intermediate_size=100)
    with pytest.raises(ValueError, match="cannot make"):
        in_torch.cut_by_torch_pruning(load_model(dense.folder), like)


@pytest.mark.slow
def test_candidates_are_saved_and_counted(tmp_path: Path) -> None:
    model = even("llama", **LARGER, num_hidden_layers=4)
    found = list(make_candidates(model, tokenizer(), (0.2,), 8, (5,), tmp_path))
    assert [c.name for c in found] == ["dense", "slim 20%", "Torch-Pruning 20%", "stock 20%"]
    assert found[1].work.parameters < found[0].work.parameters and found[2].work == found[1].work
    assert [c.runs_in(ENGINES["onnxruntime"]) for c in found] == [True, True, False, False]
    assert type(load_model(found[3].source.folder)) is type(model)


# Times


def test_jobs_alternate_forwards_and_backwards() -> None:
    order: list[str] = []

    def job(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleaved({name: lambda name=name: job(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "abc" + "abccba" * 2
    assert found == {name: [6.5, 12.5] for name in "abc"}, "a machine that slows down steadily favours none"
    with pytest.raises(ValueError, match="rounds"):
        interleaved({}, rounds=0)


def test_a_speedup_is_the_median_of_ratios_with_a_deterministic_interval() -> None:
    assert speedup([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == speedup([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert speedup([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Speedup(2.0, 2.0, 3.0)
    assert speedup([3.0] * 4, [2.0] * 4) == Speedup(1.5, 1.5, 1.5)


# Processes


@pytest.mark.slow
def test_a_worker_measures_and_reports_errors(dense: Source, tmp_path: Path) -> None:
    worker = Worker(Task("transformers", dense, "cpu", 1, CASES[0]))
    missing = Worker(Task("transformers", Source(tmp_path / "no_such_folder"), "cpu", 1, CASES[0]))
    worker.wait()
    seconds = worker.job(CASES[0])()
    assert seconds > 0 and worker.peaks[CASES[0]] > 0 and 0 < worker.products(CASES[0]) <= 1
    worker.close()
    assert worker.exitcode == 0, "an idle process stops by itself"
    with pytest.raises(EngineFailed, match="no_such_folder"):
        missing.wait()


class Stub:
    """A worker that needs no process."""

    def __init__(self, task: Task) -> None:
        self.peaks: dict[Case, float] = {}
        self.fast = "slim" in task.source.folder.name
        self.closed = False

    def job(self, case: Case) -> Callable[[], float]:
        self.peaks[case] = 3e9
        return lambda: 1.0 if self.fast else 2.0

    def wait(self) -> None:
        pass

    def products(self, case: Case) -> float | None:
        return 0.25 if self.fast else 0.5

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("benchmarks.latency.measure.Worker", Stub)
    model = even("llama", **LARGER, num_hidden_layers=4)
    monkeypatch.setattr(command, "load_named", lambda _: (model, tokenizer(), "tiny"))
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_command_prints_and_keeps_measurements(stubbed: Path) -> None:
    def run(*names: str, rounds: str = "4") -> dict[str, Any]:
        """What the file holds after a run of these engines."""
        common = ["--ratio", "0.2", "--shape", "2x5", "--round-to", "8", "--rounds", rounds, "--json"]
        result = run_main(command.main, *common, *(part for name in names for part in ("--engine", name)))
        assert result.exit_code == 0 and "graph" in result.output and "torch:" in result.output
        return json.loads((stubbed / "latency_cpu.json").read_text())  # type: ignore[no-any-return]

    data = run("graph", "transformers")
    rows = read_rows(data)
    assert [(row.engine, row.case.phase, row.candidate) for row in rows][-2:] == [
        ("graph", "prefill", "dense"),
        ("graph", "prefill", "slim 20%"),
    ]
    assert len(rows) == 2 + 2 * 4, "models of other makes are measured in transformers alone"
    slim = rows[-1]
    assert slim.speedup == Speedup(2.0, 2.0, 2.0) and slim.tokens_per_second == 10 and slim.memory == 3e9
    assert 1 < slim.ideal < 1.5 and slim.over_ideal == pytest.approx(2 / slim.ideal) and slim.disk > 0
    assert data["settings"]["shapes"] == [[2, 5]] and data["environment"]["threads"] == torch.get_num_threads()
    kept = [row["engine"] for row in run("graph")["rows"]]
    assert kept == ["transformers"] * 8 + ["graph"] * 2, "engines measured before stay in the file"
    assert {row["engine"] for row in run("graph", rounds="2")["rows"]} == {"graph"}, "unless the settings differ"


def test_the_command_refuses_other_shapes_and_engines(stubbed: Path) -> None:
    wrong = [("--shape", shape, "sequences") for shape in ("2", "0x5", "2x", "axb")]
    for option, value, told in [*wrong, ("--engine", "tensorrt", "onnxruntime")]:
        result = run_main(command.main, option, value)
        assert result.exit_code == 2 and told in result.output, value


def test_an_engine_that_fails_leaves_the_others(dense: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(task: Task) -> Stub:
        raise EngineFailed("it broke")

    monkeypatch.setattr("benchmarks.latency.measure.Worker", failing)
    reported: list[str] = []
    found = work(even("llama"), 5)
    candidate = Candidate("dense", 0.0, dense, found)
    assert list(measure("transformers", [candidate], Settings("cpu", 1, 1, [(2, 5)]), reported.append)) == []
    assert reported == ["transformers: it broke"]
