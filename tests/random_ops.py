"""What random networks are made of: ops that choose among what is there, and leave out what does not apply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from tests.random_networks import RandomNet

__all__ = ["CHOICES", "OPS", "ROWS", "SIZES", "WIDE", "WIDTH", "Picks"]

SIZES = ((2, 3), (3, 4))
"""Batch and tokens that a network is made for, and those that it is run at as well."""

WIDTH, WIDE, ROWS = 5, 12, 7
CHOICES = 12

T = TypeVar("T")


class Picks:
    """The numbers of a record, read one at a time."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = iter(numbers)

    def number(self) -> int:
        return next(self._numbers, 0)

    def of(self, items: Sequence[T]) -> T:
        return items[self.number() % len(items)]

    def lines(self, text: str) -> str:
        return self.of([line.strip() for line in text.strip().splitlines()])

    def many_lines(self, text: str) -> str:
        lines = [line.strip() for line in text.strip().splitlines()]
        return lines[(self.number() + CHOICES * self.number()) % len(lines)]


Op = Callable[["RandomNet", str, Picks], None]

OPS: dict[str, Op] = {}


def op(function: Op) -> Op:
    """Make ``function`` an op: it is given the network so far, a value, and numbers to choose by."""
    OPS[function.__name__.rstrip("_")] = function
    return function


def _axis(net: RandomNet, v: str, picks: Picks) -> int:
    """An axis of ``v``, counted from the last."""
    return net[v].dim() - 1 - picks.number() % net[v].dim()


