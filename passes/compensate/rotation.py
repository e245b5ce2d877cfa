"""Rotation: the outputs of weights that lost inputs are rotated towards the dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.masking.compare import PairedRuns
from fxprune.offload.ranks import all_reduce, broadcast_dealt, deal
from fxprune.pipeline.arguments import argument

from .base import FitPass, FitSite, fit_data

__all__ = ["RotationPass"]


@dataclass(frozen=True, eq=False)
class RotationPass(FitPass):
    """Rotates the outputs of each weight that lost inputs, all by one rotation, towards the dense ones.

    With ``w`` the kept columns of a weight ``(out, in)``, ``Z = w X (out, tokens)`` their outputs in the masked graph
    and ``Y (out, tokens)`` the targets, the new columns are ``Q w`` for the orthogonal ``Q`` that minimises
    ``|Y - Q Z|^2 + d |Q - 1|^2``, which is ``U V'`` of the singular value decomposition of ``Y Z' + d``. No norm of a
    column changes, so it cannot overfit as much as a free fit, and needs fewer samples.

    As with ``least-squares``, ``Y`` is what the sum lacks if the product is added to another value; biases stay. Each
    matrix of a weight, as those of experts, has a rotation of its own, from the tokens that reach it.

    Source: "Rotation-Constrained Error Update" (RCPU), the orthogonal Procrustes problem; Schönemann, "A generalized
    solution of the orthogonal Procrustes problem", Psychometrika 1966.
    """

    name: ClassVar[str] = "rotation"

    damping: float = argument(
        0.1,
        """How much the old weight counts: ``d``, in units of the mean square of an output. Directions that no sample
        has are then not rotated.""",
        above=0,
    )

    def fitted(self, graph_module: fx.GraphModule, site: FitSite, run: PairedRuns) -> Mapping[fx.Node, torch.Tensor]:
        W = site.matrices(graph_module)
        w = W[..., site.kept]
        both = W.new_zeros(len(W), W.shape[1], W.shape[1], dtype=torch.float64)
        scale = both.new_zeros(len(W))
        for matrix, X, y, _ in fit_data(site, run):
            Z = X @ w[matrix].T
            both[matrix] += y.T @ Z
            scale[matrix] += Z.square().sum() / W.shape[1]
        all_reduce((both, scale))
        mean = float(scale.sum()) / max(1, int(scale.count_nonzero()))
        rotated = w.clone()
        for matrix in deal(range(len(W))):
            if not scale[matrix]:
                continue
            both[matrix].diagonal().add_(self.damping * mean)
            left, _, right = torch.linalg.svd(both[matrix])
            rotated[matrix] = (left @ right).to(w.dtype) @ w[matrix]
        broadcast_dealt(rotated)
        return {site.weight: site.weight_of(W.index_copy(2, site.kept, rotated))}
