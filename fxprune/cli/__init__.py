"""The command line: prune a model, look at what went, measure, train and time what came of it, write it as a file."""

import os

from fxprune.cli import apply, bench, evaluate, export, generate, graph, lists, plan, prune, recover
from fxprune.cli.console import app

__all__ = [
    "app",
    "apply",
    "bench",
    "evaluate",
    "export",
    "generate",
    "graph",
    "lists",
    "main",
    "plan",
    "prune",
    "recover",
]


def main() -> None:
    """Run a command; under ``torchrun`` in several processes that share the samples."""
    if "WORLD_SIZE" not in os.environ:
        app()
        return
    from fxprune.data.ranks import started

    with started():
        app()
