"""Several prunes of one model: what they share, what they leave, and what a stopped sweep repeats."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.data.built_in import offline_docstrings
from fxprune.errors import ArgumentError, CheckpointError, EvaluationError, FxpruneError, UnknownNameError
from fxprune.pipeline.contract import sharing
from fxprune.recipes import Recipe
from fxprune.sweep import run as sweep_run
from fxprune.sweep.table import Sweep, SweepRow
from tests.forked import in_processes
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer

TOKENIZER = character_tokenizer()
FIT = Recipe(
    "fit", "calibrate{samples=6}, find-groups, wanda, select-by-ratio, least-squares, shrink, emit-model, make-report"
)
TUNED = Recipe(
    "tuned",
    "calibrate{samples=6}, find-groups, multiply-scores{criteria=[wanda, l2]}, select-by-ratio, record-teacher, "
    "least-squares, shrink, tune{epochs=1, measurements=1}, emit-model, make-report",
)
SAMPLES = token_ids(6, 16)
OPTIONS: dict[str, Any] = {"tokenizer": TOKENIZER, "protect": (), "verify": False}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the built-in text: the tokenizer makes a token of each character."""
    text = offline_docstrings()[:20_000]
    for module in ("fxprune.evaluation.comparison", "fxprune.passes.tune.teacher"):
        monkeypatch.setattr(f"{module}.offline_docstrings", lambda: text)


