"""Models that transformers read in part, and filled up with random numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fxprune.errors import CheckpointError

__all__ = ["LOADING", "require_whole"]

LOADING: Mapping[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""What ``from_pretrained`` of transformers is told, so that it gives what :func:`require_whole` looks at."""


def require_whole(source: str | os.PathLike[str], found: Mapping[str, Any]) -> None:
    """Refuse a model that transformers filled up.

    Args:
        source: where it is from.
        found: what transformers says of its loading.

    Raises:
        CheckpointError: weights are missing, or of another shape than the config says.
    """
    for what, key in (("missing", "missing_keys"), ("of another shape than its config says", "mismatched_keys")):
        names = sorted(name if isinstance(name, str) else name[0] for name in found.get(key) or ())
        if names:
            others = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            told = f"cannot be loaded: {names[0]}{others} {'are' if others else 'is'} {what}"
            remedy = "Fetch it or save it again, with all its weights"
            raise CheckpointError(told, where=os.fspath(source), remedy=remedy)
