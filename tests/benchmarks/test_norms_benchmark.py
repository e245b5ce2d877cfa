"""Test the benchmark of norms: both sides lose the same units, those that a norm runs over and no others."""

from __future__ import annotations

import pytest
import torch

from benchmarks.norms import SMALL, byte_loss, small_rows, train_small


@pytest.mark.slow
def test_a_row_compares_two_norms_of_one_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    for what in list(SMALL)[1:]:
        monkeypatch.delitem(SMALL, what)  # type: ignore[arg-type]
    rows = list(small_rows(0.25, models=1, steps=2))
    assert [row.what for row in rows] == ["latents, random scores", "latents, taylor scores"]
    assert all(row.sliced != row.masked and row.dense < 6 and row.removed == 0.25 for row in rows)


@pytest.mark.slow
def test_training_lowers_the_loss_and_is_deterministic() -> None:
    windows = torch.arange(64).repeat(16, 1)
    first, again, longer = (train_small("latents", windows, steps, seed=1) for steps in (1, 1, 12))
    assert byte_loss(first, windows) == byte_loss(again, windows) > byte_loss(longer, windows)
