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
from typing import Any, NoReturn

import pytest
from rich.console import Console

import fxprune
from fxprune.cli import console, main
from fxprune.report.quality import figures_table
from tests.cli.folders import save_tiny
from tests.cli.running import invoked, refused, run
from tests.export.small import tokenizer

SMALL = ("--prompt", 8, "--tokens", 3, "--rounds", 1)


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


@pytest.mark.parametrize(
    ("command", "options", "result"),
    [
        ("eval", ("--text", "story.txt", "--window", 32), "perplexity"),
        ("bench", SMALL, "each further token, ms"),
        ("generate", ("so it", "--max-new-tokens", 4), ""),
    ],
)
def test_quiet_leaves_the_result_of_a_measurement(
    models: Path,
    command: str,
    options: tuple[object, ...],
    result: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text("A quiet river runs past the old mill. " * 8)
    code, output, lines = run(command, models / "slim", *options, "-q")
    assert (code, lines) == (0, "") and result in output and output
    assert "loading" in run(command, models / "slim", *options)[2]


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
    code, printed, _ = run(*asked, "--json")
    assert code == 0 and json.loads(printed)
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
    code, output, _ = run("passes")
    assert code == 0 and "``" not in output
    for name in fxprune.pass_names():
        stage = fxprune.load_pass(name).stage
        assert f"│ {name} │ {stage} │" in output and f"stage: {stage}" in run("passes", name)[1], name
    for first, then in (
        ("calibrate", "find-groups"),
        ("slice-parameters", "propagate-shapes"),
        ("shrink", "emit-model"),
    ):
        assert output.index(f"│ {first} │") < output.index(f"│ {then} │")


def test_a_pass_is_described() -> None:
    code, output, _ = run("passes", "select-by-ratio")
    assert code == 0 and "│ ratio │ 0.2 │" in output, "an argument of its own"
    assert "│ ranking │ local │ `local`: the same fraction" in output, "one of its base class"
    assert (
        "stage: select changes: nothing needs: Dependencies, Groups, Scores " in output and "gives: Removal" in output
    )
    example = output.partition("in a pipeline: ")[2]
    assert str(fxprune.Pipeline(example)) == "select-by-ratio"
    _, output, _ = run("passes", "shrink")
    assert "changes: graph needs: Dependencies, Removal wants: Source gives: Removed, " in output


def test_recipes_are_listed_with_their_costs() -> None:
    code, output, _ = run("recipes")
    assert code == 0 and all(name in output for name in ("balanced", "fast", "best", "llm-pruner", "what it costs"))


def heed() -> None:
    """Let a process heed interrupts, also where the tests run in the background of a shell, which ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command_line(arguments: list[str], folder: Path, streams: tuple[int, int]) -> NoReturn:
    """Run a command in this process, a fork, with two pipes as its outputs; and end the process."""
    os.chdir(folder)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
    sys.argv, sys.stdout, sys.stderr = ["fxprune", *arguments], open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    code: Any = 1
    try:
        heed()
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def stopped(arguments: list[str], folder: Path, moment: str, number: int) -> tuple[int, str, str]:
    """Exit code and outputs of a command that is stopped when it prints a line that begins with ``moment``."""
    (printed, first), (errors, second) = os.pipe(), os.pipe()
    if moment == "starting":  # before the imports, which a fork has behind it
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"}
        line = [sys.executable, "-m", "fxprune", *arguments]
        child = subprocess.Popen(line, cwd=folder, env=environment, preexec_fn=heed, stdout=first, stderr=second).pid
    else:
        child = os.fork() or command_line(arguments, folder, (first, second))
    os.close(first)
    os.close(second)
    with open(printed) as output, open(errors) as told:
        for line_told in told:
            if line_told.startswith(moment):
                break
        os.kill(child, number)
        found = output.read(), told.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *found


def ran(code: str) -> tuple[int, str, str]:
    """The exit code of a process that runs some code, and its two outputs."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=heed)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    save_tiny(path)
    return path


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
    model: Path, tmp_path: Path, moment: str, number: int, out: str
) -> None:
    if out.endswith(".gguf"):  # with a tokenizer that such a file can hold, else the command refuses before it prunes
        shutil.copytree(model, tmp_path.with_suffix(".model"))
        model = tmp_path.with_suffix(".model")
        tokenizer().save_pretrained(model)
    command = ["prune", str(model), "--out", out, "--recipe", "llm-pruner", "--importance", "l2", "--verbose"]
    code, printed, errors = stopped(command, tmp_path, moment, number)
    assert code == 128 + number, errors
    lines = [line for line in errors.splitlines() if not line.endswith((" s", " ..."))]
    assert lines == ["stopped"] and printed == "", errors
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [] or (tmp_path / out / "run.yaml").is_file()
    assert not any(name.startswith(".") for name in left)


def test_an_interrupt_during_imports_stops_exit_on_signal() -> None:
    code = (
        "import os, signal; from fxprune.cli.console import exit_on_signal, install\n"
        "install()\n"
        "with exit_on_signal():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException: print('swallowed')\n"
    )
    assert ran(code) == (130, "", "stopped\n")


@pytest.mark.parametrize(
    "swallows",
    [
        "class A:\n    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\nA()\n",
        "a = type('A', (), {})(); r = weakref.ref(a, lambda _: os.kill(os.getpid(), signal.SIGINT)); del a\n",
    ],
)
def test_a_signal_in_a_finaliser_stops_a_little_later(swallows: str) -> None:
    code = (
        "import os, signal, time, weakref; from fxprune.cli.console import install\n"
        f"install()\n{swallows}"
        "for _ in range(3000): time.sleep(0.01)\n"
        "print('went on')\n"
    )
    assert ran(code) == (130, "", "stopped\n")


def test_a_finished_command_keeps_its_exit_code() -> None:
    code = (
        "import atexit, os, signal; from fxprune.cli.console import finish, install\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "install(); print('written'); finish()\n"
    )
    assert ran(code) == (0, "written\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "moment"),
    [
        (("export", "MODEL", "slim.pt2"), "loading"),
        (("recover", "MODEL", "--data", "rows.json", "--out", "new"), "loading"),
    ],
)
def test_other_commands_stop_as_well(model: Path, tmp_path: Path, command: tuple[str, ...], moment: str) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "red green blue " * 90}] * 3))
    arguments = [str(model) if word == "MODEL" else word for word in command]
    code, printed, errors = stopped(arguments, tmp_path, moment, signal.SIGINT)
    assert (code, printed, errors.splitlines()[-1]) == (130, "", "stopped"), errors
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
