"""Alone, a process takes all samples and adds nothing; see tests/end_to_end/test_processes.py for several."""

from __future__ import annotations

import pytest
import torch

from fxprune.errors import FxpruneError
from fxprune.offload.ranks import add_up, as_first, first_alone, is_first, of_first, own, rank, started, turns


def test_one_process_does_everything() -> None:
    sums = torch.tensor([1.0, 2.0])
    add_up([sums])
    as_first([sums])
    with started():
        assert own([3, 4, 5]) == (3, 4, 5) and rank() == 0 and is_first() and of_first("x") == "x"
    assert sums.tolist() == [1.0, 2.0] and list(turns(3)) == [0, 1, 2]
    assert first_alone(lambda: 7, FxpruneError) == 7
    with pytest.raises(KeyError):
        first_alone(lambda: {}["missing"], FxpruneError)
