"""Logits of the dense model, and the divergence of a masked one from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.autograd.function import once_differentiable

from fxprune.data.calibration import IGNORED, Sample, batch_indices, batched, next_token_loss
from fxprune.errors import PassError
from fxprune.graph.tensors import returned_nodes, weight_bytes
from fxprune.masking.masked_run import MaskedRun, UntouchedRun, output_tensors
from fxprune.masking.objective import class_scores, gives_classes
from fxprune.masking.parts import Part, PartRuns, output_numel, parts_by_weights, run_in_parts
from fxprune.offload.files import is_offloading
from fxprune.offload.prefetch import autocast, compute_device, current_prefetcher, gathers_weights, use_bf16
from fxprune.offload.ranks import batch_for_all, deal, gathered, shard_indices
from fxprune.removal.removal import Removal
from fxprune.rules.registry import written_sources

_LARGEST_LOGITS = 0.05
"""Logits of a batch beside the bytes of weights in files: three copies of them are as much as a part of the model."""

_KEPT, _BATCH = 64, 4
"""Classes at each position, and samples that run at once, of the divergence of a masked graph."""

_LEAST = 1e-7
"""Floor of a probability: a step of float32 at 1, below which a sum of probabilities is not resolved."""


_BLOCK = 64
"""Classes of which the largest is found first, in :func:`largest`."""


def largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest values along the last axis, in falling order, and their indices.

    They lie in the blocks with the ``count`` largest maxima. Of 262,144 values this takes a third of the time of
    `torch.topk` on a CPU, which sorts pairs of each value and its index.
    """
    whole = values.shape[-1] // _BLOCK
    if count >= whole:
        found = values.topk(count, dim=-1)
        return found.values, found.indices
    blocks = values[..., : whole * _BLOCK].unflatten(-1, (whole, _BLOCK))
    chosen = blocks.amax(-1).topk(count, dim=-1, sorted=False).indices
    numbers = torch.arange(values.shape[-1], device=values.device)
    inside = (chosen.unsqueeze(-1) * _BLOCK + numbers[:_BLOCK]).flatten(-2)
    rest = numbers[whole * _BLOCK :].expand(*inside.shape[:-1], -1)
    places = torch.cat((inside, rest), dim=-1)
    found = values.gather(-1, places).topk(count, dim=-1)
    return found.values, places.gather(-1, found.indices)


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """Top-k log-probabilities of the dense model for a sample.

    Args:
        classes: the likeliest classes at each position, ``(positions, kept)``.
        likelihoods: their log-probabilities, and in the last column that of all other classes together,
            ``(positions, kept + 1)``, in half precision. Of a model that gives no classes: its outputs,
            ``(1, numbers)``.
    """

    sample: Sample
    classes: torch.Tensor
    likelihoods: torch.Tensor

    @classmethod
    def of(cls, sample: Sample, logarithms: torch.Tensor, kept: int) -> TeacherLogits:
        """The ``kept`` likeliest classes of log-probabilities ``(positions, classes)``."""
        likely, classes = largest(logarithms, min(kept, logarithms.shape[-1]))
        others = (1 - likely.exp().sum(-1, keepdim=True)).clamp_min(_LEAST).log()
        return cls(sample, classes.int().cpu(), torch.cat((likely, others), dim=-1).half().cpu())


@dataclass(frozen=True)
class TeacherBatch:
    """Teacher logits of samples of the same shape, stacked.

    Args:
        inputs: keyword inputs of the graph: tensors, and the other values it was traced with.
        classes: ``(batch, positions, kept)``.
        likelihoods: ``(batch, positions, kept + 1)``.
        labels: label of each position of the input, as in the samples: ``(batch, tokens)``.
        share: the fraction of the samples of the whole batch that it holds.
        counted: its fraction of the labels of the whole batch that count in a loss; 0 if there are none.
    """

    inputs: Mapping[str, Any]
    classes: torch.Tensor
    likelihoods: torch.Tensor
    labels: torch.Tensor
    share: float = 1.0
    counted: float = 1.0

    @property
    def positions(self) -> int:
        return self.classes.shape[:2].numel()


