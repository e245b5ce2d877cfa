"""Stacks of blocks of many designs, pruned by the public call: the slim one is the dense one with what went zeroed."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.probes.check import numbers, pruned
from tests.tiers import tiers

D, HEADS = 12, 3
X = {"x": numbers(2, 6, 5)}
OTHERS = ({"x": numbers(3, 9, 5)}, {"x": numbers(1, 1, 5)})

Body = Callable[[Any, torch.Tensor], Any]
Sizes = dict[str, Any]


class Block(nn.Module):
    """A body over ``h (batch, tokens, 12)``; ``sizes`` are those of its linear layers, or its parts."""

    def __init__(self, body: Body, sizes: Sizes) -> None:
        super().__init__()
        self.body = body
        for name, size in sizes.items():
            part = size() if callable(size) else size
            if isinstance(part, tuple):
                part = nn.Linear(*part) if len(part) == 2 else nn.Parameter(numbers(*part) / part[-1] ** 0.5)
            setattr(self, name, part)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.body(self, h)


class Stack(nn.Module):
    """Blocks between an embedding of five numbers and a head of seven."""

    def __init__(self, *blocks: tuple[Body, Sizes]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, D)
        self.blocks = nn.ModuleList(Block(body, sizes) for body, sizes in blocks)
        self.norm = nn.RMSNorm(D, 1e-6)
        self.head = nn.Linear(D, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def causal(scores: torch.Tensor) -> torch.Tensor:
    tokens = scores.shape[-1]
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1) > 0, -1e9)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)


QKVO: Sizes = {"q": (D, 12), "k": (D, 12), "v": (D, 12), "o": (12, D)}
GQA: Sizes = {"q": (D, 16), "k": (D, 8), "v": (D, 8), "o": (16, D)}
MLP: Sizes = {"up": (D, 16), "down": (16, D)}
SMALL: Sizes = {"up": (D, 5), "down": (5, D)}
GATED: Sizes = {"gate": (D, 16), **MLP}
NORMS: Sizes = {"n": lambda: nn.RMSNorm(D, 1e-6), "m": lambda: nn.LayerNorm(D)}


def qkv(m: Any, h: torch.Tensor, heads: int = HEADS) -> tuple[torch.Tensor, ...]:
    return split(m.q(h), heads), split(m.k(h), heads), split(m.v(h), heads)


def plain(m: Any, h: torch.Tensor) -> Any:
    return h + m.o(join(attend(*qkv(m, h))))


def plain_mlp(m: Any, h: torch.Tensor) -> Any:
    return h + m.down(m.up(h).relu())


def gated_mlp(m: Any, h: torch.Tensor) -> Any:
    return h + m.down(F.silu(m.gate(h)) * m.up(h))


def fused_parallel(m: Any, h: torch.Tensor) -> Any:
    q, k, v, up = m.all(m.n(h)).split([12, 12, 12, 16], -1)
    mixed = join(attend(*(split(x, HEADS) for x in (q, k, v))))
    return h + m.out(torch.cat((mixed, F.gelu(up)), -1))


def grouped(m: Any, h: torch.Tensor) -> Any:
    q, k, v = split(m.q(h), 4), split(m.k(h), 2), split(m.v(h), 2)
    return h + m.o(join(attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))))


def grouped_the_other_way(m: Any, h: torch.Tensor) -> Any:
    q, k, v = split(m.q(h), 4), split(m.k(h), 2), split(m.v(h), 2)
    return h + m.o(join(attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))))


def one_key(m: Any, h: torch.Tensor) -> Any:
    q, k, v = split(m.q(h), 4), m.k(h)[:, None], m.v(h)[:, None]
    return h + m.o(join(causal(q @ k.mT / 2).softmax(-1) @ v))


def keys_are_values(m: Any, h: torch.Tensor) -> Any:
    q, k = split(m.q(h), HEADS), split(m.k(h), HEADS)
    return h + m.o(join(attend(q, k, k)))


def queries_are_keys(m: Any, h: torch.Tensor) -> Any:
    q, v = split(m.q(h), HEADS), split(m.v(h), HEADS)
    return h + m.o(join(attend(q, F.normalize(q, dim=-1), v)))


def talking(m: Any, h: torch.Tensor) -> Any:
    q, k, v = qkv(m, h)
    scores = torch.einsum("bhst,hg->bgst", q @ k.mT, m.before)
    return h + m.o(join(torch.einsum("bhst,hg->bgst", causal(scores).softmax(-1), m.after) @ v))


def head_gates(m: Any, h: torch.Tensor) -> Any:
    mixed = attend(*qkv(m, h)) * m.g(h).sigmoid().mT[..., None]
    return h + m.o(join(mixed))


def grouped_norm(m: Any, h: torch.Tensor) -> Any:
    mixed = join(attend(*qkv(m, h)))
    normed = F.group_norm(mixed.flatten(0, 1), HEADS).view_as(mixed)
    return h + m.o(normed * F.silu(m.g(h)))


def differential(m: Any, h: torch.Tensor) -> Any:
    (q1, q2), (k1, k2) = (split(x, HEADS).chunk(2, -1) for x in (m.q(h), m.k(h)))
    weights = causal(q1 @ k1.mT).softmax(-1) - 0.3 * causal(q2 @ k2.mT).softmax(-1)
    return h + m.o(join(weights @ split(m.v(h), HEADS)))


def linear_attention(m: Any, h: torch.Tensor) -> Any:
    q, k, v = qkv(m, h)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return h + m.o(join(q @ (k.mT @ v) / (q @ k.sum(2)[..., None])))


def linear_attention_of_positive(m: Any, h: torch.Tensor) -> Any:
    q, k, v = qkv(m, h)
    q, k = q.relu(), k.relu()
    return h + m.o(join(q @ (k.mT @ v) / (1 + q @ k.sum(2)[..., None])))


def softmax_over_features(m: Any, h: torch.Tensor) -> Any:
    q, k, v = qkv(m, h)
    return h + m.o(join(q.softmax(-1) @ (k.softmax(-2).mT @ v)))


def complex_rotary(m: Any, h: torch.Tensor) -> Any:
    q, k, v = qkv(m, h)
    turn = torch.polar(torch.ones(h.shape[1], 2), torch.arange(h.shape[1])[:, None] * torch.tensor([1.0, 0.1]))
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous()) * turn).flatten(-2)
        for x in (q, k)
    )
    return h + m.o(join(attend(q, k, v)))


def latent(m: Any, h: torch.Tensor) -> Any:
    shared, turned = m.down(h).split([6, 2], -1)
    k, v = split(m.up(m.n(shared)), HEADS).split([4, 3], -1)
    k = torch.cat((k, turned[:, None].expand(-1, HEADS, -1, -1)), -1)
    return h + m.o(join(attend(split(m.q(h), HEADS), k, v)))


def cross(m: Any, h: torch.Tensor) -> Any:
    context = m.c(h.mean(1, keepdim=True)) + m.memory
    q, k, v = split(m.q(h), HEADS), split(m.k(context), HEADS), split(m.v(context), HEADS)
    return h + m.o(join(F.scaled_dot_product_attention(q, k, v)))


def learned_keys(m: Any, h: torch.Tensor) -> Any:
    q, k, v = qkv(m, h)
    k, v = (torch.cat((p.expand(h.shape[0], -1, -1, -1), x), 2) for p, x in ((m.pk, k), (m.pv, v)))
    return h + m.o(join(F.scaled_dot_product_attention(q, k, v)))


def einsum_attention(m: Any, h: torch.Tensor) -> Any:
    q, k, v = (torch.einsum("btd,hde->bhte", h, w) for w in (m.q, m.k, m.v))
    weights = torch.einsum("bhse,bhte->bhst", q, k).softmax(-1)
    return h + torch.einsum("bhst,bhte,hed->bsd", weights, v, m.o)


def highway(m: Any, h: torch.Tensor) -> Any:
    t = m.t(h).sigmoid()
    return t * m.down(m.up(h).relu()) + (1 - t) * h


def fused_gate(m: Any, h: torch.Tensor) -> Any:
    gate, up = m.both(h).chunk(2, -1)
    return h + m.down(F.gelu(gate) * up)


def interleaved_gate(m: Any, h: torch.Tensor) -> Any:
    both = m.both(h)
    gate, up = both[..., ::2].clamp(max=3), both[..., 1::2].clamp(-3, 3)
    return h + m.down((up + 1) * gate * (gate * 1.7).sigmoid())


def gate_of_itself(m: Any, h: torch.Tensor) -> Any:
    u = m.up(h)
    return h + m.down(u * u.roll(8, -1))


def gate_by_halves(m: Any, h: torch.Tensor) -> Any:
    a, b = m.up(h).chunk(2, -1)
    return h + m.down(torch.cat((a * b, a + b), -1))


def half_gated(m: Any, h: torch.Tensor) -> Any:
    u = m.up(h)
    return h + m.down(torch.cat((u[..., :8].relu(), u[..., 8:] * m.gate(h)[..., :8].sigmoid()), -1))


def skip_inside(m: Any, h: torch.Tensor) -> Any:
    u = m.up(h).relu()
    return h + m.down(u + m.mid(u).relu())


def two_downs(m: Any, h: torch.Tensor) -> Any:
    u = m.up(h).relu()
    return h + m.down(u) * m.other(u).sigmoid()


def squeezed(m: Any, h: torch.Tensor) -> Any:
    u = m.up(h).relu()
    return h + m.down(u * m.e(m.s(u.mean(1, keepdim=True)).relu()).sigmoid())


def spatial_gate(m: Any, h: torch.Tensor) -> Any:
    a, b = m.both(h).chunk(2, -1)
    return h + m.down(a * b.cumsum(1))


def conv_block(m: Any, h: torch.Tensor) -> Any:
    u = F.glu(m.both(h), -1)
    return h + m.down(F.silu(m.norm(m.conv(u.mT))).mT)


def conv_before_mlp(m: Any, h: torch.Tensor) -> Any:
    u = F.conv1d(F.pad(m.up(h).mT, (2, 0)), m.k, groups=16).mT
    return h + m.down(F.silu(u))


def scan_by_head(m: Any, h: torch.Tensor) -> Any:
    u, z, write, read, step = m.all(h).split([16, 16, 3, 3, 4], -1)
    x = u.unflatten(-1, (4, 4))
    state = (F.softplus(step + m.bias[0])[..., None, None] * x[..., None] * write[..., None, None, :]).cumsum(1)
    y = (state @ read[..., None, :, None])[..., 0] + x * m.skip
    return h + m.down(F.rms_norm(y.flatten(-2) * F.silu(z), (16,)))


def hyper_streams(m: Any, h: torch.Tensor) -> Any:
    streams = torch.stack((h, h.roll(1, 1), h * 0.5), -2)
    mixed = torch.einsum("btsd,sr->btrd", streams, m.mix)
    return mixed.sum(-2) + m.down(m.up(mixed[..., 0, :]).relu())


def experts_in_bulk(m: Any, h: torch.Tensor) -> Any:
    gate = m.router(h).softmax(-1)
    kept = gate * (gate >= gate.topk(2, -1).values[..., -1:])
    u = torch.einsum("btd,edf->btef", h, m.up).relu()
    return h + torch.einsum("btef,efd,bte->btd", u, m.down, kept)


def experts_in_a_list(m: Any, h: torch.Tensor) -> Any:
    gate = m.router(h).softmax(-1)
    return h + sum(gate[..., i : i + 1] * expert(h) for i, expert in enumerate(m.experts))


def experts_of_relu(m: Any, h: torch.Tensor) -> Any:
    gate = m.router(h).relu()
    return h + (torch.stack([expert(h) for expert in m.experts], -1) @ gate[..., None])[..., 0]


def expert_choice(m: Any, h: torch.Tensor) -> Any:
    gate = m.router(h).softmax(1).mT
    out = [gate[:, i, :, None] * expert(h) for i, expert in enumerate(m.experts)]
    return h + torch.stack(out).sum(0)


def product_keys(m: Any, h: torch.Tensor) -> Any:
    a, b = m.q(h).chunk(2, -1)
    scores = (a @ m.ka.mT)[..., :, None] + (b @ m.kb.mT)[..., None, :]
    return h + scores.flatten(-2).softmax(-1) @ m.values


def low_rank_update(m: Any, h: torch.Tensor) -> Any:
    u = m.up(h) + m.lb(m.la(h)) * 2
    return h + m.down(u.relu()) + m.db(m.da(u.relu())) * 2


def mixes_tokens(m: Any, h: torch.Tensor) -> Any:
    u = m.up(h)
    return h + m.down((u.mT @ (h @ h.mT).softmax(-1).mT).mT)


def pooled_tokens(m: Any, h: torch.Tensor) -> Any:
    wide = F.pad(h, (0, 0, 0, 1))
    pairs = wide[:, : h.shape[1] // 2 * 2 + 2 * (h.shape[1] % 2)].unflatten(1, (-1, 2)).mean(2)
    return h + m.down(m.up(pairs).relu()).repeat_interleave(2, 1)[:, : h.shape[1]]


def unequal_parts(m: Any, h: torch.Tensor) -> Any:
    a, b = h.split([4, 8], -1)
    return torch.cat((a + m.pa(h).relu(), b * m.pb(h).sigmoid()), -1)


def reversible(m: Any, h: torch.Tensor) -> Any:
    a, b = h.chunk(2, -1)
    a = a + m.f(b).relu()
    return torch.cat((a, b + m.g(a).relu()), -1)


def grouped_mlp(m: Any, h: torch.Tensor) -> Any:
    x = h.unflatten(-1, (3, 4))
    return h + torch.einsum("btgf,gfd->btgd", torch.einsum("btgd,gdf->btgf", x, m.up).relu(), m.down).flatten(-2)


def weight(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(numbers(*shape))


def normed() -> nn.Module:
    return nn.RMSNorm(D)


def list_of(*sizes: int) -> Callable[[], nn.ModuleList]:
    return lambda: nn.ModuleList(nn.Sequential(nn.Linear(D, size), nn.SiLU(), nn.Linear(size, D)) for size in sizes)


EXPERTS: Sizes = {"router": (D, 4), "up": (4, D, 8), "down": (4, 8, D)}

CONV: Sizes = {
    "conv": lambda: nn.Conv1d(16, 16, 3, padding=1, groups=16),
    "norm": lambda: nn.BatchNorm1d(16),
}

STRUCTURES: dict[str, Sequence[tuple[Body, Sizes]]] = {
    "attention": [(plain, QKVO), (plain_mlp, MLP)],
    "unequal blocks": [(plain, QKVO), (plain_mlp, MLP), (gated_mlp, GATED), (grouped, GQA), (plain_mlp, SMALL)],
    "fused and parallel": [(fused_parallel, {"all": (D, 52), "out": (28, D), **NORMS})],
    "grouped the other way": [(grouped_the_other_way, GQA)],
    "one key": [(one_key, {"q": (D, 16), "k": (D, 4), "v": (D, 4), "o": (16, D)})],
    "keys are values": [(keys_are_values, {**QKVO})],
    "queries are keys": [(queries_are_keys, {"q": (D, 12), "v": (D, 12), "o": (12, D)})],
    "talking heads": [(talking, {**QKVO, "before": weight(3, 3), "after": weight(3, 3)})],
    "head gates": [(head_gates, {**QKVO, "g": (D, HEADS)})],
    "head scales": [(lambda m, h: h + m.o(join(attend(*qkv(m, h)) * m.scale)), {**QKVO, "scale": (HEADS, 1, 1)})],
    "head norms": [(lambda m, h: h + m.o(join(F.rms_norm(attend(*qkv(m, h)), (4,)))), QKVO)],
    "grouped norm": [(grouped_norm, {**QKVO, "g": (D, 12)})],
    "differential": [(differential, {**QKVO, "q": (D, 24), "k": (D, 24)})],
    "linear attention": [(linear_attention, QKVO)],
    "linear attention of positive": [(linear_attention_of_positive, QKVO)],
    "softmax over features": [(softmax_over_features, QKVO)],
    "complex rotary": [(complex_rotary, QKVO)],
    "latent": [(latent, {"down": (D, 8), "up": (6, 21), "q": (D, 18), "o": (9, D), "n": lambda: nn.RMSNorm(6)})],
    "cross": [(cross, {**QKVO, "c": (D, D), "memory": (1, 4, D)})],
    "learned keys": [(learned_keys, {**QKVO, "pk": (HEADS, 2, 4), "pv": (HEADS, 2, 4)})],
    "wide values": [(plain, {**QKVO, "v": (D, 18), "o": (18, D)})],
    "low rank out": [(lambda m, h: h + m.o2(m.o(join(attend(*qkv(m, h))))), {**QKVO, "o": (12, 5), "o2": (5, D)})],
    "einsum": [(einsum_attention, {"q": (3, D, 4), "k": (3, D, 4), "v": (3, D, 5), "o": (3, 5, D)})],
    "highway": [(highway, {**MLP, "t": (D, D)})],
    "fused gate": [(fused_gate, {"both": (D, 32), "down": (16, D)})],
    "interleaved gate": [(interleaved_gate, {"both": (D, 32), "down": (16, D)})],
    "gate of itself": [(gate_of_itself, MLP)],
    "gate by halves": [(gate_by_halves, MLP)],
    "half gated": [(half_gated, GATED)],
    "normed middle": [(lambda m, h: h + m.down(F.layer_norm(F.gelu(m.up(h)), (16,))), MLP)],
    "three layers": [(lambda m, h: h + m.down(m.mid(m.up(h).relu()).relu()), {**MLP, "mid": (16, 16)})],
    "skip inside": [(skip_inside, {**MLP, "mid": (16, 16)})],
    "two ups": [(lambda m, h: h + m.down(m.up(h).relu() + m.gate(h.roll(1, 1)).relu()), GATED)],
    "two downs": [(two_downs, {**MLP, "other": (16, D)})],
    "squeezed": [(squeezed, {**MLP, "s": (16, 3), "e": (3, 16)})],
    "spatial gate": [(spatial_gate, {"both": (D, 32), "down": (16, D)})],
    "convolution": [(conv_block, {"both": (D, 32), "down": (16, D), **CONV})],
    "convolution in the middle": [(conv_before_mlp, {**MLP, "k": (16, 1, 3)})],
    "scan by head": [(scan_by_head, {"all": (D, 42), "bias": (1, 1, 4), "skip": (1, 4, 1), "down": (16, D)})],
    "streams": [(hyper_streams, {**MLP, "mix": weight(3, 3)})],
    "experts in bulk": [(experts_in_bulk, EXPERTS)],
    "experts in a list": [(experts_in_a_list, {"router": (D, 3), "experts": list_of(8, 8, 8)})],
    "experts of other widths": [(experts_in_a_list, {"router": (D, 3), "experts": list_of(4, 6, 8)})],
    "experts of relu": [(experts_of_relu, {"router": (D, 3), "experts": list_of(8, 8, 8)})],
    "expert choice": [(expert_choice, {"router": (D, 3), "experts": list_of(8, 8, 8)})],
    "product keys": [(product_keys, {"q": (D, 8), "ka": weight(3, 4), "kb": weight(5, 4), "values": weight(15, D)})],
    "low rank update": [(low_rank_update, {**MLP, "la": (D, 2), "lb": (2, 16), "da": (16, 2), "db": (2, D)})],
    "mixed tokens": [(mixes_tokens, MLP)],
    "pooled tokens": [(pooled_tokens, MLP)],
    "unequal parts": [(unequal_parts, {"pa": (D, 4), "pb": (D, 8)}), (plain_mlp, MLP)],
    "reversible": [(reversible, {"f": (6, 6), "g": (6, 6)})] * 2,
    "shuffled stream": [(lambda m, h: plain_mlp(m, h.unflatten(-1, (3, 4)).mT.flatten(-2)), MLP)] * 2,
    "grouped weights": [(grouped_mlp, {"up": (3, 4, 8), "down": (3, 8, 4)})],
}  # fmt: skip


class Together(Stack):
    """Blocks that hold parts of each other."""

    def __init__(self, how: str) -> None:
        super().__init__((plain, QKVO), (gated_mlp, GATED), (plain, QKVO), (gated_mlp, GATED))
        self.how = how
        first, second, third, fourth = self.blocks
        if how == "shared blocks":
            self.blocks[2], self.blocks[3] = first, second
        elif how == "shared keys":
            third.k, third.v = first.k, first.v
        elif how == "shared downs":
            fourth.down = second.down
        elif how == "gate is up":
            fourth.gate, fourth.up = second.up, second.gate
        elif how == "shared norm":
            first.n = second.n = third.n = self.norm
        elif how == "tied head":
            self.head = nn.Linear(D, 5)
            self.head.weight = nn.Parameter(self.embed.weight.detach().T.contiguous())
            self.embed = nn.Linear(5, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, self.head.weight.T) if self.how == "tied head" else self.embed(x)
        first, second, third, fourth = self.blocks
        if self.how == "shared values":
            v = first.v(h)
            h = h + first.o(join(attend(split(first.q(h), HEADS), split(first.k(h), HEADS), split(v, HEADS))))
            both = 0.5 * (third.v(h) + v)
            return self._end(
                third(h) + third.o(join(attend(*(split(z, HEADS) for z in (third.q(h), third.k(h), both)))))
            )
        if self.how == "skips":
            a = second(first(h))
            b = fourth(third(a))
            return self._end(b + a * 0.5 + h)
        if self.how == "dense":
            a = first(h)
            b = second((a + h) / 2)
            return self._end(third((a + b + h) / 3) + fourth(b))
        if self.how == "repeated":
            for _ in range(2):
                h = second(first(h))
            return self._end(h)
        if self.how == "twice the input":
            return self._end(first(h) + second(first(h * 2)) + second(h))
        if self.how == "all outputs":
            return self._end(torch.stack([block(h) for block in self.blocks], 2).softmax(2).sum(2))
        for block in self.blocks:
            h = block(getattr(block, "n", nn.Identity())(h))
        return self._end(h)

    def _end(self, h: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(h))


TOGETHER = (
    "shared blocks", "shared keys", "shared downs", "gate is up", "shared norm", "tied head", "shared values", "skips",
    "dense", "repeated", "twice the input", "all outputs",
)  # fmt: skip


def made(name: str) -> nn.Module:
    return (Together(name) if name in TOGETHER else Stack(*STRUCTURES[name])).eval()


MANY = ("channel, mlp", "channel, head, head_dim", "channel, head, head_dim, mlp")

FEW = {
    "scan by head": "channel, head_dim", "einsum": "head, head_dim, mlp",
    "shared blocks": "head, head_dim, mlp", "all outputs": "head, head_dim, mlp", "mixed tokens": "head_dim, mlp",
    "shuffled stream": "mlp", "grouped weights": "mlp",
    "gate of itself": "channel", "normed middle": "channel", "reversible": "channel",
}  # fmt: skip
"""What goes where a norm, a sum or a permutation holds more units together than the other designs do."""

SOME = ("unequal blocks", "fused and parallel", "fused gate", "experts in bulk", "shared keys", "skips")


@pytest.mark.parametrize("name", tiers([*STRUCTURES, *TOGETHER], *SOME[::3]))
def test_of_structures(name: str) -> None:
    gone = pruned(made(name), X, OTHERS if name in SOME else ())
    assert gone == FEW[name] if name in FEW else gone in MANY, gone
