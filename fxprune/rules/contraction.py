"""Rules of matrix products and fused attention."""

from __future__ import annotations

import string

from fxprune.axes import new_factor, product
from fxprune.rules.registry import rule
from fxprune.rules.site import OpSite
from fxprune.rules.statements import Role, TensorAxes

rule("linear", notation="input[*b, i], weight[o?, i], bias[o?]? -> out[*b, o?]  sums i", values="product")
rule("mm", notation="self[n, k], mat2[k, m] -> out[n, m]  sums k", values="product")
rule("bmm", notation="self[b, n, k], mat2[b, k, m] -> out[b, n, m]  sums k", values="product")
rule("mv", notation="self[n, k], vec[k] -> out[n]  sums k", values="product")
rule("dot", notation="self[k], tensor[k] -> out[]  sums k", values="product")
rule("addmm", notation="self[n?, m?], mat1[n, k], mat2[k, m] -> out[n, m]  sums k", values="product")
rule("baddbmm", notation="self[b?, n?, m?], batch1[b, n, k], batch2[b, k, m] -> out[b, n, m]  sums k", values="product")
rule("outer", "ger", notation="self[i], vec2[j] -> out[i, j]", values="product")


@rule("matmul", "linalg_matmul", values="product")
def matmul(op: OpSite) -> None:
    """``out = a @ b`` with broadcast batch axes; either side may be a vector."""
    a, b = op.tensors if len(op.tensors) == 2 else op.tensors * 2
    op.tie(a, -1, b, max(b.rank - 2, 0))
    op.add_up((a, -1), (b, max(b.rank - 2, 0)))
    column = b.rank >= 2
    if column:
        op.tie(b, -1, op.out, -1)
    if a.rank >= 2:
        op.tie(a, -2, op.out, -2 if column else -1)
    for x in (a, b):
        for i in range(3, x.rank + 1):
            if x.sizes[-i] != 1:
                op.tie(x, -i, op.out, -i if a.rank >= 2 and column else -i + 1)
    axes = [(x, i, i < x.rank - 2) for x in (a, b) for i in range(x.rank)]
    op.tag_product(axes, [(a, -1), (b, max(b.rank - 2, 0))])


@rule("tensordot", "inner", values="product")
def tensordot(op: OpSite) -> None:
    """Axes ``dims_self`` and ``dims_other`` (for ``inner`` the last ones) match and are summed; the others pass."""
    a, b = op.need("self"), op.need("other")
    first, second = ([i % x.rank for i in op.arg(n, (-1,))] for x, n in ((a, "dims_self"), (b, "dims_other")))
    for i, j in zip(first, second, strict=True):
        op.tie(a, i, b, j)
        op.add_up((a, i), (b, j))
    free = [(x, i) for x, gone in ((a, first), (b, second)) for i in range(x.rank) if i not in gone]
    for j, (x, i) in enumerate(free):
        op.tie(x, i, op.out, j)


@rule("kron", values="product")
def kron(op: OpSite) -> None:
    """Each axis is the product of those of ``self`` and ``other``, aligned from the last."""
    for j in range(1, op.out.rank + 1):
        held = [x for x in (op.need("self"), op.need("other")) if j <= x.rank]
        op.equate(product(*(x.axes[-j] for x in held)), op.out.axes[-j])
        for x in held:
            op.link(x, -j, op.out, -j)


@rule("linalg_vecdot", values="product")
def vecdot(op: OpSite) -> None:
    """``x * y`` with broadcast axes, summed over ``dim`` of the product."""
    x, y = op.need("x"), op.need("y")
    rank = op.out.rank + 1
    summed = rank - op.arg("dim", -1) % rank
    for i in range(1, rank + 1):
        held = [z for z in (x, y) if i <= z.rank and z.sizes[-i] != 1]
        if i == summed and held:
            op.add_up(*((z, -i) for z in held))
            op.tie(held[0], -i, held[-1], -i)
        for z in held if i != summed else ():
            op.tie(z, -i, op.out, -i if i < summed else 1 - i)


