"""The command line: prune models, inspect plans, and measure, train, time and export slim models."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fxprune.cli import console

if TYPE_CHECKING:
    from fxprune.cli.console import app

__all__ = ["SPIN_COUNT", "app", "main"]

SPIN_COUNT = "10000"
"""Turns that a thread of a command spins while it waits for another one, before it sleeps: enough for the pauses
between ops, and no more, because beside other work the core that it takes is the one that the other thread needs."""


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # each adds its commands
    from fxprune.cli import apply, bench, console, evaluate, export, generate, graph  # noqa: F401, I001
    from fxprune.cli import lists, plan, prune, recover, serve, sweep  # noqa: F401

    return console.app


def main() -> None:
    """Run a command; processes of ``torchrun`` share the samples."""
    console.install()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # one line reports the error, not each attempt
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    from fxprune.cli import app

    try:
        if "WORLD_SIZE" not in os.environ:
            app()
            return
        from fxprune.offload.ranks import process_group

        with process_group():
            app()
    finally:
        console.finish()
