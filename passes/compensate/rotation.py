"""Rotation: what a weight that lost inputs gives is turned towards what the dense one gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxprune.masking.compare import SideBySide
from fxprune.offload.ranks import add_up
from fxprune.pipeline.arguments import number

from .base import FitPass, Site, pairs

__all__ = ["RotationPass"]


@dataclass(frozen=True, eq=False)
class RotationPass(FitPass):
    """The outputs of each weight that loses inputs are turned, all by one rotation, towards what the dense one gave.

    With ``w`` the kept columns of a weight ``(out, in)``, ``Z = w X (out, tokens)`` what they give in the masked graph
    and ``Y (out, tokens)`` what is wanted, the new columns are ``Q w`` for the orthogonal ``Q`` that minimises
    ``|Y - Q Z|^2 + d |Q - 1|^2``, which is ``U V'`` of the singular value decomposition of ``Y Z' + d``. No norm of a
    column changes, so it cannot overfit as much as a free fit does, and does with fewer samples.

    As with ``least-squares``, ``Y`` is what the sum lacks where the product is added to another value; biases stay.
    Matrices side by side, as those of experts, have a rotation each, from the tokens that reach them.

    Source: "Rotation-Constrained Error Update" (RCPU), the orthogonal Procrustes problem; Schönemann, "A generalized
    solution of the orthogonal Procrustes problem", Psychometrika 1966.

    Args:
        damping: ``d``: how much staying as it is counts, in units of the mean square of an output; above 0. Directions
            that no sample has are then not turned.
    """

    name: ClassVar[str] = "rotation"

    damping: float = 0.1

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            ArgumentError: the damping is not above 0, or the batch below 1.
        """
        super().__post_init__()
        object.__setattr__(self, "damping", number("damping", self.damping, above=0))

    def fitted(self, graph_module: fx.GraphModule, site: Site, run: SideBySide) -> Mapping[fx.Node, torch.Tensor]:
        """Return the weight, turned."""
        W = site.matrices(graph_module)
        w = W[..., site.kept]
        both = W.new_zeros(len(W), W.shape[1], W.shape[1], dtype=torch.float64)
        scale = both.new_zeros(len(W))
        for matrix, X, y in pairs(site, run):
            Z = X @ w[matrix].T
            both[matrix] += y.T @ Z
            scale[matrix] += Z.square().sum() / W.shape[1]
        add_up((both, scale))
        held = float(scale.sum()) / max(1, int(scale.count_nonzero()))
        turned = w.clone()
        for matrix in scale.nonzero().flatten().tolist():
            both[matrix].diagonal().add_(self.damping * held)
            left, _, right = torch.linalg.svd(both[matrix])
            turned[matrix] = (left @ right).to(w.dtype) @ w[matrix]
        return {site.weight: site.weight_of(W.index_copy(2, site.kept, turned))}