def _parts(size: int, picks: Picks) -> list[int]:
    """Two or more sizes that add up to ``size``."""
    ways = [[size // n] * n for n in (2, 3, 4) if size % n == 0 and size > n - 1]
    ways += [[n, size - n] for n in (1, 2, 3) if n < size] + [[1, size - 2, 1]] * (size > 2)
    return picks.of(ways or [[size]])


def _like(net: RandomNet, v: str, picks: Picks, fits: Callable[[torch.Size, torch.Size], bool]) -> str:
    """A value whose shape fits that of ``v``, ``v`` itself for lack of another."""
    found = [name for name in reversed(net.values) if name != v and fits(net[v].shape, net[name].shape)]
    return picks.of(found) if found else v


def _broadcast(a: torch.Size, b: torch.Size) -> bool:
    return all(1 in (m, n) or m == n for m, n in zip(reversed(a), reversed(b), strict=False))


def _linear(net: RandomNet, v: str, out: int, bias: bool = True) -> str:
    weight, zero = net.weight(out, net[v].shape[-1]), net.weight(out) if bias else "None"
    return net.put(f"F.linear({v}, {weight}, {zero})") or v


@op
def linear(net: RandomNet, v: str, picks: Picks) -> None:
    _linear(net, v, picks.of((WIDE, 8, 24, 6, 4, 16, 9, 2)), picks.of((True, False)))


@op
def tied(net: RandomNet, v: str, picks: Picks) -> None:
    """A weight that is there already, once more: as it is, transposed, as an embedding, as a scale."""
    name = picks.of([name for name, _ in net.named_parameters()])
    code = "F.linear({v}, {w})\n{v} @ {w}\nF.embedding(ids, {w})\n{v} * {w}\n{v} + {w}\n{v} @ {w}.T\n{v} * {w}[0]"
    net.put(picks.lines(code).format(v=v, w=f"self.{name}"))


@op
def embedding(net: RandomNet, v: str, picks: Picks) -> None:
    width = picks.of((8, 6, net[v].shape[-1], 12))
    table = net.weight(ROWS, width)
    found = net.put(f"F.embedding(ids, {table})")
    if found and picks.number() % 2:
        net.put(f"F.linear({found}, {table})")


ACTIVATIONS = """
    F.relu({v})
    F.gelu({v})
    F.silu({v})
    torch.sigmoid({v})
    F.elu({v}) + 1
    torch.exp(-{v}.abs())
    torch.cos({v})
    F.softplus({v})
    {v}.tanh()
    F.relu({v}) ** 2
    F.leaky_relu({v}, 0.1)
    {v}.clamp(-0.5, 0.5)
    {v}.clamp(min=0.1)
    F.hardsigmoid({v})
    torch.rsqrt({v} ** 2 + 1)
    torch.where({v} > 0, {v}, 0.1 * {v})
    {v}.masked_fill({v} < 0, 0.5)
    (1 + {v}.abs()).log()
    ({v}.abs() + 0.01).sqrt()
    {v}.sign()
    torch.erf({v})
    F.dropout({v}, 0.5, training=False)
    {v}.abs().log()
    1 / (0.5 + {v} * {v})
    {v}.abs() ** -0.5
    {v} / ({v}.abs() + 1e-20)
    F.mish({v})
    F.hardswish({v})
    F.softshrink({v}, 0.2)
    F.logsigmoid({v})
    F.selu({v})
    torch.reciprocal({v}.abs() + 1)
    {v}.floor()
    torch.atan2({v}, {v}.cos())
    F.threshold({v}, 0.1, 0.3)
    {v}.clamp(max=0.2)
"""


@op
def activate(net: RandomNet, v: str, picks: Picks) -> None:
    net.put(picks.many_lines(ACTIVATIONS).format(v=v))


@op
def scalar(net: RandomNet, v: str, picks: Picks) -> None:
    code = """{v} * 2
        {v} + 1
        1 - {v}
        {v} / 3
        {v}.to(torch.float64).square().to({v}.dtype)
        {v}.float().to({v}.dtype)
        {v}.contiguous() - 0.5
        torch.add({v}, {v}, alpha=0.5)
        {v} * math.sqrt({v}.shape[-1])
        {v} / {v}.shape[-1]
        {v}.detach() * {v}.new_tensor(0.5)
        2.0 ** -{v}.abs()"""
    net.put(picks.lines(code).format(v=v))


@op
def combine(net: RandomNet, v: str, picks: Picks) -> None:
    other = _like(net, v, picks, _broadcast)
    code = """{v} + {w}
        {v} * {w}
        {v} - {w}
        torch.sigmoid({v}) * {w}
        {v} / (1 + {w} * {w})
        torch.maximum({v}, {w})
        torch.where({w} > 0, {v}, {w})
        torch.lerp({v}, {w}, 0.3)
        {v} + {w}.mean(-1, keepdim=True)
        torch.addcmul({v}, {w}, {w})
        torch.hypot({v}, {w})
        {v} * ({w} > 0)"""
    net.put(picks.lines(code).format(v=v, w=other))


@op
def weigh(net: RandomNet, v: str, picks: Picks) -> None:
    """A parameter or buffer along an axis, itself computed in some ways."""
    axis = _axis(net, v, picks)
    size, after = net[v].shape[axis], net[v].dim() - 1 - axis
    make = picks.of((net.weight, net.constant))
    forms = "{w} | 1 + {w} | {w}.sigmoid() | -{w}.exp() | {w} / {w}.norm() | {w} * {w}.abs().mean() | {w}.softmax(0)"
    form = picks.of(forms.split(" | "))
    shape = f".view({size}{', 1' * after})" if after else ""
    code = picks.of(("{v} * {w}", "{v} + {w}", "{v} / (1 + {w} ** 2)"))
    net.put(code.format(v=v, w=f"({form.format(w=make(size))}){shape}"))


@op
def made_weight(net: RandomNet, v: str, picks: Picks) -> None:
    """A linear layer whose weight is computed: normed, low rank, fused, cut, masked, tied to itself."""
    width, out = net[v].shape[-1], picks.of((6, 8, 4))
    w, g = net.weight(out, width), net.weight(out, 1)
    code = """{w} / {w}.norm(dim=1, keepdim=True) * {g}
        {w} / {w}.norm(dim=0, keepdim=True)
        F.normalize({w}, dim=1)
        {w} + {a} @ {b}
        torch.cat(({w}, {w2}), 0)
        torch.cat(({w2}[:, :1], {w}[:, 1:]), 1)
        {w}.exp()
        ({w} * {w}).softmax(0)
        ({w}.T @ {w}) @ {w2}.T
        torch.tanh({w}) * {g}.sigmoid()
        {w} - {w}.mean(0, keepdim=True)
        torch.cat(({w}, {w}[:2]), 0)"""
    code = picks.lines(code)
    spare = {"w2": net.weight(out, width), "a": net.weight(out, 2), "b": net.weight(2, width)}
    made = code.format(w=w, g=g, **spare)
    net.put(f"{v} @ ({made})" if "}.T" in code else f"F.linear({v}, {made})")


@op
def gated(net: RandomNet, v: str, picks: Picks) -> None:
    width, hidden = net[v].shape[-1], picks.of((6, 4, 8))
    act, fused, residual = picks.lines("F.silu\nF.relu\ntorch.sigmoid\ntorch.exp"), picks.number(), picks.number()
    if fused % 3 == 0:
        both = _linear(net, v, 2 * hidden, bias=False)
        up = net.put(f"{act}({both}[..., :{hidden}]) * {both}[..., {hidden}:]")
    elif fused % 3 == 1:
        up = net.put(f"{act}({_linear(net, v, hidden)}) * {_linear(net, v, hidden)}")
    else:
        up = net.put(f"{act}({_linear(net, v, hidden)})")
    down = _linear(net, up or v, width)
    if residual % 2 == 0:
        net.put(f"{v} + {down}")


@op
def norm(net: RandomNet, v: str, picks: Picks) -> None:
    n = net[v].shape[-1]
    w, b = net.weight(n, positive=True), net.weight(n)
    code = """F.layer_norm({v}, ({n},), {w}, {b})
        F.rms_norm({v}, ({n},), {w}, 1e-5)
        {w} * ({v} * ({v}.pow(2).mean(-1, keepdim=True) + 0.1).rsqrt())
        {v} / ({v}.square().mean(-1, keepdim=True) + 0.1).sqrt() * (1 + {w})
        {v} * torch.rsqrt({v}.pow(2).mean(-1, keepdim=True) + 1e-5) * {w}
        F.layer_norm({v}, ({n},))
        F.rms_norm({v}, ({n},))
        F.normalize({v}, dim=-1)
        F.layer_norm({v}, {v}.shape[-2:])
        {v} * torch.rsqrt(({v} * {v}).sum(-1, keepdim=True) + 1e-5)
        ({v} - {v}.mean(-1, keepdim=True)) / ({v}.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        F.group_norm({v}.transpose(1, -1), 2).transpose(1, -1)
        F.batch_norm({v}.transpose(1, -1), {c}, {c}.abs(), {w}, {b}).transpose(1, -1)
        {v} / ({v}.norm(dim=-2, keepdim=True) + 1e-5)
        {v} / ({v}.norm() + 1)
        {v} - {v}.mean()
        {v} * {v}.abs().amax()
        {v} / (1 + {v}.sum().abs())
        torch.var_mean({v}, -1, keepdim=True)[1] - {v} * torch.var_mean({v}, -1, keepdim=True)[0].rsqrt()
        F.layer_norm({v}, ({n},), None, {b})
        {v} / {v}.abs().sum(-1, keepdim=True).clamp_min(1e-6)"""
    code = picks.many_lines(code)
    net.put(code.format(v=v, n=n, w=w, b=b, c=net.constant(n) if "{c}" in code else ""))


@op
def conv(net: RandomNet, v: str, picks: Picks) -> None:
    if net[v].dim() != 3:
        return
    width, taps = net[v].shape[-1], picks.of((3, 1, 2))
    groups = picks.of((1, width, 2))
    out = picks.of((width, 2 * width, 6))
    if width % groups or out % groups:
        return
    weight, bias = net.weight(out, width // groups, taps), net.weight(out)
    pad = f"F.pad({v}.transpose(1, 2), ({taps - 1}, 0))" if picks.number() % 2 else f"{v}.transpose(1, 2)"
    net.put(f"F.conv1d({pad}, {weight}, {bias}, groups={groups}).transpose(1, 2)")


@op
def attention(net: RandomNet, v: str, picks: Picks) -> None:
    if net[v].dim() != 3:
        return
    width, batch, tokens = net[v].shape[-1], *net.sizes(v)[:2]
    heads, groups, dim = picks.of(((2, 2, 4), (4, 2, 4), (4, 1, 2), (1, 1, 6), (6, 3, 2)))
    core, form = picks.many_lines(CORES), picks.number()
    if form % 5 > 2 and heads == groups:
        fused = _linear(net, v, 3 * heads * dim)
        parts = (f"{batch}, {tokens}, 3, {heads}, {dim}).unbind(2)", f"{batch}, {tokens}, {heads}, -1).chunk(3, -1)")
        if not net.run(f"a{fused} = {fused}.view({parts[form % 2]}"):
            return
        flat = [f"a{fused}[{i}]" for i in range(3)]
    elif form % 3 == 2:
        fused = _linear(net, v, (heads + 2 * groups) * dim)
        if not net.run(f"a{fused} = {fused}.split([{heads * dim}, {groups * dim}, {groups * dim}], -1)"):
            return
        flat = [f"a{fused}[{i}]" for i in range(3)]
    else:
        flat = [_linear(net, v, n * dim, bias=form % 3 == 0) for n in (heads, groups, groups)]
    counts = (heads, groups, groups)
    q, k, w = (
        net.put(f"{x}.view({batch}, {tokens}, {n}, {dim}).transpose(1, 2)") for x, n in zip(flat, counts, strict=True)
    )
    if not (q and k and w):
        return
    prepare = picks.of(("{x}", "{x}", *PREPARATIONS))
    spare = {"n": dim, "m": dim // 2, "w": net.weight(dim, positive=True), "c": net.constant(dim)}
    q, k = (net.put(prepare.format(x=x, **spare)) or x for x in (q, k))
    k, w = _repeat_keys(net, k, w, heads // groups, core, picks.number())
    most = SIZES[1][1]
    mask = net.weight(heads, most, most) if picks.number() % 2 else net.constant(most, most)
    mask = f"{mask}[..., :{tokens}, :{tokens}]"
    out = net.put(core.format(q=q, k=k, v=w, dim=dim, gqa=heads != groups, mask=mask))
    flat_out = out and net.put(f"{out}.transpose(1, 2).reshape({batch}, {tokens}, -1)")
    if flat_out and picks.number() % 3:
        net.put(f"{v} + {_linear(net, flat_out, width)}")


CORES = """
    F.scaled_dot_product_attention({q}, {k}, {v}, is_causal=True, enable_gqa={gqa})
    ({q} @ {k}.transpose(-1, -2) / math.sqrt({dim})).softmax(-1) @ {v}
    F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={mask}, enable_gqa={gqa})
    (F.elu({q}) + 1) @ ((F.elu({k}) + 1).transpose(-1, -2) @ {v})
    (({q} @ {k}.mT) * {dim} ** -0.5 + {mask}.triu(1) * -9).softmax(-1) @ {v}
    {q} @ ({k}.softmax(-1).mT @ {v})
    torch.einsum("bhsd,bhtd->bhst", {q}, {k}).softmax(-1) @ {v}
    (F.relu({q}) @ F.relu({k}).mT) @ {v} / ((F.relu({q}) @ F.relu({k}).mT).sum(-1, keepdim=True) + 1)
    torch.einsum("bhst,bhtd->bhsd", (F.normalize({q}, dim=-1) @ F.normalize({k}, dim=-1).mT).softmax(-1), {v})
    torch.sigmoid({q} @ {k}.mT) @ {v}
    F.scaled_dot_product_attention({q}, {k}, {v}, scale=0.3, enable_gqa={gqa})
    (({q} @ {k}.mT).softmax(-1) @ {v}) * torch.sigmoid({q})
    torch.cat(({q} @ {k}.mT, {q}[..., :1] * 0 + 0.5), -1).softmax(-1)[..., :-1] @ {v}
    (({q} @ {k}.mT).tanh() * 3 - (1 - {mask}.tril()) * 9).softmax(-1) @ {v} - 0.1 * {v}
"""

PREPARATIONS = (
    "F.rms_norm({x}, ({n},), {w}, 1e-5)",
    "{x} * {c}.cos() + torch.cat((-{x}[..., {m}:], {x}[..., :{m}]), -1) * {c}.sin()",
    "torch.stack(({x}[..., ::2] * {c}[{m}:], {x}[..., 1::2] * {c}[{m}:]), -1).flatten(-2)",
    "F.normalize({x}, dim=-1) * {w}",
    "{x} * torch.rsqrt(({x} * {x}).mean(-1, keepdim=True) + 1e-5) * (1 + {w})",
    "{x} + {w}",
)
"""What is done to queries and keys: norms, rotations, biases."""


def _repeat_keys(net: RandomNet, k: str, v: str, times: int, core: str, form: int) -> tuple[str, str]:
    """Keys and values once for each query head, in one of the usual spellings, where the core does not do it."""
    if times == 1 or "gqa" in core:
        return k, v
    shape, count = net.sizes(k), net[k].shape[1]
    wide = f"{shape[0]}, {shape[1]}, {times}, {shape[2]}, {shape[3]}"
    merged = f"{shape[0]}, {count * times}, {shape[2]}, {shape[3]}"
    if form % 5 == 4 and count == 1:  # one head of keys is broadcast to all
        return k, v
    code = (
        f"{{x}}.repeat_interleave({times}, 1)",
        f"{{x}}[:, :, None].expand({wide}).reshape({merged})",
        f"{{x}}.repeat(1, {times}, 1, 1)",
        f"torch.stack([{{x}}] * {times}, 2).flatten(1, 2)",
    )[form % 4]
    return net.put(code.format(x=k)) or k, net.put(code.format(x=v)) or v


@op
def latent_attention(net: RandomNet, v: str, picks: Picks) -> None:
    if net[v].dim() != 3:
        return
    heads, plain, turned, out, rank = picks.of((2, 4)), picks.of((2, 3)), 2, picks.of((3, 4)), picks.of((6, 4))
    (batch, tokens, _), width = net.sizes(v), net[v].shape[-1]
    shape = f"{batch}, {tokens}, {heads}"
    down = _linear(net, v, rank + turned, bias=False)
    latent = net.put(f"F.rms_norm({down}[..., :{rank}], ({rank},), {net.weight(rank, positive=True)}, 1e-5)") or v
    both = net.put(f"{_linear(net, latent, heads * (plain + out))}.view({shape}, -1).transpose(1, 2)")
    q = net.put(f"{_linear(net, v, heads * (plain + turned))}.view({shape}, {plain + turned}).transpose(1, 2)")
    if not (both and q):
        return
    key = f"{down}[..., {rank}:].view({batch}, 1, {tokens}, {turned}).expand(-1, {heads}, -1, -1)"
    k = net.put(f"torch.cat(({both}[..., :{plain}], {key} * {net.constant(turned)}), -1)")
    w = net.put(f"{both}.split([{plain}, {out}], -1)[1]")
    core = picks.lines("F.scaled_dot_product_attention({q}, {k}, {w})\n({q} @ {k}.mT).softmax(-1) @ {w}")
    found = net.put(core.format(q=q, k=k, w=w))
    flat = net.put(f"{found}.transpose(1, 2).reshape({batch}, {tokens}, {heads * out})")
    if flat and picks.number() % 2 == 0:
        net.put(f"{v} + {_linear(net, flat, width, bias=False)}")


@op
def state_space(net: RandomNet, v: str, picks: Picks) -> None:
    """A state for each channel, written and read by gates that depend on the token; the scan is a running sum."""
    if net[v].dim() != 3:
        return
    width, states = net[v].shape[-1], picks.of((3, 4))
    step = net.put(f"F.softplus({_linear(net, v, width)})") or v
    write, read = (_linear(net, v, states, bias=False) for _ in range(2))
    decay = net.put(f"torch.exp(-{step}[..., None] * {net.weight(width, states)}.exp())")
    kept = net.put(f"({decay} * {write}[..., None, :] * {v}[..., None]).cumsum(1)")
    code = """({h} * {c}[..., None, :]).sum(-1)
        torch.einsum('btdn,btn->btd', {h}, {c})
        ({h} @ {c}[..., None])[..., 0]
        ({h} * {c}[..., None, :].sigmoid()).sum(-1)
        {h}.sum(-1)
        {h}.flatten(-2)"""
    found = net.put(picks.lines(code).format(h=kept, c=read))
    if found and picks.number() % 2 == 0:
        net.put(f"{found} + {v} * {net.weight(width)}")


@op
def experts(net: RandomNet, v: str, picks: Picks) -> None:
    width, count, hidden = net[v].shape[-1], picks.of((3, 4)), picks.of((4, 6))
    if net[v].dim() != 3:
        return
    up, down = net.weight(count, width, hidden), net.weight(count, hidden, width)
    gate = net.put(f"{_linear(net, v, count)}{picks.of(('.softmax(-1)', '.sigmoid()', '.relu()'))}")
    code = """torch.einsum('bte,btew->btw', {g}, torch.einsum('ewi,bti->btew', {d}.mT, {h}[..., 0, :]))
        torch.einsum('bteh,ehw,bte->btw', torch.einsum('btw,ewh->bteh', {v}, {u}).relu(), {d}, {g})
        (({v}[:, :, None, None] @ {u}).relu() @ {d})[..., 0, :].mul({g}[..., None]).sum(2)
        torch.bmm(F.silu({v}.flatten(0, 1) @ {u}), {d}).movedim(0, -1) @ {g}.reshape(-1, {e}, 1)
        torch.einsum('bteh,ehw->btew', torch.einsum('btw,ewh->bteh', {v}, {u}).sigmoid(), {d}).mean(2)"""
    spare = {"u": up, "d": down, "e": count, "h": f"{v}[..., :{hidden}].unsqueeze(-2)"}
    net.put(picks.lines(code).format(v=v, g=gate, **spare))


@op
def looked_up(net: RandomNet, v: str, picks: Picks) -> None:
    """Buffers of numbers: positions to embed, an order, a mask; and a scale of no axes."""
    axis, size = net[v].dim() - 1, net[v].shape[-1]
    code = """{v} + F.embedding({i} % 3, {w})[:{t}]
        {v}[..., {i}]
        {v}.index_select({a}, {i}.flip(0))
        {v}.masked_fill({i} > 1, 0.0)
        {v} * {s}
        {v}.masked_fill(({c} > 1), 0.5)
        torch.where({c} > 1, {v}, {v}.cos())
        {v} + {s} * {c}
        {v} * {w}[1]
        {v} * F.one_hot({i}, {n}).to({v}.dtype).sum(0)"""
    index = net._named("c", torch.arange(size).flip(0))
    scale = net._named("w", nn.Parameter(net._draw(())))
    spare = {"i": index, "s": scale, "a": axis, "c": net.constant(size), "n": size, "w": net.weight(3, size)}
    net.put(picks.lines(code).format(v=v, t=net.sizes(v)[-2] if axis else 1, **spare))


@op
def rotary(net: RandomNet, v: str, picks: Picks) -> None:
    n = net[v].shape[-1]
    if n % 2:
        return
    half, full = net.constant(n // 2), net.constant(n)
    code = """{v} * {f}.cos() + torch.cat((-{v}[..., {m}:], {v}[..., :{m}]), -1) * {f}.sin()
        torch.stack(({v}[..., ::2] * {h}, {v}[..., 1::2] * {h}), -1).flatten(-2)
        torch.cat(({v}[..., :{m}] * {h} - {v}[..., {m}:], {v}[..., :{m}] + {v}[..., {m}:] * {h}), -1)
        {v} * torch.cat(({h}, {h}), -1)
        torch.view_as_real(torch.view_as_complex({v}.reshape(*{v}.shape[:-1], {m}, 2)) * (1j * {h}).exp()).flatten(-2)
        torch.cat([x * {h} for x in {v}.chunk(2, -1)], -1)"""
    net.put(picks.lines(code).format(v=v, f=full, h=half, m=n // 2))


@op
def matmul(net: RandomNet, v: str, picks: Picks) -> None:
    same = _like(net, v, picks, lambda a, b: a == b)
    code = """{v} @ {w}.mT
        {v}.mT @ {w}
        torch.sigmoid({v}) @ {w}.mT
        (F.elu({v}) + 1) @ (F.elu({w}) + 1).mT @ {v}
        {v} @ (torch.exp(-{w}.abs()).mT @ {v})
        {v}.softmax(-1) @ {w}.mT
        {v} @ {w}
        torch.baddbmm({v} @ {w}.mT, {v}, {w}.mT)
        ({v}[..., None, :] @ {w}[..., :, None])[..., 0]
        {v}[..., :1] @ {w}[..., :1].mT
        {v} @ {w}.mean(-2)[..., None]
        {v}[0] @ {w}[0].mT"""
    net.put(picks.lines(code).format(v=v, w=same))


@op
def einsum(net: RandomNet, v: str, picks: Picks) -> None:
    n = net[v].shape[-1]
    same = _like(net, v, picks, lambda a, b: a == b)
    code = """'...d,de->...e', {v}, {m}
        '...sd,...td->...st', {v}, {w}
        '...d,...d->...', {v}, {w}
        '...d,d->...d', {v}, {p}
        '...d->...', {v}
        '...sd,...sd->...d', {v}, {w}
        '...sd,...se->...de', {v}, torch.sigmoid({w})
        '...sd->...ds', {v}
        '...d,ed->...ed', {v}, {m}
        'bsd,btd,de->bste', {v}, {w}, {m}
        '...d,e->...de', {v}, {p}
        '...d,...d,d->...d', {v}, torch.cos({w}), {p}"""
    code = picks.lines(code)
    net.put(f"torch.einsum({code.format(v=v, w=same, m=net.weight(n, n), p=net.weight(n))})")


@op
def view(net: RandomNet, v: str, picks: Picks) -> None:
    axis = _axis(net, v, picks)
    size = net[v].shape[axis]
    divisors = [d for d in (2, 3, 4) if size % d == 0 and size > d]
    if not divisors:
        return
    outer, sizes = picks.of(divisors), net.sizes(v)
    shape = [*sizes[:axis], outer, size // outer, *sizes[axis + 1 :]]
    code = (
        f"{v}.view({', '.join(map(str, shape))})",
        f"{v}.unflatten({axis}, ({outer}, {size // outer}))",
        f"{v}.reshape({', '.join(map(str, [*shape[:-1], -1]))})",
        f"{v}.view(*{v}.shape[:{axis}], -1, {', '.join(map(str, shape[axis + 1 :]))})",
    )
    net.put(picks.of(code))


@op
def flatten(net: RandomNet, v: str, picks: Picks) -> None:
    axis = _axis(net, v, picks)
    if axis:
        shape = net.sizes(v)
        joined = (*shape[: axis - 1], f"{shape[axis - 1]} * {shape[axis]}", *shape[axis + 1 :])
        spelled, rest = ", ".join(map(str, joined)), ", ".join(map(str, (-1, *joined[1:])))
        code = (f"{v}.flatten({axis - 1}, {axis})", f"{v}.reshape({spelled})", f"{v}.reshape({rest})")
        net.put(picks.of(code))


@op
def permute(net: RandomNet, v: str, picks: Picks) -> None:
    a, b = _axis(net, v, picks), _axis(net, v, picks)
    order = tuple(reversed(range(net[v].dim())))
    net.put(picks.of((f"{v}.transpose({a}, {b})", f"{v}.movedim({a}, {b})", f"{v}.permute{order}", f"{v}.mT")))


@op
def cut(net: RandomNet, v: str, picks: Picks) -> None:
    axis, form = _axis(net, v, picks), picks.number()
    sizes = _parts(net[v].shape[axis], picks)
    name = f"p{v}_{len(net.values)}"
    code = f"{v}.split({sizes}, {axis})" if form % 2 else f"{v}.chunk({len(sizes)}, {axis})"
    if not net.run(f"{name} = {code}"):
        return
    count = len(net._scope[name])
    if form % 3 == 0:
        net.put(f"torch.cat({name}[::-1], {axis})")
    elif form % 3 == 1:
        net.put(f"F.silu({name}[0]) * {name}[{count - 1}]")
    else:
        for i in range(count):
            net.put(f"{name}[{i}]")


@op
def cat(net: RandomNet, v: str, picks: Picks) -> None:
    axis = _axis(net, v, picks)
    other = _like(net, v, picks, lambda a, b: len(a) == len(b) and a[:-1] == b[:-1])
    at = axis if net[other].shape == net[v].shape else net[v].dim() - 1
    code = f"""torch.cat(({v}, {other}), {at})
        torch.cat(({v}, torch.sigmoid({v})), {axis})
        torch.cat(({v}, torch.ones_like({v})), {axis})
        torch.cat(({v}, {v}.new_zeros({v}.shape)), {axis})
        torch.cat(({v}.mean({axis}, keepdim=True), {v}), {axis})
        torch.stack(({v}, {v} * {v}), {axis})
        torch.stack(({v}, {v}.cos()), {axis}).flatten({axis}, {axis} + 1)
        torch.stack(({v}, {v}), -1).flatten(-2)
        torch.cat((torch.ones(1, dtype={v}.dtype).expand({v}.shape[:-1] + (1,)), {v}), -1)"""
    net.put(picks.lines(code))


@op
def slice_(net: RandomNet, v: str, picks: Picks) -> None:
    axis = _axis(net, v, picks)
    size = net[v].shape[axis]
    run = picks.of((f":{size // 2}", f"{size // 2}:", "1:", ":-1", "::2", "1::2", f"-{size // 2}:", "1:-1"))
    colons = ":, " * axis
    code = (
        f"{v}[{colons}{run}]",
        f"{v}.narrow({axis}, 0, {max(size // 2, 1)})",
        f"{v}.index_select({axis}, torch.tensor([0, {size - 1}]))",
        f"torch.cat(({v}[{colons}{size // 2}:], {v}[{colons}:{size // 2}]), {axis})",
        f"{v}[{colons}torch.arange({max(size // 2, 1)})]",
    )
    net.put(picks.of(code))


@op
def select(net: RandomNet, v: str, picks: Picks) -> None:
    axis = _axis(net, v, picks)
    size = net[v].shape[axis]
    code = (
        f"{v}.select({axis}, {size - 1})",
        f"{v}.unbind({axis})[0] + torch.sigmoid({v}.unbind({axis})[-1])",
        f"torch.stack({v}.unbind({axis})[::-1], {axis})",
        f"{v}.select({axis}, 0).unsqueeze({axis}) - {v}",
    )
    net.put(picks.of(code))


@op
def expand(net: RandomNet, v: str, picks: Picks) -> None:
    axis, times = _axis(net, v, picks), picks.of((2, 3))
    shape = net.sizes(v)
    wide, spelled = (f"({', '.join(map(str, s))},)" for s in ([*shape[:axis], times, *shape[axis:]], shape))
    ones = ", ".join(["1"] * axis)
    repeats = ", ".join(str(times if i == axis else 1) for i in range(len(shape)))
    code = (
        f"{v}.unsqueeze({axis}).expand({wide})",
        f"{v}.repeat_interleave({times}, {axis})",
        f"{v}.repeat({repeats})",
        f"{v}.unsqueeze({axis}).expand({wide}).flatten({axis}, {axis + 1})",
        f"{v}.unsqueeze({axis})",
        f"{v}.squeeze()",
        f"{v}.squeeze({axis})",
        f"{v}.unsqueeze({axis}).squeeze()",
        f"{v}.unsqueeze(0).squeeze((0, {axis + 1}))",
        f"{v}.unsqueeze({axis}).repeat({ones}{', ' if ones else ''}{times}{', 1' * (len(shape) - axis)})",
        f"{v}.mean({axis}, keepdim=True).expand({spelled})",
        f"torch.broadcast_to({v}.select({axis}, 0).unsqueeze({axis}), {spelled})",
    )
    net.put(picks.of(code))


@op
def reduce(net: RandomNet, v: str, picks: Picks) -> None:
    axis, kept = _axis(net, v, picks), picks.of((True, False))
    name = picks.of(("sum", "mean", "amax", "norm", "var", "logsumexp", "std", "prod", "amin", "argmax"))
    code = f"{v}.{name}(dim={axis}, keepdim={kept})"
    if name == "argmax":
        code = f"{v} * {v}.argmax(dim={axis}, keepdim=True)"
    form = picks.of(("{c}", "{v} - {c}", "{v} / (1 + {c} ** 2)", "torch.sigmoid({c})")) if kept else "{c}"
    net.put(form.format(c=code, v=v))


@op
def scan(net: RandomNet, v: str, picks: Picks) -> None:
    axis = _axis(net, v, picks)
    code = f"""{v}.softmax({axis})
        {v}.cumsum({axis})
        {v}.flip({axis})
        {v}.roll(1, {axis})
        {v}.topk(2, {axis})[0]
        {v}.sort({axis})[0]
        F.log_softmax({v}, {axis})
        {v}.tril()
        {v}.diff(dim={axis})
        F.pad({v}, (1, 0))
        F.pad({v}, (0, 0, 1, -1))
        F.pad({v}, (0, 0, 1, 0), value=1.0)"""
    net.put(picks.lines(code))


@op
def positions(net: RandomNet, v: str, picks: Picks) -> None:
    n = net.sizes(v)[-1]
    code = """{v} * torch.arange({n})
        {v} + torch.ones({n})
        {v} * torch.linspace(0, 1, {n})
        {v}.masked_fill(torch.ones({v}.shape[-2:]).tril() == 0, 0.0)
        {v} * {v}.new_full(({n},), 0.5)
        {v} + torch.zeros({n})
        {v} @ torch.eye({n}, dtype={v}.dtype)
        {v} * torch.tensor([1.0] * {n}, dtype={v}.dtype)
        {v} * torch.full_like({v}, 2.0)
        torch.where(torch.arange({n}) < 2, {v}, -{v})"""
    net.put(picks.lines(code).format(v=v, n=n))


@op
def odd(net: RandomNet, v: str, picks: Picks) -> None:
    n = net[v].shape[-1]
    code = """F.glu({v}, -1)
        F.bilinear({v}, {v}, {m3}, {p3})
        {v}.gather(-1, ({v} > 0).long())
        {v}.scatter_add(-1, ({v} > 0).long(), {v})
        torch.tensordot({v}, {m}, 1)
        torch.inner({v}, {m})
        F.prelu({v}, {p}[:1])
        F.cosine_similarity({v}, {v}.cos(), -1)
        {v}.unfold(-1, 2, 2)
        F.avg_pool1d({v}, 2)
        torch.cdist({v}, {v})
        F.one_hot(ids, 7).to({v}.dtype) @ {r}
        {v}.index_add(-1, torch.tensor([0, 1]), {v}[..., :2])
        torch.outer({p}, {p}) + {v}
        torch.addmm({p}, {v}[0], {m})
        torch.kron({v}[0], {v}[0, :, :1])
        {v}.cumprod(-1)
        {v}.median(-1, keepdim=True)[0] + {v}
        torch.addcdiv({v}, {v}, {v} * {v} + 1)
        {v}.quantile(0.5, dim=-1)
        F.instance_norm({v}.transpose(1, -1)).transpose(1, -1)
        {v}.renorm(2, 0, 1.0)
        {v}.take_along_dim({v}.argsort(-1), -1)
        torch.block_diag({m}, {m})[:{n}, :{n}] @ {v}.mT"""
    code = picks.many_lines(code)
    spare = {"m": net.weight(n, n), "p": net.weight(n)}
    spare["m3"], spare["p3"] = (net.weight(4, n, n), net.weight(4)) if "m3" in code else ("", "")
    net.put(code.format(v=v, n=n, r=net.weight(ROWS, n), **spare))


@op
def library_attention(net: RandomNet, v: str, picks: Picks) -> None:
    width, heads = net[v].shape[-1], picks.of((2, 1, 3))
    if net[v].dim() != 3 or width % heads:
        return
    weights = ", ".join((net.weight(3 * width, width), net.weight(3 * width), "None, None, False, 0.0"))
    out = ", ".join((net.weight(width, width), net.weight(width)))
    options = picks.of(("need_weights=False", "need_weights=True", "need_weights=True, average_attn_weights=False"))
    x = f"{v}.transpose(0, 1)"
    call = f"F.multi_head_attention_forward({x}, {x}, {x}, {width}, {heads}, {weights}, {out}, False, {options})"
    net.put(f"{call}[{picks.of((0, 0, 1))}]" if "True" in options else f"{call}[0].transpose(0, 1)")


@op
def in_place(net: RandomNet, v: str, picks: Picks) -> None:
    code = """{w}.add_(1)
        {w}[..., 0] = 0
        {w}[..., :2] *= 2
        {w}.mul_({w}.sigmoid())
        {w}[:, 0] += 1
        {w}.transpose(0, 1).mul_(0.5)
        {w}.copy_({v}.cos())
        {w}.zero_()
        {w}[..., 1:] = {w}[..., :-1].clone()
        {w}.view(-1).add_(0.5)
        {w}.masked_fill_({v} > 0, 0.5)
        {w}[..., -1].fill_(1.0)"""
    copied = net.put(f"{v}.clone()")
    if copied and net.run(picks.lines(code).format(v=v, w=copied)):
        net.put(f"{copied} * 1")
