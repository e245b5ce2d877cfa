"""Rules of reductions, sorts and fused norms."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.axes import new_factor, product
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import TensorAxes


def _reduced(op: OpSite) -> tuple[TensorAxes, tuple[int, ...]]:
    """The input and its reduced axes, non-negative; all axes if ``dim`` names none."""
    x, dim = op.need(next((name for name in ("x", "A") if op.has(name)), "self")), op.arg("dim")
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return x, tuple(range(x.rank))
    return x, tuple(i % max(x.rank, 1) for i in (dim if isinstance(dim, Sequence) else (dim,)))


@rule("sum", "norm", "linalg_vector_norm", values="reduced")
def sum_or_norm(op: OpSite) -> None:
    """A sum over ``dim``, of powers for a norm: units that are zero can be removed; the other axes stay."""
    x, dims = _reduced(op)
    order = op.arg("ord", op.arg("p", 2))
    for i in dims:
        if isinstance(order, int | float) and order >= 0:
            op.add_up((x, i))
        else:
            op.take_statistic(x, i)
    op.tie_others(x, dims)


@rule("linalg_norm", "linalg_matrix_norm", values="reduced")
def matrix_norm(op: OpSite) -> None:
    """The root of a sum of squares; a norm by rows, columns or singular values freezes its axes."""
    (x, dims), order = _reduced(op), op.arg("ord")
    if op.name == "linalg_matrix_norm" and op.arg("dim") is None:
        dims = dims[-2:]
    for i in dims:
        if order in (None, "fro") or (order == 2 and len(dims) == 1):
            op.add_up((x, i))
        else:
            op.freeze(x, i, f"{op.node.target} of this order picks from this axis")
    op.tie_others(x, dims)


@rule("var", "std", "var_mean", "std_mean", values="reduced")
def variance(op: OpSite) -> None:
    """A statistic as in :func:`reduce`; division by ``units - correction`` needs more than ``correction`` units."""
    reduce(op)
    x, dims = _reduced(op)
    given = op.arg("correction", None)
    correction = int(op.arg("unbiased", True)) if given is None else int(given)
    if correction > 0:
        op.need_units_of(product(*(x.axes[i] for i in dims)), correction + 1)


@rule("logsumexp")
@rule("mean", "amax", "amin", values="reduced")
def reduce(op: OpSite) -> None:
    """A statistic over ``dim``: removing units of it changes the statistic; the other axes stay."""
    x, dims = _reduced(op)
    op.take_statistic(x, dims)
    if op.name == "mean":
        op.average(x, dims, power=-1)
    op.tie_others(x, dims)


@rule("argmax", "argmin", "max.dim", "min.dim")
def argmax(op: OpSite) -> None:
    """The largest or smallest along ``dim``, or its position, among the remaining units."""
    if op.arg("dim") is None:
        order_statistic(op)
        return
    x, (i,) = _reduced(op)
    op.take_statistic(x, i)
    op.tie_others(x, (i,))
    op.hold_positions(op.outs[-1], x, i)
    if len(op.outs) == 1 or any(user.args[1:] == (1,) and user.users for user in op.node.users):
        op.need_units(x, i, 1)


@rule("prod", values="reduced")
@rule("max", "min", "any", "all", "median", "mode", "kthvalue")
def order_statistic(op: OpSite) -> None:
    """A value chosen by comparison, or a product, over ``dim``, which keeps its units."""
    x, dims = _reduced(op)
    op.freeze(x, dims, f"{op.node.target} picks from this axis")
    op.tie_others(x, dims)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(op: OpSite) -> None:
    """Shares of the units along ``dim``: they may be fewer if the units are experts; any other axis keeps its units."""
    x, dims = _reduced(op)
    op.tie_all(x)
    for i in dims:
        op.compete(x, i, f"{op.node.target} runs over this axis")


@rule("cumsum")
def cumsum(op: OpSite) -> None:
    """Running sums along ``dim``: units that are zero can be removed."""
    x, dims = _reduced(op)
    op.tie_all(x)
    for i in dims:
        op.add_up((x, i))
    op.keep_all_zeros(x, but=dims)


@rule("flip", "fliplr", "flipud", "roll", values="moved")
@rule("cumprod", "logcumsumexp")
def scan(op: OpSite) -> None:
    """Each value depends on all others, or on those before it, along ``dim``: that axis keeps its units."""
    x, dims = _reduced(op)
    op.tie_all(x)
    named = {"fliplr": (1,), "flipud": (0,)}.get(op.name) or op.arg("dims", ())
    listed = tuple(i % x.rank for i in named) or tuple(range(x.rank))  # a roll of none rolls all
    op.freeze(x, dims if op.has("dim") else listed, f"{op.node.target} runs over this axis")


@rule("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm")
def batch_norm(op: OpSite) -> None:
    """Statistics per channel (axis 1), from buffers while evaluating: channels are independent.

    Without buffers they are those of ``x`` over all other axes, as where convolutions standardise their weights; for an
    instance norm, over the axes behind the channels.
    """
    x = op.need("input")
    each = op.has("use_input_stats")
    from_input = op.arg("use_input_stats", True) if each else op.arg("training") or op.tensor("running_mean") is None
    op.tie_all(x)
    _tie_channel_parameters(op, x, from_input)
    if from_input:
        op.take_statistic(x, range(2, x.rank) if each else (0, *range(2, x.rank)))


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(op: OpSite) -> None:
    """``out = norm(x) * w + b`` over the last ``len(normalized_shape)`` axes; where ``x`` is zero it is ``b``."""
    x, shape = op.need("input"), op.arg("normalized_shape")
    first = x.rank - len(shape)
    op.tie_all(x)
    for out in op.outs[1:]:  # the statistics themselves
        op.tie_all(x, out, but=range(first, x.rank))
    if op.tensor("bias") is None:
        op.keep_all_zeros(x, but=range(first, x.rank))
    for j in range(len(shape)):
        op.take_statistic(x, first + j)
        op.size_argument("normalized_shape", x.axes[first + j], j)
        for parameter in (*op.list_of("weight"), *op.list_of("bias")):
            op.tie(parameter, j, x, first + j)
    if op.name != "layer_norm" and op.arg("eps") is not None:  # w x / sqrt(mean(x x) + eps); default eps is by dtype
        op.average(x, range(first, x.rank), power=0.5, epsilon="eps", weight="weight")


@rule("group_norm")
def group_norm(op: OpSite) -> None:
    """Channels (axis 1) are ``(groups * channels of a group)``: groups are independent, each is normalised."""
    x, groups = op.need("input"), new_factor(op.arg("num_groups"))
    inside = new_factor(x.sizes[1] // groups.size)
    op.tie_all(x)
    op.equate(product(groups, inside), x.axes[1])
    op.take_statistic_of(inside)
    op.take_statistic(x, range(2, x.rank))
    op.size_argument("num_groups", groups)
    _tie_channel_parameters(op, x)


def _tie_channel_parameters(op: OpSite, x: TensorAxes, from_input: bool = True) -> None:
    """A channel is zero where scale and shift are; without these, where ``x`` and its mean were.

    ``from_input`` says that the mean is that of ``x`` itself, so that it is zero where ``x`` is.
    """
    names = ("weight", "bias", "running_mean", "running_var")
    given = {name: parameter for name in names if (parameter := op.tensor(name)) is not None}
    for parameter in given.values():
        op.tie(parameter, 0, x, 1)
    scale = [(given[name], 0) for name in ("weight", "bias") if name in given]
    mean = [] if from_input or "running_mean" not in given else [(given["running_mean"], 0)]
    op.keep_zeros(op.out, 1, *scale, *(((x, 1), *mean) if len(scale) < 2 else ()))


@rule("_weight_norm")
def weight_norm(op: OpSite) -> None:
    """``v * g / norm(v)``, the norm over all axes except ``dim``; undefined where ``v`` is zero along these."""
    v, dim = op.need("v"), op.arg("dim", 0)
    op.tie_all(v)
    op.broadcast(op.need("g"))
    outer = () if dim == -1 else (dim % v.rank,)
    op.take_statistic(v, outer)
    for i in range(v.rank):
        if i not in outer:
            op.add_up((v, i))
    op.keep_all_zeros(v, but=outer)
