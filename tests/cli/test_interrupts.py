"""Commands that are stopped at any moment: one line, an exit code that names the signal, nothing half written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fxprune.cli import main
from tests.cli.folders import save_tiny
from tests.export.small import tokenizer


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
