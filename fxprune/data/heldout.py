"""Text that a prune did not use: windows that share no run of tokens with its samples."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["RUN", "unseen"]

RUN = 16
"""Tokens in a row that two texts do not share by chance, except for phrases such as those of a licence."""


def unseen(windows: torch.Tensor, samples: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mask ``(windows,)`` of the windows ``(windows, tokens)`` that share no run of tokens with a sample.

    Args:
        samples: token ids of any shape, the last axis along the text. A run is of :data:`RUN` tokens; shorter samples
            and windows are compared whole.
    """
    found = torch.ones(len(windows), dtype=torch.bool)
    by_length: dict[int, list[torch.Tensor]] = {}
    for sample in samples:
        length = min(RUN, windows.shape[-1], sample.shape[-1])
        by_length.setdefault(length, []).append(_hashes(sample, length).flatten())
    for length, seen in by_length.items():
        found &= ~torch.isin(_hashes(windows, length), torch.cat(seen)).any(dim=1)
    return found


def _hashes(ids: torch.Tensor, length: int) -> torch.Tensor:
    """A number of 64 bits for each run of ``length`` token ids ``(..., tokens)``: ``(..., tokens - length + 1)``."""
    factors = torch.randint(2**62, (length,), generator=torch.Generator().manual_seed(0))
    return (ids.cpu().long().unfold(-1, length, 1) * factors).sum(-1)