class Counted:
    """Passes that ran, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("calibrate", "wanda", "record-teacher", "least-squares", "tune", "find-groups"):
            kind = type(fxprune.load_pass(name))
            monkeypatch.setattr(kind, "call", self._counting(name, kind.call))

    def _counting(self, name: str, call: Any) -> Any:
        def counted(step: Any, graph_module: Any) -> Any:
            self.names.append(name)
            return call(step, graph_module)

        return counted


def sweep(out: Path, **options: Any) -> Sweep:
    return fxprune.sweep(tiny("llama"), SAMPLES, out=out, **{**OPTIONS, **options})


@pytest.mark.slow
def test_each_model_is_that_of_a_prune_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, though what is found out about the dense model is found out once."""
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counted = Counted(monkeypatch)
    found = fxprune.sweep(model, SAMPLES, out=tmp_path / "out", recipe=TUNED, ratio=[0.1, 0.3], keep="all", **OPTIONS)
    times = {name: counted.names.count(name) for name in counted.names}
    assert times == {"calibrate": 1, "find-groups": 1, "wanda": 1, "record-teacher": 1, "least-squares": 2, "tune": 2}
    assert [row.name for row in found.rows] == ["tuned-0.1", "tuned-0.3"]
    for row in found.rows[1:]:
        alone = fxprune.prune(model, SAMPLES, recipe=TUNED, ratio=row.ratio, **OPTIONS)
        slim = fxprune.from_pretrained(tmp_path / "out" / row.name)
        for name, value in alone.model.state_dict().items():
            assert torch.equal(value, slim.state_dict()[name]), (row.name, name)
        assert row.parameters == alone.report.parameters and row.memory == alone.report.memory
        assert alone.report.quality is not None
        assert row.ratio_of_perplexity == pytest.approx(alone.report.quality.texts[0].ratio)
        notes = json.loads((tmp_path / "out" / row.name / "report.json").read_text())["notes"]
        assert notes == list(alone.report.notes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    text = (tmp_path / "out/sweep.md").read_text()
    assert text.count("\n| ") == 2 and "docstrings of Python: 12 windows" in text
    assert ElementTree.parse(tmp_path / "out/sweep.svg").getroot().tag.endswith("svg")


def test_an_interrupted_sweep_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def stop(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        written.append(what)
        if written.count("perplexity") == 2:  # of the second model
            raise KeyboardInterrupt
        return items

    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "out", recipe=FIT, ratio=(0.1, 0.3), track=stop)
    assert [row["name"] for row in json.loads((tmp_path / "out/sweep.json").read_text())["rows"]] == ["fit-0.1"]
    weights = (tmp_path / "out/fit-0.1/model.safetensors").stat()
    counted = Counted(monkeypatch)
    found = sweep(tmp_path / "out", recipe=FIT, ratio=(0.1, 0.3))
    assert counted.names.count("least-squares") == 1 and [row.ratio for row in found.rows] == [0.1, 0.3]
    assert (tmp_path / "out/fit-0.1/model.safetensors").stat() == weights
    counted.names.clear()
    assert sweep(tmp_path / "out", recipe=FIT, ratio=(0.3, 0.1)).rows == found.rows[::-1] and not counted.names
    assert len(sweep(tmp_path / "out", recipe=FIT, ratio=0.2, keep="none").rows) == 3
    assert not (tmp_path / "out/fit-0.2").exists() and (tmp_path / "out/fit-0.1").is_dir()
    for other in (SAMPLES[:5], [offline_docstrings()[:3000]]):  # a text of fewer samples than are taken at most, too
        with pytest.raises(CheckpointError, match="of another model, other samples"):
            fxprune.sweep(tiny("llama"), other, out=tmp_path / "out", recipe=FIT, ratio=0.1, **OPTIONS)


def test_two_sweeps_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    """The table of one, written last, was without the rows of the other."""

    def interfere(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        with pytest.raises(CheckpointError, match="another run uses"):
            sweep(tmp_path, recipe=FIT, ratio=0.2)
        return items

    (tmp_path / "_lock").touch()  # of a run that was killed
    assert [row.ratio for row in sweep(tmp_path, recipe=FIT, ratio=0.1, keep="none", track=interfere).rows] == [0.1]
    assert not (tmp_path / "_lock").exists()


def test_rows_of_a_sweep_that_ended_just_before_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table was read before the folder was reserved, and written without the rows of a sweep that ended between."""
    real = sweep_run._reserve

    def late(folder: Path, stack: ExitStack) -> None:
        monkeypatch.setattr(sweep_run, "_reserve", real)
        sweep(tmp_path / "out", recipe=FIT, ratio=0.2, keep="none")
        real(folder, stack)

    monkeypatch.setattr(sweep_run, "_reserve", late)
    found = sweep(tmp_path / "out", recipe=FIT, ratio=0.1, keep="none")
    assert [row.ratio for row in found.rows] == [0.1, 0.2]


def test_rows_are_measured_again_on_a_text_that_changed(tmp_path: Path) -> None:
    """The key of a row held the path of the text, and a figure of the old one stood beside figures of the new one."""
    text = tmp_path / "text.txt"
    found = []
    for content in ("the first text " * 400, "another, which is not the first " * 200):
        text.write_text(content)
        found += sweep(tmp_path / "out", recipe=FIT, ratio=0.1, keep="none", eval_text=text).rows
    again = sweep(tmp_path / "out", recipe=FIT, ratio=0.1, keep="none", eval_text=text).rows
    assert found[0].divergence != found[1].divergence and again == (found[1],)


@pytest.mark.slow
def test_findings_of_other_weights_or_samples_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A criterion runs again on a graph whose weights were fitted in between, though its facts are the same."""
    counted = Counted(monkeypatch)
    graph_module = fxprune.trace(tiny("llama")).graph_module
    fxprune.Pipeline([fxprune.load_pass("calibrate", data=SAMPLES), "find-groups"])(graph_module)
    with sharing():
        for _ in range(2):
            fxprune.load_pass("wanda")(graph_module)
        assert counted.names.count("wanda") == 1
        with torch.no_grad():
            next(iter(graph_module.parameters())).mul_(2)
        fxprune.load_pass("wanda")(graph_module)
        assert counted.names.count("wanda") == 2
        fxprune.load_pass("wanda", kinds="mlp")(graph_module)
        assert counted.names.count("wanda") == 3
    fxprune.load_pass("wanda")(graph_module)
    assert counted.names.count("wanda") == 4, "nothing is remembered outside"


def row(name: str, parameters: int, perplexity: float, decode: tuple[float, float] | None = None) -> SweepRow:
    pair = (perplexity, 0.1)
    sizes = (100, parameters), (400, 4 * parameters)
    return SweepRow(name, "", name[0], 0.1, *sizes, pair, (0.1, 0.0), (0.9, 0.0), "a text", decode, 1.0)


def test_what_nothing_beats_is_marked_and_the_smallest_that_is_good_enough_recommended() -> None:
    rows = (row("a", 90, 1.1), row("b", 80, 1.3), row("c", 85, 1.4), row("d", 60, 2.0), row("e", 80, 1.3))
    found = Sweep(Path("out"), rows)
    assert [one.name for one in found.best] == ["a", "b", "d", "e"], "c is larger than b, and worse"
    assert [(most, best and best.name) for most in (1.05, 1.2, 1.3, 9.0) if [best := found.recommend(most)]] == [
        *((1.05, None), (1.2, "a"), (1.3, "b"), (9.0, "d"))
    ]
    assert found.to_markdown().count(" * |") == 4
    quick = Sweep(Path("out"), (*rows, row("f", 86, 1.5, (2.0, 1.0))))
    assert "f" not in [one.name for one in quick.best], "it is beaten by b in all that both were measured in"
    with pytest.raises(ArgumentError, match="above 0"):
        found.recommend(0)
    assert replace(rows[0], key="x") != rows[0]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"keep": "some"}, UnknownNameError, "some"),
        ({"ratio": (0.1, 0.1)}, ArgumentError, "two prunes named fast-0.1"),
        ({"ratio": ()}, ArgumentError, "there is nothing to prune"),
        ({"ratio": 1.5}, FxpruneError, r"ratio is 1\.5"),
        ({"recipe": "fats"}, UnknownNameError, "Did you mean 'fast'"),
        ({"inplace": True}, ArgumentError, "a sweep does not take inplace"),
        ({"eval": False}, ArgumentError, "a sweep compares by quality"),
        ({"tokenizer": None}, ArgumentError, "quality cannot be measured without one"),
        ({"importance": "tailor"}, UnknownNameError, "Did you mean 'taylor'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    options: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        sweep(tmp_path / "out", **{"ratio": 0.1, "recipe": "fast", **options})
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_timed_is_refused_before_any_work(tmp_path: Path) -> None:
    """It was refused after the first prune."""
    model = tiny("llama", max_position_embeddings=64)
    with pytest.raises(EvaluationError, match="prompt and new tokens are 288, and the model takes 64"):
        fxprune.sweep(model, SAMPLES, out=tmp_path / "out", bench=True, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("mine")
    with pytest.raises(CheckpointError, match="not of a sweep"):
        sweep(tmp_path / "mine", recipe=FIT, ratio=0.1)
    (tmp_path / "mine/sweep.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it is not the table of a sweep"):
        sweep(tmp_path / "mine", recipe=FIT, ratio=0.1)
    with pytest.raises(FxpruneError, match="samples in memory"):
        fxprune.sweep(tiny("llama"), iter(SAMPLES), out=tmp_path / "new", **OPTIONS)


@pytest.mark.slow
def test_several_processes_make_one_sweep(tmp_path: Path) -> None:
    """Each of them wrote and deleted the same files."""
    fxprune.trace(tiny("llama"))  # for both forks

    def work(rank: int) -> list[tuple[str, float, float]]:
        found = fxprune.sweep(tiny("llama"), SAMPLES, out=tmp_path / "sweep", ratio=[0.1, 0.3], recipe=FIT, **OPTIONS)
        again = fxprune.sweep(tiny("llama"), SAMPLES, out=tmp_path / "sweep", ratio=[0.1, 0.3], recipe=FIT, **OPTIONS)
        assert [row.seconds for row in again.rows] == [row.seconds for row in found.rows], "nothing is done twice"
        return [(row.name, row.ratio_of_perplexity, row.seconds) for row in found.rows]

    one, other = in_processes(work, 2, tmp_path / "meeting", timeout=240)
    assert one == other
    assert [row["name"] for row in json.loads((tmp_path / "sweep/sweep.json").read_text())["rows"]] == [
        n for n, *_ in one
    ]
