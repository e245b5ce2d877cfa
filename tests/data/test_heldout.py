"""Windows that share no run of tokens with samples."""

from __future__ import annotations

import pytest
import torch

from fxprune.data.text import RUN, unseen


def test_a_window_with_a_run_of_a_sample_was_seen() -> None:
    windows = torch.arange(400).view(4, 100)
    sample = torch.full((1, 50), 999)
    sample[0, 10 : 10 + RUN] = torch.arange(250, 250 + RUN)
    assert unseen(windows, [sample]).tolist() == [True, True, False, True]
    sample[0, 10] = 999  # one token fewer in a row
    assert unseen(windows, [sample]).all()
    assert unseen(windows, []).all()


@pytest.mark.parametrize(("sample", "expected"), [([5, 6, 7], [False, True]), ([7, 6, 5], [True, True])])
def test_short_samples_and_windows_are_compared_whole(sample: list[int], expected: list[bool]) -> None:
    assert unseen(torch.arange(40).view(2, 20), [torch.tensor([sample])]).tolist() == expected
    assert unseen(torch.arange(20).view(2, 10), [torch.arange(30)[None]]).tolist() == [False, False]
