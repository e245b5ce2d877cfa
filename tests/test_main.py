"""The package as a command, and how little of it a start needs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import fxprune
import fxprune.__main__


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_the_package_is_a_command() -> None:
    done = python("-m", "fxprune", "--help")
    assert done.returncode == 0 and "prune" in done.stdout
    assert fxprune.__main__.main is fxprune.cli.main


def test_it_tells_its_version() -> None:
    assert python("-m", "fxprune", "--version").stdout.strip() == f"fxprune {fxprune.__version__}"


def test_threads_wait_without_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is read when torch is imported, which a command does after it is set."""
    monkeypatch.setattr(sys, "argv", ["fxprune", "--version"])
    monkeypatch.setattr("fxprune.cli.console.install", lambda: None)
    monkeypatch.setattr("fxprune.cli.console.finish", lambda: None)
    for before, after in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if before is not None:
            monkeypatch.setenv("OMP_WAIT_POLICY", before)
        with pytest.raises(SystemExit):
            fxprune.cli.main()
        assert os.environ["OMP_WAIT_POLICY"] == after


def test_help_needs_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "networkx", "numpy", "peft", "datasets", "lm_eval", "matplotlib"}
    done = python("-c", f"import sys, fxprune.cli; fxprune.cli.app; print(sorted({heavy} & sys.modules.keys()))")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_function_keeps_the_name_that_its_room_has_too() -> None:
    done = python("-c", "import fxprune.trace.capture, fxprune; print(callable(fxprune.trace), fxprune.trace.__name__)")
    assert done.stdout.strip() == "True trace", done.stderr
    assert set(fxprune.__all__) <= set(dir(fxprune)) and all(hasattr(fxprune, name) for name in fxprune.__all__)
    assert all(getattr(fxprune, name).__name__ == name for name in ("prune", "trace", "Result", "explain"))
