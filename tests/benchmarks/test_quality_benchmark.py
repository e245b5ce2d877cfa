"""Test the quality benchmark: its entries, resumed runs, questions and the page."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from benchmarks.common import memory_bytes
from benchmarks.pages import quality_page
from benchmarks.quality import __main__ as quality
from benchmarks.quality import entries as entries_module
from benchmarks.quality import measure
from benchmarks.quality import texts as texts_module
from benchmarks.quality.entries import Entry, entries
from benchmarks.quality.measure import trained_by, with_earlier
from benchmarks.quality.reference import KeptReference
from benchmarks.quality.rows import Protocol, QualityRow, blocks, compare
from benchmarks.quality.tables import known_tasks, retained, task_rows
from benchmarks.quality.texts import read_texts
from fxprune.evaluation import Divergence, Evaluation, Perplexity, TaskScore
from fxprune.evaluation.comparison import Column, Comparison
from tests.benchmarks.command import run_main
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer


def test_every_entry_is_a_pipeline_that_can_be_made() -> None:
    ids = torch.zeros(2, 8, dtype=torch.long)
    assert len({entry.name for entry in entries()}) == len(entries())
    for entry in entries():
        assert "ratio=0.35" in str(fxprune.prune_pipeline(ids, ratio=0.35, **entry.options)), entry.name
    assert [entry.name for entry in entries(["fast"])] == ["fast"]


def test_random_units_have_the_widths_that_the_recipe_chooses() -> None:
    """With shuffled scores another residual width was measured as the best, so that the two were no comparison."""
    plans = []
    for chosen in entries(["fast", "fast, random units"]):
        options = {"compensate": "none", "protect": (), "eval": False, **chosen.options}
        plans.append(fxprune.prune(tiny("llama"), token_ids(6), ratio=0.3, **options).plan)
    mine, random = (
        {(name, axis): kept for name, by in plan.kept.items() for axis, kept in by.items()} for plan in plans
    )
    assert mine.keys() == random.keys()
    assert all(len(random[place]) == len(kept) for place, kept in mine.items())
    assert any(list(random[place]) != list(kept) for place, kept in mine.items())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny model, two cheap entries, and a folder of texts."""
    l1, l2 = ({"recipe": "llm-pruner", "importance": name} for name in ("l1", "l2"))
    monkeypatch.setattr(entries_module, "ENTRIES", (Entry("l1", l1), Entry("l2", l2, samples=0)))
    monkeypatch.setattr(entries_module, "ABLATIONS", ())
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "results" / "quality.json")
    monkeypatch.setattr(quality, "load_named", lambda _: (tiny("llama"), character_tokenizer(), "tiny"))
    monkeypatch.setattr(texts_module, "python_code", lambda: "def double(x):\n    return 2 * x\n" * 20)
    (tmp_path / "some").mkdir()
    (tmp_path / "c4.jsonl").write_text("\n".join(json.dumps({"text": "abcd" * 20}) for _ in range(3)))
    (tmp_path / "some" / "test.txt").write_text("held out " * 30)
    (tmp_path / "other.txt").write_text("another kind " * 30)
    return tmp_path


