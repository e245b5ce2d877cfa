"""Ops that multiply and sum: contracted axes match, batch axes match, the others pass."""

from __future__ import annotations

import string

from torch import fx

from fxprune.rules.base import OpSite, TensorAxes
from fxprune.rules.registry import rule

__all__ = ["addmm", "baddbmm", "einsum", "linear", "matmul", "outer", "tensordot"]


@rule("linear")
def linear(op: OpSite) -> None:
    """``out = x @ weight.T + bias``, weight ``(out, in)``."""
    x, weight, bias = op.need("input"), op.need("weight"), op.tensor("bias")
    op.tie(x, -1, weight, -1)
    op.add_up((x, -1), (weight, -1))
    op.tie_all(x, but=(-1,))
    if weight.rank == 2:
        op.tie(weight, 0, op.out, -1)
    if bias is not None:
        op.tie(bias, -1, op.out, -1)


@rule("matmul", "linalg_matmul", "mm", "bmm", "mv", "dot")
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
    op.add_up((a, -1), (b, max(b.rank - 2, 0)))
    column = b.rank >= 2
    if column:
        op.tie(b, -1, op.out, -1)
    if a.rank >= 2:
        op.tie(a, -2, op.out, -2 if column else -1)
    for x, kept in ((a, 2), (b, 2)):
        for i in range(kept + 1, x.rank + 1):
            if x.sizes[-i] != 1:
                op.tie(x, -i, op.out, -i if a.rank >= 2 and column else -i + 1)
    _tag_product(
        op, [(x, i, i < x.rank - 2) for x in (a, b) for i in range(x.rank)], [(a, -1), (b, max(b.rank - 2, 0))]
    )


@rule("outer", "ger")
def outer(op: OpSite) -> None:
    """``out[i, j] = self[i] * vec2[j]``."""
    for j, name in enumerate(("self", "vec2")):
        x = op.need(name)
        op.tie(x, 0, op.out, j)
        op.keep_zeros(op.out, j, (x, 0))


@rule("tensordot", "inner")
def tensordot(op: OpSite) -> None:
    """Axes ``dims_self`` and ``dims_other``, the last ones for ``inner``, match and are summed; the others pass."""
    a, b = op.need("self"), op.need("other")
    first, second = ([i % x.rank for i in op.arg(n, (-1,))] for x, n in ((a, "dims_self"), (b, "dims_other")))
    for i, j in zip(first, second, strict=True):
        op.tie(a, i, b, j)
        op.add_up((a, i), (b, j))
    free = [(x, i) for x, gone in ((a, first), (b, second)) for i in range(x.rank) if i not in gone]
    for j, (x, i) in enumerate(free):
        op.tie(x, i, op.out, j)
        op.keep_zeros(op.out, j, (x, i))


def _tag_product(op: OpSite, axes: list[tuple[TensorAxes, int, bool]], summed: list[tuple[TensorAxes, int]]) -> None:
    """Batch axes of two activations are heads, what is summed or passed is inside a head; weights have neither.

    Args:
        op: the op.
        axes: operand and axis, and whether it is a batch axis.
        summed: operand and axis for what is summed over.
    """
    if not any(op.is_weight(x) for x, _, _ in axes):
        roles = [(x, i, "head" if batch else "head_dim") for x, i, batch in axes]
        op.multiplies(*roles, *((x, i, "summed") for x, i in summed))
    for x, i, batch in axes:
        if batch and op.is_weight(x):
            op.tag(x, i, "weights side by side")


@rule("einsum")
def einsum(op: OpSite) -> None:
    """Axes of one letter are the same axis; an ellipsis stands for leading letters of its own.

    As for :func:`matmul`, a letter of both operands and the output is a batch axis.
    """
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
    for letter in dict.fromkeys("".join(spelled)):
        if letter not in output:
            op.add_up(*((x, term.index(letter)) for term, x in zip(spelled, operands, strict=True) if letter in term))
    if len(operands) == 2:
        _tag_einsum(op, spelled, operands, output)


def _tag_einsum(op: OpSite, terms: list[str], operands: list[TensorAxes], output: str) -> None:
    """As for :func:`matmul`: a letter of both operands and the output is a batch axis."""
    batch = set(terms[0]) & set(terms[1]) & set(output)
    places = [(x, i, letter) for x, term in zip(operands, terms, strict=True) for i, letter in enumerate(term)]
    summed = [(x, i) for x, i, letter in places if letter not in output]
    _tag_product(op, [(x, i, letter in batch) for x, i, letter in places], summed)


def _spell(term: str, spare: list[str], rank: int) -> str:
    """``term`` with its ellipsis written out, right-aligned, for a tensor of ``rank`` axes."""
    hidden = rank - len(term.replace("...", ""))
    return term.replace("...", "".join(spare[len(spare) - hidden :])) if "..." in term else term
