"""A call of every op that has a rule: made from the op's schema where it takes tensors of one shape, else by hand."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from fxprune.graph.tensors import output_name
from fxprune.rules import registered_rules
from fxprune.rules.apply import apply_rule, fresh_axes
from fxprune.rules.convolution import _POOLS
from fxprune.rules.statements import Positions, Statements

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
Tensors = dict[str, torch.Tensor]
_generator = torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Sample:
    """A call of an op.

    ``positions`` says which tensors among the arguments hold positions, by number, with number and axis of another one.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    positions: Mapping[int, tuple[int, int]]


class Applied:
    """A sample as a graph of one op, after its rule ran."""

    def __init__(self, sample: Sample) -> None:
        self.inputs: Tensors = {}
        self.graph = fx.Graph(nn.Module())
        self.stated = Statements()
        args = sample.args
        if sample.op is operator.getitem:
            args = (self._several(args[0]), args[1])
        args, kwargs = tree_map_only(torch.Tensor, self._read, (tuple(args), sample.kwargs))
        self.node = self.graph.call_function(sample.op, args, kwargs)
        names = list(self.inputs)
        for i, (other, dim) in sample.positions.items():
            (of,) = self.stated.tensors[names[other]]
            self.stated.positions[names[i]] = Positions(of, dim)
        self.node.meta["val"] = self.value(self.inputs, self.node.args, self.node.kwargs)
        self.site = apply_rule(self.node, self.stated)
        self.text = str(self.site)

    def _read(self, value: torch.Tensor) -> fx.Node:
        name = f"t{len(self.inputs)}"
        node = self.graph.create_node("get_attr", name, name=name)
        node.meta["val"] = self.inputs[name] = value
        self.stated.tensors[name] = (fresh_axes(name, value),)
        return node

    def _several(self, values: tuple[torch.Tensor, ...]) -> fx.Node:
        node = self.graph.placeholder("several")
        node.meta["val"] = values
        self.inputs |= {output_name(node, i): value for i, value in enumerate(values)}
        self.stated.tensors["several"] = tuple(fresh_axes(output_name(node, i), x) for i, x in enumerate(values))
        return node

    def value(self, inputs: Tensors, args: Any, kwargs: Any) -> Any:
        """What the op makes of `inputs`, which stay as they are."""

        def read(node: fx.Node) -> Any:
            if node.op == "placeholder":
                return tuple(value.clone() for name, value in inputs.items() if name.startswith(node.name))
            return inputs[node.name].clone()

        read_args, read_kwargs = fx.map_arg((args, kwargs), read)
        return self.node.target(*read_args, **read_kwargs)  # type: ignore[operator]


def call(op: Any, *args: Any, at: Mapping[int, tuple[int, int]] = MappingProxyType({}), **kwargs: Any) -> Sample:
    """A call where ``at={1: (0, 2)}`` says that tensor 1 holds positions along axis 2 of tensor 0."""
    return Sample(op, args, kwargs, at)


def same(names: str, *args: Any, overload: str = "default", **options: Any) -> list[Sample]:
    """The same call of several ops of ATen."""
    return [call(getattr(getattr(aten, name), overload), *args, **options) for name in names.split()]


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


def _two(*shape: int) -> list[torch.Tensor]:
    return [x(*shape), x(*shape)]


def up(*shape: int) -> torch.Tensor:
    return x(*shape).abs() + 0.3


def z(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator, dtype=torch.complex128)


def i(below: int, *shape: int) -> torch.Tensor:
    return torch.randint(below, shape, generator=_generator)


def b(*shape: int) -> torch.Tensor:
    return x(*shape) > 0


def _recurrent(gates: int, width: int, hidden: int, layers: int, directions: int) -> list[torch.Tensor]:
    """The weights and biases of the layers and directions of a recurrent op."""
    sizes = [width if i < directions else hidden * directions for i in range(layers * directions)]
    rows = gates * hidden
    return [one for size in sizes for one in (x(rows, size), x(rows, hidden), x(rows), x(rows))]


def _pool(name: str) -> Sample:
    space = int(next(sign for sign in reversed(name) if sign.isdigit()))
    image, ones, twos = x(2, 3, *(4, 6, 8)[:space]), [1] * space, [2] * space
    op = getattr(aten, name).default
    if "pad" in name:
        return call(op, image, ones * 2)
    if "upsample" in name:
        sizes = [size * 2 for size in image.shape[2:]]
        return call(op, image, sizes, *((False,) if "nearest" not in name else ()))
    return call(op, image, twos)