def run(folder: Path, *more: str) -> str:
    """What the benchmark prints."""
    sizes = ["--samples", "3", "--tokens", "8", "--windows", "2", "--window", "16", "--ratio", "0.1", "--json"]
    arguments = ["--data", str(folder), "--calibration", "c4.jsonl", *sizes, *more]
    result = run_main(quality.main, *arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def found_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(quality.RESULTS.read_text())["rows"]
    return rows


@pytest.mark.slow
def test_it_measures_each_entry_once_and_prints_the_protocol(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run(small, "--only", "l1", "--keep", str(small / "kept"))
    assert fxprune.from_pretrained(small / "kept" / "l1-0.1-0").num_parameters() < tiny("llama").num_parameters()
    assert "tiny, calibrated on up to 3 x 8 tokens of c4.jsonl; measured on the first 2 x 16 tokens" in printed
    assert "dense: other.txt" in printed and "10%, draw 0: l1: other.txt" in printed and "l2" not in printed
    calls: list[str] = []
    prune = fxprune.prune

    def watched(*arguments: Any, **options: Any) -> Any:
        calls.append(options["importance"])
        assert arguments[1] is None, "it is the entry without samples"
        return prune(*arguments, **options)

    monkeypatch.setattr(fxprune, "prune", watched)
    printed = run(small)
    assert calls == ["l2"] and "draw 0: l1" in printed
    data = json.loads(quality.RESULTS.read_text())
    assert [row["entry"] for row in data["rows"]] == ["dense", "l1", "l2"]
    code = next(name for name in data["rows"][0]["texts"] if name.startswith("code of Python 3."))
    assert set(data["rows"][1]["texts"]) == {"other.txt", "some/test.txt", code}
    assert data["rows"][1]["passes"].startswith("calibrate{built_in=10}\nfind-groups\nl1\nselect-by-ratio{ratio=0.1}")
    page = quality_page(data)
    assert "## 10% of the parameters" in page and page.count("| x") >= 2 and "| l1 | " in page


def test_a_row_of_an_earlier_recipe_is_carried_over_if_the_plan_is_the_same(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small, "--only", "l1")
    (dense, now) = found_rows()
    monkeypatch.setattr(fxprune, "prune", None)

    def carried(*replaced: str) -> tuple[str, str]:
        """What is printed, and the passes of the row, of which some text was another before."""
        before = now["passes"].replace(*replaced)
        quality.RESULTS.write_text(json.dumps({"rows": [dense, {**now, "passes": before}]}))
        return run(small, "--carry"), found_rows()[-1]["passes"]

    printed, passes = carried("ratio=0.1", "ratio=0.1, width=[0.5]")
    assert "10%, draw 0: l1: the same plan" in printed and passes == now["passes"]
    for replaced in (("l1", "random"), ("shrink", "least-squares\nshrink"), ("l1", "no-more"), ("_in=10", "_in=9")):
        printed, passes = carried(*replaced)
        assert "10%, draw 0: l1: another plan, or another treatment" in printed
        assert passes == now["passes"].replace(*replaced)
    assert "l1" not in carried("ratio=0.1", "ratio=0.1")[0], "it is of today's recipe"


@pytest.mark.slow
def test_a_kept_model_is_measured_by_another_protocol_without_a_prune(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["--only", "l1", "--keep", str(small / "kept"), "--float32"]
    run(small, *kept)
    monkeypatch.setattr(fxprune, "prune", None)
    (small / "more.txt").write_text("yet another text " * 20)
    run(small, *kept, "--text", str(small / "more.txt"))
    assert [row["entry"] for row in found_rows()] == ["dense", "l1"], "rows that lack a text are replaced"
    assert all("more.txt" in row["texts"] for row in found_rows())
    run(small, *kept, "--window", "16", "--window", "32", "--fewest", "3")
    rows = found_rows()
    assert [row["protocol"]["lengths"] for row in rows] == [[16], [16], [16, 32], [16, 32]]
    assert [(one["window"], one["windows"]) for one in rows[-1]["texts"]["other.txt"]] == [(16, 2), (32, 3)]
    first, again = (row["texts"]["other.txt"][0] for row in (rows[1], rows[3]))
    assert first["losses"] == again["losses"] and first["divergence"]["ratio"] > 0
    assert rows[1]["seconds"] == rows[3]["seconds"]
    run(small, *kept, "--windows", "all")
    assert found_rows()[-1]["texts"]["other.txt"][0]["windows"] == 390 // 16
    with pytest.raises(TypeError):  # other samples make another slim model
        run(small, *kept, "--samples", "2")


@pytest.mark.slow
def test_a_prune_that_was_interrupted_resumes_where_models_are_kept(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that takes hours began anew."""
    tuned = {"recipe": "llm-pruner", "importance": "wanda", "tune": "tune{epochs=1}"}
    monkeypatch.setattr(entries_module, "ENTRIES", (Entry("tuned", tuned),))
    prune, seen = fxprune.prune, list[str]()

    def until(last: str) -> Any:
        def stopped(*arguments: Any, track: Any, **options: Any) -> Any:
            def watched(items: Any, what: str, total: int) -> Any:
                if what == last:
                    raise KeyboardInterrupt
                seen.append(what)
                return track(items, what, total)

            return prune(*arguments, track=watched, **options)

        return stopped

    kept = small / "kept"
    monkeypatch.setattr(fxprune, "prune", until("tuning"))
    bench = ["--only", "tuned", "--keep", str(kept)]
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        run(small, *bench)
    assert "wanda" in seen and "dense model" in seen
    (costs,) = kept.glob("unfinished-*/costs.json")
    costs.write_text("[1000.0, 0.001]")
    seen.clear()
    monkeypatch.setattr(fxprune, "prune", until(""))
    run(small, *bench)
    assert "tuning" in seen and "wanda" not in seen and "dense model" not in seen
    row = found_rows()[-1]
    assert 1000 < row["seconds"] < 1600 and row["peak_gb"] > 0.1 and not list(kept.glob("unfinished-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from /proc")
def test_memory_that_an_earlier_prune_freed_is_not_counted() -> None:
    """The allocator keeps small tensors that were freed: rows of a later prune had gigabytes of an earlier one."""
    parts = [torch.ones(2**16) for _ in range(1024)]
    last, before = parts[-1], memory_bytes("VmRSS")
    del parts
    _, gigabytes = measure._Costs(None, 1).so_far()
    assert last.sum() == 2**16 and gigabytes < (before - 2e8) / 1e9


def test_rows_of_the_calibration_text_are_kept_back(small: Path) -> None:
    rows = [f"row {i}: {'abcd' * 5}" for i in range(17)]
    (small / "c4.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    tokenizer = character_tokenizer()
    protocol = Protocol("tiny", "c4.jsonl", 3, 8, kept_back=8)
    texts = read_texts(tokenizer, small, "c4.jsonl", protocol)
    assert texts.heldout["c4.jsonl, kept back"] == f"{rows[7]}\n\n{rows[15]}"
    calibrated = tokenizer.decode(texts.calibration.flatten())
    assert "row 6" in calibrated and "row 7" not in calibrated and "row 15" not in calibrated
    run(small, "--only", "l1")
    assert found_rows()[0]["protocol"]["kept_back"] == 8


@pytest.mark.slow
def test_a_smaller_model_stands_beside_the_pruned_ones(small: Path) -> None:
    run(small, "--only", "l1", "--smaller", "anything")
    run(small, "--only", "l1", "--smaller", "anything")
    data = json.loads(quality.RESULTS.read_text())
    assert [row["entry"] for row in data["rows"]] == ["dense", "tiny", "l1"]
    apart = data["rows"][1]["texts"]["other.txt"][0]["divergence"]
    assert apart["ratio"] == pytest.approx(1) and apart["agreement"] == 1, "it is the same model here"
    assert "| tiny | x1.00" in quality_page(data)


@pytest.mark.slow
def test_rows_of_another_protocol_are_kept_and_entries_without_samples_measured_once(small: Path) -> None:
    run(small, "--only", "l1", "--only", "l2", "--draws", "2")
    assert [(row["entry"], row["draw"]) for row in found_rows()] == [("dense", 0), ("l1", 0), ("l2", 0), ("l1", 1)]
    before = found_rows()
    run(small, "--only", "l1", "--windows", "1")
    assert found_rows()[:4] == before
    assert [(row["entry"], row["protocol"]["windows"]) for row in found_rows()[4:]] == [("dense", 1), ("l1", 1)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--windows", "0"], "--windows takes a number from 1 on, or 'all', not '0'"),
        (["--questions", "-1"], "--questions takes a number from 0 on"),
        (["--only", "l3"], "--only 'l3' is no entry; there are: dense; l1; l2"),
        (["--questions", "all"], "needs --keep FOLDER"),
        (["--questions", "3", "--keep", "kept", "--data", "nowhere"], "needs --keep FOLDER"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(small: Path, options: list[str], told: str) -> None:
    result = run_main(quality.main, "--data", str(small), *options, env={"COLUMNS": "200"})
    assert result.exit_code == 2 and told in " ".join(result.output.replace("│", " ").split()), result.output


@pytest.mark.slow
def test_saved_models_are_asked_beside_the_dense_one(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "TASKS", quality.RESULTS.with_name("quality_tasks.json"))
    (small / "zeroshot").mkdir()
    lines = [json.dumps({"query": c, "choices": ["a", "bb"], "gold": i % 2}) for i, c in enumerate("abcdefgh")]
    (small / "zeroshot" / "quiz.jsonl").write_text("\n".join(lines))
    kept = ["--keep", str(small / "kept")]
    run(small, "--only", "l1", "--draws", "2", *kept)
    run(small, "--only", "l2")  # is not kept
    printed = run(small, "--questions", "3", "--bf16", "--only", "l1", *kept)
    assert "up to 3 questions" in printed and "l1, 10%" in printed and "l2, 10%" not in printed
    asked = json.loads(quality.TASKS.read_text())
    assert [column["name"] for column in asked["columns"]] == ["dense", "l1, 10%"]
    assert {column["evaluation"]["tasks"]["quiz"]["samples"] for column in asked["columns"]} == {3}
    page = " ".join(quality_page(json.loads(quality.RESULTS.read_text()), asked).split())
    assert "## Questions" in page and "up to 3 questions of the second half" in page
    rows = json.dumps(str(small / "zeroshot" / "quiz.jsonl"))
    (small / "zeroshot" / "theirs.yaml").write_text(
        f"task: quiz_in_yaml\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {rows}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    )
    run(small, "--questions", "all", "--only", "l1", *kept)
    asked = json.loads(quality.TASKS.read_text())
    samples = [[score["samples"] for score in column["evaluation"]["tasks"].values()] for column in asked["columns"]]
    assert samples == [[8, 8], [8, 8]] and asked["settings"]["lm_eval"]
    page = " ".join(quality_page(json.loads(quality.RESULTS.read_text()), asked).split())
    mean, error = asked["columns"][1]["difference"]["quiz"]
    assert "on all questions of each file" in page
    assert f"| l1, 10% | {100 * mean:+.1f} ± {100 * error:.1f} |" in page
    monkeypatch.setattr(measure, "zero_shot", None)  # all were asked before: nothing is asked anew
    run(small, "--questions", "all", "--only", "l1", *kept)
    assert json.loads(quality.TASKS.read_text())["columns"] == asked["columns"]


def test_answers_of_models_that_are_gone_stay_if_the_questions_are_the_same(tmp_path: Path) -> None:
    def asked(*names: str, value: float = 0.5, samples: int = 8) -> dict[str, Any]:
        evaluation = {"tasks": {"quiz": {"samples": samples, "value": value}}}
        columns = [{"name": name, "evaluation": evaluation} for name in ("dense", *names)]
        return {"settings": {"questions": None}, "columns": columns}

    def names(found: dict[str, Any]) -> list[str]:
        return [column["name"] for column in found["columns"]]

    file = tmp_path / "answers.json"
    assert with_earlier(asked("l2"), file) == asked("l2")
    file.write_text(json.dumps(asked("l1", "l2")))
    assert names(with_earlier(asked("l2", "taylor"), file)) == ["dense", "l1", "l2", "taylor"]
    for other in (asked("l2", value=0.25), asked("l2", samples=4), {**asked("l2"), "settings": {"questions": 3}}):
        assert with_earlier(other, file) == other


def measured(value: float, losses: tuple[float, ...] = (), divergence: Divergence | None = None) -> Perplexity:
    return Perplexity(value, 0.1, 16, 16, 2, 30, 1.5, 0.1, divergence, losses)


PROTOCOL = Protocol("m", "c4", 4, 8, 8, 2, (16,))
ENVIRONMENT = {"cpu": "c", "threads": 1, "torch": "t", "transformers": "t"}


def row(name: str, draw: int, value: float, cpu: str = "fast one") -> QualityRow:
    """A row of an entry as it is, if there is one, whose windows differ by what their perplexity does."""
    ids = torch.zeros(2, 8, dtype=torch.long)
    passes = [str(fxprune.prune_pipeline(ids, ratio=0.2, seed=draw, **entry.options)) for entry in entries([name])]
    apart = None if name == "dense" else Divergence(0.5, 0.02, 3.0, 0.64, 0.01, value / 10, 0.02)
    texts = {"text": (measured(value, (15 * value, 15 * value + 3), apart),)}
    own = ("".join(passes), 2, cpu, "vectors", 640)
    return QualityRow(name, 0.2 * (name != "dense"), draw, PROTOCOL, 80, texts, 10.0, 1.0, *own)


def as_data(*rows: QualityRow) -> dict[str, Any]:
    return {"environment": ENVIRONMENT, "rows": json.loads(json.dumps([each.to_dict() for each in rows]))}


def test_processors_are_those_of_the_rows_and_perplexities_of_other_tokens_do_not_compare() -> None:
    rows = row("dense", 0, 10.0), row("balanced", 0, 14.0), replace(row("dense", 0, 30.0), entry="smaller")
    page = quality_page(as_data(*rows, row("best", 0, 13.0, "slow one")))
    assert "Ran on fast one; but these ran on slow one: best at 20%; torch t" in page and "| smaller | - |" in page


def test_times_are_those_of_one_processor_and_the_range_over_draws_is_shown() -> None:
    """A mean of 1141 s on one and 510 s on another was the time of neither."""
    drawn = [row("balanced", 0, 14.0), row("balanced", 1, 15.0), row("balanced", 2, 16.0, "slow one")]
    rows = [replace(each, seconds=seconds) for each, seconds in zip(drawn, (100.0, 110.0, 900.0), strict=True)]
    page = quality_page(as_data(row("dense", 0, 10.0), *rows))
    assert "| balanced | 80 | vectors | 640 | 105 | 2 | fast one | 1.0 | 3 |" in page
    assert "| balanced | 3 | x1.50 ± 0.02 | - | x1.40 to x1.60 | 0.50 | 64% |" in page


def test_an_ablation_of_an_earlier_version_is_compared_with_that_version() -> None:
    """Beside the recipe of today, the effect of all changes since stood there as that of the ablation."""
    values = {"dense": 10.0, "fast": 14.0, "fast, width whole": 20.0, "fast, uniform": 28.0}
    *others, uniform = (row(name, 0, value) for name, value in values.items())
    page = quality_page(as_data(*others, uniform))
    assert "| fast, uniform | 1 | x2.00 ± 0.00 |" in page and "| fast, width whole | 1 | x1.43 ± 0.00 |" in page
    earlier = replace(uniform, passes=others[2].passes.replace("protect=[0.07, 0.04]", "protect=[], uniform"))
    assert earlier.passes != others[2].passes
    assert "| fast, uniform †, over *fast, width whole* | 1 | x1.40 ± 0.00 |" in quality_page(as_data(*others, earlier))


def test_what_is_retained_is_that_of_the_comparison() -> None:
    """Of files with answers counted, errors of accuracies and of paired differences give that of the ratio."""

    def score(bits: str, chance: float = 0.2, constant: float = 0.0) -> TaskScore:
        right = tuple(map(float, bits * 10))
        value = sum(right) / len(right)
        error = (value * (1 - value) / (len(right) - 1)) ** 0.5
        return TaskScore("acc", value, error, len(right), {}, right, tuple(map(int, right)), chance, constant)

    tasks = {
        "dense": {"quiz": score("11101101"), "words": score("1110"), "said": score("1101", constant=0.75)},
        "slim": {"quiz": score("10100101"), "words": score("0111"), "said": score("1111", constant=0.75)},
    }
    columns = tuple(Column(name, 1, 1, 1, None, Evaluation(tasks=each)) for name, each in tasks.items())
    compared = Comparison(columns, {})
    data = json.loads(json.dumps(compared.to_dict()))
    kept = compared.retained("slim")
    assert kept is not None and compared.informed == ("quiz", "words") and known_tasks(data) == ["quiz", "words"]
    assert retained(data, data["columns"][1]) == f"{kept[0]:.1%} ± {kept[1]:.1%}"
    rows = list(task_rows(data))
    assert rows[0][0] == "dense" and rows[1][0] == "slim †", "of no row that is there"
    mean = sum(
        columns[1].evaluation.tasks[name].value - columns[0].evaluation.tasks[name].value for name in ("quiz", "words")
    )
    assert rows[1][4].startswith(f"{100 * mean / 2:+.1f} ±") and rows[1][6] == retained(data, data["columns"][1])


def test_rows_of_another_protocol_stand_apart_unless_they_were_measured_by_both() -> None:
    old = [
        replace(row(name, 0, value), protocol=replace(PROTOCOL, kept_back=0))
        for name, value in (("dense", 10.0), ("balanced", 12.0), ("fast", 13.0))
    ]
    first = quality_page(as_data(*old))
    assert "| balanced | x1.20 ± 0.02 |" in first and "another protocol" not in first
    page = quality_page(as_data(*old, row("dense", 0, 10.0), row("balanced", 0, 14.0)))
    ours, _, others = page.partition("## Rows of another protocol")
    assert "| balanced | x1.40 ± 0.02 |" in ours and "| fast |" not in ours
    assert "| fast | x1.30 ± 0.02 |" in others and "| balanced | x1.20" not in others


def test_rows_measured_in_another_type_stand_beside_the_others() -> None:
    """Each compares its model with the dense one in its own type; of a key the row of today's recipe counts."""
    single = [replace(row(name, draw, 14.0), protocol=replace(PROTOCOL, measured_in="bfloat16")) for name, draw in (
        ("dense", 0), ("balanced", 0), ("balanced", 1), ("fast", 0), ("best", 0))]  # fmt: skip
    single[-1] = replace(single[-1], passes="an earlier version")
    others = row("dense", 0, 10.0), row("balanced", 1, 11.0), row("balanced", 2, 17.0), row("best", 0, 12.0)
    page = quality_page(as_data(*single, *others))
    assert "| balanced | 3 | x1.50 ± 0.02 | - | x1.40 to x1.70 |" in page and "another protocol" not in page
    assert "| best | 1 | x1.20 ± 0.02 |" in page and "| fast | 1 | x1.40 ± 0.02 |" in page
    assert "text 14.0. Measured in float32, beside the dense model in that type: " in page
    assert page.partition("dense model in that type: ")[2].startswith("balanced at 20%, draw 2, best at 20%.")
    assert "in float32 the dense model's perplexity differs by at most" in page


def test_rows_on_whole_texts_stand_beside_those_on_their_beginnings() -> None:
    whole = replace(PROTOCOL, windows=None)
    beginnings = row("dense", 0, 10.0), row("fast", 0, 13.0), row("balanced", 0, 14.0)
    further = [replace(each, protocol=whole) for each in (row("dense", 0, 10.0), row("fast", 0, 12.5))]
    page = quality_page(as_data(*beginnings, *further))
    ours, _, more = page.partition("## m on whole texts")
    assert "### m, 20% removed, on whole texts" in ours and "| fast | x1.30 ± 0.02 |" in ours, "not taken over"
    assert "| fast | x1.25 ± 0.02 |" in more and "| balanced | x" not in more and "text 2." in more
    alone = quality_page(as_data(*(replace(each, protocol=whole) for each in beginnings)))
    assert "| balanced | x1.40 ± 0.02 |" in alone and "on whole texts" not in alone


def test_rows_of_an_earlier_version_of_a_recipe_are_marked() -> None:
    dense, fast, best, changed = (row(name, 0, 12.0) for name in ("dense", "fast", "best", "fast, heads too"))
    earlier = [replace(best, passes=passes) for passes in (fast.passes, best.passes + "\nof-once", "l2{of_once=1}")]
    for one in (*earlier, replace(best, entry="of once")):
        page = quality_page(as_data(dense, fast, one, changed))
        assert f"| {one.entry} † | 1 | x" in page and "| fast | 1 | x" in page and "| fast, heads too | 1 |" in page
    page = quality_page(as_data(dense, replace(fast, passes=best.passes), best, changed))
    assert "| best | 1 | x" in page and "| fast, heads too † | 1 | x1.00" in page, "compared with an earlier version"
    own = quality_page(as_data(dense, row("fast, random units", 0, 14.0)))
    assert "| fast, random units | 1 | x" in own, "a pass of the benchmark's own, which no text names"


def test_rows_are_compared_window_by_window() -> None:
    one, other = measured(12.0, (45.0, 33.0)), measured(10.0, (42.0, 27.0))
    ratio, error = compare(one, other)
    assert ratio == 1.2 and error == pytest.approx(1.2 * (1.5 / 15)), "differences of 3 and 6 nats over 15 tokens"
    assert compare(measured(12.0), other) == (1.2, None)
    assert blocks([1.0, 2.0, 3.0]) == (1.0, 2.0, 3.0)
    assert blocks([float(i) for i in range(120)]) == tuple(i + 0.5 for i in range(0, 120, 2))


def test_a_reference_runs_once_and_gives_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("llama")
    model.to(torch.bfloat16).eval()
    ids = torch.arange(32).view(2, 16)
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        assert torch.equal(KeptReference(model, tmp_path)(input_ids=ids), wanted)
        again = KeptReference(model, tmp_path)
        monkeypatch.setattr(model.model, "forward", None)
        assert torch.equal(again(input_ids=ids), wanted)
        with pytest.raises(TypeError):  # the same tokens in other windows are another question
            again(input_ids=ids.view(4, 8))


def test_a_reference_whose_logits_are_more_than_a_product_is_not_kept(tmp_path: Path) -> None:
    model = tiny("gemma2").eval()  # it caps its logits
    ids = torch.arange(32).view(2, 16)
    with torch.inference_mode():
        assert torch.equal(KeptReference(model, tmp_path)(input_ids=ids), model(input_ids=ids).logits)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_was_trained_is_read_from_the_pipeline() -> None:
    ids = torch.zeros(300, 128, dtype=torch.long)
    told = {
        name: trained_by(fxprune.prune_pipeline(ids, recipe=name), 300, 128) for name in ("fast", "balanced", "best")
    }
    assert told["fast"] == ("", 0)
    assert told["balanced"] == ("all weights", (300 + 150) * 128)
    assert told["best"] == ("all weights", 3 * (300 + 600) * 128)
    written = fxprune.prune_pipeline(None, recipe="balanced", tokenizer=character_tokenizer())
    assert trained_by(written, 0, 128)[1] == 384 * 128
