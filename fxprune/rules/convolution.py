"""Rules of sliding ops: convolutions, pooling, windows. Channels are removed one by one or group by group."""

from __future__ import annotations

from fxprune.axes import new_factor, product
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Role, TensorAxes


@rule(
    *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    values="product",
    added="bias",
)
def convolution(op: OpSite) -> None:
    """Weight ``(out, in / groups, kernel..)``, transposed ``(in, out / groups, kernel..)``.

    Channels are axis 1 of input and output, axis 0 without a batch. Channels that are spread over the groups are
    ``(groups * channels of a group)``: whole groups may be removed, and the same channel of each group.
    """
    x, weight = op.need("input"), op.need("weight")
    channel = x.rank - weight.rank + 1
    transposed = bool(op.arg("transposed", "transpose" in op.name))
    spread, whole = ((x, channel), (op.out, channel)) if transposed else ((op.out, channel), (x, channel))
    groups = new_factor(op.arg("groups", 1))
    if channel:
        op.tie(x, 0, op.out, 0)
    op.tie(weight, 0, *spread)
    op.equate(product(groups, weight.axes[1]), whole[0].axes[channel])
    op.equate(product(groups, new_factor(weight.sizes[0] // groups.size)), weight.axes[0])
    op.link(weight, 1, *whole)
    op.add_up((weight, 0 if transposed else 1), (x, channel))
    if weight.sizes[0 if transposed else 1] > 1:
        op.tag(x, channel, Role.CONVOLVED)
        op.tag(op.out, channel, Role.CONVOLVED)
    if groups.size > 1:
        op.link(x, channel, op.out, channel)
        op.link(weight, 0, *whole)
        op.size_argument("groups", groups)
    bias = op.tensor("bias")
    if bias is not None:
        op.tie(bias, 0, op.out, channel)
    for tap in range(2, weight.rank):
        i = channel + tap - 1
        if weight.sizes[tap] == 1 and _is_argument(op, "stride", 1, tap) and _is_argument(op, "padding", 0, tap):
            op.tie(x, i, op.out, i)
            continue
        op.freeze(x, i, "a convolution slides over this axis")
        op.freeze(weight, tap, "a kernel's taps are fixed")
        op.freeze(op.out, i, "a convolution slides over this axis")


def _is_argument(op: OpSite, name: str, value: int, tap: int) -> bool:
    found = op.arg(name, value)
    if isinstance(found, list | tuple):
        return bool(found) and found[min(tap - 2, len(found) - 1)] == value
    return found in (value, "same", "valid")


_POOLS = (
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"
    " avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d"
    " adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d"
    " upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_linear1d"
    " upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
    " reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
)


@rule(*_POOLS.split())
def pool(op: OpSite) -> None:
    """Each channel by itself; the op slides over the last axes, as many as its name says (``max_pool2d``: two)."""
    x = op.tensors[0]
    space = next(int(sign) for sign in reversed(op.name) if sign.isdigit())
    for out in op.outs:
        op.tie_all(x, out, but=range(-space, 0))
    for tensor in (*op.outs, x):
        op.freeze(tensor, range(-space, 0), f"{op.node.target} slides over this axis")
    op.keep_all_zeros(x, but=range(x.rank - space, x.rank))  # other outputs are positions


@rule("unfold", "unfold_copy")
def unfold(op: OpSite) -> None:
    """Windows along ``dimension``, which becomes their number; a new last axis holds the entries of each window."""
    x = op.need("self")
    dim = op.arg("dimension") % max(x.rank, 1)
    op.tie_all(x, but=(dim,))
    op.freeze(x, dim, "windows slide over this axis")
    op.freeze(op.out, (dim, -1), "windows slide over this axis")
    op.keep_all_zeros(x, but=(dim,))


@rule("im2col", "col2im")
def im2col(op: OpSite) -> None:
    """An image ``(.., channels, height, width)`` and its windows as columns ``(.., channels * taps, places)``."""
    x = op.need("self")
    image, columns = (x, op.out) if x.rank > op.out.rank else (op.out, x)
    _spread(op, columns, columns.rank - 2, image, image.rank - 3, "a kernel's taps are fixed")
    op.freeze(columns, -1, "windows slide over this axis")
    op.freeze(image, (-1, -2), "windows slide over this axis")


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def pixel_shuffle(op: OpSite) -> None:
    """``(.., channels * factor ** 2, height, width)`` and ``(.., channels, height * factor, width * factor)``."""
    x = op.need("self")
    many, few = (x, op.out) if x.sizes[-3] > op.out.sizes[-3] else (op.out, x)
    if many.sizes == few.sizes:
        op.freeze_all("channels change places")
        return
    _spread(op, many, many.rank - 3, few, few.rank - 3, "pixels of a block are fixed")
    for tensor in (many, few):
        op.freeze(tensor, (-1, -2), "pixels change places along this axis")


def _spread(op: OpSite, many: TensorAxes, i: int, few: TensorAxes, j: int, reason: str) -> None:
    """Axis ``i`` of ``many`` is axis ``j`` of ``few`` times a frozen factor; the axes before are the same."""
    inner = new_factor(many.sizes[i] // few.sizes[j])
    op.freeze_expr(inner, reason)
    op.equate(product(few.axes[j], inner), many.axes[i])
    op.link(many, i, few, j)
    x, y = (many, i) if op.out is few else (few, j)
    op.keep_zeros(op.out, j if op.out is few else i, (x, y))
    for k in range(i):
        op.tie(many, k, few, k)
        op.keep_zeros(op.out, k, (x, k))
