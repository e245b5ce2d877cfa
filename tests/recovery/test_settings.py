"""The recipe is the paper's, checked, and changed by name."""

from __future__ import annotations

from typing import Any

import pytest

from fxprune.errors import RecoveryError, UnknownNameError
from fxprune.recovery.settings import RecoverySettings, settings_from


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rank": 0}, RecoveryError),
        ({"learning_rate": -1.0}, RecoveryError),
        ({"held_out": 0}, RecoveryError),
        ({"warmup": 1.0}, RecoveryError),
        ({"precision": "fp16"}, UnknownNameError),
        ({"data_format": "csv"}, UnknownNameError),
        ({"learnin_rate": 1.0}, UnknownNameError),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(changes)).replace("_", ".")):
        settings_from(None, changes)


def test_defaults_are_the_papers() -> None:
    recipe = RecoverySettings()
    assert (recipe.rank, recipe.batch, recipe.learning_rate, recipe.epochs, recipe.max_tokens) == (8, 64, 1e-4, 2, 256)
    assert recipe.response_only


def test_changes_go_over_given_settings() -> None:
    given = RecoverySettings(rank=4)
    changed = settings_from(given, {"epochs": 3})
    assert (changed.rank, changed.epochs, given.epochs) == (4, 3, 2)
    assert settings_from(None, {}) == RecoverySettings()
