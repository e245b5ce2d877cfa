"""Fused normalisations."""

from __future__ import annotations

from fxprune.axes import new_factor, product
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes

__all__ = ["group_norm", "instance_norm", "layer_norm", "weight_norm"]

rule(
    *("batch_norm", "_native_batch_norm_legit_no_training"),
    notation="input[n, c, *s], weight[c]?, bias[c]?, running_mean[c]?, running_var[c]? -> out[n, c, *s]"
    "  c zero with weight, bias",
)  # statistics per channel are kept in buffers while evaluating: channels are independent


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(op: OpSite) -> None:
    """``out = norm(x) * w + b`` over the last ``len(normalized_shape)`` axes; beside these, of zeros it is ``b``."""
    x, shape = op.need("input"), op.arg("normalized_shape")
    first = x.rank - len(shape)
    op.tie_all(x)
    for out in op.outs[1:]:  # the statistics themselves
        op.tie_all(x, out, but=range(first, x.rank))
    for i in range(first) if op.tensor("bias") is None else ():
        op.keep_zeros(op.out, i, (x, i))
    for j in range(len(shape)):
        op.take_statistic(x, first + j)
        op.size_argument("normalized_shape", x.axes[first + j], j)
        for name in ("weight", "bias"):
            parameter = op.tensor(name)
            if parameter is not None:
                op.tie(parameter, j, x, first + j)
    if op.name != "layer_norm" and op.arg("eps") is not None:  # w x / sqrt(mean(x x) + eps); without eps, one by dtype
        op.average(x, range(first, x.rank), power=0.5, epsilon="eps", weight="weight")


@rule("instance_norm")
def instance_norm(op: OpSite) -> None:
    """Statistics per channel (axis 1) over the axes behind it: channels are independent."""
    x = op.need("input")
    op.tie_all(x)
    own = op.arg("use_input_stats", True)
    _scale_channels(op, x, own)
    for i in range(2, x.rank) if own else ():
        op.take_statistic(x, i)


@rule("group_norm")
def group_norm(op: OpSite) -> None:
    """Channels (axis 1) are ``(groups * channels of a group)``: groups are independent, inside one there is a norm."""
    x, groups = op.need("input"), new_factor(op.arg("num_groups"))
    inside = new_factor(x.sizes[1] // groups.size)
    op.tie_all(x)
    op.equate(product(groups, inside), x.axes[1])
    op.take_statistic_of(inside)
    for i in range(2, x.rank):
        op.take_statistic(x, i)
    op.size_argument("num_groups", groups)
    _scale_channels(op, x)


def _scale_channels(op: OpSite, x: TensorAxes, own: bool = True) -> None:
    """A channel is zero where scale and shift are; without these where it and its mean were.

    Args:
        op: the op.
        x: its input.
        own: whether the mean is that of the input itself, so zero where that is.
    """
    names = ("weight", "bias", "running_mean", "running_var")
    given = {name: parameter for name in names if (parameter := op.tensor(name)) is not None}
    for parameter in given.values():
        op.tie(parameter, 0, x, 1)
    scale = [(given[name], 0) for name in ("weight", "bias") if name in given]
    mean = [] if own or "running_mean" not in given else [(given["running_mean"], 0)]
    op.keep_zeros(op.out, 1, *scale, *(((x, 1), *mean) if len(scale) < 2 else ()))


@rule("_weight_norm")
def weight_norm(op: OpSite) -> None:
    """``v * g / norm(v)``, the norm over all axes but ``dim``, where one of zeros has no value."""
    v, dim = op.need("v"), op.arg("dim", 0)
    op.tie_all(v)
    op.broadcast(op.need("g"))
    for i in range(v.rank):
        if i == dim % v.rank and dim != -1:
            op.take_statistic(v, i)
        else:
            op.add_up((v, i))
            op.keep_zeros(op.out, i, (v, i))