def logits_use_bf16(precision: str, graph_module: fx.GraphModule, sample: Sample, where: str) -> bool:
    """Whether to run a graph in bfloat16: :func:`fxprune.offload.prefetch.use_bf16` with a trial on a sample."""

    def trial() -> torch.Tensor:
        return run_logits(UntouchedRun(graph_module).in_step(), batched([sample], graph_module))

    return use_bf16(precision, graph_module, trial, where)


def record_teacher_logits(
    graph_module: fx.GraphModule,
    samples: Sequence[Sample],
    kept: int,
    batch: int,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
) -> tuple[TeacherLogits, ...]:
    """Run the dense graph over ``samples`` and return their teacher logits: ``kept`` classes at each position.

    Processes share the batches, and each gets the logits of all.
    """
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    classes_given = gives_classes(graph_module)
    size = batch_size(graph_module, samples, batch) if classes_given else 1
    batches = list(batch_indices(samples, graph_module, size))
    mine = deal(batches)
    with torch.no_grad():
        for numbers, logits in _each_logits(graph_module, samples, mine, track):
            if not classes_given:
                for row, i in enumerate(numbers):
                    found[i] = torch.empty(1, 0, dtype=torch.int), logits[row].cpu().clone()
                continue
            logarithms = logits.log_softmax(-1)
            for row, i in enumerate(numbers):
                one = TeacherLogits.of(samples[i], logarithms[row], kept)
                found[i] = one.classes, one.likelihoods
            del logits, logarithms  # before those of the next batch are made
    every = gathered([[found[i] for i in numbers] for numbers in mine])
    whole = {i: one for numbers, row in zip(batches, every, strict=True) for i, one in zip(numbers, row, strict=True)}
    return tuple(TeacherLogits(sample, *whole[i]) for i, sample in enumerate(samples))


