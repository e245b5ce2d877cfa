"""What commands share that take several models: their names in tables, and a look at all before the first is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxprune.cli.checks import check_dtype_and_device
from fxprune.cli.naming import check_model

__all__ = ["checked"]


def checked(models: Sequence[str], dtype: str | None = None, device: str | None = None) -> dict[str, str]:
    """Return what a user named, each once, by the last part of its path, or by all of it where two end alike.

    Args:
        models: what the user named.
        dtype: of their weights.
        device: where they are put.

    Raises:
        FxpruneError: one of them is nowhere, or is no model; or there is no such dtype or device.
    """
    check_dtype_and_device(dtype, device)
    places = list(dict.fromkeys(models))
    for place in places:
        check_model(place, None, with_weights=True)
    short = [Path(place).name for place in places]
    return dict(zip(short if len({*short}) == len(short) else places, places, strict=True))
