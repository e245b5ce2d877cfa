"""What is kept of gradients of one sample after another, and the scores of slices that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fxprune.data.ranks import add_up

from .base import axis_sums

__all__ = ["SUMS", "Axes", "ElementSums", "Positions", "Sums"]

Positions = dict[tuple[str, int], torch.Tensor]
"""By parameter and axis: a score for each position along it."""

_BLOCK = 2**20
"""Elements of a weight that are looked at together, where sums are not kept of all of them."""

Axes = Mapping[str, list[int]]
"""The axes of parameters that are wanted."""


@dataclass
class Sums:
    """What is kept of the gradients of some parameters during one sweep."""

    axes: Axes
    samples: int
    tensors: ClassVar[int] = 0
    slices: Positions = field(default_factory=dict)

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take in the gradient of one sample."""
        raise NotImplementedError

    def add_up(self) -> None:
        """Make them the sums of all processes, where several share the samples."""
        add_up(self.slices[place] for place in sorted(self.slices))

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        """The slice scores; ``values`` are the weights."""
        raise NotImplementedError

    def _add_slices(self, name: str, value: torch.Tensor) -> None:
        for axis in self.axes[name]:
            part = axis_sums(value, axis) / self.samples
            self.slices[name, axis] = self.slices[name, axis] + part if (name, axis) in self.slices else part


class _VectorSums(Sums):
    """Signed slice sums of ``w * g``; the absolute value at the end."""

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self._add_slices(name, weight * gradient)

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        return {key: value.abs() for key, value in self.slices.items()}


class _SecondSums(Sums):
    """Slice sums of ``w * g_s ** 2 * w``, never negative."""

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self._add_slices(name, (weight * gradient).square())

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        return dict(self.slices)


@dataclass
class ElementSums(Sums):
    """Sums for each element, which become slice sums when all samples are in them."""

    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self.kept[name] = self.kept[name].add_(gradient) if name in self.kept else gradient.clone()

    def by_rows(
        self, name: str, weight: torch.Tensor, gradients: Callable[[slice], Iterable[torch.Tensor]]
    ) -> Positions:
        """The slice scores of one weight, some rows of it at a time: sums are there for these alone.

        Args:
            name: of the weight.
            weight: itself.
            gradients: given rows, these rows of the gradient of each sample.
        """
        found: Positions = {}
        step = max(1, _BLOCK // max(1, weight[:1].numel()))
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            values = weight[rows].detach().float()
            self.start(name, values)
            for gradient in gradients(rows):
                self.add(name, values, gradient)
            self.add_up()
            saliency = self._saliency(name, values)
            for axis in self.axes[name]:
                part, before = axis_sums(saliency, axis), found.get((name, axis))
                joined = part if before is None else torch.cat((before, part)) if axis == 0 else before + part
                found[name, axis] = joined
        return found

    def start(self, name: str, weight: torch.Tensor) -> None:
        """Begin with sums of no sample, which are there then whether a gradient arrives or not."""
        self.kept[name] = torch.zeros_like(weight)

    def add_up(self) -> None:
        """Make them the sums of all processes, where several share the samples."""
        add_up(self.kept[name] for name in sorted(self.kept))

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        found: Positions = {}
        for name, axes in self.axes.items():
            saliency = self._saliency(name, values[name].detach().float())
            found.update({(name, axis): axis_sums(saliency, axis) for axis in axes})
        return found

    def _saliency(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What each element of a weight, or of rows of it, counts; its sums are taken away."""
        raise NotImplementedError


class _FirstSums(ElementSums):
    """``g`` by element."""

    tensors: ClassVar[int] = 1

    def _saliency(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return (weight * self.kept.pop(name).div_(self.samples)).abs_()


@dataclass
class _MixSums(ElementSums):
    """``g`` and ``h`` by element."""

    tensors: ClassVar[int] = 2
    squares: dict[str, torch.Tensor] = field(default_factory=dict)

    def start(self, name: str, weight: torch.Tensor) -> None:
        super().start(name, weight)
        self.squares[name] = torch.zeros_like(weight)

    def add_up(self) -> None:
        super().add_up()
        add_up(self.squares[name] for name in sorted(self.squares))

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        super().add(name, weight, gradient)
        if name in self.squares:
            self.squares[name].addcmul_(gradient, gradient)  # no square in memory beside the sum
        else:
            self.squares[name] = gradient.square()

    def _saliency(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        g, h = self.kept.pop(name).div_(self.samples), self.squares.pop(name).div_(self.samples)
        return (weight * (g - h.mul_(weight).mul_(0.5))).abs_()


SUMS: dict[str, type[Sums]] = {
    "vector": _VectorSums,
    "first": _FirstSums,
    "second": _SecondSums,
    "mix": _MixSums,
}
"""By order of the expansion."""
