"""Output of commands: what goes where, progress, lists, what `--quiet` leaves, and commands that are stopped."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fxprune
from fxprune.cli import console
from fxprune.errors import FxpruneError
from fxprune.recipes import recipe_names
from fxprune.report.quality import figures_table
from tests.cli.running import invoked, output_of, refused, run
from tests.export.small import tokenizer


@pytest.fixture(autouse=True)
def usual_output() -> Iterator[None]:
    yield
    console.set_output()


def test_help_comes_without_a_command_and_lists_commands_in_the_order_of_use() -> None:
    done = invoked()
    assert done.exit_code == 0
    lines = done.stdout.partition("Commands")[2].splitlines()
    names = [line[2:].split()[0] for line in lines if line.startswith("│ ") and line[2] != " "]
    wanted = "prune sweep apply eval recover generate chat bench export serve graph explain plan recipes passes"
    assert names == wanted.split()


def test_progress_is_printed_to_a_pipe_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert list(console.progress(range(10), "scoring", 10)) == list(range(10))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scoring: 1 of 10, about 54 s left" and len(lines) == 3
    with console.working("tracing"):
        pass
    assert capsys.readouterr().err == "tracing ...\n"


def test_quiet_and_json_silence_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_output(quiet=True)
    console.console.print("result")
    with console.working("tracing"):
        assert list(console.progress(iter("ab"), "scoring", 2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
    console.set_output(as_json=True)
    console.console.print("result")
    console.print_json({"out": "slim"})
    assert json.loads(capsys.readouterr().out) == {"out": "slim"}


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder `slim[v2]` was the column `slim` of a table, and in a terminal `[/` in a path ended in a traceback."""
    console.console.print(figures_table(("", "slim[v2]"), [("perplexity, notes[/old].txt", "1.0")]))
    printed = capsys.readouterr().out
    assert "slim[v2]" in printed and "notes[/old].txt" in printed
    terminal = Console(file=io.StringIO(), force_terminal=True, markup=False)
    monkeypatch.setattr(console, "notes", terminal)
    with console.working("loading slim[/v2]"):
        assert list(console.progress([1], "perplexity of slim[/v2]", 1)) == [1]


