"""Fused normalisations."""

from __future__ import annotations

from fxprune.axes import new_factor, product
from fxprune.rules.base import OpSite, TensorAxes
from fxprune.rules.registry import rule

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "weight_norm"]


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


@rule("instance_norm")
def instance_norm(op: OpSite) -> None:
    """Statistics per channel (axis 1) over the axes behind it: channels are independent."""
    batch_norm(op)
    x = op.need("input")
    _zero_channels(op, x)
    for i in range(2, x.rank) if op.arg("use_input_stats", True) else ():
        op.renormalise(x, i)


@rule("group_norm")
def group_norm(op: OpSite) -> None:
    """Channels (axis 1) are ``(groups * channels of a group)``: groups are independent, inside one there is a norm."""
    x, groups = op.need("input"), new_factor(op.arg("num_groups"))
    inside = new_factor(x.sizes[1] // groups.size)
    op.tie_all(x)
    op.equate(product(groups, inside), x.axes[1])
    op.journal.renormalised.append((inside, op.node.name))
    for i in range(2, x.rank):
        op.renormalise(x, i)
    op.literal("num_groups", groups)
    _zero_channels(op, x)
    for name in ("weight", "bias"):
        parameter = op.tensor(name)
        if parameter is not None:
            op.tie(parameter, 0, x, 1)


def _zero_channels(op: OpSite, x: TensorAxes) -> None:
    """A channel is zero where scale and shift are, or where it was if there are none."""
    scale = [parameter for name in ("weight", "bias") if (parameter := op.tensor(name)) is not None]
    op.keep_zeros(op.out, 1, *((parameter, 0) for parameter in scale), *(((x, 1),) if len(scale) < 2 else ()))


@rule("_weight_norm")
def weight_norm(op: OpSite) -> None:
    """``v * g / norm(v)``, the norm over all axes but ``dim``, where one of zeros has no value."""
    v, dim = op.need("v"), op.arg("dim", 0)
    op.tie_all(v)
    op.broadcast(op.need("g"))
    for i in range(v.rank):
        if i == dim % v.rank and dim != -1:
            op.renormalise(v, i)
        else:
            op.add_up((v, i))
            op.keep_zeros(op.out, i, (v, i))