_BY_HAND: list[Sample] = [
    # pools and paddings
    *(_pool(name) for name in _POOLS.split() if hasattr(aten, name)),
    # products and recurrent layers
    *same("outer ger", x(3), x(4)),
    call(aten.linear.default, x(2, 3, 4), x(5, 4), x(5)),
    call(aten.linear.default, x(4), x(5, 4)),
    call(aten.mm.default, x(3, 4), x(4, 5)),
    call(aten.bmm.default, x(2, 3, 4), x(2, 4, 5)),
    call(aten.mv.default, x(3, 4), x(4)),
    call(aten.dot.default, x(4), x(4)),
    call(aten.addmm.default, x(5), x(3, 4), x(4, 5)),
    call(aten.addmm.default, x(3, 1), x(3, 4), x(4, 5), alpha=0.5),
    call(aten.baddbmm.default, x(2, 1, 5), x(2, 3, 4), x(2, 4, 5)),
    call(aten.matmul.default, x(2, 3, 4), x(2, 4, 5)),
    call(aten.matmul.default, x(2, 1, 3, 4), x(6, 4, 5)),
    call(aten.matmul.default, x(4), x(2, 4, 5)),
    call(aten.matmul.default, x(2, 3, 4), x(4)),
    call(aten.linalg_matmul.default, x(2, 3, 4), x(4, 5)),
    call(aten.tensordot.default, x(2, 3, 4), x(4, 3, 5), [1, 2], [1, 0]),
    call(aten.inner.default, x(2, 4), x(3, 4)),
    call(aten.einsum.default, "bqhd,bkhd->bhqk", [x(2, 3, 4, 5), x(2, 6, 4, 5)]),
    call(aten.einsum.default, "...i,oi", [x(2, 3, 4), x(5, 4)]),
    call(aten.einsum.default, "bii->bi", [x(2, 3, 3)]),
    call(aten.einsum.default, "ii", [x(3, 3)]),
    call(aten.einsum.default, "bgd,gde,e->bge", [x(2, 3, 4), x(3, 4, 5), x(5)]),
    call(aten.einsum.default, "bij,bjk,bkl->lib", [x(2, 3, 4), x(2, 4, 5), x(2, 5, 6)]),
    call(aten.kron.default, x(2, 3), x(4, 5)),
    call(aten.kron.default, x(2, 3, 4), x(5)),
    call(aten.linalg_vecdot.default, x(2, 3, 4), x(2, 3, 4)),
    call(aten.linalg_vecdot.default, x(2, 3, 4), x(3, 1), dim=1),
    call(aten.conv1d.default, x(2, 6, 9), x(4, 3, 3), x(4), [1], [0], [1], 2),
    call(aten.conv1d.default, x(6, 9), x(4, 6, 1)),
    call(aten.conv2d.default, x(2, 3, 5, 6), x(4, 3, 2, 2), x(4)),
    call(aten.gru.input, x(2, 5, 6), x(1, 2, 4), _recurrent(3, 6, 4, 1, 1), True, 1, 0.0, False, False, True),
    call(aten.gru.input, x(5, 2, 6), x(4, 2, 3), _recurrent(3, 6, 3, 2, 2), True, 2, 0.0, False, True, False),
    call(aten.lstm.input, x(5, 2, 6), _two(1, 2, 4), _recurrent(4, 6, 4, 1, 1), True, 1, 0.0, *[False] * 3),
    call(aten.lstm.input, x(2, 5, 6), _two(4, 2, 3), _recurrent(4, 6, 3, 2, 2), True, 2, 0.0, False, True, True),
    call(aten.rnn_tanh.input, x(5, 2, 6), x(4, 2, 3), _recurrent(1, 6, 3, 2, 2), True, 2, 0.0, False, True, False),
    call(aten.rnn_relu.input, x(2, 5, 6), x(1, 2, 4), _recurrent(1, 6, 4, 1, 1), True, 1, 0.0, False, False, True),
    call(aten.lstm_cell.default, x(2, 6), _two(2, 4), *_recurrent(4, 6, 4, 1, 1)),
    call(aten.gru_cell.default, x(2, 6), x(2, 4), *_recurrent(3, 6, 4, 1, 1)),
    call(aten.rnn_tanh_cell.default, x(2, 4), x(2, 4), *_recurrent(1, 4, 4, 1, 1)[:2]),
    call(aten.rnn_relu_cell.default, x(2, 6), x(2, 4), *_recurrent(1, 6, 4, 1, 1)),
    call(aten.conv3d.default, x(2, 3, 4, 5, 6), x(4, 3, 2, 2, 2), x(4)),
    call(aten.convolution.default, x(2, 6, 9), x(4, 3, 3), x(4), [1], [0], [1], False, [0], 2),
    call(aten.convolution.default, x(2, 6, 9), x(6, 2, 3), x(4), [1], [0], [1], True, [0], 2),
    call(aten.conv_transpose1d.default, x(2, 6, 9), x(6, 2, 3), x(4), [1], [0], [0], 2),
    call(aten.conv_transpose2d.input, x(2, 3, 5, 6), x(3, 4, 2, 2), x(4)),
    call(aten.conv_transpose3d.input, x(2, 3, 4, 5, 6), x(3, 4, 2, 2, 2), x(4)),
    call(SDPA, x(2, 3, 5, 6), x(2, 3, 7, 6), x(2, 3, 7, 4), x(5, 7), scale=0.4),
    call(SDPA, x(2, 4, 5, 6), x(2, 2, 7, 6), x(2, 2, 7, 3), scale=0.4, enable_gqa=True),
    # norms
    call(aten.layer_norm.default, x(2, 3, 4), [4], x(4), x(4)),
    call(aten.layer_norm.default, x(2, 3, 4), [3, 4]),
    call(aten.rms_norm.default, x(2, 3, 4), [4], x(4), 1e-6),
    call(aten._fused_rms_norm.default, x(2, 3, 4), [4], x(4), 1e-6),
    call(aten.batch_norm.default, x(2, 3, 4), x(3), x(3), x(3), up(3), False, 0.1, 1e-5, False),
    call(aten.batch_norm.default, x(2, 3, 4), None, None, None, None, True, 0.1, 1e-5, False),
    call(aten._native_batch_norm_legit_no_training.default, x(2, 3, 4), x(3), x(3), x(3), up(3), 0.1, 1e-5),
    call(aten.instance_norm.default, x(2, 3, 4), x(3), x(3), None, None, True, 0.1, 1e-5, False),
    call(aten.instance_norm.default, x(2, 3, 4), None, None, x(3), up(3), False, 0.1, 1e-5, False),
    call(aten.group_norm.default, x(2, 6, 5), 3, x(6), x(6)),
    call(aten._weight_norm.default, x(3, 4), up(3, 1)),
    # shapes
    *same("swapaxes swapdims", x(2, 3, 4), 0, 2),
    *same("reshape_as view_as", x(2, 12), x(2, 3, 4)),
    *same("split_with_sizes split_with_sizes_copy", x(2, 5), [2, 3], 1),
    *same("_conj _conj_physical conj_physical", z(3, 4)),
    *same("unfold unfold_copy", x(2, 9, 3), 1, 3, 2),
    call(aten.reshape.default, x(2, 12), [2, 3, 4]),
    call(aten.reshape.default, x(4, 6), [2, 2, 6]),
    call(aten.view.default, x(2, 3, 4), [2, 12]),
    call(aten._unsafe_view.default, x(2, 3, 4), [6, 4]),
    call(aten.flatten.using_ints, x(2, 3, 4), 1),
    call(aten.ravel.default, x(2, 3)),
    call(aten.unflatten.int, x(2, 12, 5), 1, [3, 4]),
    call(aten.unsqueeze.default, x(2, 3), 1),
    call(aten.squeeze.dims, x(2, 1, 3), [1]),
    call(aten.squeeze_.dim, x(2, 1, 3), 1),
    call(aten.transpose.int, x(2, 3, 4), 1, -1),
    call(aten.t.default, x(2, 3)),
    call(aten.t.default, x(3)),
    call(aten.permute.default, x(2, 3, 4), [2, 0, -2]),
    call(aten.movedim.int, x(2, 3, 4), 0, -1),
    call(aten.moveaxis.intlist, x(2, 3, 4), [0, 2], [2, 1]),
    call(aten.adjoint.default, z(2, 3, 4)),
    call(aten.matrix_H.default, z(3, 4)),
    call(aten.expand.default, x(3, 1, 4), [2, -1, 5, 4]),
    call(aten.expand_as.default, x(3, 1), x(2, 3, 4)),
    call(aten.broadcast_to.default, x(3, 1), [2, 3, 4]),
    call(aten.broadcast_tensors.default, [x(3, 1), x(2, 1, 4)]),
    call(aten.repeat.default, x(3, 4), [2, 1, 5]),
    call(aten.tile.default, x(3, 4), [2, 1]),
    call(aten.repeat_interleave.self_int, x(3, 4), 2, 1, output_size=8),
    call(aten.repeat_interleave.self_int, x(3, 4), 2),
    call(aten.diagonal.default, x(3, 4, 3), 0, 0, 2),
    call(aten.diagonal.default, x(2, 4, 4), 1, -2, -1),
    call(aten.diagonal.default, x(2, 3, 4), 0, -2, -1),
    call(aten.diagonal_copy.default, x(3, 3)),
    call(aten.diag_embed.default, x(2, 3)),
    call(aten.diag_embed.default, x(2, 3), 0, 0, -1),
    call(aten.diag_embed.default, x(2, 3), 1),
    call(aten.trace.default, x(3, 3)),
    call(aten.trace.default, x(3, 4)),
    call(aten.block_diag.default, [x(2, 3), x(4, 2)]),
    call(aten.block_diag.default, [x(3), x(2, 2)]),
    call(aten.cat.default, [x(2, 3), x(2, 4)], 1),
    call(aten.concat.default, [x(2, 3), x(2, 4)], -1),
    call(aten.concatenate.default, [x(2, 3), x(4, 3)]),
    call(aten.stack.default, [x(2, 3), x(2, 3)], 1),
    call(aten.split.Tensor, x(2, 6), 3, 1),
    call(aten.chunk.default, x(2, 6), 2, 1),
    call(aten.tensor_split.sections, x(2, 6), 2, 1),
    call(aten.unbind.int, x(2, 3, 4), 1),
    call(aten.select.int, x(2, 3, 4), 1, 2),
    call(aten.slice.Tensor, x(2, 9), 1, 2, 6),
    call(aten.slice.Tensor, x(2, 9), 1, 1, 9, 3),
    call(aten.slice.Tensor, x(2, 9), 1, 0, 8, 3),
    call(aten.narrow.default, x(2, 9), 1, 2, 4),
    call(aten.constant_pad_nd.default, x(2, 3, 4), [0, 0, 1, 2], 0.5),
    call(aten.pad.default, x(2, 3, 4), [1, 1]),
    call(aten.view_as_complex.default, x(3, 4, 2)),
    call(aten.view_as_real.default, z(3, 4)),
    call(operator.getitem, (x(2, 3), x(2, 4)), 1),
    call(aten.sym_size.int, x(2, 3), 1),
    call(aten.sym_stride.int, x(2, 3), 1),
    call(aten.sym_numel.default, x(2, 3)),
    call(aten.im2col.default, x(2, 3, 5, 6), [2, 2], [1, 1], [0, 0], [1, 1]),
    call(aten.col2im.default, x(2, 12, 20), [5, 6], [2, 2], [1, 1], [0, 0], [1, 1]),
    call(aten.pixel_shuffle.default, x(2, 12, 3, 5), 2),
    call(aten.pixel_unshuffle.default, x(2, 3, 4, 6), 2),
    call(aten.channel_shuffle.default, x(2, 6, 3, 5), 2),
    # constructors
    *same("zeros ones rand randn", [2, 3]),
    *same("new_zeros new_ones new_empty", x(4), [2, 3]),
    *same("arange eye randperm", 4),
    *same("tril_indices triu_indices", 3, 4),
    call(aten.full.default, [2, 3], 0.5, dtype=torch.float64),
    call(aten.empty.memory_format, [2, 3]),
    call(aten.new_full.default, x(4), [2, 3], 0.5),
    call(aten.full_like.default, x(2, 3), 0.5),
    call(aten.linspace.default, 0, 1, 4),
    call(aten.randint.default, 5, [2, 3]),
    # each element by itself
    *same("copy_ copy", x(2, 3, 4), x(3, 1)),
    *same("dropout alpha_dropout native_dropout", x(2, 3), 0.5, False),
    call(aten.feature_dropout.default, x(2, 3, 4), 0.5, False),
    *same("real imag", z(2, 3)),
    call(aten.where.self, b(2, 3, 1), x(2, 3, 4), x(4)),
    *same("masked_fill masked_fill_", x(2, 3, 4), b(3, 1), 0.5, overload="Scalar"),
    call(aten.pow.Tensor_Scalar, up(2, 3), 1.5),
    call(aten.div.Tensor, x(2, 3), up(3)),
    call(aten.floor_divide.default, x(2, 3), up(3)),
    call(aten.to.dtype, x(2, 3), torch.float32),
    call(aten.to.other, x(2, 3), i(3, 4)),
    call(aten._to_copy.default, x(2, 3), dtype=torch.float32),
    call(aten.type_as.default, x(2, 3), i(3, 4)),
    call(aten.bernoulli.default, up(8, 9).clamp(max=1)),
    call(aten.polar.default, up(2, 3), x(3)),
    call(aten.complex.default, x(2, 3), x(3)),
    call(aten.fill_.Scalar, x(2, 3), 0.5),
    *same("__and__ __or__ __xor__", b(2, 3), b(3), overload="Tensor"),
    call(aten.prelu.default, x(2, 3, 4), x(3)),
    call(aten.prelu.default, x(2, 3, 4), x(1)),
    call(aten.glu.default, x(2, 6), 1),
    # reductions and scans
    *same("amax amin logsumexp", x(2, 3, 4), [1]),
    *same("_softmax _log_softmax", x(2, 3, 4), -1, False),
    *same("cumsum cumprod logcumsumexp", x(2, 3, 4), 1),
    call(aten.sum.dim_IntList, x(2, 3, 4), [1, 2]),
    call(aten.sum.default, x(2, 3)),
    call(aten.norm.ScalarOpt_dim, x(2, 3, 4), 2, [-1], True),
    call(aten.norm.ScalarOpt_dim, x(2, 3, 4), -1, [-1], True),
    call(aten.linalg_vector_norm.default, x(2, 3, 4), 2, [-1], True),
    call(aten.linalg_vector_norm.default, x(2, 3, 4), float("inf"), [0, 2]),
    call(aten.linalg_norm.default, x(2, 3, 4), dim=[1, 2]),
    call(aten.linalg_norm.default, x(2, 3, 4), float("inf"), [-1]),
    call(aten.linalg_norm.default, x(2, 3, 4)),
    call(aten.linalg_matrix_norm.str_ord, x(2, 3, 4)),
    call(aten.linalg_matrix_norm.default, x(2, 3, 4), 1, keepdim=True),
    call(aten.linalg_matrix_norm.str_ord, x(2, 3, 4), "nuc", [0, 1]),
    call(aten.var.correction, x(2, 3, 4), [1]),
    call(aten.var.correction, x(2, 2, 3), [0, 1]),
    call(aten.std.correction, x(2, 3, 4), [1], correction=0),
    call(aten.var_mean.correction, x(2, 3, 4), [1], keepdim=True),
    call(aten.std_mean.correction, x(2, 3, 4), [1]),
    call(aten.mean.dim, x(2, 3, 4), [1], True),
    call(aten.argmax.default, x(2, 3, 4), 1),
    call(aten.argmax.default, x(2, 3)),
    call(aten.argmin.default, x(2, 3, 4), 1, True),
    call(aten.max.dim, x(2, 3, 4), 1),
    call(aten.min.dim, x(2, 3, 4), 1, True),
    call(aten.prod.dim_int, x(2, 3, 4), 1),
    *same("max min", x(2, 3)),
    *same("any all", b(2, 3, 4), 1, overload="dim"),
    call(aten.median.dim, x(2, 3, 4), 1),
    call(aten.mode.default, i(3, 2, 3, 4), 1),
    call(aten.kthvalue.default, x(2, 3, 4), 2, 1),
    call(aten.softmax.int, x(2, 3, 4), -1),
    call(aten.log_softmax.int, x(2, 3, 4), 1),
    call(aten.flip.default, x(2, 3, 4), [1]),
    call(aten.roll.default, x(2, 3, 4), [1], [1]),
    call(aten.roll.default, x(2, 3), [2]),
    # look-ups
    *same("sort argsort", x(3, 5)),
    call(aten.embedding.default, x(5, 4), i(5, 2, 3)),
    call(aten.embedding.default, x(5, 4), i(5, 2, 3), at={1: (0, 0)}),
    *(call(aten.embedding_bag.default, x(5, 4), i(5, 6), torch.tensor([0, 2]), False, mode) for mode in range(3)),
    call(aten.index.Tensor, x(2, 5, 4), [None, i(5, 3)]),
    call(aten.index.Tensor, x(5, 4, 3), [i(5, 2)], at={1: (0, 0)}),
    call(aten.index.Tensor, x(2, 5, 4), [i(2, 3), None, i(4, 3)]),
    call(aten.index_select.default, x(2, 5, 4), 1, i(5, 3)),
    call(aten.index_select.default, x(2, 5, 4), 1, i(5, 3), at={1: (0, 1)}),
    call(aten.topk.default, x(3, 5), 2),
    call(aten.gather.default, x(3, 5), 1, i(5, 3, 2)),
    call(aten.gather.default, x(3, 5), 1, i(5, 3, 2), at={1: (0, 1)}),
    *same("scatter scatter_", x(3, 5), 1, i(5, 3, 2), x(3, 2), overload="src"),
    *same("scatter scatter_", x(3, 5), 1, i(5, 3, 2), x(3, 2), overload="src", at={1: (0, 1)}),
    call(aten.scatter_add.default, x(3, 5), 1, i(5, 3, 2), x(3, 2), at={1: (0, 1)}),
    call(aten.scatter_add_.default, x(3, 5), 1, i(5, 3, 2), x(3, 2)),
    call(aten.scatter_reduce.two, x(3, 5), 1, i(5, 3, 2), x(3, 2), "amax"),
    *same("index_add index_add_ index_copy index_copy_", x(5, 4), 0, torch.tensor([3, 1]), x(2, 4)),
    *same("index_add index_add_ index_copy index_copy_", x(5, 4), 0, torch.tensor([3, 1]), x(2, 4), at={1: (0, 0)}),
    *same("index_fill index_fill_", x(5, 4), 0, torch.tensor([3, 1]), 0.5, overload="int_Scalar"),
    *same("index_put index_put_", x(5, 4), [torch.tensor([3, 1])], x(2, 4)),
    *same("index_put index_put_", x(5, 4), [torch.tensor([3, 1])], x(4), at={1: (0, 0)}),
    *same("index_put index_put_", x(2, 5, 4), [None, torch.tensor([3, 1])], x(1)),
    call(aten.one_hot.default, i(4, 2, 3), 4),
    call(aten.histc.default, x(6), 5),
]