def test_a_remedy_is_that_of_the_face(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    """Shells were told to pass Python's arguments."""
    error = FxpruneError("no", remedy="Pass like='dense.gguf'", shell="Give a GGUF file")
    assert str(error) == "no. Pass like='dense.gguf'"

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fxprune.cli.export.check_model", fail)
    assert refused("export", models / "dense", "slim.pt2") == "no. Give a GGUF file"


def test_quiet_leaves_the_result_of_a_measurement(models: Path, story: tuple[object, ...]) -> None:
    for command, options, result in (
        ("eval", story, "perplexity"),
        ("bench", ("--prompt", 8, "--tokens", 3, "--rounds", 1), "each further token, ms"),
        ("generate", ("so it", "--max-new-tokens", 4), ""),
    ):
        code, output, lines = run(command, models / "slim", *options, "-q")
        assert (code, lines) == (0, "") and result in output and output, command
        assert "loading" in run(command, models / "slim", *options)[2], command


@pytest.mark.slow
def test_quiet_leaves_nothing_of_a_command_that_writes(models: Path, tmp_path: Path) -> None:
    """Bars of transformers, and its remark on a renamed cache, were printed by a prune on disk."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"What is {i} and one?", "output": f"{i + 1}."} for i in range(8)]))
    plan, quiet, fast = models / "slim/plan.json", "--quiet", ("--epochs", 1, "--batch", 4)
    assert run("apply", models / "dense", plan, "--out", tmp_path / "again", quiet) == (0, "", "")
    assert run("export", tmp_path / "again", tmp_path / "slim.pt2", quiet) == (0, "", "")
    assert run("recover", tmp_path / "again", "--data", rows, "--out", tmp_path / "new", *fast, quiet) == (0, "", "")
    assert (tmp_path / "slim.pt2").is_file() and (tmp_path / "new/recovery.json").is_file()
    options = ("--low-memory", "--recipe", "llm-pruner", "--importance", "l2", quiet)
    assert run("prune", models / "dense", "--out", tmp_path / "slim", *options) == (0, "", "")


def test_of_several_processes_the_first_prints(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of JSON came from each."""
    asked = ("prune", models / "dense", "--dry-run", "--recipe", "llm-pruner", "--importance", "l2")
    assert json.loads(output_of(*asked, "--json"))
    monkeypatch.setattr("fxprune.offload.ranks.is_first", lambda: False)
    assert run(*asked, "--json") == run(*asked) == (0, "", "")


def test_commands_that_processes_do_not_share_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused("bench", models / "dense") == "fxprune bench: it runs in one process. Start it without torchrun"
    monkeypatch.setattr("fxprune.offload.ranks.world_size", lambda: 2)
    line = refused("recover", models / "slim", "--data", "alpaca", "--out", "new")
    assert line == "--folder: several processes need one folder. Give --folder, one that all of them can write to"


TAKES_AND_FREES = """
import resource, sys, torch
from fxprune.cli.console import keep_freed
if sys.argv[1] == "keep" and not keep_freed():
    sys.exit(3)
counts = []
for turn in range(8):
    torch.ones(48 * 2**20, dtype=torch.uint8)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(counts[-1] - counts[0])
"""


def pages(how: str) -> int:
    """Page faults while 48 MB are allocated and freed several times."""
    done = subprocess.run([sys.executable, "-c", TAKES_AND_FREES, how], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("the allocator takes no such options")
    return int(done.stdout)


@pytest.mark.slow
def test_freed_memory_is_taken_again() -> None:
    assert pages("keep") < pages("as it is") / 5


def test_passes_are_listed_in_the_order_of_a_pipeline() -> None:
    """The page of a sequence ended in a traceback: it knows what it needs by its steps, and not as a class."""
    output = output_of("passes")
    assert "``" not in output
    for name in fxprune.pass_names():
        stage = fxprune.load_pass(name).stage
        assert f"│ {name} │ {stage} │" in output and f"stage: {stage}" in output_of("passes", name), name
    for pair in ("calibrate find-groups", "slice-parameters propagate-shapes", "shrink emit-model"):
        first, then = pair.split()
        assert output.index(f"│ {first} │") < output.index(f"│ {then} │")


def test_passes_and_recipes_are_listed_as_json() -> None:
    passes, recipes = (json.loads(output_of(command, "--json")) for command in ("passes", "recipes"))
    assert [one["name"] for one in recipes] == list(recipe_names()) and all(one["costs"] for one in recipes)
    assert {one["name"] for one in passes} == set(fxprune.pass_names())
    assert {"name": "shrink", "stage": "shrink"}.items() <= next(x for x in passes if x["name"] == "shrink").items()
    found = json.loads(output_of("passes", "select-by-ratio", "--json"))
    assert found["stage"] == "select" and found["gives"] == ["Removal"]
    assert {"name": "ratio", "default": "0.2"}.items() <= next(
        one for one in found["arguments"] if one["name"] == "ratio"
    ).items()
    assert "find-groups" in json.loads(output_of("recipes", "fast", "--json"))["text"]


def test_a_pass_is_described() -> None:
    output = output_of("passes", "select-by-ratio")
    assert "│ ratio │ 0.2 │" in output, "an argument of its own"
    assert "│ ranking │ local │ `local`: the same fraction" in output, "one of its base class"
    assert "stage: select changes: nothing needs: Dependencies, Groups, Scores " in output
    assert "gives: Removal" in output
    example = output.partition("in a pipeline: ")[2]
    assert str(fxprune.Pipeline(example)) == "select-by-ratio"
    output = output_of("passes", "shrink")
    assert "changes: graph needs: Dependencies, Removal wants: Source gives: Removed, " in output


def test_recipes_are_listed_with_their_costs() -> None:
    output = output_of("recipes")
    assert all(name in output for name in ("balanced", "fast", "best", "llm-pruner", "what it costs"))


def heed() -> None:
    """Let a process heed interrupts, also where the tests run in the background of a shell, which ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped(arguments: list[str], folder: Path, moment: str, number: int) -> tuple[int, str, str]:
    """Exit code and outputs of a command that is stopped when it prints a line that begins with ``moment``."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"}
    line = [sys.executable, "-m", "fxprune", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=folder, env=environment, preexec_fn=heed, **pipes) as child:
        assert child.stdout is not None and child.stderr is not None
        assert any(told.startswith(moment) for told in child.stderr), moment
        child.send_signal(number)
        found = child.stdout.read(), child.stderr.read()
    return child.returncode, *found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number", "out"),
    [
        ("starting", signal.SIGINT, "slim"),
        ("loading", signal.SIGINT, "slim"),
        ("pruning", signal.SIGINT, "slim"),
        ("find-groups", signal.SIGTERM, "slim.gguf"),
        ("writing", signal.SIGINT, "slim"),
    ],
)
def test_a_stopped_prune_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, moment: str, number: int, out: str
) -> None:
    model = folder
    if out.endswith(".gguf"):  # with a tokenizer that such a file can hold, else the command refuses before it prunes
        model = shutil.copytree(folder, tmp_path.with_suffix(".model"))
        tokenizer().save_pretrained(model)
    command = ["prune", str(model), "--out", out, "--recipe", "llm-pruner", "--importance", "l2", "--verbose"]
    code, printed, errors = stopped(command, tmp_path, moment, number)
    assert code == 128 + number, errors
    lines = [line for line in errors.splitlines() if not line.endswith((" s", " ..."))]
    assert lines == ["stopped"] and printed == "", errors
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [] or (tmp_path / out / "run.yaml").is_file()
    assert not any(name.startswith(".") for name in left)


