"""Taylor expansion of the loss: what removing a structure would cost, from gradients on a few samples.

Source: Ma, Fang, Wang, "LLM-Pruner", NeurIPS 2023, section 3.2; equation numbers below are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx
from torch.func import functional_call

from fxprune.data.calibration import Calibration, Sample, computing, next_token_loss, require_logits, spread
from fxprune.discovery.groups import Groups
from fxprune.errors import CalibrationError
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import name_of_nonfinite, require_weights, weights
from fxprune.masking.masked_run import output_tensors
from fxprune.pipeline.arguments import number, one_of, whole_number
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.rules.aliasing import written_sources
from fxprune.trace.fidelity import require_gradients

from .base import ImportancePass, axis_sums

__all__ = ["ORDERS", "TaylorImportancePass"]

ORDERS = ("vector", "first", "second", "mix")

Positions = dict[tuple[str, int], torch.Tensor]
Axes = Mapping[str, list[int]]


@dataclass(frozen=True, eq=False)
class TaylorImportancePass(ImportancePass):
    """Units are scored by how much the loss is expected to change when they go.

    With weight ``w``, its gradient ``g`` (mean over samples) and the diagonal of the Fisher matrix ``h`` (mean over
    samples of the squared per-sample gradient), a slice is worth, over its elements::

        vector    | sum w * g |                     equation 3, first term, for the slice as one vector
        first     sum | w * g |                     equation 4, for each element
        second    sum | w * h * w |
        mix       sum | w * g - 1/2 * w * h * w |   equation 5

    Gradients come one sample at a time and are turned into slice sums as they arrive. ``vector`` and ``second`` are
    linear in what arrives, so nothing is kept. ``first`` and ``mix`` take an absolute value per element and need
    sums of gradients: parameters are then taken in turns, so that the sums never exceed ``memory`` of the weights.

    Args:
        order: one of :data:`ORDERS`.
        memory: bytes for sums of gradients, as a fraction of the bytes of all weights. Less memory, more sweeps.
            ``mix`` keeps two float32 numbers for each weight, so 0.6 takes four sweeps of a float32 model.
        samples: calibration samples to take, evenly spread; None for all.
        track: shows progress, as ``track(items, what, total)``.
    """

    name: ClassVar[str] = "taylor"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Calibration, Runnable)

    order: str = "mix"
    memory: float = 0.6
    samples: int | None = None
    track: Track = field(default=no_progress, metadata={"spelled": False})

    def __post_init__(self) -> None:
        """Refuse unknown names before any work is done."""
        super().__post_init__()
        one_of("taylor order", self.order, ORDERS)
        object.__setattr__(self, "memory", number("memory", self.memory, above=0))
        if self.samples is not None:
            object.__setattr__(self, "samples", whole_number("samples", self.samples, least=1))
        check_track(self.track)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise unless there are calibration samples, real weights and the gradients of the module."""
        super().requires(graph_module)
        require_weights(graph_module, self.name)
        require_gradients(graph_module, self.name)

    def positions(self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]) -> Positions:
        """Slice scores of every wanted axis."""
        axes: dict[str, list[int]] = {}
        for name, axis in wanted:
            axes.setdefault(name, []).append(axis)
        samples = spread(facts_of(graph_module)[Calibration].samples, self.samples)
        chunks = list(self._chunks(graph_module, axes))
        found: Positions = {}
        written = written_sources(graph_module.graph)
        steps = [(chunk, sample) for chunk in chunks for sample in (*samples, None)]
        sums: _Sums | None = None
        for chunk, sample in self.track(steps, "gradients", len(steps)):
            if sums is None:
                sums = _SUMS[self.order](chunk, len(samples))
            if sample is None:
                found.update(sums.finish(dict(weights(graph_module))))
                sums = None
            else:
                _backward(graph_module, sample, sums, written)
        return found

    def _chunks(self, graph_module: fx.GraphModule, axes: Axes) -> Iterator[Axes]:
        """Parameters to take in one sweep, so that their sums fit into the memory allowed."""
        tensors = dict(weights(graph_module))
        per_element = 4 * _SUMS[self.order].tensors
        budget = self.memory * sum(t.numel() * t.element_size() for t in tensors.values())
        chunk: dict[str, list[int]] = {}
        used = 0.0
        for name in axes:
            cost = per_element * tensors[name].numel()
            if chunk and used + cost > budget:
                yield chunk
                chunk, used = {}, 0.0
            chunk[name] = axes[name]
            used += cost
        if chunk:
            yield chunk


