"""More of what random networks are made of: ops that mix, scatter or turn units, along any axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.random_ops import Picks, op

if TYPE_CHECKING:
    from tests.random_networks import RandomNet

__all__ = ["LINES"]

LINES: dict[str, bool] = {}
"""Every line that was among those to choose from, and whether it was ever part of a network."""


def _put(net: RandomNet, picks: Picks, code: str, **names: object) -> str | None:
    """One of the lines of ``code``, whatever their number is."""
    chosen = picks.many_lines(code)
    asked = {name: make for name, make in names.items() if f"{{{name}}}" in chosen}
    found = net.put(chosen.format(**{name: make() if callable(make) else make for name, make in asked.items()}))
    for line in code.strip().splitlines():
        LINES.setdefault(line.strip(), False)
    LINES[chosen] |= found is not None
    return found


def _axes(net: RandomNet, v: str, picks: Picks) -> tuple[int, int]:
    """Two axes of ``v``, mostly neighbours among the last ones; the same one twice if there is no other."""
    rank = net[v].dim()
    first = rank - 1 - picks.number() % rank
    return first, (first + 1 + picks.number() % max(rank - 1, 1)) % rank


@op
def turned(net: RandomNet, v: str, picks: Picks) -> None:
    a, b = _axes(net, v, picks)
    code = """{v}.roll({n}, {a})
        {v}.flip({a})
        {v}.roll(({n}, 1), ({a}, {b}))
        {v}.flip({a}, {b})
        {v}.roll({n}, {a}) * {v}
        {v} + torch.sigmoid({v}).flip({a})
        {v}.flip({a}).cumsum({a}).flip({a})
        {v}.roll(1)
        torch.fliplr({v})
        torch.flipud({v})
        {v}.rot90(1, ({a}, {b}))
        {v}.roll(-1, {a}).roll(1, {a})"""
    _put(net, picks, code, v=v, a=a, b=b, n=1 + picks.number() % 2)


@op
def windows(net: RandomNet, v: str, picks: Picks) -> None:
    a, _ = _axes(net, v, picks)
    code = """{v}.unfold({a}, 2, 1)
        {v}.unfold({a}, 2, 1).mean(-1)
        {v}.unfold({a}, 2, 2).amax(-1)
        {v}.unfold({a}, 2, 1) @ {w}
        {v}.unfold({a}, 2, 1).softmax(-1)
        {v}.unfold({a}, 1, 1)[..., 0] + {v}
        {v}.unfold({a}, 3, 1).prod(-1)
        F.pad({v}, (0, 0, 1, 0)).unfold(-2, 2, 1).flatten(-2)
        {v}.unfold({a}, 2, 2).flatten(-2)
        F.unfold({v}[:, None], (2, 1)).mT"""
    _put(net, picks, code, v=v, a=a, w=lambda: net.weight(2))


@op
def scattered(net: RandomNet, v: str, picks: Picks) -> None:
    """Values written or added at positions along an axis: fixed ones, those of a top-k, those that a mask names."""
    a, _ = _axes(net, v, picks)
    names = {"v": v, "a": a, "r": net[v].dim() - 1 - a, "i": "torch.tensor([1, 0])", "t": f"{v}.topk(2, {a})[1]"}
    code = """{v}.scatter({a}, {t}, 0.5)
        torch.zeros_like({v}).scatter({a}, {t}, 1.0) * {v}
        {v}.scatter({a}, {t}, {v}.narrow({a}, 0, 2).cos())
        torch.zeros_like({v}).scatter_add({a}, {t}, {v}.gather({a}, {t}))
        {v}.scatter_reduce({a}, {t}, {v}.narrow({a}, 0, 2), 'amax')
        {v}.index_add({a}, {i}, {v}.narrow({a}, 0, 2))
        {v}.index_add({a}, {i}, {v}.narrow({a}, 0, 2).exp().clamp(max=3), alpha=0.5)
        {v}.index_copy({a}, {i}, {v}.narrow({a}, 0, 2).cos())
        {v}.index_fill({a}, {i}, 0.5)
        {v}.index_put(({i},), {v}[:1])
        {v}.index_put(({i},), {v}[:1].sigmoid(), accumulate=True)
        {v}.masked_scatter({v} > 0, {v}.cos())
        {v} * torch.zeros_like({v}).scatter({a}, {v}.argmax({a}, keepdim=True), 1.0)
        {v}.scatter_add({a}, {t}, {v}.cos())
        {v}.select_scatter({v}.select({a}, 0).cos(), {a}, 1)
        {v}.slice_scatter({v}.narrow({a}, 0, 1) + 1, {a}, 0, 1)
        torch.zeros_like({v}).index_add({a}, torch.arange({v}.shape[{a}]), {v})
        {v}.index_reduce({a}, {i}, {v}.narrow({a}, 0, 2), 'mean')
        {v}.gather({a}, {t}).exp().clamp(max=3)
        {v}.take_along_dim({v}.argsort({a}), {a})"""
    _put(net, picks, code, **names)


@op
def diagonals(net: RandomNet, v: str, picks: Picks) -> None:
    n = net[v].shape[-1]
    code = """({v}.mT @ {v}).diagonal(dim1=-2, dim2=-1)
        ({v} @ {v}.mT).diagonal(dim1=-2, dim2=-1)
        torch.diag_embed({v})
        torch.diag_embed({v}.cos()).sum(-1)
        {v} @ torch.diag_embed({p})
        torch.einsum('...ii->...i', {v}.mT @ {v})
        torch.einsum('...ii->...', ({v}.mT @ {v}).cos())
        ({v}.mT @ {v}).diagonal(1, -2, -1)
        {v}.diagonal(dim1=-2, dim2=-1)
        {v} * ({v}.flatten(0, -2).mT @ {v}.flatten(0, -2)).trace()
        {v} * {m}.diagonal()
        {v} * {m}.diag()
        F.linear({v}, torch.block_diag({m}, {m})[:{n}, :{n}])
        {v} @ torch.block_diag({m}, {q})[:{n}]
        ({v}.mT @ {v}) - torch.diag_embed(({v}.mT @ {v}).diagonal(dim1=-2, dim2=-1))
        torch.tril({v} @ {v}.mT).diagonal(dim1=-2, dim2=-1)"""
    _put(net, picks, code, v=v, n=n, p=lambda: net.weight(n), m=lambda: net.weight(n, n), q=lambda: net.weight(3, 4))


@op
def outer(net: RandomNet, v: str, picks: Picks) -> None:
    n = net[v].shape[-1]
    code = """torch.outer({v}.flatten(0, -2).mean(0), {p})
        {v}[..., None] * {v}[..., None, :]
        ({v}[..., None] * {v}.sigmoid()[..., None, :]).flatten(-2)
        ({v}[..., None] * {p}).flatten(-2)
        ({p}[:, None] * {v}[..., None, :]).flatten(-2)
        torch.einsum('...d,e->...de', {v}, {p}).sum(-2)
        torch.einsum('...d,...e->...de', {v}, {v}.cos())
        F.linear({v}, torch.outer({p}, {q}))
        {v} @ ({p}[:, None] * {q})
        ({v}[..., None] + {p}).relu().mean(-1)
        ({v}[..., None, :] - {v}[..., None]).abs().sum(-1)
        torch.einsum('i,j,...j->...i', {p}, {q}, {v})
        torch.tensordot({v}, torch.ger({q}, {p}), 1)
        ({v}.sigmoid()[..., :, None] * {v}[..., None, :]).mean((-1, -2))"""
    _put(net, picks, code, v=v, p=lambda: net.weight(n), q=lambda: net.weight(n))


@op
def kron(net: RandomNet, v: str, picks: Picks) -> None:
    n = net[v].shape[-1]
    small = next((d for d in (2, 3) if n % d == 0), 1)
    code = """{v} @ torch.kron({a}, {b})
        torch.kron({v}, {p})
        torch.kron({p}, {v})
        torch.kron({v}, torch.ones(2, dtype={v}.dtype))
        torch.kron(torch.eye(2, dtype={v}.dtype), {v})
        torch.kron({v}[0], {v}[0].sigmoid())
        torch.kron({v}[:, :1], {v}.cos()[:, :1])
        F.linear(torch.kron({v}, {p}), torch.kron({m}, {p}))
        {v} * torch.kron({s}, {r})
        torch.kron({v}.mean(-1, keepdim=True), {p}) + torch.kron({v}.sum(-1, keepdim=True), {p})"""
    names = {"a": (small, 2), "b": (n // small, 3), "p": (3,), "m": (4, n), "s": (small,), "r": (n // small,)}
    _put(net, picks, code, v=v, **{name: (lambda shape=shape: net.weight(*shape)) for name, shape in names.items()})


@op
def norms(net: RandomNet, v: str, picks: Picks) -> None:
    a, b = _axes(net, v, picks)
    code = """{v} / ({v}.norm(dim=({a}, {b}), keepdim=True) + 0.1)
        torch.linalg.vector_norm({v}, 3, ({a}, {b}), keepdim=True) * {v}
        torch.linalg.vector_norm({v}, float('inf'), ({a}, {b}), keepdim=True) - {v}
        torch.linalg.vector_norm({v}, 0.5, ({a}, {b}))
        torch.linalg.vector_norm({v}, -1, ({a}, {b}))
        torch.linalg.matrix_norm({v})
        torch.linalg.norm({v}, dim=({a}, {b}))
        torch.linalg.norm({v}, 1, dim={a})
        {v} / (1 + torch.linalg.matrix_norm({v}, float('inf'), keepdim=True))
        F.normalize({v}, p=1, dim=({a}, {b}))
        {v}.var(({a}, {b}), keepdim=True) + {v}
        ({v} - {v}.mean(({a}, {b}), keepdim=True)) / ({v}.std(({a}, {b}), keepdim=True) + 0.1)
        {v} * {v}.amax(({a}, {b}), keepdim=True)
        {v}.logsumexp(({a}, {b}))
        {v}.sum(({a}, {b})) / {v}.abs().mean(({a}, {b}))
        torch.linalg.vecdot({v}, {v}.cos(), dim={a})
        {v} / ({v}.square().sum(({a}, {b}), keepdim=True).sqrt() + 0.1)
        F.cosine_similarity({v}, {v}.cos(), {a})
        torch.linalg.vector_norm({v}, 0, ({a}, {b}))
        {v} - torch.std_mean({v}, ({a}, {b}), keepdim=True)[1]"""
    _put(net, picks, code, v=v, a=a, b=b)


@op
def grouped_softmax(net: RandomNet, v: str, picks: Picks) -> None:
    a, b = _axes(net, v, picks)
    n = net[v].shape[a]
    groups = picks.of([d for d in (2, 3, 4) if n % d == 0 and n > d] or [1])
    split = f"{v}.unflatten({a}, ({groups}, {n // groups}))"
    code = """{s}.softmax({a} + 1).flatten({a}, {a} + 1)
        {s}.softmax({a}).flatten({a}, {a} + 1)
        ({s}.softmax({a} + 1) * {s}).sum({a} + 1)
        ({s}.softmax({a}) * {s}).sum({a})
        {s}.flatten({a}, {a} + 1).softmax({b})
        {v}.flatten(-2).softmax(-1).view({z})
        F.softmin({v}, {a})
        F.log_softmax({s}, {a} + 1).sum({a})
        torch.where({s} > 0, {s}, -9.0).softmax({a} + 1).flatten({a}, {a} + 1) * {v}
        ({s} / {s}.abs().sum({a} + 1, keepdim=True).clamp_min(0.1)).flatten({a}, {a} + 1)
        {s}.softmax({a} + 1).topk(1, {a} + 1)[0].squeeze({a} + 1)
        {v}.exp().clamp(max=9) / {v}.exp().clamp(max=9).sum({a}, keepdim=True)
        {v}.softmax({a}).softmax({b})"""
    shape = ", ".join(str(size) for size in net.sizes(v))
    _put(net, picks, code, v=v, a=a, b=b, s=split, z=shape)


@op
def patterns(net: RandomNet, v: str, picks: Picks) -> None:
    """Letters again: block-wise weights, heads, several operands, letters that repeat, outputs turned round."""
    n = net[v].shape[-1]
    groups = picks.of([d for d in (2, 3, 4) if n % d == 0 and n > d] or [1])
    split, inner = f"{v}.unflatten(-1, ({groups}, {n // groups}))", n // groups
    code = """'...gd,gde->...ge', {s}, {w}
        '...gd,gde->...eg', {s}, {w}
        '...gd,ged->...e', {s}, {u}
        '...gd,...hd->...gh', {s}, {s}.cos()
        '...gd,...ge->...de', {s}, {s}.sigmoid()
        '...gd,g,d->...gd', {s}, {p}, {q}
        '...gd,dg->...', {s}, {t}
        '...gd,...gd->...g', {s}, {s}
        'bsd,btd,bte->bse', {v}, {v}.cos(), {v}
        'bsd->sbd', {v}
        'b...d,b...d->...d', {v}, {v}
        '...d,de,ef->...f', {v}, {m}, {k}
        '...gd->...dg', {s}
        '...gd,hd->...gh', {s}, {t3}
        'bsd,bsd,btd->bt', {v}, {v}.sigmoid(), {v}
        '...d,...e,de->...', {v}, {v}, {m}
        '...gd,gde,ge->...', {s}, {w}, {r}
        '...gd,kg->...kd', {s}, {t2}
        '...d,...d->...d', {v}, {v}"""
    shapes = {
        **{"w": (groups, inner, 4), "u": (groups, 4, inner), "p": (groups,), "q": (inner,), "t": (inner, groups)},
        **{"m": (n, n), "k": (n, 4), "r": (groups, 4), "t2": (3, groups), "t3": (3, inner)},
    }
    made = {name: (lambda shape=shape: net.weight(*shape)) for name, shape in shapes.items()}
    lines = [f"torch.einsum({line.strip()})" for line in code.strip().splitlines()]
    _put(net, picks, "\n".join(lines), v=v, s=split, **made)