def _each_logits(
    graph_module: fx.GraphModule,
    samples: Sequence[Sample],
    batches: Sequence[Sequence[int]],
    track: Callable[[Iterable[Any], int], Iterable[Any]],
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """Yield the numbers of the samples of each batch, and its logits in float32.

    Where weights are fetched, or read from files, those of a part are so once for all batches.
    """
    inputs = (batched([samples[i] for i in numbers], graph_module) for numbers in batches)
    whole = current_prefetcher() is None and not is_offloading()
    if whole or written_sources(graph_module.graph):
        for numbers, given in track(zip(batches, inputs, strict=True), len(batches)):
            yield numbers, run_logits(UntouchedRun(graph_module), given).float()
        return
    parts, found = parts_by_weights(graph_module), list[Any]()
    runs = PartRuns(graph_module, parts, list(inputs), (), forward_only=True)
    watch = {graph_module.graph.output_node(): found.append}
    steps = ((part, number) for part in parts for number in runs.forward(part, watch))
    for part, number in track(steps, len(parts) * len(batches)):
        if part is parts[-1]:
            yield batches[number], scores_of(graph_module, found.pop()).float()


def batch_size(graph_module: fx.GraphModule, samples: Sequence[Sample], batch: int) -> int:
    """Samples that run at once: fewer than ``batch`` if their logits are large beside weights that are in files."""
    size = batch_for_all(batch, len(samples))
    if not is_offloading():
        return size
    nodes = graph_module.graph.nodes
    traced = max(output_numel(node) for node in nodes if node.op == "placeholder")
    outputs = max(map(output_numel, returned_nodes(graph_module.graph)), default=1)
    given = max(value.numel() for value in samples[0].inputs.values() if isinstance(value, torch.Tensor))
    most = _LARGEST_LOGITS * weight_bytes(graph_module)
    return max(1, min(size, int(most * traced / max(1, 4 * outputs * given))))


class TeacherBatches:
    """Teacher logits in batches of up to ``size`` samples of the same shape; each is stacked when it is asked for.

    With ``in_shards``, each process gets its samples of each batch; or, if there are fewer than processes, the first
    sample with a share of 0.
    """

    def __init__(
        self, teacher: Sequence[TeacherLogits], graph_module: fx.GraphModule, size: int, *, in_shards: bool = False
    ) -> None:
        self.teacher, self.graph_module = teacher, graph_module
        size = size if gives_classes(graph_module) else 1  # other outputs may compare the samples of a batch
        self.numbers = list(batch_indices([one.sample for one in teacher], graph_module, size))
        self.mine = [deal(numbers) for numbers in self.numbers] if in_shards else self.numbers

    @property
    def positions(self) -> int:
        return sum(len(one.classes) for one in self.teacher)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[TeacherBatch]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> TeacherBatch:
        numbers, mine, device = self.numbers[index], self.mine[index], compute_device(self.graph_module)
        part = [self.teacher[i] for i in mine or numbers[:1]]
        counts = {i: int((self.teacher[i].sample.labels[..., 1:] != IGNORED).sum()) for i in numbers}
        return TeacherBatch(
            inputs=batched([one.sample for one in part], self.graph_module),
            classes=torch.stack([one.classes for one in part]).long().to(device),
            likelihoods=torch.stack([one.likelihoods.float() for one in part]).to(device),
            labels=torch.cat([one.sample.labels for one in part]).to(device),
            share=len(mine) / len(numbers),
            counted=sum(counts[i] for i in mine) / max(1, sum(counts.values())),
        )


def mean_error(
    error: Callable[[torch.Tensor, TeacherBatch], torch.Tensor],
    logits: Callable[[TeacherBatch], torch.Tensor],
    dealt: Iterable[tuple[TeacherBatch, bool]],
    positions: int,
) -> float:
    """The mean over positions of an error of logits, over the batches of all processes: see :func:`deal_in_step`."""
    with torch.no_grad():
        found = [(float(error(logits(batch), batch)) * batch.positions, counts) for batch, counts in dealt]
    return sum(gathered([value for value, counts in found if counts])) / positions


def divergence_by_removal(graph_module: fx.GraphModule, samples: Sequence[Sample], where: str) -> Callable[..., float]:
    """A function that gives the divergence of the masked graph from the dense one, in nats per position.

    It takes the removal, and optionally a fork of the graph whose other weights are masked in place of its own.

    Both run in bfloat16 if the device supports it natively and no op of the graph refuses it.

    Args:
        where: the name of the pass, for messages.
    """
    bf16, device = logits_use_bf16("auto", graph_module, samples[0], where), compute_device(graph_module)
    with autocast(device, bf16):
        recorded = record_teacher_logits(graph_module, samples, _KEPT, _BATCH, lambda batches, _: batches)
    batches = TeacherBatches(recorded, graph_module, batch_size(graph_module, samples, _BATCH))
    dealt = deal_in_step(batches)

    def of(removal: Removal, fitted: fx.GraphModule = graph_module) -> float:
        def logits(batch: TeacherBatch) -> torch.Tensor:
            return run_logits(MaskedRun(fitted, removal).in_step(), batch.inputs)

        with autocast(device, bf16):
            return mean_error(divergence, logits, dealt, batches.positions)

    return of


def deal_in_step(batches: TeacherBatches) -> list[tuple[TeacherBatch, bool]]:
    """This process's share of some batches, and whether the results count.

    Where processes read weights together, all get the same number, and results that another one has do not count.
    """
    count = len(batches)
    numbers = shard_indices(count) if gathers_weights() else deal(range(count))
    return [(batches[i % count], i < count) for i in numbers]


def divergence(logits: torch.Tensor, batch: TeacherBatch, truth: float = 0.0) -> torch.Tensor:
    """Kullback-Leibler divergence of logits ``(batch, positions, classes)`` from the dense model, in nats per position.

    It is taken over the dense model's likeliest classes and one more for all others together, and never exceeds the
    divergence over all classes. For outputs that are no scores of classes, it is the squared distance from those of the
    dense model relative to their square.

    With ``truth``, plus that many times the mean cross-entropy of the samples' own next tokens; there must be some.
    """
    if not batch.classes.shape[-1]:
        distance = (logits.float() - batch.likelihoods).square().sum(-1)
        return (distance / batch.likelihoods.square().sum(-1).clamp_min(_LEAST)).mean()
    following = batch.labels[:, 1:] if truth else batch.classes[:, :0, 0]
    arguments = (batch.classes, batch.likelihoods, following, truth)
    found: torch.Tensor = _Divergence.apply(logits, *arguments)  # type: ignore[no-untyped-call]
    return found


def rejection(logits: torch.Tensor, batch: TeacherBatch, truth: float = 0.0) -> torch.Tensor:
    """Mean probability that speculative decoding rejects a token drafted by logits ``(batch, positions, classes)``.

    It is ``1 - sum min(p, q)`` of the probabilities of both models, over the classes that :func:`divergence` is taken
    over, and never exceeds that over all classes. Outputs that are no scores of classes are refused. ``truth`` counts
    as in :func:`divergence`.

    Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192),
    theorem 3.5.
    """
    if not batch.classes.shape[-1]:
        remedy = "Tune by the divergence: objective=divergence"
        raise PassError("the model gives no scores of classes, and drafts no tokens", where="model", remedy=remedy)
    likely = logits.float().softmax(-1).gather(-1, batch.classes)
    drafted = torch.cat((likely, (1 - likely.sum(-1, keepdim=True)).clamp_min(0)), dim=-1)
    rejected = 1 - torch.minimum(drafted, batch.likelihoods.exp()).sum(-1).mean()
    return rejected + truth * next_token_loss(logits, batch.labels) if truth else rejected


_CHUNK = 1 << 20
"""Numbers of logits that are converted to log-probabilities at once: those of a step would be the largest in memory."""


class _Divergence(torch.autograd.Function):
    """The divergence, and the cross-entropy of next tokens, with their gradient in closed form, some rows at a time.

    Autograd would read and write the logits several times as often, and keep their logarithms.

    With probabilities ``p`` and ``q`` of the model and the dense one, ``S`` and ``Q`` their sums over the kept classes,
    and ``c = (1 - Q) / (1 - S)`` for the others as one class, the gradient of the divergence by logit ``j`` is
    ``p_j (Q - c S)``, and ``p_j c - q_j`` more for a kept class; that of the cross-entropy is ``p_j``, less 1 for the
    next token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        classes: torch.Tensor,
        likelihoods: torch.Tensor,
        following: torch.Tensor,
        truth: float,
    ) -> torch.Tensor:
        rest = logits.shape[1] - following.shape[1]
        tokens = torch.nn.functional.pad(following, (0, rest), value=IGNORED).flatten()[:, None]
        counted = tokens != IGNORED
        weight = counted * (truth / counted.sum().clamp_min(1))
        rows, gradient = logits.flatten(0, 1), torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        size, count = max(1, _CHUNK // logits.shape[-1]), len(rows)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for begin in range(0, count, size):
            chunk = slice(begin, begin + size)
            there, given = classes.flatten(0, 1)[chunk], likelihoods.flatten(0, 1)[chunk]
            token, factor = tokens[chunk].clamp_min(0), weight[chunk]
            logarithms = rows[chunk].float().log_softmax(-1)
            likely = logarithms.gather(-1, there)
            left = 1 - likely.exp().sum(-1, keepdim=True)
            missed = given - torch.cat((likely, left.clamp_min(_LEAST).log()), dim=-1)
            total += (given.exp() * missed).sum() / count - (factor * logarithms.gather(-1, token)).sum()
            if gradient is not None:
                wanted = given.exp() / count
                kept, others = wanted[..., :-1], wanted[..., -1:]
                c = torch.where(left > _LEAST, others / left, 0)
                every = kept.sum(-1, keepdim=True) - c * (1 - left) + factor
                found = logarithms.exp_().mul_(every).scatter_add_(-1, there, likely.exp() * c - kept)
                gradient.flatten(0, 1)[chunk] = found.scatter_add_(-1, token, -factor)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (found,) = ctx.saved_tensors
        return found.mul_(gradient), None, None, None, None


def run_logits(run: UntouchedRun, inputs: Mapping[str, Any], parts: Sequence[Part] = ()) -> torch.Tensor:
    """Run a graph and return its scores of classes as ``(batch, positions, classes)``; else all its outputs.

    With ``parts``, a backward run computes each of them again.
    """
    output = run_in_parts(run, parts, inputs.values()) if parts else run.run(*inputs.values())
    return scores_of(run.module, output)  # type: ignore[arg-type]


def scores_of(graph_module: fx.GraphModule, output: Any) -> torch.Tensor:
    """Scores of classes ``(batch, positions, classes)`` in the output of a graph; else all its outputs."""
    outputs = output_tensors(output)
    if outputs and not gives_classes(graph_module):
        return torch.cat([value.flatten(1) for value in outputs], dim=-1)[:, None]
    if not outputs or outputs[0].dim() < 2:
        raise PassError(
            "the model gives no logits to learn from", where="model", remedy="Leave tuning out of the pipeline"
        )
    scores = class_scores(output)
    return scores.flatten(1, -2) if scores.dim() > 2 else scores[:, None]
