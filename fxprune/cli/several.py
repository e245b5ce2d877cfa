"""What commands share that take several models: their names in tables, and a look at all before the first is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxprune.cli.naming import check_model

__all__ = ["checked"]


def checked(models: Sequence[str]) -> dict[str, str]:
    """Return what a user named, each once, by the last part of its path, or by all of it where two end alike.

    Raises:
        FxpruneError: one of them is nowhere, or is no model.
    """
    places = list(dict.fromkeys(models))
    for place in places:
        check_model(place, None, with_weights=True)
    short = [Path(place).name for place in places]
    return dict(zip(short if len({*short}) == len(short) else places, places, strict=True))
