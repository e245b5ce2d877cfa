"""A model that runs over all windows a part after the other, so that memory is for the weights of one part."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxprune.errors import EvaluationError
from fxprune.graph.shelf import shelved
from fxprune.graph.tensors import device_of
from fxprune.masking.in_parts import PartRuns, parts_by_weights
from fxprune.trace import trace

__all__ = ["InBlocks"]


class InBlocks:
    """A language model whose weights are read once for all windows: those in files may be more than memory holds.

    Its graph is cut where the fewest numbers are alive, into parts of a tenth of the bytes of the weights. What is
    alive between two parts is kept in a temporary folder. Called, it runs on one batch, and reads all weights for it.

    Args:
        model: a Hugging Face model that can be traced, or whatever takes ``input_ids`` alone.

    Raises:
        TraceError: it cannot be traced.
        EvaluationError: it takes more than token ids.
    """

    def __init__(self, model: Any) -> None:
        traced = isinstance(model, fx.GraphModule)
        self.graph_module: fx.GraphModule = model if traced else trace(model, check=False).graph_module
        names = [str(node.target) for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        if len(names) != 1:
            raise EvaluationError(
                f"the graph takes {', '.join(names)}", where="model", remedy="Leave memory at fast for such a model"
            )
        self.name = names[0]
        self.parts = parts_by_weights(self.graph_module)

    def __call__(self, input_ids: torch.Tensor) -> Any:
        """Return what the model returns for token ids ``(batch, tokens)``."""
        return self.graph_module(input_ids)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return device_of(self.graph_module)

    def outputs(
        self, windows: Sequence[torch.Tensor], track: Callable[[Iterable[Any], int], Iterable[Any]]
    ) -> Iterator[Any]:
        """Yield what the model returns for each batch of windows.

        Args:
            windows: token ids, each ``(batch, tokens)``.
            track: shows progress over all batches in all parts.
        """
        found: list[Any] = []
        watch = {node: found.append for node in self.graph_module.graph.nodes if node.op == "output"}
        with tempfile.TemporaryDirectory() as place, shelved(Path(place), None):
            runs = PartRuns(self.graph_module, self.parts, [{self.name: ids} for ids in windows], ())
            steps = (part for part in self.parts for _ in runs.forward(part, watch))
            for _ in track(steps, len(self.parts) * len(windows)):
                while found:
                    yield found.pop()
