"""Runs without storage under each attention implementation that has them: what stops a slim model, and no dense one."""

from __future__ import annotations

from transformers import PreTrainedModel

from fxprune.emit.attention import implementations
from fxprune.emit.load import run_on_meta

__all__ = ["DryRuns"]

_NEEDS_STORAGE = "flex_attention"
"""Refuses tensors on ``meta``: a run under it tells nothing, and costs the import of a compiler."""


class DryRuns:
    """Says what stops a slim model on ``meta``.

    It has to run under the attention implementations under which the dense model does. The dense model is only run
    where a slim one fails, and once.

    Args:
        dense: a copy of the dense model on ``meta``, to be thrown away.
    """

    def __init__(self, dense: PreTrainedModel) -> None:
        own, *others = implementations(dense)
        self._dense = dense
        self._names = (own, *(name for name in others if name != _NEEDS_STORAGE))
        self._stands: dict[str, bool] = {}

    def failure_of(self, slim: PreTrainedModel, patched: bool = True) -> str | None:
        """Return what stops ``slim``, a model to be thrown away, in words; None where it runs as the dense one does.

        Args:
            slim: the model.
            patched: whether attributes of its modules are set by hand, which each implementation may read in its own
                way. A model that its class makes of a config alone is run under its own implementation.
        """
        for name in self._names if patched else self._names[:1]:
            found = run_on_meta(slim, implementation=name)
            if found is not None and self._dense_runs(name):
                return f"under {name} attention: {found}"
        return None

    def _dense_runs(self, name: str) -> bool:
        if name not in self._stands:
            self._stands[name] = run_on_meta(self._dense, implementation=name) is None
        return self._stands[name]
