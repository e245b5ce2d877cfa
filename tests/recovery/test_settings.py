"""The recipe is the paper's, checked, and changed by name."""

from __future__ import annotations

from fxprune.recovery.data import RecoverySettings, settings_from


def test_defaults_are_the_papers() -> None:
    recipe = RecoverySettings()
    assert (recipe.rank, recipe.batch, recipe.learning_rate, recipe.epochs, recipe.max_tokens) == (8, 64, 1e-4, 2, 256)
    assert recipe.response_only and settings_from(None, {}) == recipe
    given = RecoverySettings(rank=4)
    changed = settings_from(given, {"epochs": 3})
    assert (changed.rank, changed.epochs, given.epochs) == (4, 3, 2)
