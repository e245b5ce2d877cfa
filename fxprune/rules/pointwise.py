"""Rules of elementwise ops, tensor constructors and complex numbers."""

from __future__ import annotations

from fxprune.axes import concat
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite

_SAME_SHAPE = (
    "add add_ sub sub_ mul mul_ div div_ pow neg where masked_fill masked_fill_ silu gelu relu tanh sigmoid softplus"
    " dropout feature_dropout native_dropout"
    " alpha_dropout fill_ zero_ positive __and__ __or__ __xor__ bernoulli uniform_ normal_ max.other min.other"
    " polar complex real imag hardswish log_sigmoid special_expit special_erf floor_divide multiply divide"
    " true_divide subtract absolute negative"
)
_COMPARISONS = "eq ne lt le gt ge greater greater_equal less less_equal not_equal"

rule("type_as", "to.other", notation="self[*a] -> out[*a]", values="cast", may_alias=True)
rule("copy_", "copy", notation="self[*a], src[*a] -> out[*a]", values="pointwise")


@rule("add.Tensor", "add_.Tensor", values="pointwise", adds=True)
@rule("dropout", values="pointwise", may_alias=True)
@rule("to", "contiguous", values="cast", may_alias=True)
@rule("_to_copy", "clone", "detach", "alias", "lift_fresh_copy", values="cast")
@rule(*_COMPARISONS.split(), values="compared")
@rule(*_SAME_SHAPE.split(), values="pointwise")
def pointwise(op: OpSite) -> None:
    """``out = f(x, y, ..)`` elementwise: every input broadcasts to the output."""
    for out in op.outs:
        for x in op.tensors:
            op.broadcast(x, out)


@rule("prelu")
def prelu(op: OpSite) -> None:
    """``max(0, x) + weight * min(0, x)``, with one weight for all or one for each channel (axis 1)."""
    x, weight = op.need("self"), op.need("weight")
    op.tie_all(x)
    if weight.sizes not in ((), (1,)):
        op.tie(weight, 0, x, min(1, x.rank - 1))
    op.keep_all_zeros(x)


@rule("glu")
def glu(op: OpSite) -> None:
    """``a * sigmoid(b)`` for the first and second half ``[a | b]`` of ``self`` along ``dim``."""
    x = op.need("self")
    dim = op.arg("dim", -1) % x.rank
    op.tie_all(x, but=(dim,))
    op.equate(x.axes[dim], concat(op.out.axes[dim], op.out.axes[dim]))
    op.link(x, dim, op.out, dim)
    op.keep_all_zeros(x)


rule("ones_like", "full_like", "empty_like", "rand_like", "randn_like", notation="self[*a] -> out[*a]", values="shape")
rule("lift_fresh", notation="self[*a] -> out[*a]", values="moved")
rule("scalar_tensor", notation="-> out[]")
rule("sym_size", "sym_stride", "sym_numel", notation="self[*a] -> ", values="shape")


@rule("full", "ones", "empty", "new_full", "new_ones", "new_empty", "zeros", "new_zeros", "zeros_like", values="shape")
def constant(op: OpSite) -> None:
    """The same value everywhere: each axis takes the size of whatever it is used with, or that of ``self``."""
    if op.has("size"):
        for i, axis in enumerate(op.out.axes):
            op.size_argument("size", axis, i)
    else:
        op.tie_all(op.need("self"))
    for i in range(op.out.rank) if "zeros" in op.name else ():
        op.keep_zeros(op.out, i)


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices", "rand", "randn", "randint", "randperm")
def index_dependent(op: OpSite) -> None:
    """Values that depend on their position: every unit must stay."""
    op.freeze_tensor(op.out, f"{op.node.target} numbers this axis")


rule("_conj", "_conj_physical", "resolve_conj", "conj_physical", notation="self[*a] -> out[*a]", values="pointwise")


@rule("view_as_complex", "view_as_real", values="moved")
def view_as_complex(op: OpSite) -> None:
    """Real numbers ``(.., 2)`` are complex numbers ``(..)``, and back: the two parts of a number stay together."""
    x = op.need("self")
    real, numbers = (x, op.out) if x.rank > op.out.rank else (op.out, x)
    for i in range(numbers.rank):
        op.tie(real, i, numbers, i)
    op.freeze(real, -1, "the real and the imaginary part of a number")