def _backward(graph_module: fx.GraphModule, sample: Sample, sums: _Sums, written: set[str]) -> None:
    """One sample forward and back; each gradient goes to ``sums`` as it arrives and is freed.

    The graph runs on detached aliases of its parameters, so that the caller's ``.grad`` stays as it is; tied names
    share one alias, whose gradient is then that of all its uses. Weights and inputs that are ``written`` to are copies.
    """
    shared: dict[int, torch.Tensor] = {}
    aliases = {
        name: shared.setdefault(id(t), t.detach().clone() if name in written else t.detach())
        for name, t in weights(graph_module)
    }
    for name in sums.axes:
        alias = aliases[name].requires_grad_()
        alias.register_post_accumulate_grad_hook(_receiver(sums, name))
    device = next(iter(aliases.values())).device
    inputs = {
        name: _input(value, device, name in written) if isinstance(value, torch.Tensor) else value
        for name, value in sample.inputs.items()
    }
    with computing(inputs):
        outputs = output_tensors(functional_call(graph_module, aliases, kwargs=inputs))
    labels = sample.labels.to(device)
    loss = next_token_loss(require_logits(outputs, labels, TaylorImportancePass.name), labels)
    if not bool(loss.isfinite()):
        bad = name_of_nonfinite(graph_module)
        raise CalibrationError(
            f"the loss is {loss.item()}{f': {bad} has values that are not finite' if bad else ''}",
            where="calibration",
            remedy="Mend the weights, or look for samples that the model cannot take",
        )
    loss.backward()


def _input(value: torch.Tensor, device: torch.device, written: bool) -> torch.Tensor:
    """An input on the device of the graph; one that the graph writes to is a copy."""
    return value.to(device, copy=written)


def _receiver(sums: _Sums, name: str) -> Callable[[torch.Tensor], None]:
    def receive(alias: torch.Tensor) -> None:
        gradient, alias.grad = alias.grad, None
        assert gradient is not None
        sums.add(name, alias.detach().float(), gradient.float())

    return receive


@dataclass
class _Sums:
    """What is kept of the gradients of some parameters during one sweep."""

    axes: Axes
    samples: int
    tensors: ClassVar[int] = 0
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    slices: Positions = field(default_factory=dict)

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take in the gradient of one sample."""
        raise NotImplementedError

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        """The slice scores; ``values`` are the weights."""
        raise NotImplementedError

    def _add_slices(self, name: str, value: torch.Tensor) -> None:
        for axis in self.axes[name]:
            part = axis_sums(value, axis) / self.samples
            self.slices[name, axis] = self.slices[name, axis] + part if (name, axis) in self.slices else part


class _VectorSums(_Sums):
    """Signed slice sums of ``w * g``; the absolute value at the end."""

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self._add_slices(name, weight * gradient)

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        return {key: value.abs() for key, value in self.slices.items()}


class _SecondSums(_Sums):
    """Slice sums of ``w * g_s ** 2 * w``, never negative."""

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self._add_slices(name, (weight * gradient).square())

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        return dict(self.slices)


class _FirstSums(_Sums):
    """``g`` by element."""

    tensors: ClassVar[int] = 1

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self.kept[name] = self.kept[name].add_(gradient) if name in self.kept else gradient.clone()

    def finish(self, values: Mapping[str, torch.Tensor]) -> Positions:
        found: Positions = {}
        for name, axes in self.axes.items():
            saliency = self._saliency(name, values[name].detach().float())
            found.update({(name, axis): axis_sums(saliency, axis) for axis in axes})
        return found

    def _saliency(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return (weight * self.kept.pop(name).div_(self.samples)).abs_()


class _MixSums(_FirstSums):
    """``g`` and ``h`` by element."""

    tensors: ClassVar[int] = 2

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        super().add(name, weight, gradient)
        square = gradient.square()
        self.squares[name] = self.squares[name].add_(square) if name in self.squares else square

    def _saliency(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        g, h = self.kept.pop(name).div_(self.samples), self.squares.pop(name).div_(self.samples)
        return (weight * (g - h.mul_(weight).mul_(0.5))).abs_()


_SUMS: dict[str, type[_Sums]] = {
    "vector": _VectorSums,
    "first": _FirstSums,
    "second": _SecondSums,
    "mix": _MixSums,
}
