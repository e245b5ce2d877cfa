"""Random small networks, each a list of records that says what to do; any list of records is a network.

A record is an op and a few small numbers, which the op reads as choices among what is there: which value, which axis,
which of the sizes that divide. What does not apply is left out. So nothing is rejected, and hypothesis shrinks a
counterexample by dropping records and lowering numbers. The network is Python source, run line by line while it is
made and compiled to a ``forward``; a failing one prints as a module that can be pasted into a test. Each line is run at
two sizes of batch and tokens, and is left out where it runs at one alone.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import fx, nn

from fxprune.graph.shapes import failed_check
from fxprune.masking.compare import TOLERANCE, slim_outputs
from fxprune.pipeline.arguments import NORMS
from fxprune.pipeline.registry import load_pass
from fxprune.trace import trace
from tests import random_mixes  # noqa: F401  its ops are among OPS from here on
from tests.oracle import Inputs, check_removal, groups_of, leaving, plain_outputs, require_close, together
from tests.random_ops import CHOICES, OPS, ROWS, SIZES, WIDE, WIDTH, Picks

__all__ = ["RandomNet", "Record", "check_every_removal", "check_network", "descriptions", "steady"]

LARGEST, MOST_AXES, MOST_VALUES = 1e3, 5, 4000
_SHAKE, _MOVED = 1e-5, 1e-3
"""How much a number is larger or smaller, and by how much of the largest one what is made of it may then differ."""
RECENT = (0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 5)
"""How far back the value that a number names lies: mostly the last one, so that networks get deep."""


@dataclass(frozen=True)
class Record:
    """An op of :data:`OPS` and small numbers by which it chooses, read in turn, and then zeros."""

    op: str
    picks: tuple[int, ...] = ()


class RandomNet(nn.Module):
    """The network that ``records`` describe: ``x (2, 3, 5)`` and ``ids (2, 3)`` to a tuple of tensors.

    It runs at the other sizes of ``varied`` (batch, tokens) as well; ``finish`` has two bits for each output: how it is
    read out.
    """

    def __init__(
        self, records: Sequence[Record], finish: int = 0, dtype: torch.dtype = torch.float32, varied: Any = (True, True)
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self._draw: Callable[..., torch.Tensor] = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
        others = tuple(sizes[vary] for sizes, vary in zip(zip(*SIZES, strict=True), varied, strict=True))
        self.inputs, self.others = self._inputs(SIZES[0]), self._inputs(others)
        common = {"self": self, "torch": torch, "F": F, "math": math}
        self._scope: dict[str, Any] = {**common, **self.inputs}
        self._second: dict[str, Any] = {**common, **self.others}
        self._lines: list[str] = []
        self.values: list[str] = []
        with torch.no_grad():
            self.put(f"F.linear(x, {self.weight(WIDE, WIDTH)}, {self.weight(WIDE)})")
            for record in records:
                picks = Picks(record.picks)
                OPS[record.op](self, self.pick(picks), picks)
            self._finish(finish)
        self.source = "def forward(self, x, ids):\n" + "".join(f"    {line}\n" for line in self._lines)
        scope: dict[str, Any] = {"torch": torch, "F": F, "math": math}
        exec(self.source, scope)
        self._forward = scope["forward"]
        del self._scope, self._second, self._draw

    def _inputs(self, sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        ids = torch.arange(sizes[0] * sizes[1]).reshape(sizes) * 4 + 1
        return {"x": self._draw(*sizes, WIDTH), "ids": ids % ROWS}

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> Any:
        return self._forward(self, x, ids)

    def __repr__(self) -> str:
        named = (*self.named_parameters(), *self.named_buffers())
        return "\n".join((*(f"# self.{name}: {tuple(tensor.shape)}" for name, tensor in named), self.source))

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._scope[name]
        assert isinstance(value, torch.Tensor)
        return value

    def sizes(self, name: str) -> list[Any]:
        """The shape of a value as code: numbers, and for the sizes that are not fixed, where to read them."""
        pairs = zip(self[name].shape, self._second[name].shape, strict=True)
        return [size if size == other else f"{name}.shape[{axis}]" for axis, (size, other) in enumerate(pairs)]

    def weight(self, *shape: int, positive: bool = False) -> str:
        """A new parameter of ``shape``."""
        value = self._draw(*shape) / math.sqrt(shape[-1] if len(shape) > 1 else 2)
        return self._named("w", nn.Parameter(value.abs() + 0.3 if positive else value))

    def constant(self, *shape: int) -> str:
        """A new buffer of ``shape``."""
        return self._named("c", self._draw(*shape) + 1)

    def _named(self, letter: str, value: torch.Tensor) -> str:
        """``self.`` and a name; some are what nodes of the graph are called, too."""
        count = len(self._parameters) + len(self._buffers)
        name = f"{(letter, 'linear_', letter, 'mul_')[count % 4]}{count}"
        self.register_buffer(name, value) if letter == "c" else setattr(self, name, value)
        return f"self.{name}"

    def pick(self, picks: Picks) -> str:
        """A value, mostly a recent one."""
        return self.values[-1 - RECENT[picks.number() % len(RECENT)] % len(self.values)]

    def put(self, code: str) -> str | None:
        """A new value, computed by ``code``; None where torch refuses, or where it is too large or not finite."""
        name = f"v{len(self._lines)}"
        if not self.run(f"{name} = {code}"):
            return None
        if not (_fits(self._scope[name]) and _fits(self._second[name])):
            self._lines.pop()
            return None
        self.values.append(name)
        return name

    def run(self, line: str) -> bool:
        """Whether ``line`` runs, and is steady; if so it is part of the network."""
        scopes = self._scope, self._second
        try:
            if not all(steady(line, scope) for scope in scopes):
                return False
            for scope in scopes:  # copies, on which steadiness was tried, may have other strides
                exec(line, scope)
        except (AssertionError, RuntimeError, IndexError, ValueError, TypeError, AttributeError):
            return False
        self._lines.append(line)
        return True

    def _read(self) -> set[str]:
        return {word for line in self._lines for word in re.findall(r"\w+", line.partition(" = ")[2])}

    def _finish(self, finish: int) -> None:
        """What no line uses is read out by a linear layer: as it is, flattened, averaged over tokens, or turned.

        Axes whose sizes are not fixed are summed over where they come last. Parts of which none was used are left out.
        """
        read = self._read()
        self._lines = [line for line in self._lines if _named(line) in (None, *self.values, *read)]
        read = self._read()
        outputs = []
        for name in [name for name in self.values if name not in read][-4:]:
            rank, how, finish = self[name].dim(), finish % 4, finish // 4
            code = name
            if how == 1 and rank > 2:
                code = f"{name}.flatten({min(2, rank - 2)})"
            elif how and rank > 2:
                code = f"{name}.mean(1)" if how == 2 else f"{name}.transpose(1, -1).flatten(2)"
            elif how and rank == 2:
                code = f"{name}.mT"
            while (width := eval(code, self._scope).shape[-1:]) != eval(code, self._second).shape[-1:]:
                code = f"{code}.sum(-1)"
            outputs.append(f"F.linear({code}, {self.weight(3, *width)})" if width else code)
        self._lines.append(f"return ({', '.join(outputs)},)")


def steady(line: str, scope: dict[str, Any]) -> bool:
    """Whether a line gives about the same where each number that it reads is a little larger or smaller.

    Which of two equal numbers is the larger one is up to the last digit, and a matrix product of another size rounds
    differently. Numbers are shaken in both directions, so that each of two equal ones is once the larger. Zeros stay
    zeros. What the names in ``scope`` stand for stays as it is.
    """
    words = set(re.findall(r"\w+", line))

    def copied(value: Any, share: float, generator: torch.Generator) -> Any:
        if isinstance(value, tuple):
            return tuple(copied(part, share, generator) for part in value)
        if not isinstance(value, torch.Tensor):
            return value
        noise = share * (torch.rand(value.shape, generator=generator) * 2 - 1)
        return value * (1 + noise).to(value.dtype) if value.is_floating_point() else value.clone()

    def seeded(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(crc32(name.encode()))

    with torch.no_grad():
        plain, *shaken = (
            {name: copied(value, share, seeded(name)) if name in words else value for name, value in scope.items()}
            for share in (0.0, _SHAKE, -_SHAKE)
        )
        for run in (plain, *shaken):
            exec(line, run)
    return all(_close(plain[name], other[name]) for name in words & plain.keys() for other in shaken)


def _close(value: Any, other: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == len(other) and all(map(_close, value, other))
    if not isinstance(value, torch.Tensor) or not value.numel() or not value.isfinite().all():
        return True  # whether it fits is asked elsewhere
    return bool((value.double() - other.double()).abs().max() <= _MOVED * value.double().abs().max() + _SHAKE)


def _named(line: str) -> str | None:
    """What a line gives a name to; None where it does something else."""
    name = line.partition(" = ")[0]
    return name if name.isidentifier() else None


def _fits(value: Any) -> bool:
    floats = isinstance(value, torch.Tensor) and value.is_floating_point() and 1 <= value.dim() <= MOST_AXES
    return floats and 0 < value.numel() <= MOST_VALUES and bool(value.abs().max() <= LARGEST)


def descriptions(most: int = 8) -> st.SearchStrategy[tuple[list[Record], int]]:
    """Records and the numbers for the outputs."""
    numbers = st.lists(st.integers(0, CHOICES - 1), max_size=8).map(tuple)
    records = st.lists(st.builds(Record, st.sampled_from(sorted(OPS)), numbers), min_size=1, max_size=most)
    return st.tuples(records, st.integers(0, 255))


def check_every_removal(
    module: nn.Module,
    inputs: Inputs,
    *,
    others: Inputs | None = None,
    dynamic: bool = False,
    thorough: bool = True,
    accepted: float = TOLERANCE,
    norm: str = "sliced",
) -> fx.GraphModule:
    """Every group goes alone, then all at once; the slim graph does what masking, and zeroing by hand, would.

    Zeroing by hand is asked of groups that are not renormalised alone.

    Args:
        others: inputs of other sizes, to run everything at as well, if the graph takes them.
        dynamic: trace with sizes that vary.
        thorough: few, half and nearly all units of each group go, in turn; else one of these.
        accepted: the largest difference of outputs.
    """
    module.eval()
    dense = trace(module, inputs, dynamic=dynamic).graph_module
    load_pass("find-groups", norm=norm)(dense)
    sets = [inputs] if others is None or failed_check(dense, others) else [inputs, others]
    for given in sets:
        require_close(plain_outputs(module, given), slim_outputs(dense, given), "the graph is not the module", accepted)
    groups = [group for group in groups_of(dense) if group.factor is not None]
    choices = [
        [leaving(group, stay, seed) for stay in sorted({group.least, group.size - group.size // 2, group.size - 1})]
        for seed, group in enumerate(groups)
    ]
    chosen = [several[i % len(several)] for i, several in enumerate(choices)]
    for group, several, one in zip(groups, choices, chosen, strict=True):
        for keep in several if thorough else (one,):
            check_removal(module, dense, keep, [group], sets, accepted)
    if len(groups) > 1:
        check_removal(module, dense, together(chosen), groups, sets, accepted)
    return dense


VARIED = ((True, True), (True, True), (True, False), (False, True))
"""Which of batch and tokens vary: mostly both; a size that is fixed may be that of a weight."""


def check_network(records: Sequence[Record], finish: int = 0, form: int = 0) -> tuple[fx.GraphModule, int]:
    """As :func:`check_every_removal` at two sizes, for a description; return also at how many sizes it was run.

    ``form`` is the sizes that vary, one of :data:`VARIED`, and from there on in float32: what that is too coarse for is
    checked again in float64, which all others are in from the start.
    """
    varied = VARIED[form % len(VARIED)]
    if form >= len(VARIED):
        try:
            return _check(RandomNet(records, finish, torch.float32, varied), TOLERANCE)
        except AssertionError:
            pass
    return _check(RandomNet(records, finish, torch.float64, varied), EXACT)


EXACT = 1e-9
"""Accepted difference in float64."""


def _check(net: RandomNet, accepted: float) -> tuple[fx.GraphModule, int]:
    norm = NORMS[len(net.source) % len(NORMS)]  # as good as a coin
    several = {"others": net.others, "dynamic": True, "thorough": False, "norm": norm}
    dense = check_every_removal(net, net.inputs, accepted=accepted, **several)  # type: ignore[arg-type]
    return dense, 1 if failed_check(dense, net.others) else 2
