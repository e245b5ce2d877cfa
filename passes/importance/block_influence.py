"""How much each block turns what it gets: the criterion for removing whole layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Group
from fxprune.graph.facts import facts_of
from fxprune.masking.parts import observe
from fxprune.removal.scores import Scores

from .forward import ForwardImportancePass, refuse_group

__all__ = ["BlockInfluenceImportancePass"]


@dataclass(frozen=True, eq=False)
class BlockInfluenceImportancePass(ForwardImportancePass):
    """A layer is worth by how much it turns the stream: one less the mean cosine of what comes in and what comes out.

    With ``x_l (tokens, width)`` before and ``x_l+1`` after the layer::

        1 - mean over tokens of x_l . x_l+1 / (norm(x_l) norm(x_l+1))

    Source: Men et al., "Layers in Large Language Models are More Redundant Than You Expect" (arXiv
    2403.03853), equation 1.
    """

    name: ClassVar[str] = "block-influence"
    carries: ClassVar[bool] = True

    kinds: tuple[str, ...] = ("layer",)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        """One number for each layer.

        Raises:
            PassError: a group is no layer.
        """
        facts = facts_of(graph_module)
        axes, nodes = facts[Dependencies].axes, {node.name: node for node in graph_module.graph.nodes}
        ends: dict[str, tuple[fx.Node, fx.Node]] = {}
        for group in groups:
            if group.kind != "layer" or group.block is None:
                raise refuse_group(group, self.name, "input and output of a block")
            bypass = axes.bypasses[group.block]
            ends[group.name] = nodes[bypass.source], nodes[bypass.target]
        turns = {name: _Cosines() for name in ends}
        before: dict[fx.Node, torch.Tensor] = {}
        closing = {target: [name for name in ends if ends[name][1] is target] for _, target in ends.values()}
        opening = {source for source, _ in ends.values()}

        def see(node: fx.Node, value: torch.Tensor) -> None:
            for name in closing.get(node, ()):
                turns[name].add(before[ends[name][0]], value)
            if node in opening:
                before[node] = value

        watch = {node: partial(see, node) for node in {*opening, *closing}}
        observe(graph_module, self.calibration(graph_module), watch, self.batch, self.tracked)
        return Scores({name: np.asarray([1 - turn.mean]) for name, turn in turns.items()})


class _Cosines:
    """The mean cosine of pairs of vectors, taken in batch by batch."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in the vectors along the last axis of two tensors."""
        cosines = torch.cosine_similarity(x.double(), y.double(), dim=-1)
        self.total, self.count = self.total + float(cosines.sum()), self.count + cosines.numel()

    @property
    def mean(self) -> float:
        """The mean so far."""
        return self.total / max(self.count, 1)
