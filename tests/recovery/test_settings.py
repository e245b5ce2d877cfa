"""The recipe is the paper's, checked, and changed by name."""

from __future__ import annotations

import typer

import fxprune.cli
from fxprune.recipes import option_table
from fxprune.recovery.settings import RecoverySettings, settings_from


def test_defaults_are_the_papers() -> None:
    recipe = RecoverySettings()
    assert (recipe.rank, recipe.batch, recipe.learning_rate, recipe.epochs, recipe.max_tokens) == (8, 64, 1e-4, 2, 256)
    assert recipe.response_only and settings_from(None, {}) == recipe
    given = RecoverySettings(rank=4)
    changed = settings_from(given, {"epochs": 3})
    assert (changed.rank, changed.epochs, given.epochs) == (4, 3, 2)


def test_the_command_has_the_options_that_are_declared() -> None:
    """Names, defaults and types come from the settings, and a value is the one that they check."""
    command = typer.main.get_command(fxprune.cli.app).commands["recover"]  # type: ignore[attr-defined]
    help_of = {one.name: one for one in command.params}
    for name, (_, declared) in option_table(RecoverySettings).items():
        assert (name in help_of) == bool(declared.panel), name
        assert not declared.panel or f"(default: {declared.default})" in help_of[name].help
    context = command.make_context("recover", ["m", "--data", "d", "--out", "o", "--learning-rate", "2e-4"])
    assert context.params["learning_rate"] == 2e-4 and context.params["rank"] is None
