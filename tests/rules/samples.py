"""A call of every op that has a rule: made from the op's schema where it takes tensors of one shape, else by hand."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
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

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    positions: dict[int, tuple[int, int]] = field(default_factory=dict)


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


def call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Sample:
    return Sample(op, args, kwargs)


def same(names: str, *args: Any) -> dict[str, list[Sample]]:
    """The same call of several ops of ATen."""
    return {name: [call(getattr(aten, name).default, *args)] for name in names.split()}


def at(sample: Sample, **positions: tuple[int, int]) -> Sample:
    """`sample` where ``t1=(0, 2)`` says that tensor 1 holds positions along axis 2 of tensor 0."""
    return Sample(sample.op, sample.args, sample.kwargs, {int(name[1:]): found for name, found in positions.items()})


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


_PRODUCTS: dict[str, list[Sample]] = {
    **same("outer ger", x(3), x(4)),
    "linear": [call(aten.linear.default, x(2, 3, 4), x(5, 4), x(5)), call(aten.linear.default, x(4), x(5, 4))],
    "mm": [call(aten.mm.default, x(3, 4), x(4, 5))],
    "bmm": [call(aten.bmm.default, x(2, 3, 4), x(2, 4, 5))],
    "mv": [call(aten.mv.default, x(3, 4), x(4))],
    "dot": [call(aten.dot.default, x(4), x(4))],
    "addmm": [
        call(aten.addmm.default, x(5), x(3, 4), x(4, 5)),
        call(aten.addmm.default, x(3, 1), x(3, 4), x(4, 5), alpha=0.5),
    ],
    "baddbmm": [call(aten.baddbmm.default, x(2, 1, 5), x(2, 3, 4), x(2, 4, 5))],
    "matmul": [
        call(aten.matmul.default, x(2, 3, 4), x(2, 4, 5)),
        call(aten.matmul.default, x(2, 1, 3, 4), x(6, 4, 5)),
        call(aten.matmul.default, x(4), x(2, 4, 5)),
        call(aten.matmul.default, x(2, 3, 4), x(4)),
    ],
    "linalg_matmul": [call(aten.linalg_matmul.default, x(2, 3, 4), x(4, 5))],
    "tensordot": [call(aten.tensordot.default, x(2, 3, 4), x(4, 3, 5), [1, 2], [1, 0])],
    "inner": [call(aten.inner.default, x(2, 4), x(3, 4))],
    "einsum": [
        call(aten.einsum.default, "bqhd,bkhd->bhqk", [x(2, 3, 4, 5), x(2, 6, 4, 5)]),
        call(aten.einsum.default, "...i,oi", [x(2, 3, 4), x(5, 4)]),
        call(aten.einsum.default, "bii->bi", [x(2, 3, 3)]),
        call(aten.einsum.default, "ii", [x(3, 3)]),
        call(aten.einsum.default, "bgd,gde,e->bge", [x(2, 3, 4), x(3, 4, 5), x(5)]),
        call(aten.einsum.default, "bij,bjk,bkl->lib", [x(2, 3, 4), x(2, 4, 5), x(2, 5, 6)]),
    ],
    "kron": [call(aten.kron.default, x(2, 3), x(4, 5)), call(aten.kron.default, x(2, 3, 4), x(5))],
    "linalg_vecdot": [
        call(aten.linalg_vecdot.default, x(2, 3, 4), x(2, 3, 4)),
        call(aten.linalg_vecdot.default, x(2, 3, 4), x(3, 1), dim=1),
    ],
    "conv1d": [
        call(aten.conv1d.default, x(2, 6, 9), x(4, 3, 3), x(4), [1], [0], [1], 2),
        call(aten.conv1d.default, x(6, 9), x(4, 6, 1)),
    ],
    "conv2d": [call(aten.conv2d.default, x(2, 3, 5, 6), x(4, 3, 2, 2), x(4))],
    "gru": [
        call(aten.gru.input, x(2, 5, 6), x(1, 2, 4), _recurrent(3, 6, 4, 1, 1), True, 1, 0.0, False, False, True),
        call(aten.gru.input, x(5, 2, 6), x(4, 2, 3), _recurrent(3, 6, 3, 2, 2), True, 2, 0.0, False, True, False),
    ],
    "lstm": [
        call(aten.lstm.input, x(5, 2, 6), _two(1, 2, 4), _recurrent(4, 6, 4, 1, 1), True, 1, 0.0, *[False] * 3),
        call(aten.lstm.input, x(2, 5, 6), _two(4, 2, 3), _recurrent(4, 6, 3, 2, 2), True, 2, 0.0, False, True, True),
    ],
    "rnn_tanh": [
        call(aten.rnn_tanh.input, x(5, 2, 6), x(4, 2, 3), _recurrent(1, 6, 3, 2, 2), True, 2, 0.0, False, True, False)
    ],
    "rnn_relu": [
        call(aten.rnn_relu.input, x(2, 5, 6), x(1, 2, 4), _recurrent(1, 6, 4, 1, 1), True, 1, 0.0, False, False, True)
    ],
    "lstm_cell": [call(aten.lstm_cell.default, x(2, 6), _two(2, 4), *_recurrent(4, 6, 4, 1, 1))],
    "gru_cell": [call(aten.gru_cell.default, x(2, 6), x(2, 4), *_recurrent(3, 6, 4, 1, 1))],
    "rnn_tanh_cell": [call(aten.rnn_tanh_cell.default, x(2, 4), x(2, 4), *_recurrent(1, 4, 4, 1, 1)[:2])],
    "rnn_relu_cell": [call(aten.rnn_relu_cell.default, x(2, 6), x(2, 4), *_recurrent(1, 6, 4, 1, 1))],
    "conv3d": [call(aten.conv3d.default, x(2, 3, 4, 5, 6), x(4, 3, 2, 2, 2), x(4))],
    "convolution": [
        call(aten.convolution.default, x(2, 6, 9), x(4, 3, 3), x(4), [1], [0], [1], False, [0], 2),
        call(aten.convolution.default, x(2, 6, 9), x(6, 2, 3), x(4), [1], [0], [1], True, [0], 2),
    ],
    "conv_transpose1d": [call(aten.conv_transpose1d.default, x(2, 6, 9), x(6, 2, 3), x(4), [1], [0], [0], 2)],
    "conv_transpose2d": [call(aten.conv_transpose2d.input, x(2, 3, 5, 6), x(3, 4, 2, 2), x(4))],
    "conv_transpose3d": [call(aten.conv_transpose3d.input, x(2, 3, 4, 5, 6), x(3, 4, 2, 2, 2), x(4))],
    "scaled_dot_product_attention": [
        call(SDPA, x(2, 3, 5, 6), x(2, 3, 7, 6), x(2, 3, 7, 4), x(5, 7), scale=0.4),
        call(SDPA, x(2, 4, 5, 6), x(2, 2, 7, 6), x(2, 2, 7, 3), scale=0.4, enable_gqa=True),
    ],
}

_NORMS: dict[str, list[Sample]] = {
    "layer_norm": [
        call(aten.layer_norm.default, x(2, 3, 4), [4], x(4), x(4)),
        call(aten.layer_norm.default, x(2, 3, 4), [3, 4]),
    ],
    "rms_norm": [call(aten.rms_norm.default, x(2, 3, 4), [4], x(4), 1e-6)],
    "_fused_rms_norm": [call(aten._fused_rms_norm.default, x(2, 3, 4), [4], x(4), 1e-6)],
    "batch_norm": [
        call(aten.batch_norm.default, x(2, 3, 4), x(3), x(3), x(3), up(3), False, 0.1, 1e-5, False),
        call(aten.batch_norm.default, x(2, 3, 4), None, None, None, None, True, 0.1, 1e-5, False),
    ],
    "_native_batch_norm_legit_no_training": [
        call(aten._native_batch_norm_legit_no_training.default, x(2, 3, 4), x(3), x(3), x(3), up(3), 0.1, 1e-5)
    ],
    "instance_norm": [
        call(aten.instance_norm.default, x(2, 3, 4), x(3), x(3), None, None, True, 0.1, 1e-5, False),
        call(aten.instance_norm.default, x(2, 3, 4), None, None, x(3), up(3), False, 0.1, 1e-5, False),
    ],
    "group_norm": [call(aten.group_norm.default, x(2, 6, 5), 3, x(6), x(6))],
    "_weight_norm": [call(aten._weight_norm.default, x(3, 4), up(3, 1))],
}

_SHAPES: dict[str, list[Sample]] = {
    **same("swapaxes swapdims", x(2, 3, 4), 0, 2),
    **same("reshape_as view_as", x(2, 12), x(2, 3, 4)),
    **same("split_with_sizes split_with_sizes_copy", x(2, 5), [2, 3], 1),
    **same("_conj _conj_physical conj_physical", z(3, 4)),
    **same("unfold unfold_copy", x(2, 9, 3), 1, 3, 2),
    "reshape": [call(aten.reshape.default, x(2, 12), [2, 3, 4]), call(aten.reshape.default, x(4, 6), [2, 2, 6])],
    "view": [call(aten.view.default, x(2, 3, 4), [2, 12])],
    "_unsafe_view": [call(aten._unsafe_view.default, x(2, 3, 4), [6, 4])],
    "flatten": [call(aten.flatten.using_ints, x(2, 3, 4), 1)],
    "ravel": [call(aten.ravel.default, x(2, 3))],
    "unflatten": [call(aten.unflatten.int, x(2, 12, 5), 1, [3, 4])],
    "unsqueeze": [call(aten.unsqueeze.default, x(2, 3), 1)],
    "squeeze": [call(aten.squeeze.dims, x(2, 1, 3), [1])],
    "squeeze_": [call(aten.squeeze_.dim, x(2, 1, 3), 1)],
    "transpose": [call(aten.transpose.int, x(2, 3, 4), 1, -1)],
    "t": [call(aten.t.default, x(2, 3)), call(aten.t.default, x(3))],
    "permute": [call(aten.permute.default, x(2, 3, 4), [2, 0, -2])],
    "numpy_T": [call(aten.numpy_T.default, x(2, 3, 4))],
    "mT": [call(aten.mT.default, x(2, 3, 4))],
    "movedim": [call(aten.movedim.int, x(2, 3, 4), 0, -1)],
    "moveaxis": [call(aten.moveaxis.intlist, x(2, 3, 4), [0, 2], [2, 1])],
    "adjoint": [call(aten.adjoint.default, z(2, 3, 4))],
    "matrix_H": [call(aten.matrix_H.default, z(3, 4))],
    "expand": [call(aten.expand.default, x(3, 1, 4), [2, -1, 5, 4])],
    "expand_as": [call(aten.expand_as.default, x(3, 1), x(2, 3, 4))],
    "broadcast_to": [call(aten.broadcast_to.default, x(3, 1), [2, 3, 4])],
    "broadcast_tensors": [call(aten.broadcast_tensors.default, [x(3, 1), x(2, 1, 4)])],
    "repeat": [call(aten.repeat.default, x(3, 4), [2, 1, 5])],
    "tile": [call(aten.tile.default, x(3, 4), [2, 1])],
    "repeat_interleave.self_int": [
        call(aten.repeat_interleave.self_int, x(3, 4), 2, 1, output_size=8),
        call(aten.repeat_interleave.self_int, x(3, 4), 2),
    ],
    "diagonal": [
        call(aten.diagonal.default, x(3, 4, 3), 0, 0, 2),
        call(aten.diagonal.default, x(2, 4, 4), 1, -2, -1),
        call(aten.diagonal.default, x(2, 3, 4), 0, -2, -1),
    ],
    "diagonal_copy": [call(aten.diagonal_copy.default, x(3, 3))],
    "diag_embed": [
        call(aten.diag_embed.default, x(2, 3)),
        call(aten.diag_embed.default, x(2, 3), 0, 0, -1),
        call(aten.diag_embed.default, x(2, 3), 1),
    ],
    "trace": [call(aten.trace.default, x(3, 3)), call(aten.trace.default, x(3, 4))],
    "block_diag": [call(aten.block_diag.default, [x(2, 3), x(4, 2)]), call(aten.block_diag.default, [x(3), x(2, 2)])],
    "cat": [call(aten.cat.default, [x(2, 3), x(2, 4)], 1)],
    "concat": [call(aten.concat.default, [x(2, 3), x(2, 4)], -1)],
    "concatenate": [call(aten.concatenate.default, [x(2, 3), x(4, 3)])],
    "stack": [call(aten.stack.default, [x(2, 3), x(2, 3)], 1)],
    "split": [call(aten.split.Tensor, x(2, 6), 3, 1)],
    "chunk": [call(aten.chunk.default, x(2, 6), 2, 1)],
    "tensor_split": [call(aten.tensor_split.sections, x(2, 6), 2, 1)],
    "unbind": [call(aten.unbind.int, x(2, 3, 4), 1)],
    "select": [call(aten.select.int, x(2, 3, 4), 1, 2)],
    "slice": [
        call(aten.slice.Tensor, x(2, 9), 1, 2, 6),
        call(aten.slice.Tensor, x(2, 9), 1, 1, 9, 3),
        call(aten.slice.Tensor, x(2, 9), 1, 0, 8, 3),
    ],
    "narrow": [call(aten.narrow.default, x(2, 9), 1, 2, 4)],
    "constant_pad_nd": [call(aten.constant_pad_nd.default, x(2, 3, 4), [0, 0, 1, 2], 0.5)],
    "pad": [call(aten.pad.default, x(2, 3, 4), [1, 1])],
    "view_as_complex": [call(aten.view_as_complex.default, x(3, 4, 2))],
    "view_as_real": [call(aten.view_as_real.default, z(3, 4))],
    "python::getitem": [call(operator.getitem, (x(2, 3), x(2, 4)), 1)],
    "sym_size": [call(aten.sym_size.int, x(2, 3), 1)],
    "sym_stride": [call(aten.sym_stride.int, x(2, 3), 1)],
    "sym_numel": [call(aten.sym_numel.default, x(2, 3))],
    "im2col": [call(aten.im2col.default, x(2, 3, 5, 6), [2, 2], [1, 1], [0, 0], [1, 1])],
    "col2im": [call(aten.col2im.default, x(2, 12, 20), [5, 6], [2, 2], [1, 1], [0, 0], [1, 1])],
    "pixel_shuffle": [call(aten.pixel_shuffle.default, x(2, 12, 3, 5), 2)],
    "pixel_unshuffle": [call(aten.pixel_unshuffle.default, x(2, 3, 4, 6), 2)],
    "channel_shuffle": [call(aten.channel_shuffle.default, x(2, 6, 3, 5), 2)],
}

_CREATION: dict[str, list[Sample]] = {
    **same("zeros ones rand randn", [2, 3]),
    **same("new_zeros new_ones new_empty", x(4), [2, 3]),
    **same("arange eye randperm", 4),
    **same("tril_indices triu_indices", 3, 4),
    "full": [call(aten.full.default, [2, 3], 0.5, dtype=torch.float64)],
    "empty": [call(aten.empty.memory_format, [2, 3])],
    "new_full": [call(aten.new_full.default, x(4), [2, 3], 0.5)],
    "full_like": [call(aten.full_like.default, x(2, 3), 0.5)],
    "linspace": [call(aten.linspace.default, 0, 1, 4)],
    "randint": [call(aten.randint.default, 5, [2, 3])],
    "scalar_tensor": [call(aten.scalar_tensor.default, 0.5)],
}

_ELEMENTS: dict[str, list[Sample]] = {
    **same("copy_ copy", x(2, 3, 4), x(3, 1)),
    **same("dropout alpha_dropout native_dropout", x(2, 3), 0.5, False),
    "feature_dropout": [call(aten.feature_dropout.default, x(2, 3, 4), 0.5, False)],
    **same("real imag", z(2, 3)),
    "where": [call(aten.where.self, b(2, 3, 1), x(2, 3, 4), x(4))],
    "masked_fill": [call(aten.masked_fill.Scalar, x(2, 3, 4), b(3, 1), 0.5)],
    "masked_fill_": [call(aten.masked_fill_.Scalar, x(2, 3, 4), b(3, 1), 0.5)],
    "pow": [call(aten.pow.Tensor_Scalar, up(2, 3), 1.5)],
    "div": [call(aten.div.Tensor, x(2, 3), up(3))],
    "floor_divide": [call(aten.floor_divide.default, x(2, 3), up(3))],
    "to": [call(aten.to.dtype, x(2, 3), torch.float32)],
    "to.other": [call(aten.to.other, x(2, 3), i(3, 4))],
    "_to_copy": [call(aten._to_copy.default, x(2, 3), dtype=torch.float32)],
    "type_as": [call(aten.type_as.default, x(2, 3), i(3, 4))],
    "bernoulli": [call(aten.bernoulli.default, up(8, 9).clamp(max=1))],
    "polar": [call(aten.polar.default, up(2, 3), x(3))],
    "complex": [call(aten.complex.default, x(2, 3), x(3))],
    "fill_": [call(aten.fill_.Scalar, x(2, 3), 0.5)],
    "__and__": [call(aten.__and__.Tensor, b(2, 3), b(3))],
    "__or__": [call(aten.__or__.Tensor, b(2, 3), b(3))],
    "__xor__": [call(aten.__xor__.Tensor, b(2, 3), b(3))],
    "prelu": [call(aten.prelu.default, x(2, 3, 4), x(3)), call(aten.prelu.default, x(2, 3, 4), x(1))],
    "glu": [call(aten.glu.default, x(2, 6), 1)],
}

_REDUCTIONS: dict[str, list[Sample]] = {
    **same("amax amin logsumexp", x(2, 3, 4), [1]),
    **same("_softmax _log_softmax", x(2, 3, 4), -1, False),
    **same("cumsum cumprod logcumsumexp", x(2, 3, 4), 1),
    **same("fliplr flipud tril triu tril_ triu_ diff", x(2, 3, 4)),
    "sum": [call(aten.sum.dim_IntList, x(2, 3, 4), [1, 2]), call(aten.sum.default, x(2, 3))],
    "norm": [
        call(aten.norm.ScalarOpt_dim, x(2, 3, 4), 2, [-1], True),
        call(aten.norm.ScalarOpt_dim, x(2, 3, 4), -1, [-1], True),
    ],
    "linalg_vector_norm": [
        call(aten.linalg_vector_norm.default, x(2, 3, 4), 2, [-1], True),
        call(aten.linalg_vector_norm.default, x(2, 3, 4), float("inf"), [0, 2]),
    ],
    "linalg_norm": [
        call(aten.linalg_norm.default, x(2, 3, 4), dim=[1, 2]),
        call(aten.linalg_norm.default, x(2, 3, 4), float("inf"), [-1]),
        call(aten.linalg_norm.default, x(2, 3, 4)),
    ],
    "linalg_matrix_norm": [
        call(aten.linalg_matrix_norm.str_ord, x(2, 3, 4)),
        call(aten.linalg_matrix_norm.default, x(2, 3, 4), 1, keepdim=True),
        call(aten.linalg_matrix_norm.str_ord, x(2, 3, 4), "nuc", [0, 1]),
    ],
    "var": [call(aten.var.correction, x(2, 3, 4), [1]), call(aten.var.correction, x(2, 2, 3), [0, 1])],
    "std": [call(aten.std.correction, x(2, 3, 4), [1], correction=0)],
    "var_mean": [call(aten.var_mean.correction, x(2, 3, 4), [1], keepdim=True)],
    "std_mean": [call(aten.std_mean.correction, x(2, 3, 4), [1])],
    "mean": [call(aten.mean.dim, x(2, 3, 4), [1], True)],
    "argmax": [call(aten.argmax.default, x(2, 3, 4), 1), call(aten.argmax.default, x(2, 3))],
    "argmin": [call(aten.argmin.default, x(2, 3, 4), 1, True)],
    "max.dim": [call(aten.max.dim, x(2, 3, 4), 1)],
    "min.dim": [call(aten.min.dim, x(2, 3, 4), 1, True)],
    "prod": [call(aten.prod.dim_int, x(2, 3, 4), 1)],
    "max": [call(aten.max.default, x(2, 3))],
    "min": [call(aten.min.default, x(2, 3))],
    "any": [call(aten.any.dim, b(2, 3, 4), 1)],
    "all": [call(aten.all.dim, b(2, 3, 4), 1)],
    "median": [call(aten.median.dim, x(2, 3, 4), 1)],
    "mode": [call(aten.mode.default, i(3, 2, 3, 4), 1)],
    "kthvalue": [call(aten.kthvalue.default, x(2, 3, 4), 2, 1)],
    "softmax": [call(aten.softmax.int, x(2, 3, 4), -1)],
    "log_softmax": [call(aten.log_softmax.int, x(2, 3, 4), 1)],
    "flip": [call(aten.flip.default, x(2, 3, 4), [1])],
    "roll": [call(aten.roll.default, x(2, 3, 4), [1], [1]), call(aten.roll.default, x(2, 3), [2])],
}

_LOOK_UPS: dict[str, list[Sample]] = {
    **same("sort argsort", x(3, 5)),
    "embedding": [
        call(aten.embedding.default, x(5, 4), i(5, 2, 3)),
        at(call(aten.embedding.default, x(5, 4), i(5, 2, 3)), t1=(0, 0)),
    ],
    "embedding_bag": [
        call(aten.embedding_bag.default, x(5, 4), i(5, 6), torch.tensor([0, 2]), False, mode) for mode in range(3)
    ],
    "index": [
        call(aten.index.Tensor, x(2, 5, 4), [None, i(5, 3)]),
        at(call(aten.index.Tensor, x(5, 4, 3), [i(5, 2)]), t1=(0, 0)),
        call(aten.index.Tensor, x(2, 5, 4), [i(2, 3), None, i(4, 3)]),
    ],
    "index_select": [
        call(aten.index_select.default, x(2, 5, 4), 1, i(5, 3)),
        at(call(aten.index_select.default, x(2, 5, 4), 1, i(5, 3)), t1=(0, 1)),
    ],
    "topk": [call(aten.topk.default, x(3, 5), 2)],
    "gather": [
        call(aten.gather.default, x(3, 5), 1, i(5, 3, 2)),
        at(call(aten.gather.default, x(3, 5), 1, i(5, 3, 2)), t1=(0, 1)),
    ],
    **{
        name: [
            call(getattr(aten, name).src, x(3, 5), 1, i(5, 3, 2), x(3, 2)),
            at(call(getattr(aten, name).src, x(3, 5), 1, i(5, 3, 2), x(3, 2)), t1=(0, 1)),
        ]
        for name in ("scatter", "scatter_")
    },
    "scatter_add": [at(call(aten.scatter_add.default, x(3, 5), 1, i(5, 3, 2), x(3, 2)), t1=(0, 1))],
    "scatter_add_": [call(aten.scatter_add_.default, x(3, 5), 1, i(5, 3, 2), x(3, 2))],
    "scatter_reduce": [call(aten.scatter_reduce.two, x(3, 5), 1, i(5, 3, 2), x(3, 2), "amax")],
    **{
        name: [
            call(getattr(aten, name).default, x(5, 4), 0, torch.tensor([3, 1]), x(2, 4)),
            at(call(getattr(aten, name).default, x(5, 4), 0, torch.tensor([3, 1]), x(2, 4)), t1=(0, 0)),
        ]
        for name in ("index_add", "index_add_", "index_copy", "index_copy_")
    },
    "index_fill": [call(aten.index_fill.int_Scalar, x(5, 4), 0, torch.tensor([3, 1]), 0.5)],
    "index_fill_": [call(aten.index_fill_.int_Scalar, x(5, 4), 0, torch.tensor([3, 1]), 0.5)],
    **{
        name: [
            call(getattr(aten, name).default, x(5, 4), [torch.tensor([3, 1])], x(2, 4)),
            at(call(getattr(aten, name).default, x(5, 4), [torch.tensor([3, 1])], x(4)), t1=(0, 0)),
            call(getattr(aten, name).default, x(2, 5, 4), [None, torch.tensor([3, 1])], x(1)),
        ]
        for name in ("index_put", "index_put_")
    },
    "one_hot": [call(aten.one_hot.default, i(4, 2, 3), 4)],
    "histc": [call(aten.histc.default, x(6), 5)],
}

_BY_HAND: dict[str, list[Sample]] = (
    {name: [_pool(name)] for name in _POOLS.split() if hasattr(aten, name)}
    | _PRODUCTS
    | _NORMS
    | _SHAPES
    | _CREATION
    | _ELEMENTS
    | _REDUCTIONS
    | _LOOK_UPS
)


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
        return [Sample(target, args)]
    return []


def samples() -> dict[str, list[Sample]]:
    """Calls of each op that has a rule, in the order of the rules; none for an op that no one wrote a call of."""
    ours = {name: rule for name, rule in registered_rules().items() if name.startswith(("aten::", "python::"))}
    return {name: _BY_HAND.get(name.removeprefix("aten::")) or _generated(name) for name in ours}
