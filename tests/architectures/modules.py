"""Networks from scratch: of torch's own transformer modules, with rotary angles in two dimensions, memories, images."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Encoder(nn.Module):
    """`nn.TransformerEncoder` over embedded tokens, padding left out."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(31, 18)
        layer = nn.TransformerEncoderLayer(18, 3, 22, activation="gelu", batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(18, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=ids == 3)
        return self.head(x)


class Translator(nn.Module):
    """`nn.Transformer` from one sequence to another, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 16)
        self.transformer = nn.Transformer(16, 4, 1, 1, 20, batch_first=True, bias=False)
        self.head = nn.Linear(16, 31, bias=False)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        return self.head(x)


class Reader(nn.Module):
    """`nn.MultiheadAttention` from learnt queries to tokens of another width; the weights of attention come out too."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, 12))
        self.embedding, self.place = nn.Embedding(31, 10), nn.Embedding(20, 10)
        self.attention = nn.MultiheadAttention(12, 3, kdim=10, vdim=10, batch_first=True, add_bias_kv=True)
        self.out = nn.Linear(12, 6)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        out, weights = self.attention(self.queries.expand(ids.shape[0], -1, -1), x, x)
        return self.out(out), weights


class Recurrent(nn.Module):
    """Two layers of states that run both ways, of `nn.LSTM` or `nn.GRU`."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 6)
        self.states = kind(6, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.states(self.embedding(ids))[0])


class Rotary(nn.Module):
    """Tables of cosines and sines, `(positions, 1, width)`, for two halves alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1e4 ** (-torch.arange(0, width, 2).float() / width))

    def forward(self, x: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.einsum("i,j->ij", torch.arange(length, device=x.device).type_as(self.inv_freq), self.inv_freq)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos()[:, None, :].type_as(x), both.sin()[:, None, :].type_as(x)


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], position: torch.Tensor) -> torch.Tensor:
    """`x (tokens, batch, heads, width)` turned by the angles of `position (tokens, batch)`."""
    cos, sin = (F.embedding(position, table.squeeze(1)).unsqueeze(2) for table in tables)
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Queries and keys are in two parts, turned by the place in the text and by the place in the gap."""

    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__()
        self.heads, self.layer, self.inner = heads, layer + 1, width // heads
        self.rotary = Rotary(self.inner // 2)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, position: torch.Tensor, block: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length, batch, _ = x.shape
        mixed = self.query_key_value(x).view(length, batch, self.heads, 3 * self.inner)
        query, key, value = torch.split(mixed, self.inner, dim=3)
        tables = self.rotary(value, 16)
        halves = [(part.chunk(2, dim=-1)) for part in (query, key)]
        query, key = (torch.cat((rotate(a, tables, position), rotate(b, tables, block)), dim=-1) for a, b in halves)
        query = query / (math.sqrt(self.inner) * self.layer)
        query = query.reshape(length, batch * self.heads, -1)
        key = key.reshape(length, batch * self.heads, -1)
        value = value.reshape(length, batch * self.heads, -1)
        scores = torch.baddbmm(
            torch.zeros(1, 1, 1, dtype=x.dtype, device=x.device),
            query.transpose(0, 1),
            key.transpose(0, 1).transpose(1, 2),
            beta=0.0,
        ).view(batch, self.heads, length, length)
        scores = scores.masked_fill(mask, -1e4).float() * self.layer
        weights = F.softmax(scores, dim=-1).type_as(x).view(batch * self.heads, length, length)
        context = torch.bmm(weights, value.transpose(0, 1)).view(batch, self.heads, length, self.inner)
        return self.dense(context.permute(2, 0, 1, 3).contiguous().view(length, batch, -1))


class Block(nn.Module):
    """Residuals that carry the normed input, scaled by the depth."""

    def __init__(self, width: int, heads: int, hidden: int, layer: int, layers: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, layer)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.alpha = (2 * layers) ** 0.5

    def forward(self, x: torch.Tensor, position: torch.Tensor, block: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        normed = self.before(x)
        x = normed * self.alpha + self.attention(normed, position, block, mask)
        normed = self.between(x)
        return normed * self.alpha + self.down(F.gelu(self.up(normed), approximate="tanh"))


class TwoDimensionalLM(nn.Module):
    """A prefix that sees itself, then a text that sees what came before."""

    def __init__(
        self, vocabulary: int = 31, width: int = 24, heads: int = 3, hidden: int = 20, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, heads, hidden, i, layers) for i in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor, prefix: int = 3) -> torch.Tensor:
        batch, length = input_ids.shape
        place = torch.arange(length, device=input_ids.device)
        position = place.clamp(max=prefix - 1)[:, None].expand(length, batch)
        block = (place - prefix + 1).clamp(min=0)[:, None].expand(length, batch)
        mask = (place[None, :] > place[:, None]) & (place[None, :] >= prefix)
        x = self.embedding(input_ids).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, position, block, mask)
        return self.head(self.norm(x)).transpose(0, 1).contiguous()


class SelectiveScan(nn.Module):
    """A state-space model whose step, input and output matrices depend on the token, run as a loop over tokens."""

    def __init__(self, width: int, inner: int, states: int, rank: int) -> None:
        super().__init__()
        self.inner, self.states, self.rank = inner, states, rank
        self.into = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.select = nn.Linear(inner, rank + 2 * states, bias=False)
        self.step = nn.Linear(rank, inner)
        self.log_decay = nn.Parameter(torch.log(torch.arange(1, states + 1).float()).repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        u, gate = self.into(x).chunk(2, dim=-1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :length]).transpose(1, 2)
        step, write, read = self.select(u).split([self.rank, self.states, self.states], dim=-1)
        step = F.softplus(self.step(step))
        decay = torch.exp(torch.einsum("b l d, d n -> b l d n", step, -torch.exp(self.log_decay)))
        drive = torch.einsum("b l d, b l n, b l d -> b l d n", step, write, u)
        state, found = x.new_zeros(batch, self.inner, self.states), []
        for i in range(length):
            state = decay[:, i] * state + drive[:, i]
            found.append(torch.einsum("b d n, b n -> b d", state, read[:, i]))
        return self.out((torch.stack(found, dim=1) + u * self.skip) * F.silu(gate))


class Retention(nn.Module):
    """Heads with a decay each, in the form of one product, and a norm of each head's output."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkvg = nn.Linear(width, 4 * heads * inner, bias=False)
        self.norm = nn.GroupNorm(heads, heads * inner)
        self.out = nn.Linear(heads * inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v, gate = self.qkvg(x).chunk(4, dim=-1)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        gamma = 1 - torch.exp2(-5.0 - torch.arange(self.heads, device=x.device))
        place = torch.arange(length, device=x.device)
        distance = place[:, None] - place[None, :]
        decay = torch.where(distance < 0, 0.0, gamma[:, None, None] ** distance.clamp(min=0))
        out = (q @ (k * k.shape[-1] ** -0.5).mT * decay) @ v
        out = self.norm(out.transpose(1, 2).reshape(batch * length, -1)).view(batch, length, -1)
        return self.out(F.silu(gate) * out)


class TimeMix(nn.Module):
    """A weighted running mean of values, in logarithms, with token shift; then a squared-relu channel mix."""

    def __init__(self, width: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.mix = nn.Parameter(torch.rand(4, width))
        self.decay, self.first = nn.Parameter(torch.randn(inner)), nn.Parameter(torch.randn(inner))
        self.key, self.value, self.receptance = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.output = nn.Linear(inner, width, bias=False)
        self.up, self.gate = nn.Linear(width, hidden, bias=False), nn.Linear(width, width, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = self.shift(x)
        a, b, c, d = (torch.lerp(last, x, m) for m in self.mix.unbind(0))
        k, v, r = self.key(a), self.value(b), torch.sigmoid(self.receptance(c))
        top, bottom, found = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), []
        for i in range(x.shape[1]):
            weight = torch.exp(k[:, i])
            now = torch.exp(self.first) * weight
            found.append((top + now * v[:, i]) / (bottom + now))
            top, bottom = (
                torch.exp(-torch.exp(self.decay)) * s + t for s, t in ((top, weight * v[:, i]), (bottom, weight))
            )
        x = x + self.output(r * torch.stack(found, dim=1))
        return x + torch.sigmoid(self.gate(d)) * self.down(torch.relu(self.up(d)) ** 2)


class DeltaRule(nn.Module):
    """Fast weights: each head's memory forgets, and is corrected at each token. Keys have length one."""

    def __init__(self, width: int, heads: int, keys: int, values: int) -> None:
        super().__init__()
        self.heads, self.sizes = heads, (heads * keys, heads * keys, heads * values)
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = nn.Conv1d(sum(self.sizes), sum(self.sizes), 3, padding=2, groups=sum(self.sizes), bias=False)
        self.rates = nn.Linear(width, 2 * heads, bias=False)
        self.decay = nn.Parameter(torch.rand(heads))
        self.norm = nn.RMSNorm(values)
        self.gate, self.out = nn.Linear(width, heads * values), nn.Linear(heads * values, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        mixed = F.silu(self.conv(self.qkv(x).mT)[..., :length].mT)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in mixed.split(self.sizes, dim=-1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta, alpha = (t for t in self.rates(x).chunk(2, dim=-1))
        beta, keep = torch.sigmoid(beta), torch.exp(-self.decay.exp() * F.softplus(alpha))
        memory, found = x.new_zeros(batch, self.heads, k.shape[-1], v.shape[-1]), []
        for i in range(length):
            memory = memory * keep[:, i, :, None, None]
            error = (v[:, i] - (k[:, i, :, None, :] @ memory).squeeze(-2)) * beta[:, i, :, None]
            memory = memory + k[:, i, :, :, None] * error[:, :, None, :]
            found.append(torch.einsum("bhk,bhkv->bhv", q[:, i], memory))
        out = self.norm(torch.stack(found, dim=1)).flatten(-2)
        return self.out(out * torch.sigmoid(self.gate(x)))


class MemoryLM(nn.Module):
    """A residual network of one of these layers between embeddings."""

    def __init__(self, mixer: nn.Module, width: int = 16, vocabulary: int = 31) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm, self.mixer, self.last = nn.RMSNorm(width), mixer, nn.RMSNorm(width)
        self.readout = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.readout(self.last(x + self.mixer(self.norm(x))))


class DownAndUp(nn.Module):
    """Half the size and back, with group norms, a transposed convolution, and what was there before put beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(12, 20, 3, 2, 1), nn.GroupNorm(5, 20), nn.SiLU())
        self.up = nn.ConvTranspose2d(20, 9, 2, 2)
        self.last = nn.Sequential(nn.Conv2d(21, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.PReLU(16))
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        before = self.first(image)
        after = self.up(self.down(before))
        return self.out(self.last(torch.cat((before, after), dim=1)))


class TokenMixer(nn.Module):
    """One network across tokens, one across channels."""

    def __init__(self, tokens: int = 9, width: int = 14) -> None:
        super().__init__()
        self.patches = nn.Unfold(2, stride=2)
        self.embed = nn.Linear(12, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 11), nn.GELU(), nn.Linear(11, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 17), nn.GELU(), nn.Linear(17, width))
        self.head = nn.Linear(width, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.embed(self.patches(image).mT)
        x = x + self.tokens(self.norm1(x).mT).mT
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(dim=1))
