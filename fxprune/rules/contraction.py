"""Ops that multiply and sum: contracted axes match, batch axes match, the others pass."""

from __future__ import annotations

import string

from torch import fx

from fxprune.rules.base import OpSite, TensorAxes
from fxprune.rules.registry import rule

__all__ = ["addmm", "baddbmm", "convolution", "einsum", "linear", "matmul"]


@rule("linear")
def linear(op: OpSite) -> None:
    """``out = x @ weight.T + bias``, weight ``(out, in)``."""
    x, weight, bias = op.need("input"), op.need("weight"), op.tensor("bias")
    op.tie(x, -1, weight, -1)
    op.tie_all(x, but=(-1,))
    if weight.rank == 2:
        op.tie(weight, 0, op.out, -1)
    if bias is not None:
        op.tie(bias, -1, op.out, -1)


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(op: OpSite) -> None:
    """``out = a @ b`` with broadcast batch axes; either side may be a vector."""
    a, b = (op.of(node) for node in op.node.args[:2] if isinstance(node, fx.Node))
    assert a is not None and b is not None
    _multiply(op, a, b)


@rule("addmm")
def addmm(op: OpSite) -> None:
    """``out = bias + a @ b``."""
    op.broadcast(op.need("self"))
    _multiply(op, op.need("mat1"), op.need("mat2"))


@rule("baddbmm")
def baddbmm(op: OpSite) -> None:
    """``out = bias + a @ b`` for each of a batch."""
    op.broadcast(op.need("self"))
    _multiply(op, op.need("batch1"), op.need("batch2"))


def _multiply(op: OpSite, a: TensorAxes, b: TensorAxes) -> None:
    op.tie(a, -1, b, max(b.rank - 2, 0))
    column = b.rank >= 2
    if column:
        op.tie(b, -1, op.out, -1)
    if a.rank >= 2:
        op.tie(a, -2, op.out, -2 if column else -1)
    for x, kept in ((a, 2), (b, 2)):
        for i in range(kept + 1, x.rank + 1):
            if x.sizes[-i] != 1:
                op.tie(x, -i, op.out, -i if a.rank >= 2 and column else -i + 1)
    if not (a.weight or b.weight):
        _tag_attention(op, a, b)


def _tag_attention(op: OpSite, *operands: TensorAxes) -> None:
    """Two activations multiplied: batch axes are heads, what is summed or passed is inside a head."""
    for x in operands:
        for i in range(x.rank):
            op.tag(x, i, "head" if i < x.rank - 2 else "head_dim")


@rule("einsum")
def einsum(op: OpSite) -> None:
    """Axes of one letter are the same axis; an ellipsis stands for leading letters of its own."""
    operands = op.list_of("tensors")
    inputs, _, output = op.arg("equation").replace(" ", "").partition("->")
    terms = inputs.split(",")
    rank = max(
        (x.rank - len(t.replace("...", "")) for t, x in zip(terms, operands, strict=True) if "..." in t),
        default=0,
    )
    spare = [letter for letter in string.ascii_letters if letter not in inputs][:rank]
    spelled = [_spell(term, spare, x.rank) for term, x in zip(terms, operands, strict=True)]
    if not output and "->" not in op.arg("equation"):
        letters = "".join(spelled)
        output = "".join(sorted(set(letters), key=lambda c: (c not in spare, c)))
        output = "".join(c for c in output if c in spare or letters.count(c) == 1)
    output = _spell(output, spare, op.out.rank)
    places: dict[str, tuple[TensorAxes, int]] = {letter: (op.out, i) for i, letter in enumerate(output)}
    for term, x in zip(spelled, operands, strict=True):
        for i, letter in enumerate(term):
            if x.sizes[i] == 1:
                continue
            if letter in places:
                op.tie(x, i, *places[letter])
            else:
                places[letter] = (x, i)
    for term, x in zip(spelled, operands, strict=True):
        for i, letter in enumerate(term):
            if letter not in output and sum(letter in other for other in spelled) == 1:
                op.renormalise(x, i)
    if len(operands) == 2 and not any(x.weight for x in operands):
        _tag_einsum(op, spelled, operands, output)


def _spell(term: str, spare: list[str], rank: int) -> str:
    """``term`` with its ellipsis written out, right-aligned, for a tensor of ``rank`` axes."""
    hidden = rank - len(term.replace("...", ""))
    return term.replace("...", "".join(spare[len(spare) - hidden :])) if "..." in term else term


def _tag_einsum(op: OpSite, terms: list[str], operands: list[TensorAxes], output: str) -> None:
    """As for :func:`matmul`: a letter of both operands and the output is a batch axis."""
    batch = set(terms[0]) & set(terms[1]) & set(output)
    for term, x in zip(terms, operands, strict=True):
        for i, letter in enumerate(term):
            op.tag(x, i, "head" if letter in batch else "head_dim")


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(op: OpSite) -> None:
    """Weight ``(out, in / groups, kernel..)``; channels are axis 1 of input and output, 0 where there is no batch."""
    x, weight, bias = op.need("input"), op.need("weight"), op.tensor("bias")
    groups, channel = op.arg("groups", 1), x.rank - weight.rank + 1
    if channel:
        op.tie(x, 0, op.out, 0)
    op.tie(weight, 0, op.out, channel)
    if bias is not None:
        op.tie(bias, 0, op.out, channel)
    if groups == 1:
        op.tie(x, channel, weight, 1)
    elif groups == x.sizes[channel] == weight.sizes[0]:
        op.tie(x, channel, op.out, channel)
        op.literal("groups", x.axes[channel])
    else:
        for tensor, i in ((x, channel), (weight, 0), (weight, 1)):
            op.freeze(tensor, i, "a grouped convolution mixes neighbouring channels")
    for i in range(2, weight.rank):
        op.freeze(x, channel + i - 1, "a convolution slides over this axis")
        op.freeze(weight, i, "a kernel's taps are fixed")
        op.freeze(op.out, channel + i - 1, "a convolution slides over this axis")