IMPORTS = "import atexit, os, signal, time, weakref; from fxprune.cli.console import exit_on_signal, finish, install\n"
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"
LATER = "for _ in range(3000): time.sleep(0.01)\nprint('went on')\n"
STOPPED = (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (f"with exit_on_signal():\n    try: {INTERRUPT}\n    except BaseException: print('swallowed')\n", STOPPED),
        (f"class A:\n    def __del__(self): {INTERRUPT}\nA()\n{LATER}", STOPPED),
        (f"a = type('A', (), {{}})(); r = weakref.ref(a, lambda _: {INTERRUPT}); del a\n{LATER}", STOPPED),
        (f"atexit.register(lambda: {INTERRUPT})\nprint('written'); finish()\n", (0, "written\n", "")),
    ],
    ids=["during imports", "in a finaliser", "in a callback of a weak reference", "after the command"],
)
def test_an_interrupt_ends_a_command_unless_its_work_is_done(code: str, end: tuple[int, str, str]) -> None:
    """One that arrives where nothing can be raised ends it a little later."""
    command = [sys.executable, "-c", f"{IMPORTS}install()\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=heed)
    assert (done.returncode, done.stdout, done.stderr) == end


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "moment"),
    [
        (("export", "MODEL", "slim.pt2"), "loading"),
        (("recover", "MODEL", "--data", "rows.json", "--out", "new"), "loading"),
    ],
)
def test_other_commands_stop_as_well(folder: Path, tmp_path: Path, command: tuple[str, ...], moment: str) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "red green blue " * 90}] * 3))
    arguments = [str(folder) if word == "MODEL" else word for word in command]
    code, printed, errors = stopped(arguments, tmp_path, moment, signal.SIGINT)
    assert (code, printed, errors.splitlines()[-1]) == (130, "", "stopped"), errors
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
