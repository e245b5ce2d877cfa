"""The command line: prune a model, write it as one file, look at its groups, ask why, list passes and recipes."""

from fxprune.cli import export, graph, lists, prune
from fxprune.cli.console import app

__all__ = ["app", "export", "graph", "lists", "prune"]