@rule("einsum", values="product")
def einsum(op: OpSite) -> None:
    """Axes with one letter are one axis, a batch axis if in operands and output; an ellipsis is letters of its own."""
    operands = op.list_of("tensors")
    terms, output = _spell_out(op.arg("equation"), operands, op.out.rank)
    places: dict[str, tuple[TensorAxes, int]] = {letter: (op.out, i) for i, letter in enumerate(output)}
    axes = [(x, i, letter) for x, term in zip(operands, terms, strict=True) for i, letter in enumerate(term)]
    for x, i, letter in axes:
        if x.sizes[i] != 1 and letter in places:
            op.tie(x, i, *places[letter])
        elif x.sizes[i] != 1:
            places[letter] = (x, i)
    for letter in dict.fromkeys("".join(terms)):
        if letter not in output:
            op.add_up(*((x, term.index(letter)) for term, x in zip(terms, operands, strict=True) if letter in term))
    if len(operands) == 2:
        batch = set(terms[0]) & set(terms[1]) & set(output)
        summed = [(x, i) for x, i, letter in axes if letter not in output]
        op.tag_product([(x, i, letter in batch) for x, i, letter in axes], summed)


def _spell_out(equation: str, operands: list[TensorAxes], rank: int) -> tuple[list[str], str]:
    """The letters of each operand and of the output, with ellipses and an implicit output spelled out."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    hidden = [x.rank - len(t.replace("...", "")) for t, x in zip(terms, operands, strict=True) if "..." in t]
    spare = [letter for letter in string.ascii_letters if letter not in inputs][: max(hidden, default=0)]

    def spell(term: str, rank: int) -> str:
        own = rank - len(term.replace("...", ""))
        return term.replace("...", "".join(spare[len(spare) - own :])) if "..." in term else term

    spelled = [spell(term, x.rank) for term, x in zip(terms, operands, strict=True)]
    if not arrow:
        letters = "".join(spelled)
        output = "".join(sorted(set(letters), key=lambda c: (c not in spare, c)))
        output = "".join(c for c in output if c in spare or letters.count(c) == 1)
    return spelled, spell(output, rank)


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(op: OpSite) -> None:
    """``softmax(q k^T * scale + mask) v``: q ``(.., H, S, D)``, k ``(.., G, T, D)``, v ``(.., G, T, E)``.

    With ``enable_gqa`` query head ``g * H / G + r`` reads key head ``g``. The canonical form of a graph makes
    ``scale`` explicit, so that it keeps the dense model's value when ``D`` shrinks.
    """
    q, k, v = op.need("query"), op.need("key"), op.need("value")
    op.tie(q, -1, k, -1)
    op.add_up((q, -1), (k, -1))
    op.tie(k, -2, v, -2)
    op.tie(q, -2, op.out, -2)
    op.tie(v, -1, op.out, -1)
    _tie_heads(op, q, k, v)
    mask = op.tensor("attn_mask")
    if mask is not None:
        for i in range(1, mask.rank + 1):
            if mask.sizes[-i] != 1:
                op.tie(mask, -i, *((k, -2) if i == 1 else (q, -i)))
    op.freeze(k, -2, "attention normalises over keys")
    if op.arg("is_causal", False):
        op.freeze(q, -2, "a causal mask depends on the position")
    for i in (1, *range(3, v.rank + 1)):  # attention weights are never zero, so the values must be
        op.keep_zeros(op.out, -i, (v, -i))
    op.tag(q, -1, Role.SUMMED)
    for x in (q, k, v):
        op.tag(x, -1, Role.HEAD_DIM)
        for i in range(3, x.rank + 1):
            op.tag(x, -i, Role.HEAD)


def _tie_heads(op: OpSite, q: TensorAxes, k: TensorAxes, v: TensorAxes) -> None:
    """Head and batch axes are the same in all tensors; several query heads may read one key head."""
    for i in range(3, q.rank + 1):
        op.tie(q, -i, op.out, -i)
        op.tie(k, -i, v, -i)
        if op.arg("enable_gqa", False) and i == 3:
            op.equate(q.axes[-3], product(k.axes[-3], new_factor(q.sizes[-3] // k.sizes[-3])))
            op.link(q, -3, k, -3)
        elif k.sizes[-i] != 1:
            op.tie(q, -i, k, -i)