def _generated(name: str) -> list[Sample]:
    """A call with tensors of one shape for whatever is needed, and 2 for numbers; none where torch refuses it."""
    op, _, overload = name.removeprefix("aten::").partition(".")
    packet = getattr(aten, op, None)
    for each in [overload] if overload else [] if packet is None else packet.overloads():
        target = getattr(packet, each)
        needed = [arg for arg in target._schema.arguments if not arg.has_default_value()]
        kinds = {str(arg.type) for arg in needed}
        if any(arg.is_out for arg in target._schema.arguments) or not kinds <= {"Tensor", "number"}:
            continue
        args = tuple(x(2, 3, 4) if str(arg.type) == "Tensor" else 2 for arg in needed if not arg.kwarg_only)
        try:
            target(*(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args))
        except RuntimeError:  # what torch says to numbers of a type that the op is not for
            continue
        return [call(target, *args)]
    return []


def samples() -> dict[str, list[Sample]]:
    """Calls of each op that has a rule, in the order of the rules; none for an op that no one wrote a call of."""
    found: dict[str, list[Sample]] = {
        name: [] for name in registered_rules() if name.startswith(("aten::", "python::"))
    }
    for sample in _BY_HAND:
        name = "python::getitem" if sample.op is operator.getitem else sample.op.name()
        found[name if name in found else name.partition(".")[0]].append(sample)
    return {name: by_hand or _generated(name) for name, by_hand in found.items()}
