"""Block influence: how much each block turns the residual stream, the criterion for removing whole layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Group, as_kinds
from fxprune.graph.facts import facts_of
from fxprune.pipeline.arguments import argument
from fxprune.removal.scores import Scores

from .forward import ForwardImportancePass

__all__ = ["BlockInfluenceImportancePass"]


@dataclass(frozen=True, eq=False)
class BlockInfluenceImportancePass(ForwardImportancePass):
    """Scores layers by one minus the mean cosine of the stream before and after.

    With ``x_l (tokens, width)`` before and ``x_l+1`` after the layer::

        1 - mean over tokens of x_l . x_l+1 / (norm(x_l) norm(x_l+1))

    Source: Men et al., "Layers in Large Language Models are More Redundant Than You Expect" (arXiv
    2403.03853), equation 1.
    """

    name: ClassVar[str] = "block-influence"
    prefetches: ClassVar[bool] = True

    kinds: tuple[str, ...] = argument(("layer",), "Kinds of groups to score: layers only.", check=as_kinds)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        axes, nodes = facts_of(graph_module)[Dependencies].axes, {node.name: node for node in graph_module.graph.nodes}
        ends: dict[str, tuple[fx.Node, fx.Node]] = {}
        for group in groups:
            if group.kind != "layer" or group.block is None:
                raise self.not_scored(group, "input and output of a block")
            bypass = axes.bypasses[group.block]
            ends[group.name] = nodes[bypass.source], nodes[bypass.target]
        opening = {source for source, _ in ends.values()}
        closing = {target: [name for name in ends if ends[name][1] is target] for _, target in ends.values()}
        before: dict[fx.Node, torch.Tensor] = {}
        sums, counts = dict.fromkeys(ends, 0.0), dict.fromkeys(ends, 0)

        def see(node: fx.Node, value: torch.Tensor) -> None:
            for name in closing.get(node, ()):
                source = before[ends[name][0]]
                cosines = torch.cosine_similarity(source.double(), value.double(), dim=-1)
                sums[name] += float(cosines.sum())
                counts[name] += cosines.numel()
            if node in opening:
                before[node] = value

        self.observe(graph_module, {node: partial(see, node) for node in {*opening, *closing}})
        return Scores({name: np.asarray([1 - sums[name] / max(counts[name], 1)]) for name in ends})
