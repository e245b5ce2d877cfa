"""The command line: prune a model, write it as one file, look at its groups, ask why, list passes and recipes."""

import os

from fxprune.cli import export, graph, lists, prune
from fxprune.cli.console import app

__all__ = ["app", "export", "graph", "lists", "main", "prune"]


def main() -> None:
    """Run a command; under ``torchrun`` in several processes that share the samples."""
    if "WORLD_SIZE" not in os.environ:
        app()
        return
    from fxprune.data.ranks import started

    with started():
        app()
