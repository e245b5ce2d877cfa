"""The loss of a sample: of its next tokens, the model's own on its labels, or a divergence from the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxprune.data.calibration import (
    Sample,
    clear_sample_errors,
    make_inputs,
    next_token_loss,
    require_logits,
    token_input,
)
from fxprune.data.samples import LABELS, read_calibration
from fxprune.errors import PassError
from fxprune.graph.compat import tree_leaves
from fxprune.graph.context import Refusal, attempt
from fxprune.graph.facts import Fact, Source, facts_of
from fxprune.graph.tensors import get_tensor, has_meta_weights, map_tensors, upstream
from fxprune.masking.masked_run import PreciseRun, output_tensors
from fxprune.offload.files import is_offloading
from fxprune.trace.capture import trace
from fxprune.trace.inputs import is_hugging_face


@dataclass(frozen=True, eq=False)
class Objective(Fact):
    """The loss of calibration samples: that of next tokens, or the model's own on labels, or a divergence.

    Args:
        next_token: whether the model predicts next tokens.
        own: the model's own loss, as :func:`own_loss` makes it; None if samples have no labels, or the loss cannot be
            read from the model.
        shift: makes what a decoder reads from labels; None if the graph reads no such input.
        named: the names that the model has for labels.
        positions: most tokens that the model takes; None if its config does not say.
    """

    open: ClassVar[bool] = True

    next_token: bool = True
    own: fx.GraphModule | None = None
    shift: Callable[[torch.Tensor], torch.Tensor] | None = None
    named: tuple[str, ...] = (LABELS,)
    positions: int | None = None


def predicts_next(graph_module: fx.GraphModule) -> bool:
    """Whether a graph predicts next tokens: its first output, at each token, does not depend on later ones.

    Outputs that have names, and none of them ``logits``, are vectors and no predictions. A graph that cannot be tried
    counts as one, and so does that of a module outside transformers, whose labels are next tokens.
    """
    source, name = facts_of(graph_module).get(Source), token_input(graph_module)
    if source is None or not is_hugging_face(source.model):
        return True
    if name is None or "logits" not in (named_outputs(graph_module) or {"logits"}):
        return False
    if is_offloading() or has_meta_weights(graph_module):
        return True
    inputs = make_inputs(graph_module, source.example_inputs, 0)
    ids = inputs[name]
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        return True

    def first_output(given: Mapping[str, Any]) -> torch.Tensor:
        return next(iter(output_tensors(PreciseRun(graph_module).run(*given.values()))), ids)

    found = attempt(reads_no_later_tokens, first_output, inputs, (name,))
    return True if isinstance(found, Refusal) else found


_ROUNDING = 1e-6
"""Some steps of float32: a smaller part of the largest output may be rounded differently."""

_LEAST_INFLUENCE = 1e-3
"""Of a token on outputs before it, relative to that on outputs after it, from which on it is no rounding either."""


@torch.no_grad()
def reads_no_later_tokens(
    run: Callable[[Mapping[str, Any]], torch.Tensor], inputs: Mapping[str, Any], names: Sequence[str]
) -> bool:
    """Whether an output at each token, ``(batch, tokens, ...)``, does not depend on later tokens.

    The last token is changed, and the first one, by which rounding is told from influence: with random weights a token
    may move the outputs of others by a ten-thousandth alone.

    Args:
        run: computes the output in float32 from inputs like these.
        names: the inputs that hold tokens ``(batch, tokens)``.
    """

    def with_other(place: int) -> torch.Tensor:
        changed = {name: inputs[name].clone() for name in names}
        for ids in changed.values():
            ids[:, place] = (ids[:, place] + 1) % (ids.max() + 1).clamp_min(2)
        return run({**inputs, **changed})

    output = run(inputs)
    if output.dim() != 3 or output.shape[:2] != inputs[names[0]].shape:
        return False
    before = (with_other(-1) - output)[:, :-1].abs().max()
    after = (with_other(0) - output)[:, 1:].abs().max()
    return not bool(before > _ROUNDING * output.abs().max() and before > _LEAST_INFLUENCE * after)


def read_heldout(data: Any, graph_module: fx.GraphModule) -> tuple[Sample, ...]:
    """Held-out samples, with labels of the form that the calibration samples have."""
    form = facts_of(graph_module).get(Objective) or Objective()
    options: dict[str, Any] = {"next_token": form.next_token, "shift": form.shift, "named": form.named}
    return read_calibration(data, graph_module, **options, most=form.positions)


def own_loss(model: nn.Module, sample: Sample) -> fx.GraphModule:
    """The loss of a model as a graph of its named outputs, its inputs and the labels of two samples or more.

    The model is traced with labels, and of its graph stays what lies between outputs, labels and loss.

    Raises:
        PassError: it has no such loss.
        TraceError: it cannot be traced with labels.
    """
    inputs = map_tensors({**sample.inputs, **(sample.own or {})}, lambda value: torch.cat([value, value]))
    traced = trace(model, inputs, check=False).graph_module
    nodes: dict[str, fx.Node] = {str(node.target): node for node in traced.graph.nodes if node.op == "placeholder"}
    fields = named_outputs(traced) or {}
    if not isinstance(fields.get("loss"), fx.Node):
        raise PassError("it gives no loss for labels", where=f"forward of {type(model).__name__}", remedy=_REMEDY)
    loss = fields["loss"]
    nodes |= {name: value for name, value in fields.items() if isinstance(value, fx.Node) and value is not loss}
    graph = fx.Graph()
    ends = {node: name for name, node in nodes.items()}
    needed = set(upstream([loss], ends))
    made = {node: graph.placeholder(name) for node, name in ends.items() if node in needed}
    for node in traced.graph.nodes:
        if node not in needed or node in made:
            continue
        is_weight = node.op == "get_attr" and isinstance(get_tensor(traced, str(node.target)), nn.Parameter)
        if is_weight and any(user.target is not getattr for user in node.users):
            what = f"its loss reads the weight {node.target} beside its outputs"
            raise PassError(what, where=f"forward of {type(model).__name__}", remedy=_REMEDY)
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[loss])
    return fx.GraphModule(traced, graph)


_REMEDY = "Leave labels out: the divergence from the dense model needs none"


def named_outputs(graph_module: fx.GraphModule) -> Mapping[str, Any] | None:
    """The nodes, or containers of nodes, that a graph returns under names; None if it returns them without."""
    returned: Any = graph_module.graph.output_node().args[0]
    fields = returned.kwargs if isinstance(returned, fx.Node) and isinstance(returned.target, type) else returned
    return fields if isinstance(fields, Mapping) else None


def gives_classes(graph_module: fx.GraphModule) -> bool:
    """Whether a graph gives scores of classes: outputs named ``logits``, of several classes, or without any names."""
    fields = named_outputs(graph_module)
    if fields is None:
        return True
    value = fields["logits"].meta["val"] if isinstance(fields.get("logits"), fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
        return False
    return bool(value.shape[_class_axis(value)] != 1)


def class_scores(output: Any) -> torch.Tensor:
    """The scores of classes in the output of a graph that gives some: ``(..., classes)``."""
    found = output["logits"] if isinstance(output, Mapping) else output_tensors(output)[0]
    return found.movedim(_class_axis(found), -1) if isinstance(output, Mapping) else found


def _class_axis(logits: torch.Tensor) -> int:
    """The axis of classes: the second of images ``(samples, classes, height, width)``, else the last."""
    return 1 if logits.dim() == 4 else -1


def sample_loss(graph_module: fx.GraphModule, output: Any, sample: Sample, number: int, name: str) -> torch.Tensor:
    """The loss of a sample, given the output of the graph for it.

    The pass ``name`` needs it; ``number`` is the seed of what is drawn for the sample.
    """
    objective = facts_of(graph_module).get(Objective) or Objective()
    if objective.own is not None and sample.own is not None:
        given = {**sample.inputs, **output, **sample.own}
        wanted = [given.get(str(node.target)) for node in objective.own.graph.nodes if node.op == "placeholder"]
        device = next(leaf.device for leaf in tree_leaves(dict(output)) if isinstance(leaf, torch.Tensor))
        with clear_sample_errors(sample.own):  # of two samples, as the graph may not accept a batch of one
            twice = map_tensors(wanted, lambda value: torch.cat([value, value]).to(device))
            loss: torch.Tensor = fx.Interpreter(objective.own).run(*twice)
        return loss
    if objective.next_token and sample.labels.numel():
        outputs = output_tensors(output)
        labels = sample.labels.to(outputs[0].device if outputs else "cpu")
        return next_token_loss(require_logits(outputs, labels, name), labels)
    return drawn_divergence(output, gives_classes(graph_module), number, name)


def drawn_divergence(output: Any, classes: bool, number: int, name: str) -> torch.Tensor:
    """A loss whose squared gradient is, on average, the curvature of the divergence of an output from itself.

    The divergence itself has no gradient where nothing is removed yet. With classes ``y`` drawn from the model's own
    distribution ``p``, the mean of the squared gradient of ``-log p(y)`` is the Fisher matrix, the curvature of the
    Kullback-Leibler divergence. For an output ``o`` that is no distribution, and ``e`` of independent normal numbers,
    that of ``sqrt(2) e'o / norm(o)`` is the curvature of the squared distance relative to ``norm(o) ** 2``.

    Source: Martens, "New Insights and Perspectives on the Natural Gradient Method" (JMLR 2020), sections 5 and 9.
    """
    draw = torch.Generator().manual_seed(number)
    outputs = output_tensors(output)
    if not outputs:
        raise PassError("the model gives no float tensor", where=f"pass {name}", remedy="Choose l1, l2 or random")
    if classes and (scores := class_scores(output)).dim() > 1:
        logarithms = scores.flatten(0, -2).float().log_softmax(-1)
        drawn = torch.multinomial(logarithms.detach().exp().cpu(), 1, generator=draw).to(scores.device)
        return -logarithms.gather(-1, drawn).mean()
    every = torch.cat([value.float().flatten() for value in outputs])
    noise = torch.randn(len(every), generator=draw).to(every.device)
    size = every.detach().norm().clamp_min(torch.finfo(torch.float32).tiny)
    loss: torch.Tensor = math.sqrt(2) * (noise @ every) / size
    return loss
