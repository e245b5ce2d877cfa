"""What products take in, over all calibration samples: moments of each input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import Sample
from fxprune.data.ranks import add_up, own
from fxprune.discovery.consumers import Consumer
from fxprune.discovery.groups import Group
from fxprune.errors import CalibrationError, PassError
from fxprune.masking.observe import observe

__all__ = ["Moments", "input_moments", "refuse_group", "rows_of"]


@dataclass
class Moments:
    """Sums over all tokens of the inputs of a product.

    Args:
        sums: of each input, ``(in,)``.
        squares: of its square, ``(in,)``.
        count: number of tokens.
    """

    sums: torch.Tensor
    squares: torch.Tensor
    count: int = 0

    def add_up(self) -> None:
        """Make it the sums of all processes, where several share the samples."""
        count = self.sums.new_full((), self.count, dtype=torch.int64)
        add_up((self.sums, self.squares, count))
        self.count = int(count)

    @property
    def mean_square(self) -> torch.Tensor:
        """The mean square of each input."""
        return self.squares / max(self.count, 1)

    @property
    def variance(self) -> torch.Tensor:
        """The variance of each input, with one less than the number of tokens below."""
        spread = self.squares - self.sums.square() / max(self.count, 1)
        return spread.clamp_min(0) / max(self.count - 1, 1)


def rows_of(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Return activations as ``(tokens, in)``, where ``dim`` is the axis of the inputs."""
    return value.movedim(dim, -1).flatten(0, -2)


def input_moments(
    graph_module: fx.GraphModule,
    samples: Sequence[Sample],
    consumers: Sequence[Consumer],
    batch: int,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
) -> dict[Consumer, Moments]:
    """Return the moments of what each consumer takes in.

    Raises:
        CalibrationError: an input is not finite.
    """
    found: dict[tuple[fx.Node, int], Moments] = {}
    watched: dict[fx.Node, list[int]] = {}
    for consumer in consumers:
        dims = watched.setdefault(consumer.source, [])
        if consumer.dim not in dims:
            dims.append(consumer.dim)

    def add(node: fx.Node, value: torch.Tensor) -> None:
        for dim in watched[node]:
            rows = rows_of(value, dim).double()
            sums = found.setdefault((node, dim), Moments(torch.zeros_like(rows[0]), torch.zeros_like(rows[0])))
            sums.sums += rows.sum(0)
            sums.squares += rows.square().sum(0)
            sums.count += len(rows)

    seen = {node: partial(add, node) for node in watched}
    observe(graph_module, own(samples), seen, batch, track, in_turn=False)
    for moments in found.values():
        moments.add_up()
    for consumer in consumers:
        if not bool(found[consumer.source, consumer.dim].squares.isfinite().all()):
            raise CalibrationError(
                "its inputs are not finite", where=consumer.name, remedy="Check the weights and the samples"
            )
    return {consumer: found[consumer.source, consumer.dim] for consumer in consumers}


def refuse_group(group: Group, name: str, what: str) -> PassError:
    """Return the error for a group that a criterion says nothing about.

    Args:
        group: the group.
        name: the pass.
        what: what the group would have to have.
    """
    return PassError(
        f"{group.name}, of the kind {group.kind!r}, has no {what}",
        where=f"pass {name}",
        remedy="Leave that kind out, or score it by another importance, such as taylor",
    )
