"""Fused normalisations."""

from __future__ import annotations

from fxprune.rules.base import OpSite
from fxprune.rules.registry import rule

__all__ = ["batch_norm", "group_norm", "layer_norm"]


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(op: OpSite) -> None:
    """``out = norm(x) * w + b`` over the last ``len(normalized_shape)`` axes."""
    x, shape = op.need("input"), op.arg("normalized_shape")
    op.tie_all(x)
    for j in range(len(shape)):
        i = x.rank - len(shape) + j
        op.renormalise(x, i)
        op.literal("normalized_shape", x.axes[i], j)
        for name in ("weight", "bias"):
            parameter = op.tensor(name)
            if parameter is not None:
                op.tie(parameter, j, x, i)


@rule("batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(op: OpSite) -> None:
    """Statistics per channel (axis 1), kept in buffers while evaluating: channels are independent."""
    x = op.need("input")
    op.tie_all(x)
    for name in ("weight", "bias", "running_mean", "running_var"):
        parameter = op.tensor(name)
        if parameter is not None:
            op.tie(parameter, 0, x, 1)


@rule("group_norm", "instance_norm")
def group_norm(op: OpSite) -> None:
    """Statistics over groups of neighbouring channels: channels must stay where they are."""
    x = op.need("input")
    op.tie_all(x)
    op.freeze(x, 1, "a group norm runs over neighbouring channels")
    for name in ("weight", "bias", "running_mean", "running_var"):
        parameter = op.tensor(name)
        if parameter is not None:
            op.tie(parameter, 0, x, 1)
